"""A work directory belongs to one run at a time.

    WORKDIR/.lock     {"run": a random name, "host", "pid", "began", "beat": a number that goes up}

The first process of a job has it; its thread counts `beat` up every few seconds. Whoever finds a
lock looks whether its process lives, where it is
of the same machine, and else whether it still beats. So it works on shared disks, whatever their
clocks say, and a lock whose run was
killed is taken over.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import secrets
import socket
import threading
import time

import jax

from lavit_jax.errors import UserError
from lavit_jax.training import distributed

BEAT = 10.0  # seconds between two beats
SILENCE = 60.0  # seconds without one after which a run on another machine is taken for dead
LOOK = 2.0  # seconds between two looks at a lock that may be dead


class WorkdirLock:
  """Holds a work directory while its block runs. All processes of a job enter it, and leave it.

  Raises:
    UserError: another run is at work in the directory.
  """

  def __init__(self, workdir: pathlib.Path):
    self.file = pathlib.Path(workdir) / '.lock'
    self.run = secrets.token_hex(8)
    self.stop = threading.Event()
    self.thread: threading.Thread | None = None
    self.lost = ''

  def __enter__(self):
    watched = Watched(self.file)
    while True:
      state = self._try(watched) if jax.process_index() == 0 else {}
      state = {
        key: value if value is True else value[:800] for key, value in state.items()
      }  # gather has room for a kilobyte
      state = distributed.gather(state)[0]  # the others learn it, all the while
      if refusal := state.get('refused'):
        raise UserError(refusal)
      if state.get('held'):
        break
      if 'waiting' in state and jax.process_index() == 0:
        print(state['waiting'], flush=True)
      time.sleep(LOOK)
    if jax.process_index() == 0:
      self.thread = threading.Thread(target=self._beat, daemon=True)
      self.thread.start()
    return self

  def __exit__(self, *_):
    self.stop.set()
    if self.thread is not None:
      self.thread.join()
      if not self.lost and _read(self.file).get('run') == self.run:
        with contextlib.suppress(OSError):
          self.file.unlink()

  def check(self) -> None:
    """Raises UserError, on the first process, if another run has taken the directory over while
    this one was silent.
    """
    if self.lost:
      raise UserError(self.lost)

  def _try(self, watched: Watched) -> dict:
    """One try: {'held': True}, {'refused': why}, or {} and perhaps 'waiting', what to say."""
    try:
      self.file.parent.mkdir(parents=True, exist_ok=True)
      descriptor = os.open(self.file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
      if watched.is_alive():
        return {'refused': watched.refusal()}
      if watched.is_dead():
        watched.remove()
        return {}
      if not watched.told:
        watched.told = True
        return {
          'waiting': f'{self.file} is of a run on {watched.host}, which may have been killed: waiting up to {SILENCE:.0f} seconds for a sign of it'
        }
      return {}
    with os.fdopen(descriptor, 'w') as file:
      file.write(self._text(0))
    return {'held': True}

  def _text(self, beat: int) -> str:
    return json.dumps(
      dict(run=self.run, host=_machine(), pid=os.getpid(), began=_began(os.getpid()), beat=beat)
    )

  def _beat(self) -> None:
    beat = 0
    while not self.stop.wait(BEAT):
      beat += 1
      now = _read(self.file)
      if now and now.get('run') != self.run:
        self.lost = (
          f'{self.file} is now of process {now.get("pid")} on {_name(now)}: another run has taken this work directory over, and '
          'this one ends; choose another --workdir'
        )
        return
      try:
        scratch = self.file.with_name(f'.lock.{self.run}')
        scratch.write_text(self._text(beat))
        os.replace(scratch, self.file)  # never half-written
      except OSError:  # a full or absent disk: saving tells
        pass


class Watched:
  """A lock that stands there, as one looks at it again and again."""

  def __init__(self, file: pathlib.Path):
    self.file, self.told = file, False
    self.seen, self.since = _read(file), time.monotonic()

  @property
  def host(self) -> str:
    return _name(self.seen)

  def is_alive(self) -> bool:
    """Whether a process of this machine has it, or it beats."""
    now = _read(self.file)
    if now.get('run') != self.seen.get('run'):  # of a third run, or being written
      self.seen, self.since = now, time.monotonic()
    beats = bool(self.seen) and now.get('beat') != self.seen.get('beat')
    return beats or (_is_here(now) and _lives(now))

  def is_dead(self) -> bool:
    """Whether a process of this machine had it that is gone, or it has been silent for long."""
    if _is_here(self.seen):
      return not _lives(self.seen)
    return time.monotonic() - self.since > SILENCE

  def remove(self) -> None:
    """Takes a dead lock away; by a rename, so that of two who do it one learns that it was late."""
    aside = self.file.with_name(f'.lock.{secrets.token_hex(4)}.dead')
    try:
      os.rename(self.file, aside)
    except FileNotFoundError:  # somebody was faster
      return
    if _read(aside).get('run') != self.seen.get('run'):  # a new run's, which was faster
      with contextlib.suppress(OSError):
        os.link(aside, self.file)
    aside.unlink(missing_ok=True)
    self.seen, self.since = {}, time.monotonic()

  def refusal(self) -> str:
    return (
      f'{self.file.parent} is in use: process {self.seen.get("pid")} on {self.host} is running there ({self.file}); choose another '
      '--workdir, or stop that run first'
    )


def refuse_if_running(workdir) -> None:
  """Raises UserError, early, where it is plain that a run of this machine is at work in the
  directory.
  """
  watched = Watched(pathlib.Path(workdir) / '.lock')
  if watched.seen and watched.is_alive():
    raise UserError(watched.refusal())


def _read(file: pathlib.Path) -> dict:
  try:
    told = json.loads(file.read_text())
  except (OSError, ValueError):  # not there, or being written
    return {}
  return told if isinstance(told, dict) else {}


def _machine() -> list[str]:
  """What tells this machine, since it was started, and this container from others, as far as /proc
  says.
  """
  return [
    socket.gethostname(),
    _line('/proc/sys/kernel/random/boot_id'),
    _link('/proc/self/ns/pid'),
  ]


def _is_here(told: dict) -> bool:
  return told.get('host') == _machine()


def _name(told: dict) -> str:
  return (told.get('host') or ['an unknown machine'])[0]


def _lives(told: dict) -> bool:
  """Whether the process of a lock of this machine lives; its number may be another's by now."""
  try:
    os.kill(told['pid'], 0)
  except ProcessLookupError:
    return False
  except PermissionError:  # somebody else's
    pass
  return told.get('began') == _began(told['pid'])


def _began(pid: int) -> str:
  """When a process began, in ticks since the machine did; '' where /proc does not say, or for a
  zombie.
  """
  fields = _line(f'/proc/{pid}/stat').rpartition(')')[2].split()
  return fields[19] if len(fields) > 19 and fields[0] not in 'ZX' else ''


def _line(path: str) -> str:
  try:
    return pathlib.Path(path).read_text().strip()
  except OSError:
    return ''


def _link(path: str) -> str:
  try:
    return os.readlink(path)
  except OSError:
    return ''
