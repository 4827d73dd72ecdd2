"""One job of many processes: how they find each other, stop together, and what of their arrays the first one writes.

Every process runs the same program on the same mesh. What only one of them knows (SIGTERM, an error of its own) reaches the others
through the coordinator, which is process 0.
"""

from __future__ import annotations

import atexit
import contextlib
import glob
import importlib.util
import json
import os
import pathlib
import re
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from lavit_jax.errors import Unreachable, UserError

TERMINATED = 143  # 128 + SIGTERM
LOST = re.compile(
  r'Gloo [^\n]{,80}failed|Connection (closed|reset|refused)|NCCL [^\n]{,80}|Socket closed|heartbeat timeout|'
  r'(UNAVAILABLE|DEADLINE_EXCEEDED)[^\n]{,80}'
)
TIMEOUT = 60  # seconds of silence after which a process is given up
ROOM = 1024  # bytes of what one process tells the others
PATIENCE = 10  # seconds that a shared folder has to show a new file everywhere


def connect(
  coordinator: str | None = None,
  processes: int | None = None,
  process: int | None = None,
  timeout: int | None = None,
) -> None:
  """Joins the job, before anything else of JAX runs; a process on its own does nothing here.

  TPU pods, GKE and SLURM say by themselves who belongs to the job. Elsewhere the arguments do, or for those that are None the variables
  JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.

  Args:
    coordinator: HOST:PORT where process 0 listens.
    processes, process: how many there are, and which this is.
    timeout: seconds after which the others end when one of them is silent (default: JAX_HEARTBEAT_TIMEOUT, or 60).

  Raises:
    UserError: some of the three are missing or make no sense.
    Unreachable: the others do not come.
  """
  coordinator = coordinator or os.environ.get('JAX_COORDINATOR_ADDRESS')
  processes = _number('--processes', 'JAX_NUM_PROCESSES', processes)
  process = _number('--process', 'JAX_PROCESS_ID', process)
  timeout = _number('--timeout', 'JAX_HEARTBEAT_TIMEOUT', timeout) or TIMEOUT
  given = (coordinator, processes, process)
  if given == (None,) * 3 and not in_a_cluster():
    return
  if given != (None,) * 3:
    if None in given and not in_a_cluster():
      raise UserError(
        'a job of several processes needs --coordinator HOST:PORT, --processes N and --process I (or JAX_COORDINATOR_ADDRESS, '
        f'JAX_NUM_PROCESSES, JAX_PROCESS_ID); there is {coordinator}, {processes}, {process}'
      )
    if None not in given and not 0 <= process < processes:
      raise UserError(
        f'--process {process}: of {processes} processes the first is 0 and the last {processes - 1}'
      )
    if coordinator and not coordinator.rpartition(':')[2].isdigit():
      raise UserError(f'--coordinator {coordinator}: give host and port, such as 10.0.0.1:9876')
  try:
    jax.distributed.initialize(
      coordinator,
      processes,
      process,
      heartbeat_timeout_seconds=timeout,
      shutdown_timeout_seconds=timeout,
    )
  except (RuntimeError, ValueError) as error:
    reason = ' '.join(str(error).split())[:300]
    kind = UserError if isinstance(error, ValueError) else Unreachable
    raise kind(
      f'the {processes or ""} processes of the job did not meet at {coordinator or "their coordinator"} ({reason}); '
      'start all of them, with the same --coordinator and --processes'
    ) from error


@contextlib.contextmanager
def exit_together() -> Iterator[None]:
  """Around the work of a job: a process that fails ends without waiting for the others, who learn of it by its silence.

  Raises:
    Unreachable: in place of what JAX says when another process is gone. (Where no transfer was under way JAX itself ends the process:
      'another task died', status 134.)
  """
  try:
    yield
  except Exception as error:
    if jax.process_count() == 1:
      raise
    told = error if isinstance(error, UserError) else None
    if told is None and (lost := LOST.search(f'{error} {error.__context__ or ""}')):
      told = Unreachable(
        f'process {jax.process_index()} of {jax.process_count()} has lost another one ({" ".join(lost[0].split())}); look '
        'at what the others say, and start all of them again: the run goes on from its last checkpoint'
      )
    atexit.register(_leave, told.status if told else 1)  # runs before JAX's, which waits for all
    if told is None or told is error:
      raise
    raise told from error


def _leave(status: int) -> None:
  if jax.process_index() == 0:  # its end ends the others: who fails alike may say so first
    time.sleep(1)
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError):  # nobody reads any more
      stream.flush()
  os._exit(status)


def in_a_cluster() -> bool:
  """Whether JAX can tell by itself who belongs to the job: a step of SLURM with several tasks, or a machine with TPUs."""
  if 'SLURM_STEP_NODELIST' in os.environ and int(os.environ.get('SLURM_NTASKS', 1)) > 1:
    return True
  cpu = os.environ.get('JAX_PLATFORMS', '').startswith('cpu')
  return (
    not cpu
    and bool(glob.glob('/dev/accel*') or glob.glob('/dev/vfio/[0-9]*'))
    and importlib.util.find_spec('libtpu') is not None
  )


def _number(option: str, variable: str, value: int | None) -> int | None:
  text = os.environ.get(variable)
  if value is not None or not text:
    return value
  if not text.isdigit():
    raise UserError(f'{variable}={text!r} is no number (it stands for {option})')
  return int(text)


class InterruptHandler:
  """SIGTERM as a question that is asked in every phase, and that all processes of a job answer alike, at the same point of the program.

  Which point it is, JAX settles behind the program: the first that no process has passed. So all must ask equally often.
  """

  def __enter__(self):
    self.flag = threading.Event()
    self.previous, self.asked = None, 0
    if (
      threading.current_thread() is threading.main_thread() and jax.process_count() == 1
    ):  # else jax.distributed listens
      self.previous = signal.signal(signal.SIGTERM, lambda *_: self.flag.set())
    return self

  def __exit__(self, *_):
    if self.previous is not None:
      signal.signal(signal.SIGTERM, self.previous)

  def requested(self) -> bool:
    """Whether to stop here; once it is True it stays so."""
    if jax.process_count() > 1 and not self.flag.is_set():
      self.asked += 1
      if multihost_utils.reached_preemption_sync_point(self.asked):
        self.flag.set()
    return self.flag.is_set()

  def check(self) -> None:
    """Ends the run while there is nothing to save yet."""
    if self.requested():
      raise SystemExit(TERMINATED)


def to_host(tree):
  """The arrays of a tree as numpy on process 0, one after the other; None in their place on the others, which must call it too."""

  def fetch(x):
    x = (
      multihost_utils.process_allgather(x, tiled=True)
      if jax.process_count() > 1
      else jax.device_get(x)
    )
    return np.asarray(x) if jax.process_index() == 0 else None

  return jax.tree.map(fetch, tree)


def gather(values: dict) -> list[dict]:
  """What each process gives, in their order; all must call it. A kilobyte of JSON at most."""
  if jax.process_count() == 1:
    return [values]
  text = json.dumps(values).encode()
  if len(text) > ROOM:
    raise ValueError(f'{len(text)} bytes are more than the {ROOM} that there is room for')
  rows = multihost_utils.process_allgather(np.frombuffer(text.ljust(ROOM), np.uint8))
  return [json.loads(row.tobytes()) for row in np.asarray(rows)]


def check_shared(folder: pathlib.Path) -> None:
  """Makes the folder, where there are several processes, and looks whether they all have the same one; all must call it.

  Raises:
    UserError: on all of them, with the names of those that do not see what process 0 writes there.
  """
  if jax.process_count() == 1:
    return
  name = gather({'probe': f'.probe-{secrets.token_hex(8)}'})[0]['probe']
  probe = folder / name
  if jax.process_index() == 0:
    folder.mkdir(parents=True, exist_ok=True)
    probe.touch()
  wait_for_all('a probe is written')
  deadline = time.monotonic() + PATIENCE
  while not (seen := probe.exists()) and time.monotonic() < deadline:
    time.sleep(0.5)
  told = gather({'seen': seen, 'host': socket.gethostname()[:200]})
  if jax.process_index() == 0:
    probe.unlink()
  if blind := [f'{i} ({each["host"]})' for i, each in enumerate(told) if not each['seen']]:
    raise UserError(
      f'what process 0 ({told[0]["host"]}) writes to {folder.absolute()} is not seen by process {", ".join(blind[:5])}'
      f'{f" and {len(blind) - 5} more" if len(blind) > 5 else ""}; --workdir must be one folder that all machines share'
    )


def wait_for_all(what: str) -> None:
  """Returns when all processes have come here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)
