"""A work directory belongs to one run at a time.

    WORKDIR/.lock     {"run": a random name, "host", "pid", "began", "beat": a number that goes up}

The first process of a job holds the lock; its thread increments `beat` every few seconds. Another
run that finds a lock checks whether its process lives, if that is on the same machine, and
otherwise whether it still beats. So it works on shared disks and in stores, whatever their clocks
say, and takes over the lock of a killed run.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from lavit_jax.errors import UserError
from lavit_jax.training import distributed
from lavit_jax.training.lock_file import NAME, Content, lock_file
from lavit_jax.training.workdir import open_workdir

BEAT_INTERVAL = 10.0  # seconds between two beats
SILENCE = 60.0  # seconds without a beat after which a run on another machine counts as dead
POLL_INTERVAL = 2.0  # seconds between two checks of a lock that may be dead
MAX_MESSAGE = 800  # characters; `distributed.gather` has room for a kilobyte


class WorkdirLock:
  """Holds a work directory while its block runs. All processes of a job enter and leave it.

  Raises:
    UserError: another run is at work in the directory.
  """

  def __init__(self, workdir: str | os.PathLike[str]):
    self.workdir = open_workdir(workdir)
    self.file = lock_file(self.workdir)
    self.run = secrets.token_hex(8)
    self.stop = threading.Event()
    self.thread: threading.Thread | None = None
    self.lost = ''  # the error, once another run has taken over

  def __enter__(self) -> WorkdirLock:
    other = OtherLock(self.workdir)
    while True:
      attempt = self._try(other) if jax.process_index() == 0 else {}
      attempt = distributed.gather(attempt)[0]
      if 'refused' in attempt:
        raise UserError(attempt['refused'])
      if attempt.get('acquired'):
        break
      if 'waiting' in attempt and jax.process_index() == 0:
        print(attempt['waiting'], flush=True)
      time.sleep(POLL_INTERVAL)
    if jax.process_index() == 0:
      self.thread = threading.Thread(target=self._beat, daemon=True)
      self.thread.start()
    return self

  def __exit__(self, *_) -> None:
    self.stop.set()
    if self.thread is None:
      return
    self.thread.join()
    if not self.lost:
      with contextlib.suppress(OSError, UserError):
        self.file.remove(self._content(0))

  def check(self) -> None:
    """Raises UserError on the first process if another run has taken over the directory.

    That happens when this run was silent for long.
    """
    if self.lost:
      raise UserError(self.lost)

  def _try(self, other: OtherLock) -> dict[str, Any]:
    """Tries once: {'acquired': True}, {'refused': why}, {'waiting': message}, or {}."""
    try:
      self.file.prepare()
    except FileExistsError:
      return {'refused': f'{self.workdir}: Not a directory; choose another --workdir'}
    if self.file.create(self._content(0)):
      return {'acquired': True}
    if other.is_alive():
      return {'refused': other.refusal()[:MAX_MESSAGE]}
    if other.is_dead():
      other.remove()
    elif not other.reported:
      other.reported = True
      return {'waiting': other.waiting()[:MAX_MESSAGE]}
    return {}

  def _content(self, beat: int) -> Content:
    return dict(
      run=self.run, host=_machine(), pid=os.getpid(), began=_start_time(os.getpid()), beat=beat
    )

  def _beat(self) -> None:
    beat = 0
    while not self.stop.wait(BEAT_INTERVAL):
      beat += 1
      try:
        now = self.file.read()
      except UserError:  # a store that does not answer; saving reports it
        continue
      if now and now.get('run') != self.run:
        self.lost = (
          f'{self.workdir / NAME} is now of process {now.get("pid")} on {_host_name(now)}: another '
          'run has taken this work directory over, and this one ends; choose another --workdir'
        )
        return
      with contextlib.suppress(OSError, UserError):  # a full or absent disk; saving reports it
        self.file.replace(self._content(beat))


class OtherLock:
  """A lock of another run, which is checked again and again."""

  def __init__(self, workdir: epath.Path):
    self.workdir = workdir
    self.file = lock_file(workdir)
    self.reported = False  # whether the user knows of the waiting
    self._remember(self.file.read())

  def _remember(self, content: Content) -> None:
    self.content = content
    self.since = time.monotonic()

  def is_alive(self) -> bool:
    """Whether a process of this machine holds it, or it beats."""
    now = self.file.read()
    if now.get('run') != self.content.get('run'):  # of a third run, or being written
      self._remember(now)
    beats = bool(self.content) and now.get('beat') != self.content.get('beat')
    return beats or (_is_on_this_machine(now) and _is_running(now))

  def is_dead(self) -> bool:
    """Whether its process on this machine is gone, or it has been silent for long."""
    if _is_on_this_machine(self.content):
      return not _is_running(self.content)
    return time.monotonic() - self.since > SILENCE

  def remove(self) -> None:
    """Removes a dead lock, unless another run has done so and has its own there by now."""
    self.file.remove(self.content)
    self._remember({})

  def refusal(self) -> str:
    """The error of a run that finds it alive."""
    return (
      f'{self.workdir} is in use: process {self.content.get("pid")} on '
      f'{_host_name(self.content)} is running there ({self.workdir / NAME}); choose another '
      '--workdir, or stop that run first'
    )

  def waiting(self) -> str:
    """The message of a run that finds it silent."""
    return (
      f'{self.workdir / NAME} is of a run on {_host_name(self.content)}, which may have been '
      f'killed: waiting up to {SILENCE:.0f} seconds for a sign of it'
    )


def refuse_if_running(workdir: str | os.PathLike[str]) -> None:
  """Raises UserError, early, where a run of this machine is clearly at work in the directory."""
  other = OtherLock(open_workdir(workdir))
  if other.content and other.is_alive():
    raise UserError(other.refusal())


def _machine() -> list[str]:
  """Identifies this machine since its start, and this container, as far as /proc tells."""
  boot = _read_line('/proc/sys/kernel/random/boot_id')
  return [socket.gethostname(), boot, _read_link('/proc/self/ns/pid')]


def _is_on_this_machine(content: Mapping[str, Any]) -> bool:
  return content.get('host') == _machine()


def _host_name(content: Mapping[str, Any]) -> str:
  return (content.get('host') or ['an unknown machine'])[0]


def _is_running(content: Mapping[str, Any]) -> bool:
  """Whether the process of a lock of this machine runs; its number may be another's by now."""
  try:
    os.kill(content['pid'], 0)
  except ProcessLookupError:
    return False
  except PermissionError:  # another user's
    pass
  return content.get('began') == _start_time(content['pid'])


def _start_time(pid: int) -> str:
  """When a process began, in ticks since the machine did; '' for a zombie, or without /proc."""
  fields = _read_line(f'/proc/{pid}/stat').rpartition(')')[2].split()
  return fields[19] if len(fields) > 19 and fields[0] not in 'ZX' else ''


def _read_line(path: str) -> str:
  try:
    return pathlib.Path(path).read_text().strip()
  except OSError:
    return ''


def _read_link(path: str) -> str:
  try:
    return os.readlink(path)
  except OSError:
    return ''
