"""The noise that the U-Net learns to remove: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise (Stable Diffusion's schedule).

Training (the loss) and inference (the samplers) both start here.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array


class NoiseSchedule(NamedTuple):
  """T training steps: `betas` f32[T], the variance added at each, and `alphas_cumprod` f32[T], the signal left."""

  betas: Array
  alphas_cumprod: Array


def scaled_linear(num_steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> NoiseSchedule:
  """The schedule of SD 1.5 and SDXL: the square roots of the betas are evenly spaced."""
  return _schedule(np.linspace(beta_start ** 0.5, beta_end ** 0.5, num_steps) ** 2)


def linear(num_steps: int, beta_start: float, beta_end: float) -> NoiseSchedule:
  """The betas themselves are evenly spaced (Ho et al. 2020)."""
  return _schedule(np.linspace(beta_start, beta_end, num_steps))


def _schedule(betas: np.ndarray) -> NoiseSchedule:
  return NoiseSchedule(jnp.asarray(betas, jnp.float32), jnp.asarray(np.cumprod(1 - betas), jnp.float32))


def signal_and_noise(schedule: NoiseSchedule, t: Array, ndim: int) -> tuple[Array, Array]:
  """sqrt(a_t), sqrt(1 - a_t) of timesteps i32[B], shaped [B, 1, ...] to scale arrays of `ndim` axes."""
  alpha = schedule.alphas_cumprod[t].reshape(t.shape + (1,) * (ndim - t.ndim))
  return jnp.sqrt(alpha), jnp.sqrt(1 - alpha)


def add_noise(schedule: NoiseSchedule, latents: Array, noise: Array, t: Array) -> Array:
  """Latents and noise f32[B, h, w, Z], timesteps i32[B] in 0..T-1 -> x_t f32[B, h, w, Z]."""
  signal, sigma = signal_and_noise(schedule, t, latents.ndim)
  return signal * latents + sigma * noise


def velocity(schedule: NoiseSchedule, latents: Array, noise: Array, t: Array) -> Array:
  """The target of v-prediction, sqrt(a_t) noise - sqrt(1 - a_t) x_0 (Salimans & Ho 2022); shapes as `add_noise`."""
  signal, sigma = signal_and_noise(schedule, t, latents.ndim)
  return signal * noise - sigma * latents
