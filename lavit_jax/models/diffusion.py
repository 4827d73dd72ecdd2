"""Noise to latents: diffusion samplers, each one compiled loop over steps.

DDIM, Euler and DPM-Solver++ 2M are one update under three plans. Let the network predict the clean
image and the noise of x = signal * clean + noise_level * noise. Then a step is

    x' = signal' * ahead + noise_level' * noise',
    ahead = clean + c * (clean - previous clean),

where noise' is that of x = signal * ahead + noise_level * noise'. The plan (sampler_plans.py) says
which timesteps are visited, where each step goes (signal', noise_level'), and c, which is 0 but for
2M. PNDM is DDIM's update with a mix of the last predictions in place of the last one.

The samplers agree with diffusers' schedulers, made by `from_config` of the same scheduler config:

    'ddim'      DDIMScheduler, eta 0: the published decoder
    'euler'     EulerDiscreteScheduler, no churn; it has neither clip_sample nor thresholding
    'dpm++2m'   DPMSolverMultistepScheduler(algorithm_type='dpmsolver++', solver_order=2,
                solver_type='midpoint', lower_order_final=True); it has no clip_sample
    'pndm'      PNDMScheduler(skip_prk_steps=True); it has neither clip_sample nor thresholding, nor
                prediction_type='sample', and evaluates the network once more than it has steps

with one difference: for 62 numbers of steps, diffusers' trailing spacing has one timestep too many.

Axes: B images, h and w latents, Z latent channels, T training steps of a schedule, S steps of a
sampler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lavit_jax.models.noise_schedule import Scheduler
from lavit_jax.models.sampler_plans import DEFAULT_SPACINGS, NUM_MIXED, SamplerPlan, make_plan

# (latents [B, h, w, Z], timesteps [B], *condition) -> prediction [B, h, w, Z]
Denoiser = Callable[..., Array]
Condition = tuple[Any, ...]
SD_SCHEDULER = Scheduler()  # of Stable Diffusion 1.5 and SDXL


def initial_latents(keys: Array, shape: tuple[int, int, int]) -> Array:
  """Returns unit Gaussian f32[B, h, w, Z] by keys[B]: an image does not depend on its batch."""
  return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def guided_denoiser(
  denoise: Denoiser,
  condition: Condition,
  null_condition: Condition | None,
  guidance_scale: float | Array,
  rescale: float = 0.0,
) -> Denoiser:
  """Applies classifier-free guidance (Ho & Salimans 2022) to a network, in one batch of 2B.

  Args:
    denoise: the network.
    condition: what it takes after the timesteps, trees of arrays with leading axis B.
    null_condition: the same without a condition, with or without that axis; None for no guidance.
    guidance_scale: of null + scale * (conditional - null).
    rescale: share of the result that gets the standard deviation of the conditional prediction,
      image by image (Lin et al. 2023, section 3.4).

  Returns:
    (latents, timesteps) -> prediction.
  """
  if null_condition is None:
    return lambda latents, t: denoise(latents, t, *condition)

  def concatenate(conditional: Array, null: Array) -> Array:
    null = jnp.broadcast_to(null, conditional.shape).astype(conditional.dtype)
    return jnp.concatenate([conditional, null])

  conditions = jax.tree.map(concatenate, condition, null_condition)

  def predict(latents: Array, t: Array) -> Array:
    both = denoise(jnp.concatenate([latents, latents]), jnp.concatenate([t, t]), *conditions)
    conditional, null = jnp.split(both, 2)
    guided = null + guidance_scale * (conditional - null)
    if not rescale:
      return guided
    axes = tuple(range(1, guided.ndim))
    deviation = conditional.std(axes, keepdims=True)
    return guided * (1 - rescale + rescale * deviation / guided.std(axes, keepdims=True))

  return predict


def clean_and_noise(
  latents: Array,
  prediction: Array,
  signal: Array,
  noise_level: Array,
  kind: str,
) -> tuple[Array, Array]:
  """Splits latents into the clean ones and the noise, x_t = signal * clean + noise_level * noise.

  Args:
    latents: x_t, f32[B, h, w, Z].
    prediction: of the network at x_t, f32[B, h, w, Z].
    signal: f32 scalar.
    noise_level: f32 scalar.
    kind: of the prediction: 'epsilon', 'v_prediction' or 'sample'.

  Raises:
    ValueError: an unknown kind.
  """
  if kind == 'epsilon':
    return (latents - noise_level * prediction) / signal, prediction
  if kind == 'v_prediction':
    clean = signal * latents - noise_level * prediction
    return clean, signal * prediction + noise_level * latents
  if kind == 'sample':
    return prediction, (latents - signal * prediction) / noise_level
  raise ValueError(f"prediction={kind!r} is not 'epsilon', 'v_prediction' or 'sample'")


def limit_clean(clean: Array, scheduler: Scheduler, sampler: str) -> Array:
  """Clips or thresholds clean latents f32[B, h, w, Z], as the scheduler config says.

  Dynamic thresholding (Saharia et al. 2022, section 2.3) clips each image to +-s and divides it by
  s, a quantile of its absolute values within 1..sample_max_value.
  """
  if scheduler.thresholding and sampler in ('ddim', 'dpm++2m'):
    axes = tuple(range(1, clean.ndim))
    s = jnp.quantile(jnp.abs(clean), scheduler.dynamic_thresholding_ratio, axis=axes, keepdims=True)
    s = jnp.minimum(jnp.maximum(s, 1.0), scheduler.sample_max_value)
    return jnp.clip(clean, -s, s) / s
  if scheduler.clip_sample and sampler == 'ddim':
    return jnp.clip(clean, -scheduler.clip_sample_range, scheduler.clip_sample_range)
  return clean


def sample_latents(
  denoise: Denoiser,
  latents: Array,
  condition: Condition,
  null_condition: Condition | None = None,
  *,
  steps: int,
  scheduler: Scheduler = SD_SCHEDULER,
  sampler: str = 'ddim',
  guidance_scale: float | Array = 1.0,
  rescale: float = 0.0,
  start: Array | None = None,
  strength: float = 1.0,
) -> Array:
  """Samples latents with a U-Net, in one scan.

  The published decoder (specification, Inference) has steps=50 and guidance_scale=5.

  Args:
    denoise: (latents, timesteps i32[B] or f32[B], *condition) -> prediction [B, h, w, Z].
    latents: unit Gaussian f32[B, h, w, Z] (`initial_latents`).
    condition: see `guided_denoiser`.
    null_condition: see `guided_denoiser`.
    steps: number of steps.
    scheduler: how the network was trained, and the options of the sampler.
    sampler: one of `SAMPLERS`.
    guidance_scale: see `guided_denoiser`.
    rescale: see `guided_denoiser`.
    start: clean latents f32[B, h, w, Z] to start from (Meng et al. 2022, SDEdit), with as much of
      `latents` as noise on them as the first step expects; None starts from pure noise.
    strength: share of the steps that are done from `start`.

  Returns:
    f32[B, h, w, Z].

  Raises:
    ValueError: as in `make_plan`; an unknown prediction_type.
  """
  plan = make_plan(scheduler, steps, sampler=sampler, strength=1.0 if start is None else strength)
  predict = guided_denoiser(denoise, condition, null_condition, guidance_scale, rescale)
  latents = latents.astype(jnp.float32)
  spacing = scheduler.timestep_spacing or DEFAULT_SPACINGS[sampler]
  if start is not None:
    latents = plan.signal[0] * start + plan.noise[0] * latents
  elif sampler == 'euler' and spacing != 'leading':
    latents = latents * plan.noise[0]  # diffusers starts with sigma times the noise, without signal

  def step(carry: tuple[Array, Array], now: Any) -> tuple[tuple[Array, Array], None]:
    """One step of the plan; `now` is a SamplerPlan of one evaluation."""
    latents, previous_clean = carry
    prediction = predict(latents, jnp.full(len(latents), now.t)).astype(jnp.float32)
    clean, noise = clean_and_noise(
      latents, prediction, now.signal, now.noise, scheduler.prediction_type
    )
    clean = limit_clean(clean, scheduler, sampler)
    if sampler == 'dpm++2m':  # has no noise of its own; DDIM keeps the noise of the unlimited image
      noise = (latents - now.signal * clean) / now.noise
    change = now.ahead * (clean - previous_clean)
    noise = noise - now.signal / now.noise * change
    latents = now.next_signal * (clean + change) + now.next_noise * noise
    return (latents, clean), None

  if sampler == 'pndm':
    return _sample_by_mixes(predict, latents, plan, scheduler.prediction_type)
  (latents, _), _ = jax.lax.scan(step, (latents, latents), plan)
  return latents


def _sample_by_mixes(predict: Denoiser, latents: Array, plan: SamplerPlan, kind: str) -> Array:
  """The steps of PNDM, from latents f32[B, h, w, Z]."""

  def step(carry: tuple[Array, Array, Array], now: Any) -> tuple[tuple[Array, Array, Array], None]:
    latents, last_start, earlier = carry
    prediction = predict(latents, jnp.full(len(latents), now.t)).astype(jnp.float32)
    recent = jnp.concatenate([prediction[None], earlier])
    start = jnp.where(now.repeats, last_start, latents)
    mixed = jnp.tensordot(now.mix, recent, 1, precision=jax.lax.Precision.HIGHEST)
    clean, noise = clean_and_noise(start, mixed, now.signal, now.noise, kind)
    latents = now.next_signal * clean + now.next_noise * noise
    return (latents, start, jnp.where(now.repeats, earlier, recent[:-1])), None

  earlier = jnp.zeros((NUM_MIXED - 1, *latents.shape))
  (latents, *_), _ = jax.lax.scan(step, (latents, latents, earlier), plan)
  return latents
