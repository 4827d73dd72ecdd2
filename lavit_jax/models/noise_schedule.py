"""The noise that the U-Net learns to remove: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise.

Training (the loss) and inference (the samplers) both start here.

Axes: T training steps of a schedule, B batch, h and w latents, Z latent channels.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import chex
import jax.numpy as jnp
import numpy as np
from jax import Array

# Stable Diffusion 1.5 and SDXL.
SD_BETA_START = 0.00085
SD_BETA_END = 0.012
SD_TIMESTEPS = 1000
MAX_BETA = 0.999  # of the cosine schedule, whose last beta would be 1


class NoiseSchedule(NamedTuple):
  """The noise of T training steps.

  Attributes:
    betas: f32[T], the variance added at each step.
    alphas_cumprod: f32[T], the variance of the signal that is left.
  """

  betas: np.ndarray
  alphas_cumprod: np.ndarray


class Scheduler(NamedTuple):
  """How a U-Net was trained to remove noise, and the options of its samplers.

  The fields have the names and meanings of diffusers' schedulers. The defaults are the published
  values, those of Stable Diffusion 1.5 and SDXL (specification, Inference).
  """

  prediction_type: str = 'epsilon'  # 'epsilon', 'v_prediction' or 'sample'
  timestep_spacing: str | None = None  # None: the default of each sampler's class
  steps_offset: int = 1
  beta_schedule: str = 'scaled_linear'  # 'linear', 'scaled_linear' or 'squaredcos_cap_v2'
  beta_start: float = SD_BETA_START
  beta_end: float = SD_BETA_END
  num_train_timesteps: int = SD_TIMESTEPS
  trained_betas: tuple[float, ...] | None = None  # in place of the four fields before it
  rescale_betas_zero_snr: bool = False  # whether the last training step has no signal at all
  set_alpha_to_one: bool = False  # whether DDIM ends at the clean image, not at step 0
  clip_sample: bool = False  # DDIM: clean latents are cut to +-clip_sample_range
  clip_sample_range: float = 1.0
  thresholding: bool = False  # DDIM and DPM++: dynamic thresholding of clean latents
  dynamic_thresholding_ratio: float = 0.995
  sample_max_value: float = 1.0
  # Not implemented here; the samplers that have such an option refuse it:
  use_karras_sigmas: bool = False
  use_exponential_sigmas: bool = False
  use_beta_sigmas: bool = False
  use_lu_lambdas: bool = False
  interpolation_type: str = 'linear'
  final_sigmas_type: str = 'zero'
  lambda_min_clipped: float | None = None

  @property
  def schedule(self) -> NoiseSchedule:
    """The betas, and the signal that they leave.

    Raises:
      ValueError: an unknown `beta_schedule`.
    """
    return _make_schedule(self)


@functools.lru_cache(maxsize=16)
def _make_schedule(scheduler: Scheduler) -> NoiseSchedule:
  steps = scheduler.num_train_timesteps
  start = scheduler.beta_start
  end = scheduler.beta_end
  if scheduler.trained_betas is not None:
    schedule = from_betas(np.asarray(scheduler.trained_betas, np.float64))
  elif scheduler.beta_schedule == 'scaled_linear':
    schedule = scaled_linear(steps, start, end)
  elif scheduler.beta_schedule == 'linear':
    schedule = linear(steps, start, end)
  elif scheduler.beta_schedule == 'squaredcos_cap_v2':
    schedule = cosine(steps)
  else:
    raise ValueError(f'beta_schedule={scheduler.beta_schedule!r} is not known')
  return zero_terminal_snr(schedule) if scheduler.rescale_betas_zero_snr else schedule


def scaled_linear(
  num_steps: int = SD_TIMESTEPS, beta_start: float = SD_BETA_START, beta_end: float = SD_BETA_END
) -> NoiseSchedule:
  """The schedule of SD 1.5 and SDXL: the square roots of the betas are evenly spaced."""
  return from_betas(np.linspace(beta_start**0.5, beta_end**0.5, num_steps) ** 2)


def linear(num_steps: int, beta_start: float, beta_end: float) -> NoiseSchedule:
  """The betas themselves are evenly spaced (Ho et al. 2020)."""
  return from_betas(np.linspace(beta_start, beta_end, num_steps))


def cosine(num_steps: int) -> NoiseSchedule:
  """The signal falls as a squared cosine (Nichol & Dhariwal 2021, equation 17)."""
  level = np.cos((np.arange(num_steps + 1) / num_steps + 0.008) / 1.008 * np.pi / 2) ** 2
  return from_betas(np.minimum(1 - level[1:] / level[:-1], MAX_BETA))


def from_betas(betas: np.ndarray) -> NoiseSchedule:
  """Betas f64[T] -> the schedule."""
  return NoiseSchedule(betas.astype(np.float32), np.cumprod(1 - betas).astype(np.float32))


def zero_terminal_snr(schedule: NoiseSchedule) -> NoiseSchedule:
  """The schedule with no signal at its last step (Lin et al. 2023, algorithm 1).

  The square roots of the signal are shifted, then scaled to keep the first.
  """
  roots = np.sqrt(np.cumprod(1 - schedule.betas.astype(np.float64)))
  first = roots[0]
  last = roots[-1]
  signal = ((roots - last) * first / (first - last)) ** 2
  ratios = signal / np.concatenate([[1.0], signal[:-1]])
  return NoiseSchedule((1 - ratios).astype(np.float32), signal.astype(np.float32))


def signal_and_noise(schedule: NoiseSchedule, t: Array, ndim: int) -> tuple[Array, Array]:
  """sqrt(a_t) and sqrt(1 - a_t), shaped [B, 1, ...] to scale arrays of `ndim` axes.

  Args:
    schedule: of the training.
    t: timesteps i32[B] in [0, T).
    ndim: number of axes of the results.
  """
  chex.assert_rank(t, {0, 1})
  alpha = jnp.asarray(schedule.alphas_cumprod)[t].reshape(t.shape + (1,) * (ndim - t.ndim))
  return jnp.sqrt(alpha), jnp.sqrt(1 - alpha)


def add_noise(schedule: NoiseSchedule, latents: Array, noise: Array, t: Array) -> Array:
  """The noisy latents x_t.

  Args:
    schedule: of the training.
    latents: x_0, f32[B, h, w, Z].
    noise: f32[B, h, w, Z].
    t: timesteps i32[B] in [0, T).

  Returns:
    f32[B, h, w, Z].
  """
  chex.assert_equal_shape([latents, noise])
  signal, sigma = signal_and_noise(schedule, t, latents.ndim)
  return signal * latents + sigma * noise


def velocity(schedule: NoiseSchedule, latents: Array, noise: Array, t: Array) -> Array:
  """The target of v-prediction, sqrt(a_t) noise - sqrt(1 - a_t) x_0; shapes as `add_noise`.

  Source: Salimans & Ho 2022.
  """
  chex.assert_equal_shape([latents, noise])
  signal, sigma = signal_and_noise(schedule, t, latents.ndim)
  return signal * noise - sigma * latents


def training_target(
  prediction: str, schedule: NoiseSchedule, latents: Array, noise: Array, t: Array
) -> Array:
  """The training target of a network with this `prediction_type`; shapes as `add_noise`.

  Raises:
    ValueError: an unknown type.
  """
  if prediction == 'epsilon':
    return noise
  if prediction == 'v_prediction':
    return velocity(schedule, latents, noise, t)
  if prediction == 'sample':
    return latents
  raise ValueError(f"prediction={prediction!r} is not 'epsilon', 'v_prediction' or 'sample'")
