"""Safetensors files: lazy reading, and writing of single files and shards in any order.

A file is 8 bytes with the length of its header, the header (JSON: dtype, shape and offsets of each
tensor), and the numbers. Reading checks the file against its header.
"""

from __future__ import annotations

import io
import json
import pathlib
import struct
from collections.abc import Iterator, Mapping

import jax
import ml_dtypes
import numpy as np
import safetensors
import xxhash
from numpy.typing import DTypeLike

from lavit_jax.errors import UserError
from lavit_jax.weights.store import disk
from lavit_jax.weights.torch.tensors import ArraySpec, LazyTensor, damaged_file, nbytes

DTYPES = {  # by the format's own names
  'F64': np.float64,
  'F32': np.float32,
  'F16': np.float16,
  'BF16': ml_dtypes.bfloat16,
  'I64': np.int64,
  'I32': np.int32,
  'I16': np.int16,
  'I8': np.int8,
  'U8': np.uint8,
  'BOOL': np.bool_,
}
SHARD_BYTES = 5 * 10**9  # as transformers and diffusers shard


# --- Reading ---------------------------------------------------------------------------------


def is_safetensors(file: pathlib.Path) -> bool:
  """Whether a file is safetensors, by its content, or by its name where it is short or missing.

  The content decides because the cache of the Hugging Face Hub names files by their digests.

  Raises:
    UserError: the file is a Git LFS pointer.
  """
  try:
    with open(file, 'rb') as stream:
      start = stream.read(64)
  except OSError:
    start = b''
  if start.startswith(b'version https://git-lfs'):
    raise UserError(
      f'{file} is a Git LFS pointer, not the weights themselves; fetch them with `git lfs pull`'
    )
  header_begins = start[8:9] == b'{'
  header_below_4_gib = not any(start[4:8])
  if header_begins and header_below_4_gib:
    return True
  is_pickle = start.startswith((b'PK', b'\x80'))  # a zip file, or a bare pickle
  return file.suffix == '.safetensors' and not is_pickle


def open_safetensors(path: pathlib.Path) -> dict[str, LazyTensor]:
  """Opens a file: torch name -> tensor, in the order of their bytes.

  Raises:
    UserError: the file is missing or damaged, or has a dtype that is not in `DTYPES`.
  """
  try:
    with safetensors.safe_open(path, 'numpy') as file:  # checks the header and the file's length
      names = file.offset_keys()
    with open(path, 'rb') as stream:
      data_start = 8 + int.from_bytes(stream.read(8), 'little')
      header = json.loads(stream.read(data_start - 8))
  except FileNotFoundError:
    raise UserError(f'{path} is missing; download the checkpoint again') from None
  except (OSError, ValueError, safetensors.SafetensorError) as error:
    raise damaged_file(path, error) from None
  return {name: _lazy_tensor(path, name, header[name], data_start) for name in names}


def _lazy_tensor(path: pathlib.Path, name: str, entry: Mapping, data_start: int) -> LazyTensor:
  """The tensor of one entry of the header."""
  code = entry['dtype']
  if code not in DTYPES:
    raise UserError(
      f'{path}: {name} is of type {code}, which is not read here; known: {", ".join(DTYPES)}'
    )
  shape = tuple(entry['shape'])
  dtype = np.dtype(DTYPES[code])
  offset = data_start + entry['data_offsets'][0]
  size = nbytes(jax.ShapeDtypeStruct(shape, dtype))

  def read() -> np.ndarray:
    return read_range(path, offset, size).view(dtype).reshape(shape)

  return LazyTensor(shape, dtype, read, path, offset)


def read_range(path: pathlib.Path, start: int, size: int) -> np.ndarray:
  """Bytes of a file, u8[size].

  Raises:
    UserError: the file ends before.
  """
  data = disk.read_bytes(path, start, size)
  if len(data) < size:
    raise damaged_file(path, f'it ends at {start + len(data)}')
  return data


# --- Writing ---------------------------------------------------------------------------------


class SafetensorsWriter:
  """Writes one file, or shards with their index, as a context; tensors may come in any order.

  Attributes:
    files: the file or the shards, in order.
    sums: name -> XXH3-64 of the bytes of each tensor that has been written.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    stem: str,
    specs: Mapping[str, ArraySpec],
    shard_bytes: int = SHARD_BYTES,
  ):
    """Creates the files with their headers.

    Args:
      folder: where the files are written.
      stem: of their names: `stem.safetensors`; or the shards `stem-00001-of-00002.safetensors`,
        ..., and `stem.safetensors.index.json`.
      specs: name -> shape and dtype, in the order of the file.
      shard_bytes: the largest size of a shard.
    """
    shards = list(_shards(specs, shard_bytes))
    names = [f'{stem}.safetensors']
    if len(shards) > 1:
      total = len(shards)
      names = [f'{stem}-{n:05}-of-{total:05}.safetensors' for n in range(1, total + 1)]
    self.files = [folder / name for name in names]
    self.sums: dict[str, int] = {}
    self._streams: list[io.BufferedWriter] = []
    self._slots: dict[str, tuple[io.BufferedWriter, int, ArraySpec]] = {}
    self._flusher = disk.Flusher()
    self._unflushed = 0  # bytes
    folder.mkdir(parents=True, exist_ok=True)
    for file, shard in zip(self.files, shards, strict=True):
      self._create(file, {name: specs[name] for name in shard})
    if len(shards) > 1:
      index = folder / f'{stem}.safetensors.index.json'
      index.write_text(_index(names, shards, specs))

  def _create(self, file: pathlib.Path, specs: Mapping[str, ArraySpec]) -> None:
    """Writes the header of one file and reserves the room for its tensors."""
    header: dict[str, dict] = {'__metadata__': {'format': 'pt'}}
    offsets = {}
    size = 0
    for name, spec in specs.items():
      offsets[name] = size
      size += nbytes(spec)
      header[name] = dict(
        dtype=_dtype_code(spec.dtype),
        shape=list(spec.shape),
        data_offsets=[offsets[name], size],
      )
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)  # tensors are aligned to 8 bytes
    data_start = 8 + len(text)
    stream = open(file, 'wb')
    self._streams.append(stream)
    stream.write(struct.pack('<Q', len(text)) + text)
    stream.truncate(data_start + size)
    for name, spec in specs.items():
      self._slots[name] = (stream, data_start + offsets[name], spec)

  def __enter__(self) -> SafetensorsWriter:
    return self

  def __exit__(self, kind, error, traceback) -> None:
    for stream in self._streams:
      stream.close()
    if error is not None:
      return
    self._flusher.flush(self.files)
    self._flusher.wait()
    missing = self._slots.keys() - self.sums.keys()
    if missing:
      raise ValueError(f'never written: {", ".join(sorted(missing))}')

  def write(self, name: str, array: np.ndarray) -> None:
    """Writes one tensor.

    Raises:
      ValueError: shape or dtype differ from the specs.
    """
    stream, offset, spec = self._slots[name]
    if array.shape != tuple(spec.shape) or array.dtype != spec.dtype:
      raise ValueError(
        f'{name} is {array.dtype}{list(array.shape)}, announced was {spec.dtype}{list(spec.shape)}'
      )
    data = np.asarray(array, order='C').reshape(-1).view(np.uint8)
    self.sums[name] = checksum(data)
    stream.seek(offset)
    stream.write(data.data)
    self._unflushed += len(data)
    if self._unflushed >= disk.FLUSH_BYTES:
      self._flusher.flush(self.files)
      self._unflushed = 0


def checksum(array: np.ndarray) -> int:
  """XXH3-64 of the bytes of an array in C order."""
  return xxhash.xxh3_64_intdigest(array.reshape(-1).view(np.uint8).data)


def _shards(specs: Mapping[str, ArraySpec], shard_bytes: int) -> Iterator[list[str]]:
  """Splits the names, in order, into shards; a tensor larger than a shard is alone in one."""
  shard: list[str] = []
  size = 0
  for name, spec in specs.items():
    if shard and size + nbytes(spec) > shard_bytes:
      yield shard
      shard = []
      size = 0
    shard.append(name)
    size += nbytes(spec)
  yield shard


def _index(names: list[str], shards: list[list[str]], specs: Mapping[str, ArraySpec]) -> str:
  """The content of the index of some shards."""
  weight_map = {}
  for file, shard in zip(names, shards, strict=True):
    weight_map |= dict.fromkeys(shard, file)
  total_size = sum(nbytes(spec) for spec in specs.values())
  index = dict(metadata=dict(total_size=total_size), weight_map=weight_map)
  return json.dumps(index, indent=2) + '\n'


def _dtype_code(dtype: DTypeLike) -> str:
  return next(code for code, known in DTYPES.items() if np.dtype(known) == dtype)
