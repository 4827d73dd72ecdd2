"""Weights folders in a store, such as gs://BUCKET/model: copies of them on this machine.

Reading weights seeks in files, and writing them renames folders, which an object store does not do.
So a folder is copied here before it is read, of a run only the modules that its stage uses; a new
one is written here and copied there. The file by which a folder is known (`MARKS`) is written last
and removed first: a copy that was cut short is no checkpoint. It has the file `UNFINISHED`, by
which the next copy may replace it.

Whatever fsspec has a driver for is a store. Copies lie in the folder for temporary files (TMPDIR)
until the process ends.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Collection, Iterator
from functools import partial

from fsspec import AbstractFileSystem

from lavit_jax.data.paths import filesystem_of, is_remote, list_files, retry
from lavit_jax.errors import UserError
from lavit_jax.weights.store.metadata import ADAPTERS, CONFIG
from lavit_jax.weights.torch.formats import EXPORT_INFO

MARKS = (CONFIG, EXPORT_INFO, ADAPTERS)
UNFINISHED = '.unfinished'


def fetch(folder: str, modules: Collection[str] | None = None) -> str:
  """Copies a weights folder of a store to this machine.

  Args:
    folder: a URL; a local path stands for itself.
    modules: names of those to copy of a checkpoint of this package; None copies all files.

  Returns:
    The path on this machine.

  Raises:
    UserError: there is nothing at the URL, the store refuses, or a package for it is missing.
    Unreachable: the store does not answer.
  """
  if not is_remote(folder):
    return folder.removeprefix('file://')
  names = list_files(folder)
  if not names:
    raise UserError(f'{folder} has no files; check the address')
  filesystem, root = filesystem_of(folder)
  copy = temporary_folder() / _last_name(folder)
  for name in names:
    parts = pathlib.PurePosixPath(name).parts
    if modules is not None and parts[0] == 'parts' and parts[1] not in modules:
      continue
    target = copy / name
    target.parent.mkdir(parents=True, exist_ok=True)
    retry(folder, partial(filesystem.get_file, _join(root, name), str(target)))
  return str(copy)


@contextlib.contextmanager
def target(folder: str, replaces: bool = True) -> Iterator[str]:
  """Yields where to write a weights folder, which is copied to its store when the block ends.

  Nothing is copied if the block raises, or has written nothing.

  Args:
    folder: a URL; a local path stands for itself.
    replaces: whether a weights folder that is there may be replaced; a copy that was cut short may
      always be.

  Raises:
    UserError: something else is there, the store refuses, or a package for it is missing.
    Unreachable: the store does not answer.
  """
  if not is_remote(folder):
    yield folder.removeprefix('file://')
    return
  _check_target(folder, replaces)
  copy = temporary_folder() / _last_name(folder)
  yield str(copy)
  if copy.is_dir():
    _upload(copy, folder)


def _check_target(folder: str, replaces: bool) -> None:
  names = list_files(folder)
  if not names or UNFINISHED in names:
    return
  if not any(mark in names for mark in MARKS):
    raise UserError(
      f'{folder} has other files ({names[0]}); choose another address, or remove them first'
    )
  if not replaces:
    raise UserError(f'{folder} exists; choose another place, or --force to replace it')


def _upload(copy: pathlib.Path, folder: str) -> None:
  """Copies a folder to a store, and removes what else is there."""
  filesystem, root = filesystem_of(folder)
  old = list_files(folder)
  new = sorted(str(file.relative_to(copy)) for file in copy.rglob('*') if file.is_file())
  new.sort(key=_is_mark)

  def remove(names: Collection[str]) -> None:
    for name in names:
      with contextlib.suppress(FileNotFoundError):  # if an answer was lost
        retry(folder, partial(filesystem.rm_file, _join(root, name)), 'written')

  retry(folder, partial(filesystem.pipe_file, _join(root, UNFINISHED), b''), 'written')
  remove([name for name in old if _is_mark(name)])
  for name in new:
    retry(folder, partial(_put, filesystem, copy / name, _join(root, name)), 'written')
  remove([name for name in old if name not in new and not _is_mark(name) and name != UNFINISHED])
  remove([UNFINISHED])


def _put(filesystem: AbstractFileSystem, file: pathlib.Path, path: str) -> None:
  filesystem.put_file(str(file), path)
  size = filesystem.size(path)
  if size != file.stat().st_size:
    raise OSError(f'{path} has {size} bytes of {file.stat().st_size}')


def _is_mark(name: str) -> bool:
  return name in MARKS


def temporary_folder() -> pathlib.Path:
  """Makes a folder that is removed when the process ends."""
  path = tempfile.mkdtemp(prefix='lavit-')
  atexit.register(shutil.rmtree, path, ignore_errors=True)
  return pathlib.Path(path)


def _last_name(folder: str) -> str:
  return os.path.basename(folder.rstrip('/')) or 'weights'


def _join(root: str, name: str) -> str:
  return f'{root.rstrip("/")}/{name}'
