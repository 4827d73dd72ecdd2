"""Variants and helpers for tests that convert whole folders."""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from nano import NANO

from lavit_jax.models import lavit
from lavit_jax.weights.torch import convert
from lavit_jax.weights.torch.safetensors_files import SafetensorsWriter

TOKENIZER = pathlib.Path(lavit.__file__).parents[1] / 'assets' / 'tiny' / 'language_model'
WHOLE = {  # every module that a published folder may have
  **NANO,
  'highres_decoder': dict(num_layers=1, context_dims=(16, 24), pooled_dim=20),
  'highres_unet': dict(
    block_out_channels=(8, 16),
    layers_per_block=1,
    down_block_attention=(False, True),
    transformer_layers=(1, 2),
    num_heads=(2, 2),
    cross_attention_dim=40,
    norm_num_groups=4,
    use_linear_projection=True,
    addition_time_embed_dim=8,
    pooled_dim=20,
  ),
  'highres_vae': dict(
    block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, scaling_factor=0.5
  ),
  'safety_checker': dict(
    image_size=16,
    patch_size=8,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    mlp_dim=24,
    output_dim=12,
  ),
  'uncond_rows': 3,
}
DTYPES = {'vit': np.float16, 'llama': ml_dtypes.bfloat16, 'unet': np.float16}


@contextlib.contextmanager
def whole_variant() -> Iterator[None]:
  """Adds the variant 'whole' to the table for a while: no other test should match its shapes."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(lavit.VARIANTS, 'whole', WHOLE)
    yield


def write(where, stem, state, shard_bytes=10**9):
  with SafetensorsWriter(where, stem, state, shard_bytes) as writer:
    for name, array in state.items():
      writer.write(name, array)


def run(src, dst, variant='whole', **options):
  conversion = convert.plan_conversion(src, dst, variant=variant, **options)
  sizes = []
  conversion.run(sizes.append)
  assert sum(sizes) > 0
  return conversion


def contents(where):
  """By relative path: the state dicts of all weights below a folder, and the other files."""
  weights = {}
  others = {}
  for file in sorted(pathlib.Path(where).rglob('*')):
    if file.suffix == '.safetensors':
      stem = file.name.split('-0')[0].removesuffix('.safetensors')
      weights.setdefault(str(file.parent.relative_to(where) / stem), {}).update(
        safetensors.numpy.load_file(file)
      )
    elif file.is_file() and not file.name.endswith('.index.json'):
      others[str(file.relative_to(where))] = (
        json.loads(file.read_text()) if file.suffix == '.json' else file.read_bytes()
      )
  return weights, others


def assert_same(state, expected):
  assert state.keys() == expected.keys()
  for name, x in expected.items():
    assert state[name].dtype == x.dtype and np.array_equal(state[name], x), name
