"""Noise to latents: diffusion samplers, each one compiled loop over steps.

DDIM, Euler and DPM-Solver++ 2M are one update under three plans. Let the network predict the clean
image and the noise of x = signal * clean + noise_level * noise. Then a step is

    x' = signal' * ahead + noise_level' * noise',
    ahead = clean + c * (clean - previous clean),

where noise' is that of x = signal * ahead + noise_level * noise'. The plan says which timesteps are
visited, where each step goes (signal', noise_level'), and c, which is 0 but for 2M. Another
deterministic sampler needs only its plan.

The samplers agree with diffusers' schedulers, made by `from_config` of the same scheduler config:

    'ddim'      DDIMScheduler, eta 0: the published decoder
    'euler'     EulerDiscreteScheduler, no churn; it has neither clip_sample nor thresholding
    'dpm++2m'   DPMSolverMultistepScheduler(algorithm_type='dpmsolver++', solver_order=2,
                solver_type='midpoint', lower_order_final=True); it has no clip_sample

with one difference: for 62 numbers of steps, diffusers' trailing spacing has one timestep too many.

Axes: B images, h and w latents, Z latent channels, T training steps of a schedule, S steps of a
sampler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lavit_jax.models.noise_schedule import Scheduler

# (latents [B, h, w, Z], timesteps [B], *condition) -> prediction [B, h, w, Z]
Denoiser = Callable[..., Array]
Condition = tuple[Any, ...]
SD_SCHEDULER = Scheduler()  # of Stable Diffusion 1.5 and SDXL
SAMPLERS = ('ddim', 'euler', 'dpm++2m')
DEFAULT_SPACINGS = {'ddim': 'leading', 'euler': 'linspace', 'dpm++2m': 'linspace'}  # of diffusers
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
}


class SamplerPlan(NamedTuple):
  """The S steps of a sampler, from noise to image.

  Attributes:
    t: i32[S], or f32[S] between training steps: the timesteps that the network gets.
    signal: f32[S], sqrt(a) before the step.
    noise: f32[S], sqrt(1 - a) before the step.
    next_signal: f32[S], sqrt(a) after the step; 1 is the clean image.
    next_noise: f32[S], sqrt(1 - a) after the step.
    ahead: f32[S], c: how far the step extrapolates the last two clean images.
  """

  t: np.ndarray
  signal: np.ndarray
  noise: np.ndarray
  next_signal: np.ndarray
  next_noise: np.ndarray
  ahead: np.ndarray


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
  if sampler == 'ddim':
    alphas, next_alphas = _ddim_alphas(scheduler, t, steps)
  else:
    alphas, next_alphas = _sigma_alphas(scheduler, t)
  ahead = np.zeros(len(t))
  if sampler == 'dpm++2m' and len(t) > 2:
    half_log_snr = np.log(alphas / (1 - alphas)) / 2
    gains = np.diff(half_log_snr)  # of each step but the last
    ahead[1:-1] = gains[1:] / gains[:-1] / 2
  return SamplerPlan(
    t=t,
    signal=np.sqrt(alphas).astype(np.float32),
    noise=np.sqrt(1 - alphas).astype(np.float32),
    next_signal=np.sqrt(next_alphas).astype(np.float32),
    next_noise=np.sqrt(1 - next_alphas).astype(np.float32),
    ahead=ahead.astype(np.float32),
  )


def _check_fields(scheduler: Scheduler, sampler: str) -> None:
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


# ---------------------------------------------------------------------------------------- sampling


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
    """One step of the plan; `now` is a SamplerPlan of scalars."""
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

  (latents, _), _ = jax.lax.scan(step, (latents, latents), plan)
  return latents
