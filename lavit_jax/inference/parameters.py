"""The parts of a checkpoint as the programs of inference take them: each read when first needed, and never held twice.

A part is checked against the variant, and put into the compute dtype and onto the mesh, leaf by leaf as it is read. The language model comes
a layer of a leaf at a time, for its programs want the layers apart (models/llama.py), and is made eight bits wide on the way if that was
asked for: no more is ever on the device than the result and what is being read.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lavit_jax import sharding
from lavit_jax.errors import UserError
from lavit_jax.models import lavit
from lavit_jax.models.initialization import init_params
from lavit_jax.models.int8 import quantize_weight
from lavit_jax.models.noise_schedule import Scheduler
from lavit_jax.weights.store.arrays import ParameterSource, flatten, unflatten
from lavit_jax.weights.store.folder import check_codebook, open_params, read_config, read_settings
from lavit_jax.weights.torch import configs, formats, matching, name_tables, weight_files
from lavit_jax.weights.torch.api import open_torch

FLOAT32 = (
  'tokenizer',
  'vae',
  'highres_vae',
  'uncond_embeddings',
)  # parts that decide or draw in float32 whatever the compute dtype
CODEBOOK = 'quantizer/embedding'  # the leaf of the tokenizer that drawing needs


class CheckpointInfo(NamedTuple):
  """A folder that has been looked at: its variant, where its words are, the parts that it holds, how one is opened, and the settings
  (models/settings.py).
  """

  variant: str
  words: pathlib.Path
  held: frozenset[str]
  open: Callable[..., ParameterSource]  # (part, dtype=...)
  settings: Mapping[str, dict]


def open_checkpoint(folder, variant: str | None) -> CheckpointInfo:
  """Looks at a folder of ours (weights/store/folder.py) or a PyTorch one (weights/torch/formats.py).

  Raises:
    UserError: it is missing, damaged, or not of `variant`.
  """
  folder = pathlib.Path(folder)
  if formats.detect_kind(folder) == 'LaVIT':
    known = (
      formats.read_json(folder / formats.EXPORT_INFO).get('variant')
      or variant
      or matching.find_variant(formats.detect(folder)[1])
    )
    words, opener = folder / 'language_model', functools.partial(open_torch, folder, variant=known)
    held = {
      place.module
      for place in formats.PUBLISHED
      if weight_files.choose(folder / place.folder, place.stems)
    }
    settings = configs.read_settings(
      folder, {place.module: place.folder for place in formats.PUBLISHED}, held, known
    )
  else:
    config = read_config(folder)
    if 'tokenizer' in config['parts']:
      check_codebook(folder)
    known, held, words, opener = (
      config['variant'],
      config['parts'],
      folder / 'tokenizer',
      functools.partial(open_params, folder),
    )
    settings = read_settings(folder)
  if variant not in (None, known):
    raise UserError(f'{folder} holds variant {known!r}, but {variant!r} was asked for')
  return CheckpointInfo(known, words, frozenset(held), opener, settings)


class LazyParams:
  """part name -> its parameters, read at the first asking. 'codebook' is what drawing needs of 'tokenizer', and is read alone.

  Args:
    model: whose parts they are.
    checkpoint: where they are read, or the trees themselves by name, which are copied, not taken apart.
    weights: None, or 'int8' for the language model's.
    mesh: where they lie (sharding.py); None leaves them on the first device.
  """

  def __init__(
    self,
    model: lavit.LavitModules,
    checkpoint: CheckpointInfo | Mapping,
    weights: str | None = None,
    mesh: Mesh | None = None,
  ):
    known = isinstance(checkpoint, CheckpointInfo)
    self._model, self._weights, self.mesh, self._ready = model, weights, mesh, {}
    self._held, self._open = (
      (checkpoint.held, checkpoint.open)
      if known
      else (checkpoint, functools.partial(_of_tree, checkpoint))
    )
    self.max_length = model.llama.longest  # of prompt and answer together

  @property
  def loaded(self) -> frozenset[str]:
    """Names of those that have been read."""
    return frozenset(self._ready)

  def scheduler(self, prefix: str) -> Scheduler:
    """Of the U-Net of a way of drawing, by its prefix."""
    return getattr(self._model, f'{prefix}scheduler')

  def __contains__(self, name: str) -> bool:
    """Whether the checkpoint holds it, read or not."""
    return _part_of(name) in self._held

  def __getitem__(self, name: str):
    """Raises UserError if it is missing, damaged, or another model's."""
    if name not in self._ready:
      self._ready[name] = self._read(name)
    return self._ready[name]

  def _read(self, name: str):
    part, other = _part_of(name), {'codebook': 'tokenizer', 'tokenizer': 'codebook'}.get(name)
    there = {CODEBOOK: self._ready[other]['quantizer']['embedding']} if other in self._ready else {}
    if name == 'codebook' and there:
      return unflatten(there)
    source = self._open(
      part, dtype='float32' if part in FLOAT32 else jnp.dtype(self._model.vit.dtype).name
    )
    self._check(part, source.structs)
    places = (
      {}
      if self.mesh is None
      else flatten(sharding.shardings({part: unflatten(source.structs)}, self.mesh)[part])
    )
    small = self._weights == 'int8' and part == 'llama'

    def leaf(path, place, row=None):
      array = jnp.asarray(source.read(path, row, place))
      return jax.block_until_ready(
        quantize_weight(path.split('/')[-1], array) if small else array
      )  # before the next is begun

    flat = {}
    for path in (CODEBOOK,) if name == 'codebook' else source.structs:
      place = places.get(path)
      if path in there:
        flat[path] = there[path]
      elif part == 'llama' and path.startswith('layers/'):
        place = place and NamedSharding(
          self.mesh, PartitionSpec(*place.spec[1:])
        )  # that axis is never split
        flat |= {
          path.replace('layers', f'layers_{i}', 1): leaf(path, place, i)
          for i in range(source.structs[path].shape[0])
        }
      else:
        flat[path] = leaf(path, place)
    return unflatten(flat)

  def _check(self, name: str, structs: Mapping) -> None:
    expected = jax.eval_shape(lambda: init_params(self._model, jax.random.key(0), (name,)))[name]
    want, have = (
      {path: x.shape for path, x in flat.items()} for flat in (flatten(expected), structs)
    )
    absent = optional_leaves(self._model, name) - have.keys()
    wrong = [
      f'{key}: {have.get(key, "missing")} instead of {want.get(key, "nothing")}'
      for key in sorted(want.keys() | have.keys())
      if want.get(key) != have.get(key) and key not in absent
    ]
    if wrong:
      more = f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''
      raise UserError(
        f'the weights of {name} are not of variant {self._model.variant!r}, export the checkpoint again; '
        f'{"; ".join(wrong[:3])}{more}'
      )


def optional_leaves(model: lavit.LavitModules, part: str) -> frozenset[str]:
  """The leaves of a part that its files may lack, for no task here computes with them: norm and head of the image encoder."""
  return frozenset(row.leaf for row in name_tables.name_rules(model, part)[0] if row.optional)


def _part_of(name: str) -> str:
  return 'tokenizer' if name == 'codebook' else name


def _of_tree(trees: Mapping, name: str, dtype: str) -> ParameterSource:
  """A part that is there already, in its own dtype."""
  flat = flatten(trees[name])

  def read(path, row=None, place=None):
    leaf = jnp.asarray(flat[path])
    leaf = (
      leaf if row is None else jax.lax.index_in_dim(leaf, row, keepdims=False)
    )  # not leaf[row], which moves one of many devices to one
    return leaf if place is None else jax.device_put(leaf, place)

  return ParameterSource(
    {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in flat.items()}, read
  )
