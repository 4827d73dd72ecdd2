"""Noise -> latents: samplers, each one compiled loop over steps.

B images, h and w latents, Z latent channels; T training steps of the schedule.

A sampler is made of three things, and another one (Euler, DPM-Solver, ...) needs only its own update: `timesteps` says which
steps to visit, `guided` turns the network into a prediction under guidance, and an update such as `ddim_update` takes the
latents one step back; `jax.lax.scan` runs it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lavit_jax.models.noise import NoiseSchedule, signal_and_noise

Denoiser = Callable[..., Array]  # (latents [B, h, w, Z], timesteps i32[B], *condition) -> prediction [B, h, w, Z]


def initial_latents(keys: Array, shape: tuple[int, int, int]) -> Array:
  """Keys [B], one for each image, so that an image does not depend on its batch; shape (h, w, Z) -> f32[B, h, w, Z]."""
  return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def timesteps(num_train_steps: int, steps: int, spacing: str = 'leading', steps_offset: int = 1) -> np.ndarray:
  """The timesteps to visit, from noise to image; i32[steps].

  'leading' counts up from `steps_offset` in strides of T // steps, and never sees pure noise; 'trailing' counts down from
  T - 1 (Lin et al. 2023, arXiv 2305.08891, table 2).

  Raises:
    ValueError: no such spacing; more steps than T, or a first step beyond T - 1.
  """
  if not 0 < steps <= num_train_steps:
    raise ValueError(f'steps={steps} must be in 1..{num_train_steps}')
  if spacing == 'leading':
    visited = np.arange(steps)[::-1] * (num_train_steps // steps) + steps_offset
  elif spacing == 'trailing':
    visited = np.round(num_train_steps - np.arange(steps) * (num_train_steps / steps)) - 1
  else:
    raise ValueError(f"spacing={spacing!r} is not 'leading' or 'trailing'")
  if visited[0] >= num_train_steps:
    raise ValueError(f'steps={steps} with steps_offset={steps_offset} begins at {visited[0]}, past the {num_train_steps} trained')
  return visited.astype(np.int32)


def guided(denoise: Denoiser, condition: tuple, null_condition: tuple | None, guidance_scale: float | Array) -> Denoiser:
  """Classifier-free guidance (Ho & Salimans 2022): null + scale * (conditional - null), both in one batch of 2B.

  `condition` holds what `denoise` takes after the timesteps, any trees of arrays with leading axis B; `null_condition` the
  same trees for the unconditional branch, with or without that axis. Without it there is no guidance, and no second branch.
  """
  if null_condition is None:
    return lambda latents, t: denoise(latents, t, *condition)
  both = jax.tree.map(lambda c, n: jnp.concatenate([c, jnp.broadcast_to(n, c.shape).astype(c.dtype)]), condition, null_condition)

  def predict(latents: Array, t: Array) -> Array:
    given, null = jnp.split(denoise(jnp.concatenate([latents, latents]), jnp.concatenate([t, t]), *both), 2)
    return null + guidance_scale * (given - null)

  return predict


def clean_and_noise(schedule: NoiseSchedule, latents: Array, prediction: Array, t: Array, kind: str) -> tuple[Array, Array]:
  """What a prediction says that x_0 and the noise are, given x_t at timesteps i32[B]; kind 'epsilon' or 'v_prediction'.

  Raises:
    ValueError: no such kind.
  """
  signal, sigma = signal_and_noise(schedule, t, latents.ndim)
  if kind == 'epsilon':
    return (latents - sigma * prediction) / signal, prediction
  if kind == 'v_prediction':
    return signal * latents - sigma * prediction, signal * prediction + sigma * latents
  raise ValueError(f"prediction={kind!r} is not 'epsilon' or 'v_prediction'")


def ddim_update(schedule: NoiseSchedule, clean: Array, noise: Array, t: Array) -> Array:
  """x at timesteps i32[B], along the deterministic path (Song et al. 2021, equation 12 with eta 0).

  Below 0 the path ends in the schedule's first step, not in the clean image (set_alpha_to_one False).
  """
  signal, sigma = signal_and_noise(schedule, jnp.maximum(t, 0), clean.ndim)
  return signal * clean + sigma * noise


def ddim_sample(
    denoise: Denoiser, latents: Array, condition: tuple, null_condition: tuple | None = None, *, steps: int,
    guidance_scale: float | Array = 1.0, schedule: NoiseSchedule, prediction: str = 'epsilon', spacing: str = 'leading',
    steps_offset: int = 1,
) -> Array:
  """Deterministic DDIM with classifier-free guidance, the published decoder (REFERENCE section 4), as one scan.

      ddim_sample(unet, initial_latents(keys, (64, 64, 4)), (context, mask), (null_context, null_mask),
                  steps=50, guidance_scale=5., schedule=scaled_linear())

  Args:
    denoise: (latents, timesteps i32[B], *condition) -> prediction, float32.
    latents: f32[B, h, w, Z], unit Gaussian; see `initial_latents`.
    condition, null_condition, guidance_scale: see `guided`.
    steps: how many of the schedule's timesteps to visit.
    prediction: what the network was trained to give, 'epsilon' or 'v_prediction'.
    spacing, steps_offset: see `timesteps`.

  Returns:
    f32[B, h, w, Z].

  Raises:
    ValueError: no such prediction or spacing; too many steps.
  """
  num_train_steps = len(schedule.alphas_cumprod)
  visited = timesteps(num_train_steps, steps, spacing, steps_offset)
  predict = guided(denoise, condition, null_condition, guidance_scale)

  def step(latents: Array, t: Array) -> tuple[Array, None]:
    t = jnp.full(len(latents), t)
    clean, noise = clean_and_noise(schedule, latents, predict(latents, t).astype(jnp.float32), t, prediction)
    return ddim_update(schedule, clean, noise, t - num_train_steps // steps), None

  return jax.lax.scan(step, latents.astype(jnp.float32), visited)[0]
