"""The file of a lock, on a disk or in a store: created by one, replaced as a whole.

Both kinds have the same methods. On a disk a file is created exclusively, and replaced and set
aside by renames. In a store each write names the generation of the object that it replaces, 'none'
among them, and the store refuses it if there is another one by then.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import secrets
from typing import Any, Protocol

import tensorstore as ts
from etils import epath

from lavit_jax.data.paths import retry
from lavit_jax.training.workdir import is_store

NAME = '.lock'
Content = dict[str, Any]  # JSON


class LockFile(Protocol):
  """What a lock does with its file."""

  def prepare(self) -> None:
    """Makes the work directory.

    Raises:
      FileExistsError: a file is in its place.
    """
    ...

  def read(self) -> Content:
    """The content; {} if there is none, or it is being written."""
    ...

  def create(self, content: Content) -> bool:
    """Writes the file unless there is one; whether it did."""
    ...

  def replace(self, content: Content) -> None:
    """Writes the file anew, which is of the run of `content` or gone.

    Raises:
      OSError: the disk cannot be written.
      UserError: the store cannot.
    """
    ...

  def remove(self, content: Content) -> None:
    """Removes the file if it is of the run of `content`."""
    ...


def lock_file(workdir: epath.Path) -> LockFile:
  """The file of the lock of a work directory."""
  return _StoreFile(workdir / NAME) if is_store(workdir) else _DiskFile(workdir / NAME)


class _DiskFile:
  def __init__(self, path: epath.Path):
    self.path = pathlib.Path(path)

  def prepare(self) -> None:
    self.path.parent.mkdir(parents=True, exist_ok=True)

  def read(self) -> Content:
    return _read(self.path)

  def create(self, content: Content) -> bool:
    try:
      descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
      return False
    with os.fdopen(descriptor, 'w') as file:
      file.write(json.dumps(content))
    return True

  def replace(self, content: Content) -> None:
    scratch = self.path.with_name(f'{NAME}.{content["run"]}')
    scratch.write_text(json.dumps(content))
    os.replace(scratch, self.path)  # never half-written

  def remove(self, content: Content) -> None:
    # By a rename, so that of two runs that remove a dead lock one learns that it was late.
    aside = self.path.with_name(f'{NAME}.{secrets.token_hex(4)}.dead')
    try:
      os.rename(self.path, aside)
    except FileNotFoundError:  # another run was faster
      return
    if _read(aside).get('run') != content.get('run'):  # it is a new run's, which was faster
      with contextlib.suppress(OSError):
        os.link(aside, self.path)
    aside.unlink(missing_ok=True)


class _StoreFile:
  def __init__(self, path: epath.Path):
    self.url = os.fspath(path)
    self.key = path.name
    self.store = ts.KvStore.open(f'{os.fspath(path.parent)}/').result()

  def prepare(self) -> None:
    pass  # a store has no folders

  def read(self) -> Content:
    return _parse(self._read().value)

  def create(self, content: Content) -> bool:
    now = self._read()
    if now.state == 'missing' and self._write(content, now.stamp.generation):
      return True
    return self.read().get('run') == content['run']  # its own, if the first answer was lost

  def replace(self, content: Content) -> None:
    now = self._read()
    if now.state == 'missing' or _parse(now.value).get('run') == content['run']:
      self._write(content, now.stamp.generation)

  def remove(self, content: Content) -> None:
    now = self._read()
    if now.state == 'value' and _parse(now.value).get('run') == content.get('run'):
      self._write(None, now.stamp.generation)

  def _read(self) -> ts.KvStore.ReadResult:
    return retry(self.url, lambda: self.store.read(self.key).result())

  def _write(self, content: Content | None, generation: bytes) -> bool:
    """Writes or removes the object if it has the generation; whether it had."""
    value = None if content is None else json.dumps(content).encode()
    stamp = retry(
      self.url,
      lambda: self.store.write(self.key, value, if_equal=generation).result(),
      'written',
    )
    return stamp.generation != b''


def _read(path: pathlib.Path) -> Content:
  try:
    return _parse(path.read_bytes())
  except OSError:  # not there
    return {}


def _parse(text: bytes) -> Content:
  try:
    content = json.loads(text)
  except ValueError:  # being written
    return {}
  return content if isinstance(content, dict) else {}
