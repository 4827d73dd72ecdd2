"""Fixtures of all tests.

The golden case of the visual modules (specification, Golden case) has small random weights and the
outputs of an independent forward pass.
"""

import functools
import json
import os
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lavit_jax.models import lavit
from lavit_jax.models.decoder import FeatureDecoder
from lavit_jax.models.initialization import init_params
from lavit_jax.models.tokenizer import DynamicTokenizer, Understanding
from lavit_jax.models.vit import ViT
from lavit_jax.weights.store.folder import save_params
from lavit_jax.weights.torch import names_visual as tables
from lavit_jax.weights.torch.mapping import from_state_dict

# Commands that tests run leave nothing in the caches of whoever runs the tests.
os.environ['LAVIT_COMPILATION_CACHE'] = 'off'

FOLDER = pathlib.Path(__file__).parent / 'data' / 'golden'
LONG_FILES = (  # each takes over a minute
  'test_pipeline.py',
  'test_image_generation.py',
  'test_distributed.py',
  'test_loop.py',
  'test_loop_sources.py',
  'test_convert.py',
)


def pytest_collection_modifyitems(items):
  """Long files go first: whoever began one last would keep the other processes waiting."""
  items.sort(key=lambda item: item.path.name not in LONG_FILES)


@pytest.fixture(scope='session')
def golden():
  """By module name: `modules`, `params`; `size` the config, `io` inputs and outputs.

  `features` are those of the ViT without CLS.
  """
  size = json.loads((FOLDER / 'config.json').read_text())
  io = dict(np.load(FOLDER / 'io.npz'))
  width = size['width']
  heads = size['heads']
  patches = (size['image_size'] // size['patch_size']) ** 2
  mlp_dim = int(width * 4.3637)
  merger = (width, size['merger_depth'], heads, mlp_dim)
  decoder = (width, size['decoder_depth'], heads, mlp_dim, patches, size['code_dim'])
  modules = dict(
    vit=ViT(
      size['image_size'],
      size['patch_size'],
      width,
      size['vit_depth'],
      size['vit_heads'],
      width // size['vit_heads'],
      mlp_dim,
      size['vit_head_dim'],
    ),
    tokenizer=DynamicTokenizer(*merger, size['codebook_size'], size['code_dim']),
    understanding=Understanding(*merger, size['llm_dim']),
    decoder=FeatureDecoder(*decoder, (size['cross_attention_dim'],)),
    highres_decoder=FeatureDecoder(
      *decoder, (size['cross_attention_dim_1'], size['cross_attention_dim_2']), size['pooled_dim']
    ),
  )
  side = size['image_size']
  x = jnp.zeros((1, patches, width))
  inputs = dict(
    vit=(jnp.zeros((1, side, side, 3)),),
    tokenizer=(x,),
    understanding=(x, x[..., 0]),
    decoder=(x[..., : size['code_dim']], x[..., 0] == 0),
  )
  inputs['highres_decoder'] = inputs['decoder']
  files = dict(
    vit=('eva_vit', tables.vit_rules()),
    tokenizer=('tokenizer_encoder', tables.tokenizer_rules()),
    understanding=('tokenizer_encoder', tables.understanding_rules()),
    decoder=('tokenizer_decoder', tables.decoder_rules(1)),
    highres_decoder=('highres_tokenizer_decoder', tables.decoder_rules(2)),
  )
  params = {}
  for part, (file, rows) in files.items():
    like = jax.eval_shape(modules[part].init, jax.random.key(0), *inputs[part])['params']
    params[part] = jax.tree.map(
      jnp.asarray, from_state_dict(rows, load_file(FOLDER / f'{file}.safetensors'), like)
    )
  return types.SimpleNamespace(
    modules=modules, params=params, io=io, features=io['vit_features'][:, 1:], size=size
  )


@pytest.fixture(scope='session')
def run(golden):
  """Calls `run(module, *inputs, method=None, dtype=float32)` on a module of the golden model.

  Each combination of module, method and dtype is compiled once.
  """

  @functools.cache
  def compiled(module, method, dtype):
    return jax.jit(
      functools.partial(golden.modules[module].clone(dtype=dtype).apply, method=method)
    )

  def call(module, *args, method=None, dtype=jnp.float32):
    return compiled(module, method, dtype)({'params': golden.params[module]}, *args)

  return call


@pytest.fixture(scope='session')
def tiny_parts():
  """All modules of the tiny variant with random weights, which numpy draws: nothing compiles."""
  rng = np.random.default_rng(0)

  def draw(leaf):
    fan_in = np.prod(leaf.shape[-2:-1] if leaf.ndim < 4 else leaf.shape[:3])
    return jnp.asarray(rng.normal(0, fan_in**-0.5, leaf.shape), jnp.float32)

  return jax.tree.map(
    draw, jax.eval_shape(functools.partial(init_params, lavit.build('tiny')), jax.random.key(0))
  )


@pytest.fixture(scope='session')
def tiny_folder(tiny_parts, tmp_path_factory):
  """The parameters of `tiny_parts` as a checkpoint folder with its tokenizer."""
  folder = tmp_path_factory.mktemp('checkpoint') / 'tiny'
  save_params(
    folder,
    'tiny',
    tiny_parts,
    tokenizer=pathlib.Path(lavit.__file__).parents[1] / 'assets' / 'tiny' / 'language_model',
  )
  return folder
