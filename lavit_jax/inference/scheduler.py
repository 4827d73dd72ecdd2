"""What a folder says of the noise that its U-Net removes: `scheduler_config.json`, as diffusers writes it.

The published code opens it as a DDIMScheduler, whatever class it names; what is said of other samplers (Karras sigmas and so on) counts for
nothing here either.
"""

from __future__ import annotations

import json
import os
import pathlib
from typing import NamedTuple

from lavit_jax.errors import UserError
from lavit_jax.models.noise import NoiseSchedule, linear, scaled_linear


class Scheduler(NamedTuple):
  """Its fields under their names there; the defaults are the published values."""

  prediction_type: str = 'epsilon'
  timestep_spacing: str = 'leading'
  steps_offset: int = 1
  beta_schedule: str = 'scaled_linear'
  beta_start: float = 0.00085
  beta_end: float = 0.012
  num_train_timesteps: int = 1000
  set_alpha_to_one: bool = False  # whether DDIM ends at the clean image, not at the first step

  @property
  def schedule(self) -> NoiseSchedule:
    """The betas."""
    make = scaled_linear if self.beta_schedule == 'scaled_linear' else linear
    return make(self.num_train_timesteps, self.beta_start, self.beta_end)


KNOWN = dict(  # words, and switches of what is not done here
    prediction_type=('epsilon', 'v_prediction'), timestep_spacing=('leading', 'trailing'), beta_schedule=('scaled_linear', 'linear'),
    set_alpha_to_one=(False, True), clip_sample=(False,), thresholding=(False,), rescale_betas_zero_snr=(False,), trained_betas=(None,))
RANGES = dict(steps_offset=(0, 999), beta_start=(0, 1), beta_end=(0, 1), num_train_timesteps=(1, 10**6))


def read_scheduler(file: str | os.PathLike) -> Scheduler:
  """Reads a `scheduler_config.json`; what it does not say, and all of it where there is none, is as published.

  Raises:
    UserError: it is damaged, or a value is not known here.
  """
  file = pathlib.Path(file)
  if not file.exists():
    return Scheduler()
  try:
    config = json.loads(file.read_text())
    told = config.items()
  except (OSError, ValueError, AttributeError) as error:
    raise UserError(f'{file} is damaged ({error}); copy it again') from None
  for name, value in told:
    if name in KNOWN and not any(value is each or value == each and isinstance(value, str) for each in KNOWN[name]):
      raise UserError(f'{file}: {name}={value!r} is not known; choose one of {", ".join(map(repr, KNOWN[name]))}')
    if name in RANGES:
      least, most = RANGES[name]
      whole = isinstance(Scheduler._field_defaults[name], int)
      if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not least <= value <= most:
        raise UserError(f'{file}: {name}={value!r} is not a {"whole " * whole}number in {least}..{most}')
  return Scheduler(**{name: value for name, value in told if name in Scheduler._fields})
