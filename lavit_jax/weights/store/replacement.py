"""Replaces a folder as a whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator

from lavit_jax.errors import UserError
from lavit_jax.weights.store.disk import disk_full
from lavit_jax.weights.store.metadata import CONFIG, read_config

REMEDY = 'free some space or choose another folder'


@contextlib.contextmanager
def replace_folder(folder: str | os.PathLike, mark: str = CONFIG) -> Iterator[pathlib.Path]:
  """Makes a new folder, which replaces `folder` when the block ends without an error.

  The new folder has a temporary name beside `folder` until then. What a killed run left under that
  name is removed.

  Args:
    folder: to replace. It may be missing or empty; otherwise it must contain the file `mark`.
    mark: a file that identifies folders that this package wrote.

  Yields:
    The new folder.

  Raises:
    UserError: `folder` has other content, cannot be written, or the disk is full. It is unchanged.
  """
  folder = pathlib.Path(folder).resolve()  # the target of a link, not the link
  check_destination(folder, mark)
  scratch = folder.with_name(f'.{folder.name}.partial')
  try:
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    yield scratch
    swap_folders(scratch, folder)
  except OSError as error:
    raise UserError(f'cannot write {folder}: {error.strerror or error}; {REMEDY}') from error
  except ValueError as error:  # TensorStore's, for a full disk among other things
    if not disk_full(error):
      raise
    raise UserError(f'cannot write {folder}: No space left on device; {REMEDY}') from error
  finally:
    shutil.rmtree(scratch, ignore_errors=True)


def check_destination(folder: pathlib.Path, mark: str = CONFIG) -> None:
  """Checks that a folder may be replaced: it is missing, empty, or has the file `mark`.

  Raises:
    UserError: it has other content.
  """
  if not folder.exists():
    return
  empty = folder.is_dir() and not any(folder.iterdir())
  if empty:
    return
  if not folder.is_dir() or not (folder / mark).exists():
    raise UserError(
      f'{folder} exists and is not a checkpoint of lavit_jax; choose another folder, '
      'or remove it first'
    )
  if mark == CONFIG:
    read_config(folder)  # raises for another program's config.json


def swap_folders(scratch: pathlib.Path, folder: pathlib.Path) -> None:
  """Renames the finished folder to its final name, and removes the one that had the name.

  The old folder is removed last: if the renaming fails, it is put back.
  """
  if not folder.exists():
    os.rename(scratch, folder)
    return
  old = folder.with_name(f'.{folder.name}.old')
  shutil.rmtree(old, ignore_errors=True)
  os.rename(folder, old)
  try:
    os.rename(scratch, folder)
  except OSError:
    os.rename(old, folder)
    raise
  shutil.rmtree(old)
