"""The parts of a checkpoint as the programs of inference take them: each read when first needed, and never held twice.

A part is checked against the variant, put into the compute dtype and onto the mesh as it is read; the language model's layers are taken
apart (models/llama.py), and its weights made eight bits wide if that was asked for.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lavit_jax import sharding
from lavit_jax.errors import UserError
from lavit_jax.models import lavit
from lavit_jax.models.initial import initial_parts
from lavit_jax.models.int8 import quantize_weights
from lavit_jax.models.llama import unstack
from lavit_jax.porting import from_torch, layouts
from lavit_jax.porting.folder import load_parts, read_config

FLOAT32 = ('tokenizer', 'vae', 'highres_vae', 'uncond_embeddings')  # parts that decide or draw in float32 whatever the compute dtype


class Checkpoint(NamedTuple):
  """A folder that has been looked at: its variant, where its words are, the parts that it holds, and how one is read."""

  variant: str
  words: pathlib.Path
  held: frozenset[str]
  read: Callable  # (part, dtype=..., shardings=None or as `load_parts` takes it) -> tree of arrays


def open_checkpoint(folder, variant: str | None) -> Checkpoint:
  """Looks at a folder of ours (porting/folder.py) or a PyTorch one (porting/layouts.py).

  Raises:
    UserError: it is missing, damaged, or not of `variant`.
  """
  folder = pathlib.Path(folder)
  if layouts.kind_of(folder) == 'LaVIT':
    known = layouts.read_json(folder / layouts.ABOUT).get('variant') or variant or layouts.find_variant(layouts.recognise(folder)[1])
    held = {place.part for place in layouts.PUBLISHED if layouts.stem_of(folder / place.folder, place.stems)}
    found = Checkpoint(known, folder / 'language_model', frozenset(held), functools.partial(from_torch, folder, variant=known))
  else:
    config = read_config(folder)

    def read(name, **options):
      return load_parts(folder, [name], **options)[name]

    found = Checkpoint(config['variant'], folder / 'tokenizer', frozenset(config['parts']), read)
  if variant not in (None, found.variant):
    raise UserError(f'{folder} holds variant {found.variant!r}, but {variant!r} was asked for')
  return found


class Parts:
  """part name -> its parameters, read at the first asking.

  Args:
    model: whose parts they are.
    read: as in `Checkpoint`, or the trees themselves by name, which are copied, not taken apart.
    held: names of the parts that there are.
    weights: None, or 'int8' for the language model's.
    mesh: where they lie (sharding.py); None leaves them on the first device.
  """

  def __init__(self, model: lavit.Lavit, read: Callable | Mapping, held, weights: str | None = None, mesh: Mesh | None = None):
    self._model, self._read, self._held, self._weights, self.mesh, self._ready = model, read, held, weights, mesh, {}

  @property
  def loaded(self) -> frozenset[str]:
    """Names of those that have been read."""
    return frozenset(self._ready)

  def __contains__(self, name: str) -> bool:
    """Whether the checkpoint holds it, read or not."""
    return name in self._held

  def __getitem__(self, name: str):
    """Raises UserError if it is missing, damaged, or another model's."""
    if name not in self._ready:
      params = self._fetch(name)
      self._check(name, params)
      if name == 'llama':
        params = unstack(params)
        params = quantize_weights(params) if self._weights == 'int8' else params
      self._ready[name] = params
    return self._ready[name]

  def _fetch(self, name: str):
    places = None if self.mesh is None else functools.partial(sharding.shardings, mesh=self.mesh)
    if isinstance(self._read, Mapping):
      tree = jax.tree.map(jnp.asarray, self._read[name])  # a tree of our own
      return tree if places is None else jax.device_put(tree, places({name: tree})[name])
    dtype = 'float32' if name in FLOAT32 else jnp.dtype(self._model.vit.dtype).name
    return _onto_device(self._read(name, dtype=dtype, shardings=places))

  def _check(self, name: str, params) -> None:
    expected = jax.eval_shape(lambda: initial_parts(self._model, jax.random.key(0), (name,)))[name]
    want, have = _shapes(expected), _shapes(params)
    wrong = [f'{key or name}: {have.get(key, "missing")} instead of {want.get(key, "nothing")}'
             for key in sorted(want.keys() | have.keys()) if want.get(key) != have.get(key)]
    if wrong:
      more = f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''
      raise UserError(f'the weights of {name} are not of variant {self._model.variant!r}, export the checkpoint again; '
                      f'{"; ".join(wrong[:3])}{more}')


def _onto_device(tree):
  """The tree as JAX arrays; its leaves are removed from it one by one, so that memory never holds two."""
  if not isinstance(tree, dict):
    return jnp.asarray(tree).block_until_ready()
  return {name: _onto_device(tree.pop(name)) for name in list(tree)}


def _shapes(tree) -> dict[str, tuple[int, ...]]:
  """'blocks/attn/qkv/kernel' -> its shape."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): x.shape for path, x in leaves}
