"""Noise -> latents: samplers, each one compiled loop over steps.

B images, h and w latents, Z latent channels; T training steps of the schedule, S steps of a sampler.

DDIM, Euler and DPM-Solver++ 2M are one update under three plans. Given what the network says of x_t, clean and noise, a step is

    x' = signal' * ahead + noise' * e,    ahead = clean + c * (clean - clean before),    x = signal * ahead + noise * e

and the plan says which timesteps are visited, where each step leads (signal', noise'), and how far it looks ahead (c = 0 but for
2M). So another deterministic sampler needs only its plan; `guided` makes the prediction and `jax.lax.scan` runs the steps.

diffusers' schedulers, with the settings of the scheduler configs of Stable Diffusion 1.5 and SDXL, do the same; of them all,
beta_schedule='scaled_linear', beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000, steps_offset=1, no Karras sigmas, and

    'ddim'      DDIMScheduler(clip_sample=False, set_alpha_to_one=False), eta 0: the published decoder
    'euler'     EulerDiscreteScheduler(interpolation_type='linear', final_sigmas_type='zero'), no churn
    'dpm++2m'   DPMSolverMultistepScheduler(algorithm_type='dpmsolver++', solver_order=2, solver_type='midpoint',
                lower_order_final=True, final_sigmas_type='zero')
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lavit_jax.models.noise import NoiseSchedule, add_noise, signal_and_noise

Denoiser = Callable[..., Array]  # (latents [B, h, w, Z], timesteps i32[B], *condition) -> prediction [B, h, w, Z]
SAMPLERS = ('ddim', 'euler', 'dpm++2m')


class Plan(NamedTuple):
  """What a sampler does in its S steps, from noise to image."""

  t: np.ndarray  # i32[S], the timestep that the network is asked at
  signal: Array  # f32[S], sqrt(a) after the step; 1 is the clean image
  noise: Array  # f32[S], sqrt(1 - a) after the step
  ahead: Array  # f32[S], c: how far the step looks ahead along the last two clean images


def initial_latents(keys: Array, shape: tuple[int, int, int]) -> Array:
  """Keys [B], one for each image, so that an image does not depend on its batch; shape (h, w, Z) -> f32[B, h, w, Z]."""
  return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def timesteps(num_train_steps: int, steps: int, spacing: str = 'leading', steps_offset: int = 1, sampler: str = 'ddim',
              strength: float = 1.0) -> np.ndarray:
  """The timesteps to visit, from noise to image: the last int(steps * strength) of i32[steps].

  'leading' counts up from `steps_offset` in strides of T // steps, and never sees pure noise; 'trailing' counts down from
  T - 1 (Lin et al. 2023, arXiv 2305.08891, table 2). Leading DPM-Solver++ has strides of T // (steps + 1) and leaves the first out.

  Raises:
    ValueError: no such sampler or spacing; more steps than T, or a first step beyond T - 1; a strength that leaves no step.
  """
  if sampler not in SAMPLERS:
    raise ValueError(f'sampler={sampler!r} is not one of {", ".join(map(repr, SAMPLERS))}')
  skipped = int(sampler == 'dpm++2m' and spacing == 'leading')
  if not 0 < steps <= num_train_steps - skipped:
    raise ValueError(f'steps={steps} must be in 1..{num_train_steps - skipped}')
  if spacing == 'leading':
    visited = (np.arange(steps)[::-1] + skipped) * (num_train_steps // (steps + skipped)) + steps_offset
  elif spacing == 'trailing':
    visited = np.round(num_train_steps - np.arange(steps) * (num_train_steps / steps)) - 1
  else:
    raise ValueError(f"spacing={spacing!r} is not 'leading' or 'trailing'")
  if visited[0] >= num_train_steps:
    raise ValueError(f'steps={steps} with steps_offset={steps_offset} begins at {visited[0]}, past the {num_train_steps} trained')
  visited = visited[steps - min(int(steps * strength), steps):]
  if not len(visited):
    raise ValueError(f'strength={strength} leaves none of {steps} steps; raise one of them')
  return visited.astype(np.int32)


def plan(schedule: NoiseSchedule, steps: int, *, sampler: str = 'ddim', spacing: str = 'leading', steps_offset: int = 1,
         strength: float = 1.0, to_clean: bool = False) -> Plan:
  """The steps of a sampler, at the `timesteps` of these arguments.

  DDIM (Song et al. 2021, equation 12 with eta 0) goes T // steps back, and in the end to the schedule's first step, or, with
  `to_clean`, to the clean image. Euler (Karras et al. 2022, algorithm 1: DDIM, but for where it goes) and DPM-Solver++ 2M (Lu et al. 2022,
  algorithm 2) go to the next timestep, and in the end to the clean image; 2M does not look ahead in its first step, for want of
  an earlier one, nor in its last.
  """
  t = timesteps(len(schedule.alphas_cumprod), steps, spacing, steps_offset, sampler, strength)
  if sampler == 'ddim':
    to = t - len(schedule.alphas_cumprod) // steps
    alpha = jnp.where(to_clean & (to < 0), 1., schedule.alphas_cumprod[np.maximum(to, 0)])
  else:
    alpha = jnp.append(schedule.alphas_cumprod[t[1:]], 1.)
  ahead = jnp.zeros(len(t))
  if sampler == 'dpm++2m' and len(t) > 2:
    here = schedule.alphas_cumprod[t]
    gains = jnp.diff(jnp.log(here / (1 - here)) / 2)  # of log(signal / noise), by each step but the last
    ahead = ahead.at[1:-1].set(gains[1:] / gains[:-1] / 2)
  return Plan(t, jnp.sqrt(alpha), jnp.sqrt(1 - alpha), ahead)


def guided(denoise: Denoiser, condition: tuple, null_condition: tuple | None, guidance_scale: float | Array,
           rescale: float = 0.0) -> Denoiser:
  """Classifier-free guidance (Ho & Salimans 2022): null + scale * (conditional - null), both in one batch of 2B.

  `condition` holds what `denoise` takes after the timesteps, any trees of arrays with leading axis B; `null_condition` the
  same trees for the unconditional branch, with or without that axis. Without it there is no guidance, and no second branch.
  With `rescale`, that share of the result has the deviation of the conditional prediction, image by image (Lin et al. 2023,
  section 3.4).
  """
  if null_condition is None:
    return lambda latents, t: denoise(latents, t, *condition)
  both = jax.tree.map(lambda c, n: jnp.concatenate([c, jnp.broadcast_to(n, c.shape).astype(c.dtype)]), condition, null_condition)

  def predict(latents: Array, t: Array) -> Array:
    given, null = jnp.split(denoise(jnp.concatenate([latents, latents]), jnp.concatenate([t, t]), *both), 2)
    found = null + guidance_scale * (given - null)
    if rescale:
      axes = tuple(range(1, found.ndim))
      found = found * (1 - rescale + rescale * given.std(axes, keepdims=True) / found.std(axes, keepdims=True))
    return found

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


def sample(
    denoise: Denoiser, latents: Array, condition: tuple, null_condition: tuple | None = None, *, steps: int,
    schedule: NoiseSchedule, sampler: str = 'ddim', guidance_scale: float | Array = 1.0, rescale: float = 0.0,
    prediction: str = 'epsilon', spacing: str = 'leading', steps_offset: int = 1, start: Array | None = None, strength: float = 1.0,
    to_clean: bool = False,
) -> Array:
  """A deterministic sampler with classifier-free guidance, as one scan. The published decoder (REFERENCE section 4) is

      sample(unet, initial_latents(keys, (64, 64, 4)), (context, mask), (null_context, null_mask),
             steps=50, guidance_scale=5., schedule=scaled_linear())

  Args:
    denoise: (latents, timesteps i32[B], *condition) -> prediction, float32.
    latents: f32[B, h, w, Z], unit Gaussian; see `initial_latents`.
    condition, null_condition, guidance_scale, rescale: see `guided`.
    steps: how many of the schedule's timesteps to visit.
    sampler: 'ddim', 'euler' or 'dpm++2m'; see `plan`.
    prediction: what the network was trained to give, 'epsilon' or 'v_prediction'.
    spacing, steps_offset: see `timesteps`.
    start: clean latents f32[B, h, w, Z] to begin from in place of pure noise (Meng et al. 2022, SDEdit); `latents` is then the noise
      that is laid over them, as much as the first step that is left expects.
    strength: with `start`, the share of the steps that is made.
    to_clean: see `plan`.

  Returns:
    f32[B, h, w, Z].

  Raises:
    ValueError: no such sampler, prediction or spacing; too many steps or none.
  """
  todo = plan(schedule, steps, sampler=sampler, spacing=spacing, steps_offset=steps_offset,
              strength=1.0 if start is None else strength, to_clean=to_clean)
  predict = guided(denoise, condition, null_condition, guidance_scale, rescale)
  latents = latents.astype(jnp.float32)
  if start is not None:
    latents = add_noise(schedule, start, latents, jnp.full(len(latents), todo.t[0]))
  elif sampler == 'euler' and spacing == 'trailing':
    latents = latents * jnp.sqrt(1 - schedule.alphas_cumprod[todo.t[0]])  # diffusers begins with sigma times the noise, without a signal

  def step(carry: tuple[Array, Array], now: Plan) -> tuple[tuple[Array, Array], None]:
    latents, before = carry
    t = jnp.full(len(latents), now.t)
    clean, noise = clean_and_noise(schedule, latents, predict(latents, t).astype(jnp.float32), t, prediction)
    signal, sigma = signal_and_noise(schedule, t, latents.ndim)
    further = now.ahead * (clean - before)
    return (now.signal * (clean + further) + now.noise * (noise - signal / sigma * further), clean), None

  return jax.lax.scan(step, (latents, latents), todo)[0][0]
