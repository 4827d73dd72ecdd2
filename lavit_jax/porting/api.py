"""For scripts: PyTorch files straight into parameter trees, and trees into PyTorch files."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import jax
import numpy as np

from lavit_jax.errors import UserError
from lavit_jax.models import lavit
from lavit_jax.porting import engine, layouts, torch_files
from lavit_jax.porting.leaves import flatten, unflatten


def from_torch(path, part: str | None = None, *, variant: str | None = None, shardings: Callable | None = None, allow_missing: str = ''):
  """Reads the weights of a PyTorch folder or file (porting/layouts.py), one leaf in memory at a time beside the result.

  Args:
    path: a LaVIT, LLaMA, Stable Diffusion or SDXL folder, or an EVA-CLIP file; with `part`, any folder or file that holds that part alone.
    part: what to read; None reads all there is.
    variant: a row of the variants table; None finds the largest whose shapes the files have.
    shardings: {part: tree of ShapeDtypeStructs} -> the same tree of shardings: leaves then go straight onto the devices.
    allow_missing: regex of torch names that may be missing.
  Returns:
    {part: tree of float32 arrays}, or the tree of `part`.
  Raises:
    UserError: unknown or damaged files; PortingError: they do not fit the variant.
  """
  path = pathlib.Path(path)
  found = _of_part(path, part) if part else layouts.recognise(path)[1]
  model = lavit.build(variant or layouts.find_variant(found))
  parts = {}
  for name, fit in layouts.fit(model, found, allow_missing).items():
    rows = layouts.tables(model, name)[fit.table]
    like = {leaf: jax.ShapeDtypeStruct(x.shape, np.float32) for leaf, x in fit.plan.leaves.items()}
    place = None
    if shardings is not None:
      where = flatten(shardings({name: unflatten(like)})[name])

      def place(leaf, array, where=where):
        return jax.make_array_from_callback(array.shape, where[leaf], lambda index: array[index])

    tree = engine.from_torch(rows, {n: fit.state[n] for n in fit.plan.slots}, like, place)
    parts[name] = unflatten(flatten(tree))
  return parts[part] if part else parts


def to_torch(params, path, part: str, *, variant: str) -> pathlib.Path:
  """Writes one part as a safetensors file under its PyTorch names, in the types of its arrays; returns the file.

  Args:
    params: the tree.
    path: `FOLDER/NAME.safetensors`.
  Raises:
    UserError: the file cannot be written; PortingError: the tree is not of this part.
  """
  path = pathlib.Path(path)
  if path.suffix != '.safetensors':
    raise UserError(f'{path}: give a name that ends in .safetensors')
  state = engine.to_torch(layouts.tables(lavit.build(variant), part)[0], layouts.like_of(params))
  try:
    with torch_files.Writer(path.parent, path.stem, state, shard_bytes=1 << 62) as writer:
      for name, array in state.items():
        writer.write(name, array)
  except OSError as error:
    raise UserError(f'cannot write {path}: {error.strerror}; free some space or choose another place') from error
  return path


def _of_part(path: pathlib.Path, part: str) -> list[layouts.Found]:
  if part not in layouts.TABLES:
    raise UserError(f'unknown part {part!r}; known: {", ".join(layouts.TABLES)}')
  if path.is_dir() and layouts.kind_of(path):
    return layouts.recognise(path, part)[1]
  return [layouts.Found(layouts.Place(part, '', ('',)), torch_files.load(path), {})]
