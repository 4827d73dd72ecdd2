"""Weight files of the PyTorch family, a tensor at a time: `.safetensors`, and `.bin` / `.pt` where torch is installed.

Nothing here has a whole file in memory. What is read is checked as far as its format allows: safetensors against its own header,
torch's zip files against their CRCs; a pickle that would run code is refused.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import math
import os
import pathlib
import pickle
import re
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
import safetensors
import xxhash

from lavit_jax.errors import UserError
from lavit_jax.porting import disk, weight_files

DTYPES = {  # safetensors' names
    'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16, 'I64': np.int64, 'I32': np.int32,
    'I16': np.int16, 'I8': np.int8, 'U8': np.uint8, 'BOOL': np.bool_,
}
REOPEN_BYTES = 1 << 30  # what a mapped file may hold of memory before it is mapped anew
WRAPPERS = ('model', 'module', 'state_dict', 'model_state_dict')  # keys under which a training saves the tensors of its model
GAP_BYTES = 32 << 20  # read at once, where no tensor is wanted


class Tensor(NamedTuple):
  """One tensor of a file: its shape and type, and how to read it; `np.asarray(tensor)` does."""

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]
  file: pathlib.Path
  offset: int | None = None  # its bytes lie in the file as they are, from here on

  def __array__(self, dtype=None, copy=None):
    return np.asarray(self.read(), dtype)


def load(path: str | os.PathLike, stem: str | None = None) -> dict[str, Tensor]:
  """Opens a file, or all the shards of a folder.

  Args:
    path: a safetensors or pickled (`.bin`, `.pth`, `.pt`) file of whatever name; or a folder with one such file, or with shards
      and the `*.index.json` that names them.
    stem: of a folder, what its files are called (weight_files.py).

  Returns:
    torch name -> tensor, in the order of the files. A pickle of one bare tensor goes by the stem of its file.

  Raises:
    UserError: the path is missing, damaged or ambiguous, a pickle would run code, or torch is needed and not installed.
  """
  return load_files(files(path, stem))


def load_files(paths: Iterable[pathlib.Path]) -> dict[str, Tensor]:
  """As `load`, for the files of one set of weights."""
  state = {}
  for file in paths:
    shard = _open_safetensors(file) if is_safetensors(file) else _open_pickle(file)
    if twice := shard.keys() & state.keys():
      raise UserError(f'{file} repeats names of another shard: {", ".join(sorted(twice))}; remove the stale file')
    state |= shard
  return state


def files(path: str | os.PathLike, stem: str | None = None) -> list[pathlib.Path]:
  """The file, or the shards in order, that `load` reads."""
  path = pathlib.Path(path)
  if path.is_file():
    return [path]
  if not path.is_dir():
    raise UserError(f'{path} does not exist')
  if chosen := weight_files.choose(path, (stem,) if stem else weight_files.STEMS):
    return list(chosen.files)
  for suffix in weight_files.FORMATS if not stem else ():  # both may lie side by side, with the same content
    for index in sorted(path.glob(f'*{suffix}.index.json')):
      return list(weight_files.shards_of(index))
    if found := sorted(path.glob(f'*{suffix}')):
      if len(found) > 1:
        raise UserError(f'{path} holds {len(found)} {suffix} files and no index; name the one to read')
      return found
  raise UserError(f'{path} holds no .safetensors and no .bin file{f" of {stem}" if stem else ""}')


def is_safetensors(file: pathlib.Path) -> bool:
  """Whether a file is in this format, by its content; by its name, where it is too short, or missing.

  A file may have any name: the cache of Hugging Face's hub keeps its files under their digests, and links to them.

  Raises:
    UserError: the file is the text that stands for a file in a Git repository, not the file.
  """
  try:
    with open(file, 'rb') as stream:
      start = stream.read(64)
  except OSError:
    start = b''
  if start.startswith(b'version https://git-lfs'):
    raise UserError(f'{file} is a Git LFS pointer, not the weights themselves; fetch them with `git lfs pull`')
  if start[8:9] == b'{' and not any(start[4:8]):  # the length of the header, and its first letter
    return True
  return file.suffix == '.safetensors' and not start.startswith((b'PK', b'\x80'))  # a zip file, or a bare pickle


def sha256(file: pathlib.Path) -> str:
  """Hex digest of a file; of a torch zip file, its own CRCs are looked at too.

  Raises:
    UserError: a CRC is another.
  """
  with open(file, 'rb') as stream:
    digest = hashlib.file_digest(stream, 'sha256').hexdigest()
  if zipfile.is_zipfile(file) and not is_safetensors(file):
    try:
      bad = zipfile.ZipFile(file).testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, struct.error) as error:
      bad = str(error)
    if bad is not None:
      raise _damaged(file, f'the checksum of {bad} is another')
  return digest


class Digests:
  """SHA-256 of files, counted from their tensors on the way, so that the disk reads a file once. Use as a context."""

  def __init__(self):
    self._thread, self._sums, self._whole = concurrent.futures.ThreadPoolExecutor(1), {}, {}

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._thread.shutdown(cancel_futures=True)  # who gives up waits for one file at most

  def add(self, tensor: Tensor, array: np.ndarray) -> concurrent.futures.Future | None:
    """Counts a tensor that has been read; what is returned is done when `array` may change. Of a pickle, begins with the whole file."""
    if tensor.offset is not None:
      return self._thread.submit(self._count, tensor.file, tensor.offset, array)
    if tensor.file not in self._whole:
      self._whole[tensor.file] = self._thread.submit(sha256, tensor.file)
    return None

  def of(self, file: pathlib.Path) -> str:
    """Hex digest of a file; reads what has not been counted."""
    if file in self._sums:
      self._thread.submit(self._count, file, file.stat().st_size, np.empty(0, np.uint8)).result()
      return self._sums[file][0].hexdigest()
    return self._whole[file].result() if file in self._whole else sha256(file)

  def _count(self, file: pathlib.Path, offset: int, array: np.ndarray) -> None:
    digest, done = self._sums.get(file, (hashlib.sha256(), 0))
    if offset < done:
      return  # out of order: it was read again where its turn was
    for start in range(done, offset, GAP_BYTES):
      digest.update(_read(file, start, min(GAP_BYTES, offset - start)))
    digest.update(array.reshape(-1).view(np.uint8))
    self._sums[file] = digest, offset + array.nbytes


class Writer:
  """A new `.safetensors` file, or shards of one with their index, whose tensors may come in any order.

  Args:
    folder, stem: `folder/stem.safetensors`, or `stem-00001-of-00002.safetensors` and so on, and `stem.safetensors.index.json`.
    specs: name -> anything with a shape and a dtype, in the order wanted.
    shard_bytes: how large a shard may be.
  """

  def __init__(self, folder: pathlib.Path, stem: str, specs: Mapping, shard_bytes: int = 5 * 10**9):
    self.sums, self._streams, self._places, self._flusher, self._pending = {}, [], {}, disk.Flusher(), 0
    shards = list(_shards(specs, shard_bytes))
    names = [f'{stem}.safetensors' if len(shards) == 1 else f'{stem}-{n:05}-of-{len(shards):05}.safetensors'
             for n in range(1, len(shards) + 1)]
    self.files = [folder / name for name in names]
    folder.mkdir(parents=True, exist_ok=True)
    for file, shard in zip(self.files, shards):
      header, at = {'__metadata__': {'format': 'pt'}}, 0
      for name in shard:
        header[name] = dict(dtype=_code(specs[name].dtype), shape=list(specs[name].shape), data_offsets=[at, at + nbytes(specs[name])])
        at += nbytes(specs[name])
      text = json.dumps(header, separators=(',', ':')).encode()
      text += b' ' * (-len(text) % 8)
      stream = open(file, 'wb')
      self._streams.append(stream)
      stream.write(struct.pack('<Q', len(text)) + text)
      stream.truncate(8 + len(text) + at)
      self._places |= {name: (stream, 8 + len(text) + header[name]['data_offsets'][0], specs[name]) for name in shard}
    if len(shards) > 1:
      index = dict(metadata=dict(total_size=sum(nbytes(x) for x in specs.values())),
                   weight_map={name: file for file, shard in zip(names, shards) for name in shard})
      (folder / f'{stem}.safetensors.index.json').write_text(json.dumps(index, indent=2) + '\n')

  def __enter__(self):
    return self

  def __exit__(self, kind, error, traceback):
    for stream in self._streams:
      stream.close()
    if error is None:
      self._flusher.flush(self.files)
      self._flusher.wait()
    if error is None and (missing := self._places.keys() - self.sums.keys()):
      raise ValueError(f'never written: {", ".join(sorted(missing))}')

  def write(self, name: str, array: np.ndarray) -> None:
    """Puts a tensor in its place."""
    stream, offset, spec = self._places[name]
    if array.shape != tuple(spec.shape) or array.dtype != spec.dtype:
      raise ValueError(f'{name} is {array.dtype}{list(array.shape)}, announced was {spec.dtype}{list(spec.shape)}')
    data = np.asarray(array, order='C').reshape(-1).view(np.uint8)
    self.sums[name] = xxhash.xxh3_64_intdigest(data)
    stream.seek(offset)
    stream.write(data)
    self._pending += len(data)
    if self._pending >= disk.FLUSH_BYTES:
      self._flusher.flush(self.files)
      self._pending = 0


def to_pickle(file: pathlib.Path, tensors: Mapping[str, Tensor]) -> None:
  """Writes a `.bin` as torch.save does; a tensor named as the file's stem, if it is the only one, goes bare."""
  import torch
  state = {name: _to_torch(np.asarray(tensor)) for name, tensor in tensors.items()}
  torch.save(state[file.stem] if list(state) == [file.stem] else state, file)


def to_pickles(written: list[pathlib.Path]) -> None:
  """Replaces the files of a `Writer`, and their index, by `.bin` files of the same tensors; transformers calls its own pytorch_model."""
  def renamed(name):
    return re.sub(r'^model(?=[-.])', 'pytorch_model', name).replace('.safetensors', '.bin')

  for file in written:
    to_pickle(file.with_name(renamed(file.name)), load(file))
    file.unlink()
  index = written[0].with_name(re.sub(r'-\d+-of-\d+', '', written[0].name) + '.index.json')
  if len(written) > 1:
    index.with_name(renamed(index.name)).write_text(renamed_index(index.read_text(), renamed))
    index.unlink()


def renamed_index(text: str, renamed: Callable[[str], str]) -> str:
  """An index of shards, for shards of other names."""
  index = json.loads(text)
  return json.dumps({**index, 'weight_map': {name: renamed(file) for name, file in index['weight_map'].items()}}, indent=2) + '\n'


def nbytes(spec) -> int:
  """Bytes of an array of this shape and type."""
  return math.prod(spec.shape) * np.dtype(spec.dtype).itemsize


def _shards(specs: Mapping, shard_bytes: int) -> Iterator[list[str]]:
  shard, size = [], 0
  for name, spec in specs.items():
    if shard and size + nbytes(spec) > shard_bytes:
      yield shard
      shard, size = [], 0
    shard.append(name)
    size += nbytes(spec)
  yield shard


def _code(dtype) -> str:
  return next(code for code, known in DTYPES.items() if np.dtype(known) == dtype)


def _open_safetensors(path: pathlib.Path) -> dict[str, Tensor]:
  try:
    with safetensors.safe_open(path, 'numpy') as file:  # it knows a bad header and a file of another length
      names = file.offset_keys()
    with open(path, 'rb') as stream:
      start = 8 + int.from_bytes(stream.read(8), 'little')
      header = json.loads(stream.read(start - 8))
  except FileNotFoundError:
    raise UserError(f'{path} is missing; download the checkpoint again') from None
  except (OSError, ValueError, safetensors.SafetensorError) as error:
    raise _damaged(path, error) from None

  def tensor(name, code, shape, begin):
    if code not in DTYPES:
      raise UserError(f'{path}: {name} is of type {code}, which is not read here; known: {", ".join(DTYPES)}')
    spec = jax.ShapeDtypeStruct(shape, np.dtype(DTYPES[code]))
    return Tensor(spec.shape, spec.dtype, lambda: _read(path, begin, nbytes(spec)).view(spec.dtype).reshape(shape), path, begin)

  return {name: tensor(name, header[name]['dtype'], tuple(header[name]['shape']), start + header[name]['data_offsets'][0]) for name in names}


def _read(path: pathlib.Path, start: int, size: int) -> np.ndarray:
  data = disk.read_bytes(path, start, size)
  if len(data) < size:
    raise _damaged(path, f'it ends at {start + len(data)}')
  return data


class _Pickle:
  """A torch file, mapped where it can be; mapped anew now and then, since what has been read counts as memory in use."""

  def __init__(self, path: pathlib.Path):
    self.path, self.tensors, self.touched, self.lock = path, None, 0, threading.Lock()

  def open(self) -> dict:
    import torch
    if self.tensors is None:
      with torch.serialization.safe_globals([argparse.Namespace]):  # the options of a training, which run nothing
        if self.path.suffix == '.safetensors':  # by which torch 2.13 would take it for one; of an open file it looks at the content
          with open(self.path, 'rb') as stream:
            content = torch.load(stream, map_location='cpu', weights_only=True)
        else:
          content = torch.load(self.path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(self.path))
      content = {self.path.stem: content} if isinstance(content, torch.Tensor) else content
      self.tensors, self.touched = _unwrapped(content), 0
    return self.tensors

  def read(self, name: str) -> np.ndarray:
    with self.lock:
      array = _from_torch(self.open()[name]).copy()
      self.touched += array.nbytes
      if self.touched > REOPEN_BYTES and zipfile.is_zipfile(self.path):
        self.tensors = None
    return array


def _open_pickle(path: pathlib.Path) -> dict[str, Tensor]:
  try:
    import torch
  except ImportError:
    raise UserError(f'{path} is a PyTorch pickle; to read it: pip install "lavit_jax[torch]"') from None
  if not path.is_file():
    raise UserError(f'{path} is missing; download the checkpoint again')
  file = _Pickle(path)
  try:
    tensors = file.open()
  except pickle.UnpicklingError as error:
    if re.search('(?i)unsupported (global|class)|unrecognized function', str(error)):
      raise UserError(f'{path} holds more than tensors and would run code; it is refused. Ask for it as .safetensors') from None
    raise _damaged(path, type(error).__name__) from None
  except Exception as error:  # zip and torch each have their own for a damaged file
    raise _damaged(path, type(error).__name__) from None
  if not isinstance(tensors, dict) or not tensors:
    raise UserError(f'{path} holds a {type(tensors).__name__}, not a dict of tensors; save the state_dict of the model alone')
  if other := {name: type(x).__name__ for name, x in tensors.items() if not isinstance(x, torch.Tensor)}:
    name, kind = next(iter(other.items()))
    raise UserError(f'{path} is no dict of tensors, nor has it one under {", ".join(WRAPPERS)}: {name!r} is a {kind} '
                    f'({len(other)} of {len(tensors)} entries are no tensors); save the state_dict of the model alone')
  return {name: Tensor(tuple(x.shape), _from_torch(x[:0] if x.ndim else x).dtype, lambda name=name: file.read(name), path)
          for name, x in tensors.items()}


def _unwrapped(content):
  """The dict of tensors of what a training saved: under one of WRAPPERS, at any depth; anything else as it is."""
  while isinstance(content, dict):
    inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), None)
    if inner is None:
      break
    content = inner
  return content


def _from_torch(x) -> np.ndarray:
  import torch
  x = x.detach()
  return x.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()


def _to_torch(x: np.ndarray):
  import torch
  x = np.array(x)  # torch wants to be able to write to it
  return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if x.dtype == ml_dtypes.bfloat16 else torch.from_numpy(x)


def _damaged(path: pathlib.Path, reason) -> UserError:
  return UserError(f'{path} is truncated or damaged ({reason}); download it again')
