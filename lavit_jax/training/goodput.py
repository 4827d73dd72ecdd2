"""Goodput: the share of the wall time of a run that went into steps which count.

    WORKDIR/goodput.jsonl   what each start of the run did until when
    WORKDIR/.goodput_alive  when the process that is at work was last alive, in Unix seconds

A start appends a line when it has the work directory, when it begins and ends to restore and to
compile, at each report, and after each save and evaluation:

    {"start": 2, "at": 1e9, "step": 40, "phase": "step", "seconds": {"compile": 8.1, ...}}

`at` is in Unix seconds, `seconds` counts since this start, and `phase` is what the process does
from then on. The first line of a start has `began` and `last_alive` too, and the one that says
which checkpoint it goes on from has `resumed_from`. All seconds of a
process belong to one phase. Steps after the checkpoint that a later start resumed from are lost.
The time of a killed process after its last line is lost too if it was training, and else belongs to
the phase that it was in. The time between two starts is no process's and is reported apart, as
`down`.

The values are of this machine's clock, so they are not in metrics.jsonl, whose lines are the same
however often a run is killed.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

FILE = 'goodput.jsonl'
ALIVE = '.goodput_alive'
ALIVE_INTERVAL = 2.0  # seconds between two signs of life
STEP = 'step'
LOST = 'lost'
DOWN = 'down'
PHASES = ('startup', 'restore', 'compile', STEP, 'data_wait', 'evaluation', 'saving')
SHOWN = ('compile', 'restore', 'data_wait', 'evaluation', 'saving', LOST, 'startup')
LONG = ('restore', 'compile')  # phases without steps: a line says when they begin and end
COMPILE_EVENT = '/jax/core/compile/backend_compile_duration'  # or reading from the cache


class Totals(NamedTuple):
  """Where the time of a run went.

  Attributes:
    seconds: by phase; `LOST` of all phases together, `DOWN` between the starts.
    starts: how often the run was started.
  """

  seconds: Mapping[str, float]
  starts: int

  @property
  def wall(self) -> float:
    """Seconds in which a process of the run was alive."""
    return sum(seconds for phase, seconds in self.seconds.items() if phase != DOWN)

  @property
  def goodput(self) -> float:
    """The share of `wall` that went into steps which count; 0 before any time has passed."""
    return self.seconds.get(STEP, 0.0) / self.wall if self.wall else 0.0

  def scalars(self) -> dict[str, float]:
    """Goodput, and the share of each phase, for TensorBoard."""
    shares = {'goodput': self.goodput}
    for phase in SHOWN:
      shares[f'goodput/{phase}'] = self.seconds.get(phase, 0.0) / max(self.wall, 1e-9)
    shares['goodput/down_seconds'] = self.seconds.get(DOWN, 0.0)
    return shares

  def line(self) -> str:
    """One line for the terminal."""
    parts = []
    for phase in SHOWN:
      share = self.seconds.get(phase, 0.0) / max(self.wall, 1e-9)
      parts.append(f'{"lost steps" if phase == LOST else phase} {share:.1%}')
    starts = f'{self.starts} start' + ('s' if self.starts > 1 else '')
    return (
      f'goodput {self.goodput:.1%} of {self.wall:.1f} s in {starts}: {", ".join(parts)}; '
      f'down {self.seconds.get(DOWN, 0.0):.1f} s besides'
    )


class Goodput:
  """The account of one process. Until `open` it is in memory only, as on all processes but one.

  Args:
    began: when the process began, by `clock`; None is now.
    clock: seconds that never go back.
    now: Unix seconds.
  """

  def __init__(
    self,
    began: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    now: Callable[[], float] = time.time,
  ):
    self._clock = clock
    self._now = now
    self._began = clock() if began is None else began
    self._since = self._began  # when the phase that is last in `_phases` was last counted
    self._phases = ['startup']
    self._seconds: defaultdict[str, float] = defaultdict(float)
    self._earlier: _Ledger | None = None
    self._folder: pathlib.Path | None = None
    self._step = 0
    self._stop = threading.Event()
    self._thread: threading.Thread | None = None
    self._main = threading.get_ident()
    jax.monitoring.register_event_duration_secs_listener(self._on_duration)

  # --- Phases ---

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Counts the time of the block for a phase, and not for the one around it."""
    self._count()
    self._phases.append(name)
    if name in LONG:
      self.record(self._step)
    try:
      yield
    finally:
      self._count()
      self._phases.pop()
      if name in LONG:
        self.record(self._step)

  def begin_steps(self) -> None:
    """From here on, what is of no other phase is of steps."""
    self._count()
    self._phases[0] = STEP

  def move(self, seconds: float, target: str) -> None:
    """Counts seconds that have just passed for `target` in place of the present phase."""
    if target != self._phases[-1]:
      self._seconds[self._phases[-1]] -= seconds
      self._seconds[target] += seconds

  def _count(self) -> None:
    now = self._clock()
    self._seconds[self._phases[-1]] += now - self._since
    self._since = now

  def _on_duration(self, event: str, duration_secs: float, **_: str | int) -> None:
    if event == COMPILE_EVENT and threading.get_ident() == self._main:
      self.move(duration_secs, 'compile')

  # --- The file ---

  def open(self, folder: pathlib.Path) -> None:
    """Takes up the account of the earlier starts, and writes this one's from now on.

    Args:
      folder: the work directory, which is this run's.
    """
    lines = _read_lines(folder / FILE)
    ledger = _Ledger()
    for line in lines:
      ledger.add(line)
    began = self._now() - (self._clock() - self._began)
    first = {'began': began, 'last_alive': _read_alive(folder / ALIVE)}
    ledger.begin(first)
    self._earlier = ledger
    self._folder = folder
    _drop_cut_line(folder / FILE)
    self._write({'start': ledger.starts, **first})
    self._thread = threading.Thread(target=self._sign, daemon=True)
    self._thread.start()

  def resume(self, step: int) -> None:
    """Counts steps of earlier starts after `step` as lost; 0 if nothing was restored."""
    self._step = step
    if self._folder is not None and self._earlier is not None:
      self._earlier.lose_after(step)
      self._write({'start': self._earlier.starts, 'resumed_from': step})

  def record(self, step: int) -> None:
    """Writes what has been counted until now; `step` is the last that is done."""
    self._step = step
    if self._folder is not None:
      self._write({'start': self._earlier.starts if self._earlier else 1})

  def totals(self) -> Totals:
    """Where the time went, that of earlier starts included."""
    self._count()
    seconds = defaultdict(float, self._seconds)
    starts = 1
    if self._earlier is not None:
      starts = self._earlier.starts
      for phase, earlier in self._earlier.totals().items():
        seconds[phase] += earlier
    return Totals(seconds, starts)

  def close(self) -> None:
    """Writes the last line, and counts no longer; a second call does nothing."""
    if self._stop.is_set():
      return
    self._stop.set()
    jax.monitoring.unregister_event_duration_listener(self._on_duration)
    if self._thread is not None:
      self._thread.join()
      self.record(self._step)
      self._folder = None

  def _write(self, fields: Mapping[str, Any]) -> None:
    assert self._folder is not None
    self._count()
    line = dict(fields)
    line |= {'at': self._now(), 'step': self._step, 'phase': self._phases[-1]}
    line['seconds'] = {name: round(seconds, 6) for name, seconds in self._seconds.items()}
    with contextlib.suppress(OSError):  # a full disk: saving reports it
      with (self._folder / FILE).open('a') as file:
        file.write(json.dumps(line) + '\n')

  def _sign(self) -> None:
    assert self._folder is not None
    file = self._folder / ALIVE
    while not self._stop.wait(ALIVE_INTERVAL):
      with contextlib.suppress(OSError):
        file.write_text(repr(self._now()))


class _Ledger:
  """Adds up the lines of earlier starts."""

  def __init__(self):
    self.starts = 0
    self._seconds: defaultdict[str, float] = defaultdict(float)
    # (step before, step after, seconds) of all steps that count so far, in order
    self._steps: list[tuple[int, int, float]] = []
    self._last: Mapping[str, Any] | None = None
    self._unfinished = 0.0  # seconds of steps since the last line that had a later step

  def add(self, line: Mapping[str, Any]) -> None:
    """Adds the next line of the file."""
    if 'began' in line:
      self.begin(line)
    elif line['start'] != self.starts or self._last is None:
      return  # of a start whose directory another one has taken over
    before = self._last['seconds'] if self._last else {}
    step = self._last['step'] if self._last else line['step']
    if 'resumed_from' in line:
      self.lose_after(line['resumed_from'])
      step = line['step']
    for phase, seconds in line['seconds'].items():
      passed = seconds - before.get(phase, 0.0)
      if phase == STEP:
        self._unfinished += passed
      else:
        self._seconds[phase] += passed
    if line['step'] > step:
      self._steps.append((step, line['step'], self._unfinished))
      self._unfinished = 0.0
    self._last = line

  def begin(self, first: Mapping[str, Any]) -> None:
    """Closes the account of the start before this one, whose first line is `first`."""
    self.starts += 1
    self._seconds[LOST] += self._unfinished
    self._unfinished = 0.0
    if self._last is not None:
      end = max(self._last['at'], first.get('last_alive') or 0.0)
      end = min(end, max(first['began'], self._last['at']))
      tail = end - self._last['at']
      phase = self._last['phase']
      self._seconds[LOST if phase == STEP else phase] += tail
      self._seconds[DOWN] += max(first['began'] - end, 0.0)
    self._last = None

  def lose_after(self, step: int) -> None:
    """Counts the steps after `step` as lost: they are made again."""
    kept = []
    for before, after, seconds in self._steps:
      share = min(max(step - before, 0) / (after - before), 1.0)
      self._seconds[LOST] += (1 - share) * seconds
      if share:
        kept.append((before, min(after, step), share * seconds))
    self._steps = kept

  def totals(self) -> dict[str, float]:
    """Seconds by phase."""
    totals = defaultdict(float, self._seconds)
    totals[STEP] += sum(seconds for _, _, seconds in self._steps) + self._unfinished
    return totals


def read_totals(workdir: pathlib.Path) -> Totals:
  """Where the time of the run in `workdir` went until its last line, the present start included."""
  ledger = _Ledger()
  for line in _read_lines(workdir / FILE):
    ledger.add(line)
  return Totals(ledger.totals(), ledger.starts)


def _read_lines(file: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of the file that are complete; [] if it does not begin with that of a start."""
  if not file.exists():
    return []
  lines = []
  for text in file.read_text().splitlines():
    try:
      line = json.loads(text)
    except ValueError:  # cut short by a kill
      continue
    lines.append(line)
  return lines


def _drop_cut_line(file: pathlib.Path) -> None:
  """Ends a last line that was cut short, so that the next one begins after it."""
  if file.exists() and not file.read_bytes().endswith(b'\n'):
    with file.open('a') as handle:
      handle.write('\n')


def _read_alive(file: pathlib.Path) -> float | None:
  try:
    return float(file.read_text())
  except (OSError, ValueError):  # not there, or being written
    return None
