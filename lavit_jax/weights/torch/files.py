"""Opens the weight files of the PyTorch family, whatever their format, one tensor at a time."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable

from lavit_jax.errors import UserError
from lavit_jax.weights.torch import weight_files
from lavit_jax.weights.torch.pickle_files import open_pickle
from lavit_jax.weights.torch.safetensors_files import is_safetensors, open_safetensors
from lavit_jax.weights.torch.tensors import LazyTensor


def load(path: str | os.PathLike, stem: str | None = None) -> dict[str, LazyTensor]:
  """Opens a file, or all the shards of a folder.

  Args:
    path: a safetensors or pickled (`.bin`, `.pth`, `.pt`) file of any name; or a folder with one
      such file, or with shards and the `*.index.json` that lists them.
    stem: the stem of the file names (weight_files.py) in a folder.

  Returns:
    torch name -> tensor, in the order of the files. A pickle of one bare tensor has the name of
    its file.

  Raises:
    UserError: the path is missing, damaged or ambiguous, a pickle would run code, or torch is
      needed and not installed.
  """
  return load_files(find_files(path, stem))


def load_files(paths: Iterable[pathlib.Path]) -> dict[str, LazyTensor]:
  """As `load`, for the files of one set of weights."""
  state: dict[str, LazyTensor] = {}
  for file in paths:
    shard = open_safetensors(file) if is_safetensors(file) else open_pickle(file)
    repeated = shard.keys() & state.keys()
    if repeated:
      raise UserError(
        f'{file} repeats names of another shard: {", ".join(sorted(repeated))}; '
        'remove the stale file'
      )
    state |= shard
  return state


def find_files(path: str | os.PathLike, stem: str | None = None) -> list[pathlib.Path]:
  """The file, or the shards in order, that `load` reads; arguments and errors as there."""
  path = pathlib.Path(path)
  if path.is_file():
    return [path]
  if not path.is_dir():
    raise UserError(f'{path} does not exist')
  stems = (stem,) if stem else weight_files.STEMS
  edition = weight_files.choose(path, stems)
  if edition is not None:
    return list(edition.files)
  if stem:
    raise UserError(f'{path} holds no .safetensors and no .bin file of {stem}')
  for suffix in weight_files.FORMATS:  # a folder may hold both, with the same content
    indexes = sorted(path.glob(f'*{suffix}.index.json'))
    if indexes:
      return list(weight_files.shards_of(indexes[0]))
    files = sorted(path.glob(f'*{suffix}'))
    if len(files) > 1:
      raise UserError(
        f'{path} holds {len(files)} {suffix} files and no index; name the one to read'
      )
    if files:
      return files
  raise UserError(f'{path} holds no .safetensors and no .bin file')
