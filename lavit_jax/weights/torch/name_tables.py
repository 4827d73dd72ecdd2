"""The name tables of every module, and the shapes of the parameters that they name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

import jax

from lavit_jax.models import lavit
from lavit_jax.models.initialization import init_params
from lavit_jax.models.unet import UNet
from lavit_jax.models.vae import AutoencoderKL
from lavit_jax.weights.torch.name_rules import NameRule
from lavit_jax.weights.torch.names_diffusion import unet_rules, unet_shapes, vae_rules, vae_shapes
from lavit_jax.weights.torch.names_llama import llama_rules
from lavit_jax.weights.torch.names_visual import (
  decoder_rules,
  safety_rules,
  tokenizer_rules,
  understanding_rules,
  vit_rules,
)

T = TypeVar('T')
VERSION = 1  # counts the changes of the tables; recorded in the metadata of checkpoints

# By module: the tables of names that its files may use, the usual one first.
TABLES: dict[str, Callable[[lavit.LavitModules], list[list[NameRule]]]] = {
  'vit': lambda model: [vit_rules()],
  'tokenizer': lambda model: [tokenizer_rules()],
  'understanding': lambda model: [understanding_rules()],
  'decoder': lambda model: [decoder_rules(1)],
  'highres_decoder': lambda model: [decoder_rules(2)],
  'llama': lambda model: [llama_rules()],
  'unet': lambda model: [unet_rules(_present(model.unet))],
  'highres_unet': lambda model: [unet_rules(_present(model.highres_unet))],
  'vae': lambda model: _vae_tables(_present(model.vae)),
  'highres_vae': lambda model: _vae_tables(_present(model.highres_vae)),
  'safety_checker': lambda model: [safety_rules(), safety_rules(nested=False)],
  'uncond_embeddings': lambda model: [
    [NameRule('uncond_embeddings', 'value', 'unbatch')],
    [NameRule('uncond_embeddings', 'value')],
  ],
}


def _present(module: T | None) -> T:
  """A module that the variant has."""
  assert module is not None
  return module


def _vae_tables(vae: AutoencoderKL) -> list[list[NameRule]]:
  return [vae_rules(vae), vae_rules(vae, old_attention=True)]


@functools.cache
def name_rules(model: lavit.LavitModules, module: str) -> list[list[NameRule]]:
  """The tables of one module."""
  return TABLES[module](model)


def choose_table(model: lavit.LavitModules, module: str, names: Iterable[str]) -> int:
  """The index of the module's table that has most of the torch names of a file."""
  names = set(names)
  matches = []
  for rules in name_rules(model, module):
    matches.append(len(names & {rule.name for rule in rules}))
  return matches.index(max(matches))


def module_shapes(model: lavit.LavitModules, modules: Collection[str]) -> dict[str, Any]:
  """By module: the tree of `jax.ShapeDtypeStruct`s, of those modules that the model has."""
  shapes = {}
  for module in modules:
    if module == 'uncond_embeddings' or getattr(model, module) is not None:
      shapes[module] = _module_shape(model, module)
  return shapes


@functools.cache
def _module_shape(model: lavit.LavitModules, module: str) -> Any:
  flax_module = getattr(model, module, None)
  # These two are already traced for their tables. (Flax modules are hashable.)
  if isinstance(flax_module, UNet):
    return unet_shapes(flax_module)  # pyright: ignore[reportArgumentType]
  if isinstance(flax_module, AutoencoderKL):
    return vae_shapes(flax_module)  # pyright: ignore[reportArgumentType]
  return jax.eval_shape(lambda: init_params(model, jax.random.key(0), (module,)))[module]


def as_tree(params: Any) -> Mapping:
  """Parameters as a tree that the tables can name: a bare array has the name 'value'."""
  return params if isinstance(params, Mapping) else {'value': params}
