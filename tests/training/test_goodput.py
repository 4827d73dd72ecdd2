"""The account of wall time: every second has one phase, and what a kill undid is lost."""

import json

import pytest

from lavit_jax.training.goodput import ALIVE, DOWN, FILE, LOST, Goodput, read_totals


class Clock:
  """Both clocks of a process; `passes` lets time pass."""

  def __init__(self, unix=0.0):
    self.monotonic = 0.0
    self.unix = unix

  def passes(self, seconds):
    self.monotonic += seconds
    self.unix += seconds

  def account(self, began=None):
    return Goodput(began, lambda: self.monotonic, lambda: self.unix)


@pytest.fixture
def start(tmp_path):
  """start(clock, step): the account of a start that took 3 s to come there, and compiled for 4."""
  accounts = []

  def begin(clock, step):
    account = clock.account()
    accounts.append(account)
    clock.passes(1)
    account.open(tmp_path)
    with account.phase('restore'):
      clock.passes(2)
    account.resume(step)
    with account.phase('compile'):
      clock.passes(4)
    account.begin_steps()
    return account

  yield begin
  for account in accounts:
    account.close()


def shown(totals):
  return {phase: seconds for phase, seconds in totals.seconds.items() if seconds}


def test_every_second_has_one_phase(start, tmp_path):
  clock = Clock()
  account = start(clock, 0)
  clock.passes(10)
  account.move(2.5, 'data_wait')
  with account.phase('evaluation'):
    clock.passes(5)
    account.move(1.5, 'compile')  # as JAX tells while it goes on
  with account.phase('saving'):
    clock.passes(0.5)
  account.record(8)
  expected = dict(startup=1, restore=2, compile=5.5, step=7.5, data_wait=2.5, evaluation=3.5)
  expected['saving'] = 0.5
  totals = account.totals()
  assert shown(totals) == expected
  assert totals.wall == clock.monotonic == 22.5 and totals.goodput == 7.5 / 22.5
  assert shown(read_totals(tmp_path)) == expected
  assert totals.line() == (
    'goodput 33.3% of 22.5 s in 1 start: compile 24.4%, restore 8.9%, data_wait 11.1%, '
    'evaluation 15.6%, saving 2.2%, lost steps 0.0%, startup 4.4%; down 0.0 s besides'
  )


def test_steps_that_a_kill_undid_are_lost(start, tmp_path):
  """Killed at step 14 and a bit, 6 s after its last line, and started again 30 s later."""
  clock = Clock()
  account = start(clock, 0)
  clock.passes(10)
  account.record(5)
  clock.passes(10)
  account.record(10)  # saved
  clock.passes(8)
  account.record(14)
  clock.passes(6)
  (tmp_path / ALIVE).write_text(str(clock.unix))
  again = Clock(clock.unix + 30)
  account = start(again, 10)
  assert shown(account.totals()) == {
    'startup': 2,
    'restore': 4,
    'compile': 8,
    'step': 20,
    LOST: 8 + 6,
    DOWN: 30,
  }
  again.passes(9)
  account.record(14)
  totals = account.totals()
  assert totals.seconds['step'] == 29 and totals.starts == 2
  assert totals.wall == clock.monotonic + again.monotonic
  assert shown(read_totals(tmp_path)) == shown(totals)


def test_steps_are_divided_where_no_line_was_written(start):
  """The line of step 10 is the first after that of step 0; the checkpoint is of step 4."""
  clock = Clock()
  account = start(clock, 0)
  clock.passes(10)
  account.record(10)
  account = start(Clock(clock.unix), 4)
  assert shown(account.totals())['step'] == pytest.approx(4)
  assert shown(account.totals())[LOST] == pytest.approx(6)
  # A damaged checkpoint: the third start goes on from nothing.
  account = start(Clock(clock.unix + 7), 0)
  assert 'step' not in shown(account.totals())
  assert shown(account.totals())[LOST] == pytest.approx(10)


def test_a_kill_while_it_compiles(start, tmp_path):
  """What it did then is compilation, up to its last sign of life."""
  clock = Clock()
  account = clock.account()
  account.open(tmp_path)
  account.resume(0)
  with account.phase('compile'):
    (tmp_path / ALIVE).write_text('50.0')
    account = start(Clock(100.0), 0)
  totals = shown(account.totals())
  assert totals[DOWN] == 50 and totals['compile'] == 50 + 4 and LOST not in totals


def test_a_kill_before_it_has_found_its_checkpoint(start, tmp_path):
  """It loses no steps, and the time until its last sign of life is that of restoring."""
  clock = Clock()
  account = start(clock, 0)
  clock.passes(10)
  account.record(5)
  killed = Clock(clock.unix)
  account = killed.account()
  killed.passes(1)
  account.open(tmp_path)
  with account.phase('restore'):
    killed.passes(6)
    (tmp_path / ALIVE).write_text(str(killed.unix))
    account = start(Clock(killed.unix + 3), 5)
  assert shown(account.totals()) == {
    'startup': 1 + 1 + 1,
    'restore': 2 + 6 + 2,
    'compile': 8,
    'step': 10,
    DOWN: 3,
  }
  assert account.totals().starts == 3


def test_a_late_line_of_an_earlier_start_does_not_count(start, tmp_path):
  clock = Clock()
  first = start(clock, 0)
  second = start(Clock(1000.0), 0)
  clock.passes(500)
  first.record(3)
  assert shown(read_totals(tmp_path)) == shown(second.totals())


def test_a_line_that_was_cut_short(start, tmp_path):
  clock = Clock()
  account = start(clock, 0)
  clock.passes(10)
  account.record(5)
  file = tmp_path / FILE
  whole = file.read_text()
  file.write_text(whole + '{"start": 1, "at": 17.0, "st')
  account = start(Clock(clock.unix), 5)
  assert shown(account.totals())['step'] == 10
  lines = file.read_text().splitlines()
  assert 'began' in json.loads(lines[len(whole.splitlines()) + 1])


def test_a_machine_whose_clock_goes_back(start):
  """Nothing becomes negative."""
  clock = Clock(1000.0)
  account = start(clock, 0)
  clock.passes(10)
  account.record(5)
  account = start(Clock(0.0), 5)
  assert min(account.totals().seconds.values()) >= 0 and DOWN not in shown(account.totals())
