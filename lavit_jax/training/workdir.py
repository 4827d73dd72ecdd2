"""A work directory on a disk or in a store: where what a run writes goes.

    WORKDIR/checkpoints/, .lock                   written in their place, by all processes
    WORKDIR/metrics.jsonl, tensorboard/, ...      files that grow; process 0 alone writes them
    WORKDIR/export/                               copied when it is whole (weights/store/remote.py)

An object of a store is written as a whole: nothing can be appended to it, and no folder renamed. So
process 0 writes the files that grow to a folder on its machine, its records, and `Mirror` copies
those that have changed, every half minute and at the end; metrics also before each checkpoint and
after each evaluation. So a checkpoint is never ahead of the metrics: a killed run loses records of
its last half minute, and of the metrics only lines of steps that are made again.

The store is Google's, gs://: Orbax 0.12.8 writes arrays by TensorStore's driver for that one or as
files of this machine, and knows no other (findings/orbax-stores.sh).
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import threading
import time
from collections.abc import Callable
from functools import partial

import fsspec.config
import jax
from etils import epath
from fsspec import AbstractFileSystem

from lavit_jax.data.paths import filesystem_of, is_remote, retry
from lavit_jax.errors import UserError
from lavit_jax.weights.store.remote import temporary_folder

SCHEME = 'gs://'
INTERVAL = 30.0  # seconds at least between two copies of what has changed
MAX_SHARE = 0.05  # of the time, that is spent on copying meanwhile
# What a start takes up from those before it.
CONTINUED = ('metrics.jsonl', 'goodput.jsonl', '.goodput_alive')


def open_workdir(workdir: str | os.PathLike[str]) -> epath.Path:
  """The path of a work directory, which need not be there.

  Args:
    workdir: a local path, or gs://BUCKET/PATH.

  Raises:
    UserError: it is in a store that checkpoints cannot be written to, or the package for it is
      missing.
  """
  text = os.fspath(workdir).removeprefix('file://')
  if not is_remote(text):
    return epath.Path(text)
  bucket, _, path = text.removeprefix(SCHEME).partition('/')
  if not text.startswith(SCHEME) or not bucket or not path.strip('/'):
    raise UserError(
      f'--workdir {text}: checkpoints are written to a folder of this machine or to '
      'gs://BUCKET/PATH; give one of these'
    )
  # gcsfs would remember forever what it has listed, and miss what other processes write.
  fsspec.config.conf.setdefault('gcs', {})['use_listings_cache'] = False
  filesystem_of(text)
  return epath.Path(text)


def is_store(path: str | os.PathLike[str]) -> bool:
  """Whether a path is in a store, where objects are written as a whole and not renamed."""
  return is_remote(os.fspath(path))


def absolute(workdir: epath.Path) -> epath.Path:
  """The path from the root of this machine, or the address in a store."""
  return workdir if is_store(workdir) else epath.Path(os.path.abspath(workdir))


def records_folder(workdir: epath.Path) -> pathlib.Path:
  """The folder on this machine for the files that grow: the work directory itself, on a disk."""
  return temporary_folder() if is_store(workdir) else pathlib.Path(workdir)


class Mirror:
  """Copies the records of process 0 to the store while its block runs; on a disk it does nothing.

  When the block begins, it fetches those that this start takes up.

  Args:
    workdir: of the run.
    folder: its `records_folder`.
    owned: whether the work directory is still this run's; nothing is copied where it is not.
  """

  def __init__(self, workdir: epath.Path, folder: pathlib.Path, owned: Callable[[], bool]):
    self._workdir = workdir
    self._folder = folder
    self._owned = owned
    self._active = is_store(workdir) and jax.process_index() == 0
    self._copied: dict[pathlib.Path, tuple[int, int]] = {}  # size and time of what is in the store
    self._copying = threading.Lock()
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._copy_often, daemon=True)

  def __enter__(self) -> Mirror:
    if self._active:
      for name in CONTINUED:
        url = self._url(name)
        with contextlib.suppress(FileNotFoundError):
          content = retry(url, partial(self._filesystem.cat_file, url))
          assert isinstance(content, bytes)
          (self._folder / name).write_bytes(content)
      self._thread.start()
    return self

  def __exit__(self, kind, *_) -> None:
    self._stop.set()
    if self._active:
      self._thread.join()
      # After an error that is the one to report.
      with contextlib.suppress(*([OSError, UserError] if kind else [])):
        self._copy_changed(everything=True)

  def copy(self) -> None:
    """Copies what a later start takes up, as far as it has changed; returns when it is there.

    Raises:
      Unreachable: the store does not answer.
      UserError: it refuses.
    """
    if self._active:
      self._copy_changed(everything=False)

  def _copy_changed(self, everything: bool) -> None:
    if not self._owned():
      return
    with self._copying:
      for file in sorted(self._folder.rglob('*')):
        continued = file.name in CONTINUED and file.parent == self._folder
        if file.is_file() and file.suffix != '.tmp' and (everything or continued):
          self._copy_if_changed(file)

  def _copy_often(self) -> None:
    wait = INTERVAL
    while not self._stop.wait(wait):
      began = time.monotonic()
      with contextlib.suppress(OSError, UserError):  # the next checkpoint reports it
        self._copy_changed(everything=True)
      wait = max(INTERVAL, (time.monotonic() - began) / MAX_SHARE)

  def _copy_if_changed(self, file: pathlib.Path) -> None:
    stat = file.stat()
    state = (stat.st_size, stat.st_mtime_ns)
    if self._copied.get(file) != state:
      url = self._url(file.relative_to(self._folder).as_posix())
      content = file.read_bytes()  # in one piece: the file may grow meanwhile
      retry(url, partial(self._filesystem.pipe_file, url, content), 'written')
      self._copied[file] = state

  @property
  def _filesystem(self) -> AbstractFileSystem:
    return filesystem_of(os.fspath(self._workdir))[0]

  def _url(self, name: str) -> str:
    return os.fspath(self._workdir / name)
