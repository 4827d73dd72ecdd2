"""The steps of the diffusion samplers: which timesteps a sampler visits, and where each step goes.

Axes: T training steps of a schedule, S steps of a sampler, E evaluations of the network.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lavit_jax.models.noise_schedule import Scheduler

SAMPLERS = ('ddim', 'euler', 'dpm++2m', 'pndm')
DEFAULT_SPACINGS = {  # of diffusers
  'ddim': 'leading',
  'euler': 'linspace',
  'dpm++2m': 'linspace',
  'pndm': 'leading',
}
NUM_MIXED = 4  # predictions that an evaluation of PNDM mixes, at most
# Squared, in place of a last training step without signal; it is the least number of float16.
MIN_SIGNAL = 2.0**-24
# Fields of a scheduler config that change a sampler's steps, with the only value that works here.
_REQUIRED_FIELDS = {
  'ddim': {},
  'euler': {
    'use_karras_sigmas': False,
    'use_exponential_sigmas': False,
    'use_beta_sigmas': False,
    'interpolation_type': 'linear',
    'final_sigmas_type': 'zero',
  },
  'dpm++2m': {
    'use_karras_sigmas': False,
    'use_exponential_sigmas': False,
    'use_beta_sigmas': False,
    'use_lu_lambdas': False,
    'final_sigmas_type': 'zero',
    'lambda_min_clipped': None,
  },
  'pndm': {'rescale_betas_zero_snr': False},
}


# Of the evaluations from the second on: Adams-Bashforth's coefficients, after the mean.
_PNDM_MIXES = np.array(
  [
    [1 / 2, 1 / 2, 0, 0],
    [3 / 2, -1 / 2, 0, 0],
    [23 / 12, -16 / 12, 5 / 12, 0],
    [55 / 24, -59 / 24, 37 / 24, -9 / 24],
  ]
)


class SamplerPlan(NamedTuple):
  """The evaluations of the network, from noise to image: one a step, and one more with PNDM.

  Attributes:
    t: i32[E], or f32[E] between training steps: the timesteps that the network gets.
    signal: f32[E], sqrt(a) before the step.
    noise: f32[E], sqrt(1 - a) before the step.
    next_signal: f32[E], sqrt(a) after the step; 1 is the clean image.
    next_noise: f32[E], sqrt(1 - a) after the step.
    ahead: f32[E], c: how far the step extrapolates the last two clean images.
    mix: f32[E, NUM_MIXED], how much of this prediction and of those before it the step takes; only
      PNDM takes any of those before.
    repeats: bool[E], whether the step starts where the last one did, and later steps do not take
      its prediction.
  """

  t: np.ndarray
  signal: np.ndarray
  noise: np.ndarray
  next_signal: np.ndarray
  next_noise: np.ndarray
  ahead: np.ndarray
  mix: np.ndarray
  repeats: np.ndarray


# ------------------------------------------------------------------------------------------- plans


def timesteps(
  num_train_steps: int,
  steps: int,
  spacing: str | None = None,
  steps_offset: int = 1,
  sampler: str = 'ddim',
  strength: float = 1.0,
) -> np.ndarray:
  """Returns the timesteps to visit, from noise to image.

  The spacings are named as in Lin et al. 2023 (arXiv 2305.08891, table 2):

    'leading'    counts up from `steps_offset` in strides of T // steps, and never sees pure noise
    'trailing'   counts down from T - 1 in strides of T / steps
    'linspace'   goes evenly from T - 1 to 0; between the training steps for Euler, else rounded

  DPM-Solver++ plans one step more by the first and the last of these, and leaves out the one at the
  clean end.

  Args:
    num_train_steps: T.
    steps: number of steps of the sampler.
    spacing: None for the default of the sampler's class in diffusers.
    steps_offset: of 'leading'.
    sampler: one of `SAMPLERS`.
    strength: visits only the last int(steps * strength).

  Returns:
    i32[S], or f32[S] between training steps.

  Raises:
    ValueError: an unknown sampler or spacing; more steps than T, or a first step beyond T - 1; a
      strength that leaves no step.
  """
  if sampler not in SAMPLERS:
    raise ValueError(f'sampler={sampler!r} is not one of {", ".join(map(repr, SAMPLERS))}')
  spacing = DEFAULT_SPACINGS[sampler] if spacing is None else spacing
  skipped = int(sampler == 'dpm++2m' and spacing in ('leading', 'linspace'))
  if not 0 < steps <= num_train_steps - skipped:
    raise ValueError(f'steps={steps} must be in 1..{num_train_steps - skipped}')
  if spacing == 'leading':
    stride = num_train_steps // (steps + skipped)
    visited = (np.arange(steps)[::-1] + skipped) * stride + steps_offset
  elif spacing == 'trailing':
    # np.arange(T, 0, -T / steps) has one too many for 62 numbers of steps.
    visited = np.round(num_train_steps - np.arange(steps) * (num_train_steps / steps)) - 1
  elif spacing == 'linspace':
    visited = np.linspace(0, num_train_steps - 1, steps + skipped)[::-1][:steps]
    visited = visited if sampler == 'euler' else visited.round()
  else:
    raise ValueError(f"spacing={spacing!r} is not 'leading', 'trailing' or 'linspace'")
  if visited[0] >= num_train_steps:
    raise ValueError(
      f'steps={steps} with steps_offset={steps_offset} begins at {visited[0]}, '
      f'past the {num_train_steps} trained'
    )
  visited = visited[steps - min(int(steps * strength), steps) :]
  if not len(visited):
    raise ValueError(f'strength={strength} leaves none of {steps} steps; raise one of them')
  between = sampler == 'euler' and spacing == 'linspace'
  return visited.astype(np.float32 if between else np.int32)


def make_plan(
  scheduler: Scheduler, steps: int, *, sampler: str = 'ddim', strength: float = 1.0
) -> SamplerPlan:
  """Plans the steps of a sampler, at its `timesteps`.

  DDIM (Song et al. 2021, equation 12 with eta 0) goes T // steps back, and finally to the first
  step of the schedule or, with `set_alpha_to_one`, to the clean image. Euler (Karras et al. 2022,
  algorithm 1, which is DDIM with other targets) and DPM-Solver++ 2M (Lu et al. 2022, algorithm 2)
  go to the next timestep, and finally to the clean image. 2M does not extrapolate in its first
  step, which has no previous one, nor in its last.

  PNDM (Liu et al. 2022, algorithm 2, with the linear multistep method alone: diffusers'
  `skip_prk_steps`, as the scheduler config of Stable Diffusion has it) is DDIM with a mix of the
  last four predictions. Its first step is done twice: the second time, by the mean of the
  predictions at its two ends.

  Args:
    scheduler: how the network was trained, and the options of the sampler.
    steps: number of steps.
    sampler: one of `SAMPLERS`.
    strength: share of the steps that are done.

  Raises:
    ValueError: as in `timesteps`; an option that the sampler does not have; a first step without
      any signal, where a predicted noise does not determine the clean image.
  """
  t = timesteps(
    scheduler.num_train_timesteps,
    steps,
    scheduler.timestep_spacing,
    scheduler.steps_offset,
    sampler,
    strength,
  )
  _check_fields(scheduler, sampler)
  start = t
  if sampler == 'pndm' and len(t) > 1:
    t = np.insert(t, 1, t[1])
    start = t.copy()
    start[1] += scheduler.num_train_timesteps // steps
  if sampler in ('ddim', 'pndm'):
    alphas, next_alphas = _ddim_alphas(scheduler, start, steps)
  else:
    alphas, next_alphas = _sigma_alphas(scheduler, t)
  ahead = np.zeros(len(t))
  if sampler == 'dpm++2m' and len(t) > 2:
    half_log_snr = np.log(alphas / (1 - alphas)) / 2
    gains = np.diff(half_log_snr)  # of each step but the last
    ahead[1:-1] = gains[1:] / gains[:-1] / 2
  mix = np.zeros((len(t), NUM_MIXED))
  mix[:, 0] = 1
  if sampler == 'pndm':
    mix[1:] = _PNDM_MIXES[3]
    mix[1:4] = _PNDM_MIXES[: len(mix) - 1][:3]
  return SamplerPlan(
    t=t,
    signal=np.sqrt(alphas).astype(np.float32),
    noise=np.sqrt(1 - alphas).astype(np.float32),
    next_signal=np.sqrt(next_alphas).astype(np.float32),
    next_noise=np.sqrt(1 - next_alphas).astype(np.float32),
    ahead=ahead.astype(np.float32),
    mix=mix.astype(np.float32),
    repeats=(np.arange(len(t)) == 1) & (sampler == 'pndm'),
  )


def _check_fields(scheduler: Scheduler, sampler: str) -> None:
  if sampler == 'pndm' and scheduler.prediction_type == 'sample':
    raise ValueError(
      "sampler='pndm' mixes predicted noises or velocities, and the U-Net has "
      "prediction_type='sample'; draw with sampler='ddim'"
    )
  for name, required in _REQUIRED_FIELDS[sampler].items():
    value = getattr(scheduler, name)
    if value != required:
      raise ValueError(
        f'sampler={sampler!r} cannot draw with {name}={value!r} of scheduler_config.json, '
        f"only with {required!r}; draw with sampler='ddim', or change it there"
      )


def _ddim_alphas(scheduler: Scheduler, t: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
  """The signal variances f64[S] before and after each step."""
  levels = scheduler.schedule.alphas_cumprod.astype(np.float64)
  alphas = levels[t]
  if alphas[0] == 0 and scheduler.prediction_type == 'epsilon':
    raise ValueError(
      f'steps={steps} begin at timestep {t[0]}, where rescale_betas_zero_snr leaves no signal: '
      "there a network of prediction_type='epsilon' does not say what is clean; "
      "take timestep_spacing='leading', or sampler='euler'"
    )
  next_t = t - scheduler.num_train_timesteps // steps
  end = 1.0 if scheduler.set_alpha_to_one else levels[0]
  return alphas, np.where(next_t < 0, end, levels[np.maximum(next_t, 0)])


def _sigma_alphas(scheduler: Scheduler, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The same for samplers that interpolate sigma = noise / signal between training steps."""
  levels = scheduler.schedule.alphas_cumprod.astype(np.float64)
  if scheduler.rescale_betas_zero_snr:
    levels[-1] = MIN_SIGNAL
  sigmas = np.interp(t, np.arange(len(levels)), np.sqrt((1 - levels) / levels))
  alphas = 1 / (1 + sigmas**2)
  return alphas, np.append(alphas[1:], 1.0)
