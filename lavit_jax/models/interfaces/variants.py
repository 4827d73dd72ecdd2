"""The interfaces by name: their sizes are data, as those of all modules (models/variants.py).

`published` has the sizes of the released models, for all variants without sizes of their own.
`tiny` is a choice, for the tiny variant: all interfaces get the same width and depth of their own,
and a fourth of its 64 patches.

Sources: OpenFlamingo's, LAVIS's and Emu's configs; the heads of `qformer` are BERT-base's.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from lavit_jax.errors import UserError
from lavit_jax.models.interfaces.base import VisualInterface
from lavit_jax.models.interfaces.emu import EmuInterface
from lavit_jax.models.interfaces.flamingo import FlamingoInterface
from lavit_jax.models.interfaces.lavit import LavitInterface
from lavit_jax.models.interfaces.projections import LinearProjection, MlpProjection
from lavit_jax.models.interfaces.qformer import QFormerInterface
from lavit_jax.models.interfaces.resampler import ResamplerInterface
from lavit_jax.models.interfaces.towers import Tower

BERT_VOCABULARY = 30523  # with the decode token, which LAVIS appends
LAVIT = 'lavit'
# Those that a whole model may have in place of LaVIT's (models/lavit.py).
OTHERS = ('linear', 'mlp', 'resampler', 'flamingo', 'qformer', 'emu')
DRAWING = (LAVIT, 'emu')  # those with which the language model draws: codes, or vectors

_RESAMPLER = dict(num_latents=64, num_layers=6, num_heads=8, head_dim=64, mlp_dim=4096)
_QFORMER = dict(num_queries=32, hidden_size=768, num_layers=12, num_heads=12, mlp_dim=3072)
_TINY_RESAMPLER = dict(num_latents=16, num_layers=2, num_heads=4, head_dim=32, mlp_dim=384)
_TINY_QFORMER = dict(num_queries=16, hidden_size=128, num_layers=2, num_heads=4, mlp_dim=384)

# name -> module, and how its tower is cut (towers.py).
INTERFACES: dict[str, tuple[Any, dict[str, Any]]] = {
  'lavit': (LavitInterface, {}),
  'linear': (LinearProjection, dict(cut=1)),
  'mlp': (MlpProjection, dict(cut=1)),
  'resampler': (ResamplerInterface, {}),
  'flamingo': (FlamingoInterface, {}),
  'qformer': (QFormerInterface, dict(cut=1, keep_cls=True)),
  'instructed_qformer': (QFormerInterface, dict(cut=1, keep_cls=True)),
  'emu': (EmuInterface, dict(keep_cls=True)),
}
SIZES: dict[str, dict[str, dict[str, Any]]] = {
  'published': {
    'lavit': dict(hidden_size=1408, num_layers=12, num_heads=16, mlp_dim=6144),
    'linear': {},
    'mlp': {},
    'resampler': _RESAMPLER,
    'flamingo': dict(_RESAMPLER, every=4),
    'qformer': _QFORMER,
    'instructed_qformer': dict(_QFORMER, vocab_size=BERT_VOCABULARY),
    'emu': dict(
      num_tokens=32, hidden_size=768, num_layers=12, num_heads=12, head_dim=64, mlp_dim=3072
    ),
  },
  'tiny': {
    'lavit': dict(hidden_size=128, num_layers=2, num_heads=4, mlp_dim=384),
    'linear': {},
    'mlp': {},
    'resampler': _TINY_RESAMPLER,
    'flamingo': dict(_TINY_RESAMPLER, every=2),
    'qformer': _TINY_QFORMER,
    'instructed_qformer': dict(_TINY_QFORMER, vocab_size=2048, max_positions=64),
    'emu': dict(
      num_tokens=16, hidden_size=128, num_layers=2, num_heads=4, head_dim=32, mlp_dim=384
    ),
  },
}


def build_interface(
  name: str,
  sizes: str,
  llm_dim: int,
  llm_layers: int,
  dtype: str = 'float32',
  remat: str = 'none',
) -> VisualInterface:
  """The interface of a name.

  Args:
    name: a key of `INTERFACES`.
    sizes: a key of `SIZES`.
    llm_dim: H of the language model.
    llm_layers: its layers.
    dtype: the compute dtype.
    remat: policy of the scanned stacks.

  Raises:
    UserError: an unknown name, or unknown sizes.
  """
  module, _ = _find_interface(name)
  if sizes not in SIZES:
    raise UserError(f'unknown sizes {sizes!r}: choose one of {", ".join(SIZES)}')
  options: dict[str, Any] = dict(SIZES[sizes][name], llm_dim=llm_dim, dtype=jnp.dtype(dtype))
  if name == 'flamingo':  # it has layers between those of the language model
    options['llm_layers'] = llm_layers
  if name not in ('linear', 'mlp'):  # they have no stack
    options['remat'] = remat
  return module(**options)


def sizes_of(variant: str) -> str:
  """The key of `SIZES` for a variant (models/variants.py)."""
  return variant if variant in SIZES else 'published'


def build_tower(name: str, encoder: Any) -> Tower:
  """The tower of an interface, with an encoder (`ViT` or `ClipViT`).

  Raises:
    UserError: an unknown name.
  """
  _, cut = _find_interface(name)
  return Tower(encoder, **cut)


def _find_interface(name: str) -> tuple[Any, dict[str, Any]]:
  if name not in INTERFACES:
    raise UserError(f'unknown interface {name!r}: choose one of {", ".join(INTERFACES)}')
  return INTERFACES[name]
