"""The learning rate over the steps of a run, and what becomes of it when a run is continued under
other options.
"""

from __future__ import annotations

from collections.abc import Mapping

import optax

SCHEDULES = ('cosine', 'constant', 'rewarm')
NOTICEABLE = 1.02  # the ratio from which a jump of the rate is told


def learning_rate(config: Mapping, num_steps: int) -> optax.Schedule:
  """The rate of the n-th update, counted from 0.

  Args:
    config: the page's `optim`, of which count
      schedule: 'cosine' (also where a page has none), 'constant' or 'rewarm';
      learning_rate: the highest rate;
      warmup_steps: over so many updates the rate rises to it, from 0, in a line;
      final_fraction: of it is left at the end, to which a cosine comes down ('constant' stays at
        the top);
      rewarm_from: under 'rewarm' the updates before it are those of a cosine that ends there; then
        the rate rises again over `warmup_steps`, from
        what was left, and comes down once more.
    num_steps: where the (last) cosine ends.
  """
  peak, schedule = config['learning_rate'], config.get('schedule', 'cosine')
  final = config['final_fraction'] * peak

  def cosine(start: float, steps: int) -> optax.Schedule:
    warmup = min(config['warmup_steps'], max(steps - 1, 0))
    return optax.warmup_cosine_decay_schedule(start, peak, warmup, steps, final)

  if schedule == 'constant':
    return optax.warmup_constant_schedule(0.0, peak, config['warmup_steps'])
  again = config.get('rewarm_from', 0)
  if schedule == 'rewarm' and 0 < again < num_steps:
    return optax.join_schedules([cosine(0.0, again), cosine(final, num_steps - again)], [again])
  return cosine(0.0, num_steps)


def warn_of_schedule(log, config, saved: dict, first: int) -> None:
  """A warning where the next update's rate, after `first` steps, is another than under the options
  that these were made with.
  """
  if first >= config.num_steps:
    return
  was = float(learning_rate(saved['optim'], saved['num_steps'])(first))
  now = float(learning_rate(config.optim, config.num_steps)(first))
  low, high = sorted((was, now))
  if high <= NOTICEABLE * low:
    return
  log.say(
    f'warning: at step {first} the learning rate goes from {was:.3g}, as this run was begun (num_steps={saved["num_steps"]}), to {now:.3g} '
    f'(num_steps={config.num_steps}); --config.optim.schedule=constant --config.optim.learning_rate={was:.3g} goes on as it was, '
    f'--config.optim.schedule=rewarm --config.optim.rewarm_from={first} warms up anew'
  )
