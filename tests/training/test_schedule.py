"""Learning rates against formulas in plain Python, and the warning when a run changes them."""

import math

import pytest

from lavit_jax.training.schedule import ScheduleConfig, learning_rate, warn_of_schedule

OPTIONS = dict(learning_rate=0.1, warmup_steps=10, final_fraction=0.1)


def cosine(step, start, steps):
  """From `start` in a line to 0.1 over 10 steps, then by a cosine to 0.01."""
  if step < 10:
    return start + (0.1 - start) * step / 10
  done = min((step - 10) / (steps - 10), 1)
  return 0.01 + 0.09 * (1 + math.cos(math.pi * done)) / 2


def test_cosine_is_the_schedule_of_configs_without_one():
  for options in (OPTIONS, OPTIONS | dict(schedule='cosine', rewarm_from=50)):
    rate = learning_rate(ScheduleConfig(100, **options))
    assert [float(rate(n)) for n in range(0, 120, 7)] == pytest.approx(
      [cosine(n, 0.0, 100) for n in range(0, 120, 7)], rel=1e-5
    )


def test_constant():
  rate = learning_rate(ScheduleConfig(100, **OPTIONS, schedule='constant'))
  assert [float(rate(n)) for n in (0, 5, 10, 99, 1000)] == pytest.approx([0, 0.05, 0.1, 0.1, 0.1])


def test_rewarm_goes_on_from_what_was_left():
  rate = learning_rate(ScheduleConfig(300, **OPTIONS, schedule='rewarm', rewarm_from=100))
  first = [float(rate(n)) for n in range(100)]
  # As it was made.
  assert first == pytest.approx([cosine(n, 0.0, 100) for n in range(100)], rel=1e-5)
  second = [float(rate(n)) for n in range(100, 301)]
  assert second == pytest.approx([cosine(n, 0.01, 200) for n in range(201)], rel=1e-5)


class LineLog(list):
  print_line = list.append


@pytest.mark.parametrize(
  'changes, steps, warns',
  [
    ({}, 100, False),
    ({}, 200, True),
    (dict(schedule='constant', learning_rate=0.01), 200, False),
    (dict(schedule='rewarm', rewarm_from=100), 200, False),
    (dict(learning_rate=0.2), 200, True),
  ],
)
def test_a_jump_is_reported_with_both_rates(changes, steps, warns):
  log = LineLog()
  config = ScheduleConfig(steps, **OPTIONS | changes)
  saved = ScheduleConfig.from_config(dict(optim=OPTIONS, num_steps=100))
  warn_of_schedule(log, config, saved, 100)
  assert bool(log) == (warns and steps > 100)
  if log:
    now = float(learning_rate(config)(100))
    assert (
      f'goes from 0.01, as this run was begun (num_steps=100), to {now:.3g} (num_steps=200)'
      in log[0]
    )
    assert (
      'schedule=constant --config.optim.learning_rate=0.01 ' in log[0]
      and 'schedule=rewarm --config.optim.rewarm_from=100' in log[0]
    )
