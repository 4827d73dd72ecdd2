"""SHA-256 of weight files, counted while their tensors are read, so that the disk reads once."""

from __future__ import annotations

import concurrent.futures
import hashlib
import pathlib
import struct
import zipfile
import zlib

import numpy as np

from lavit_jax.weights.torch.safetensors_files import is_safetensors, read_range
from lavit_jax.weights.torch.tensors import LazyTensor, damaged_file

GAP_BYTES = 32 << 20  # read at once between tensors


def sha256(file: pathlib.Path) -> str:
  """Hex digest of a file; the CRCs in a torch zip file are checked too.

  Raises:
    UserError: a CRC does not match.
  """
  with open(file, 'rb') as stream:
    digest = hashlib.file_digest(stream, 'sha256').hexdigest()
  if zipfile.is_zipfile(file) and not is_safetensors(file):
    try:
      damaged = zipfile.ZipFile(file).testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, struct.error) as error:
      damaged = str(error)
    if damaged is not None:
      raise damaged_file(file, f'the checksum of {damaged} does not match')
  return digest


class FileDigests:
  """SHA-256 of files from their tensors as they are read; use it as a context."""

  def __init__(self):
    self._thread = concurrent.futures.ThreadPoolExecutor(1)
    self._partial: dict[pathlib.Path, tuple] = {}  # file -> (hash so far, bytes hashed)
    self._whole: dict[pathlib.Path, concurrent.futures.Future[str]] = {}

  def __enter__(self) -> FileDigests:
    return self

  def __exit__(self, *_) -> None:
    self._thread.shutdown(cancel_futures=True)

  def add(self, tensor: LazyTensor, array: np.ndarray) -> concurrent.futures.Future | None:
    """Counts a tensor that has been read; the first tensor of a pickle counts its whole file.

    Returns:
      A future that is done when `array` may change, or None if it may at once.
    """
    if tensor.offset is not None:
      return self._thread.submit(self._update, tensor.file, tensor.offset, array)
    if tensor.file not in self._whole:
      self._whole[tensor.file] = self._thread.submit(sha256, tensor.file)
    return None

  def hexdigest(self, file: pathlib.Path) -> str:
    """Hex digest of a file; reads what has not been counted."""
    if file in self._partial:
      end = file.stat().st_size
      self._thread.submit(self._update, file, end, np.empty(0, np.uint8)).result()
      return self._partial[file][0].hexdigest()
    if file in self._whole:
      return self._whole[file].result()
    return sha256(file)

  def _update(self, file: pathlib.Path, offset: int, array: np.ndarray) -> None:
    """Hashes the gap before a tensor, which holds tensors out of order, and the tensor."""
    digest, done = self._partial.get(file, (hashlib.sha256(), 0))
    if offset < done:
      return  # it was part of a gap
    for start in range(done, offset, GAP_BYTES):
      digest.update(read_range(file, start, min(GAP_BYTES, offset - start)))
    digest.update(array.reshape(-1).view(np.uint8))
    self._partial[file] = (digest, offset + array.nbytes)
