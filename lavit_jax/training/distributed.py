"""One job of several processes: how they connect, stop together, and share what one of them knows.

Every process runs the same program on the same mesh. What only one of them knows (SIGTERM, an error
of its own) reaches the others through the coordinator, which is process 0.
"""

from __future__ import annotations

import atexit
import contextlib
import glob
import importlib.util
import json
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from lavit_jax.errors import Unreachable, UserError
from lavit_jax.training.workdir import absolute

TERMINATED = 143  # exit status: 128 + SIGTERM
# What the libraries below JAX say when another process is gone.
CONNECTION_LOST = re.compile(
  r'Gloo [^\n]{,80}failed|Connection (closed|reset|refused)|NCCL [^\n]{,80}|Socket closed|'
  r'heartbeat timeout|(UNAVAILABLE|DEADLINE_EXCEEDED)[^\n]{,80}'
)
HEARTBEAT_TIMEOUT = 60  # seconds of silence after which a process counts as lost
LAST_TIMEOUT = 300  # seconds that whoever ends first waits for one that still writes: JAX's own
MESSAGE_BYTES = 1024  # of JSON, that each process may send to the others
SHARED_FOLDER_TIMEOUT = 10  # seconds in which a shared folder must show a new file everywhere


# --- Connecting ----------------------------------------------------------------------------------


def connect(
  coordinator: str | None = None,
  processes: int | None = None,
  process: int | None = None,
  timeout: int | None = None,
  last_timeout: int = LAST_TIMEOUT,
) -> None:
  """Joins the job, before anything else of JAX runs; a single process does nothing here.

  On TPU pods, GKE and SLURM, JAX knows who belongs to the job. Elsewhere the arguments say so, or
  for those that are None the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
  JAX_PROCESS_ID.

  Args:
    coordinator: HOST:PORT where process 0 listens.
    processes: how many there are.
    process: the number of this one.
    timeout: seconds after which the others end when one is silent (default: the variable
      JAX_HEARTBEAT_TIMEOUT, or 60).
    last_timeout: seconds that a process which is done waits for those that are not.

  Raises:
    UserError: some of the three are missing, or out of range.
    Unreachable: the others do not come.
  """
  coordinator = coordinator or os.environ.get('JAX_COORDINATOR_ADDRESS')
  processes = _from_environment('--processes', 'JAX_NUM_PROCESSES', processes)
  process = _from_environment('--process', 'JAX_PROCESS_ID', process)
  timeout = _from_environment('--timeout', 'JAX_HEARTBEAT_TIMEOUT', timeout) or HEARTBEAT_TIMEOUT
  automatic = in_a_cluster()
  if coordinator is None and processes is None and process is None:
    if not automatic:
      return
  else:
    _check_addresses(coordinator, processes, process, automatic)
  try:
    # Heartbeats go on while the last ones are waited for, so that one that is gone is noticed as at
    # any other time.
    jax.distributed.initialize(
      coordinator,
      processes,
      process,
      heartbeat_timeout_seconds=timeout,
      shutdown_timeout_seconds=last_timeout,
    )
  except (RuntimeError, ValueError) as error:
    reason = ' '.join(str(error).split())[:300]
    kind = UserError if isinstance(error, ValueError) else Unreachable
    raise kind(
      f'the {processes or ""} processes of the job did not meet at '
      f'{coordinator or "their coordinator"} ({reason}); start all of them, with the same '
      '--coordinator and --processes'
    ) from error


def _check_addresses(
  coordinator: str | None, processes: int | None, process: int | None, automatic: bool
) -> None:
  """Raises UserError if some are missing (and JAX cannot know them), or out of range."""
  if coordinator is None or processes is None or process is None:
    if not automatic:
      raise UserError(
        'a job of several processes needs --coordinator HOST:PORT, --processes N and --process I '
        '(or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID); there is '
        f'{coordinator}, {processes}, {process}'
      )
  elif not 0 <= process < processes:
    raise UserError(
      f'--process {process}: of {processes} processes the first is 0 and the last {processes - 1}'
    )
  if coordinator and not coordinator.rpartition(':')[2].isdigit():
    raise UserError(f'--coordinator {coordinator}: give host and port, such as 10.0.0.1:9876')


def in_a_cluster() -> bool:
  """Whether JAX knows who belongs to the job: in a SLURM step of several tasks, or on TPUs."""
  if 'SLURM_STEP_NODELIST' in os.environ and int(os.environ.get('SLURM_NTASKS', 1)) > 1:
    return True
  if os.environ.get('JAX_PLATFORMS', '').startswith('cpu'):
    return False
  has_tpus = bool(glob.glob('/dev/accel*') or glob.glob('/dev/vfio/[0-9]*'))
  return has_tpus and importlib.util.find_spec('libtpu') is not None


def _from_environment(option: str, variable: str, value: int | None) -> int | None:
  text = os.environ.get(variable)
  if value is not None or not text:
    return value
  if not text.isdigit():
    raise UserError(f'{variable}={text!r} is not a number (it stands for {option})')
  return int(text)


# --- Ending together -----------------------------------------------------------------------------


@contextlib.contextmanager
def exit_together() -> Iterator[None]:
  """Around the work of a job: a process that fails ends without waiting for the others.

  They notice its silence.

  Raises:
    Unreachable: in place of JAX's error when another process is gone. (Where no transfer was under
      way, JAX itself ends the process: 'another task died', status 134.)
  """
  try:
    yield
  except Exception as error:
    if jax.process_count() == 1:
      raise
    reported = _user_error(error)
    # This runs before JAX's own exit handler, which waits for all processes.
    atexit.register(_leave, reported.status if reported else 1)
    if reported is None or reported is error:
      raise
    raise reported from error


def _user_error(error: Exception) -> UserError | None:
  """The error as one for the user, if it is one, or if another process is gone."""
  if isinstance(error, UserError):
    return error
  lost = CONNECTION_LOST.search(f'{error} {error.__context__ or ""}')
  if lost is None:
    return None
  return Unreachable(
    f'process {jax.process_index()} of {jax.process_count()} has lost another one '
    f'({" ".join(lost[0].split())}); look at what the others say, and start all of them again: the '
    'run goes on from its last checkpoint'
  )


def _leave(status: int) -> None:
  if jax.process_index() == 0:
    time.sleep(1)  # its end ends the others, who may first report the same failure
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError):  # nobody reads any more
      stream.flush()
  os._exit(status)


class InterruptHandler:
  """SIGTERM as a question, which all processes of a job answer alike at the same point.

  Behind the program JAX agrees on that point: the first that no process has passed. So all
  processes must ask equally often.
  """

  def __init__(self):
    self.flag = threading.Event()
    self.previous: Any = None
    self.count = 0  # of the questions

  def __enter__(self) -> InterruptHandler:
    # In a job of several processes, jax.distributed listens.
    main_thread = threading.current_thread() is threading.main_thread()
    if main_thread and jax.process_count() == 1:
      self.previous = signal.signal(signal.SIGTERM, lambda *_: self.flag.set())
    return self

  def __exit__(self, *_) -> None:
    if self.previous is not None:
      signal.signal(signal.SIGTERM, self.previous)

  def requested(self) -> bool:
    """Whether to stop here; once it is True it stays so."""
    if jax.process_count() > 1 and not self.flag.is_set():
      self.count += 1
      if multihost_utils.reached_preemption_sync_point(self.count):
        self.flag.set()
    return self.flag.is_set()

  def check(self) -> None:
    """Ends the run while there is nothing to save yet."""
    if self.requested():
      raise SystemExit(TERMINATED)


# --- Exchanging ----------------------------------------------------------------------------------


def to_host(tree: Any) -> Any:
  """Fetches the arrays of a tree one after the other; all processes must call this.

  Returns:
    The tree as numpy arrays on process 0; on the others with None in their place.
  """

  def fetch(x):
    if jax.process_count() > 1:
      x = multihost_utils.process_allgather(x, tiled=True)
    else:
      x = jax.device_get(x)
    return np.asarray(x) if jax.process_index() == 0 else None

  return jax.tree.map(fetch, tree)


def gather(message: Mapping[str, Any]) -> list[dict[str, Any]]:
  """The messages of all processes, in their order; all must call this.

  Args:
    message: of this process, at most a kilobyte as JSON.

  Raises:
    ValueError: it is larger.
  """
  if jax.process_count() == 1:
    return [dict(message)]
  text = json.dumps(message).encode()
  if len(text) > MESSAGE_BYTES:
    raise ValueError(f'{len(text)} bytes are more than the {MESSAGE_BYTES} of a message')
  padded = np.frombuffer(text.ljust(MESSAGE_BYTES), np.uint8)
  messages = np.asarray(multihost_utils.process_allgather(padded))
  return [json.loads(row.tobytes()) for row in messages]


def check_shared(folder: epath.Path) -> None:
  """Checks that all processes see the same folder; all must call this.

  Process 0 makes the folder. A single process does nothing here.

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
  deadline = time.monotonic() + SHARED_FOLDER_TIMEOUT
  while not probe.exists() and time.monotonic() < deadline:
    time.sleep(0.5)
  messages = gather({'seen': probe.exists(), 'host': socket.gethostname()[:200]})
  if jax.process_index() == 0:
    probe.unlink()
  blind = []
  for process, message in enumerate(messages):
    if not message['seen']:
      blind.append(f'{process} ({message["host"]})')
  if blind:
    more = f' and {len(blind) - 5} more' if len(blind) > 5 else ''
    raise UserError(
      f'what process 0 ({messages[0]["host"]}) writes to {absolute(folder)} is not seen '
      f'by process {", ".join(blind[:5])}{more}; --workdir must be one folder that all machines '
      'share, or gs://BUCKET/PATH'
    )


def wait_for_all(point: str) -> None:
  """Returns when all processes have come to this point of the program."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(point)
