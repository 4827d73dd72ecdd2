"""Pickled weight files (`.bin`, `.pt`, `.pth`), read and written by PyTorch where it is installed.

A pickle that would run code is refused. Nothing here holds a whole file in memory.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import pickle
import re
import threading
import zipfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike

from lavit_jax.errors import UserError
from lavit_jax.weights.torch.safetensors_files import open_safetensors
from lavit_jax.weights.torch.tensors import LazyTensor, damaged_file

if TYPE_CHECKING:
  import torch

REOPEN_BYTES = 1 << 30  # read from a mapped file before it is mapped anew
WRAPPER_KEYS = (  # under which training scripts save the state_dict of their model
  'model',
  'module',
  'state_dict',
  'model_state_dict',
)


# --- Reading ---------------------------------------------------------------------------------


class _Pickle:
  """A torch file, memory-mapped where it can be.

  The file is mapped anew now and then, since pages that have been read count as memory in use.
  """

  def __init__(self, path: pathlib.Path):
    self.path = path
    self._lock = threading.Lock()
    self._tensors: Any = None  # torch name -> tensor
    self._bytes_read = 0  # since the file was mapped

  def open(self) -> Any:
    """The tensors by name; what is not a dict of tensors is returned as it is."""
    import torch

    if self._tensors is None:
      content = self._load()
      if isinstance(content, torch.Tensor):
        content = {self.path.stem: content}
      self._tensors = _unwrap(content)
      self._bytes_read = 0
    return self._tensors

  def _load(self) -> Any:
    import torch

    # Training scripts store their options as a Namespace, which runs nothing.
    with torch.serialization.safe_globals([argparse.Namespace]):
      if self.path.suffix != '.safetensors':
        return torch.load(
          self.path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(self.path)
        )
      # torch 2.13 goes by this suffix, whatever the content; of an open file it reads the content.
      with open(self.path, 'rb') as stream:
        return torch.load(stream, map_location='cpu', weights_only=True)

  def read(self, name: str) -> np.ndarray:
    """A copy of one tensor."""
    with self._lock:
      array = _to_numpy(self.open()[name]).copy()
      self._bytes_read += array.nbytes
      if self._bytes_read > REOPEN_BYTES and zipfile.is_zipfile(self.path):
        self._tensors = None
    return array


def open_pickle(path: pathlib.Path) -> dict[str, LazyTensor]:
  """Opens a file: torch name -> tensor. A pickle of one bare tensor has the name of its file.

  Raises:
    UserError: torch is not installed, or the file is missing or damaged, would run code, or holds
      no state_dict.
  """
  try:
    import torch
  except ImportError:
    raise UserError(
      f'{path} is a PyTorch pickle; to read it: pip install "lavit_jax[torch]"'
    ) from None
  if not path.is_file():
    raise UserError(f'{path} is missing; download the checkpoint again')
  file = _Pickle(path)
  try:
    tensors = file.open()
  except pickle.UnpicklingError as error:
    if re.search('(?i)unsupported (global|class)|unrecognized function', str(error)):
      raise UserError(
        f'{path} holds more than tensors and would run code; it is refused: get it as .safetensors'
      ) from None
    raise damaged_file(path, type(error).__name__) from None
  except Exception as error:  # zip and torch each have their own for a damaged file
    raise damaged_file(path, type(error).__name__) from None
  if not isinstance(tensors, dict) or not tensors:
    raise UserError(
      f'{path} holds a {type(tensors).__name__}, not a dict of tensors; '
      'save the state_dict of the model alone'
    )
  others = {key: value for key, value in tensors.items() if not isinstance(value, torch.Tensor)}
  if others:
    key, value = next(iter(others.items()))
    raise UserError(
      f'{path} is not a dict of tensors, nor has one under {", ".join(WRAPPER_KEYS)}: '
      f'{key!r} is a {type(value).__name__} ({len(others)} of {len(tensors)} entries are not '
      'tensors); save the state_dict of the model alone'
    )
  return {name: _lazy_tensor(file, name, tensor) for name, tensor in tensors.items()}


def _lazy_tensor(file: _Pickle, name: str, tensor: torch.Tensor) -> LazyTensor:
  empty = tensor[:0] if tensor.ndim else tensor  # enough to know the dtype
  return LazyTensor(tuple(tensor.shape), _to_numpy(empty).dtype, lambda: file.read(name), file.path)


def _unwrap(content: Any) -> Any:
  """The innermost dict under `WRAPPER_KEYS`, at any depth; anything else as it is."""
  while isinstance(content, dict):
    inner = [content[key] for key in WRAPPER_KEYS if isinstance(content.get(key), dict)]
    if not inner:
      break
    content = inner[0]
  return content


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
  """The array of a tensor; numpy has no bfloat16 of torch's, so its bits go as integers."""
  import torch

  tensor = tensor.detach()
  if tensor.dtype == torch.bfloat16:
    return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
  return tensor.numpy()


# --- Writing ---------------------------------------------------------------------------------


class PickleForm(NamedTuple):
  """How the published inference code expects its pickles.

  Attributes:
    suffix: of their names.
    key: under which a dict has the state_dict; None if the file is the state_dict.
  """

  suffix: str = '.bin'
  key: str | None = None


BIN = PickleForm()


def write_pickle(
  file: pathlib.Path, tensors: Mapping[str, ArrayLike], key: str | None = None
) -> None:
  """Writes a file as torch.save does; a single tensor named as the file is written bare."""
  import torch

  state = {name: _from_numpy(np.asarray(tensor)) for name, tensor in tensors.items()}
  bare = list(state) == [file.stem]
  content = state[file.stem] if bare else state
  torch.save(content if key is None else {key: content}, file)


def replace_by_pickles(written: list[pathlib.Path], form: PickleForm = BIN) -> None:
  """Replaces a safetensors file, or shards and their index, by pickles of the same tensors."""
  for file in written:
    pickled = file.with_name(_pickle_name(file.name)).with_suffix(form.suffix)
    write_pickle(pickled, open_safetensors(file), form.key)
    file.unlink()
  if len(written) > 1:
    unsharded = re.sub(r'-\d+-of-\d+', '', written[0].name)
    _rename_index(written[0].with_name(f'{unsharded}.index.json'))


def _rename_index(file: pathlib.Path) -> None:
  """Replaces the index of safetensors shards by that of the pickles in their place."""
  index = json.loads(file.read_text())
  index['weight_map'] = {
    tensor: _pickle_name(shard) for tensor, shard in index['weight_map'].items()
  }
  file.with_name(_pickle_name(file.name)).write_text(json.dumps(index, indent=2) + '\n')
  file.unlink()


def _pickle_name(name: str) -> str:
  """The `.bin` name of a safetensors file; transformers calls its pickles pytorch_model."""
  return re.sub(r'^model(?=[-.])', 'pytorch_model', name).replace('.safetensors', '.bin')


def _from_numpy(array: np.ndarray) -> torch.Tensor:
  import torch

  array = np.array(array)  # a copy, since torch needs to be able to write to it
  if array.dtype == ml_dtypes.bfloat16:
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
  return torch.from_numpy(array)
