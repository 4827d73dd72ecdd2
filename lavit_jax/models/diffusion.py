"""Noise -> latents: samplers, each one compiled loop over steps.

B images, h and w latents, Z latent channels; T training steps of the schedule, S steps of a sampler.

DDIM, Euler and DPM-Solver++ 2M are one update under three plans. Given what the network says of x_t, clean and noise, a step is

    x' = signal' * ahead + noise' * e,    ahead = clean + c * (clean - clean before),    x = signal * ahead + noise * e

and the plan says which timesteps are visited, where each step leads (signal', noise'), and how far it looks ahead (c = 0 but for
2M). So another deterministic sampler needs only its plan; `guided_denoiser` makes the prediction and `jax.lax.scan` runs the steps.

diffusers' schedulers do the same, made by `from_config` of the same scheduler config (`noise.Scheduler`):

    'ddim'      DDIMScheduler, eta 0: the published decoder
    'euler'     EulerDiscreteScheduler, no churn; it knows neither clip_sample nor thresholding
    'dpm++2m'   DPMSolverMultistepScheduler(algorithm_type='dpmsolver++', solver_order=2, solver_type='midpoint',
                lower_order_final=True); it knows no clip_sample

with one difference: for 62 numbers of steps, diffusers' trailing spacing has a timestep too many, and ours has not (see `timesteps`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lavit_jax.models.noise_schedule import Scheduler

Denoiser = Callable[
  ..., Array
]  # (latents [B, h, w, Z], timesteps [B], *condition) -> prediction [B, h, w, Z]
SAMPLERS = ('ddim', 'euler', 'dpm++2m')
SPACINGS = {
  'ddim': 'leading',
  'euler': 'linspace',
  'dpm++2m': 'linspace',
}  # the defaults of diffusers' classes
LEAST_SIGNAL = (
  2.0**-24
)  # of Euler and DPM++ where a schedule ends with none: so small is float16's least number
REFUSED = {  # what a scheduler config may say that a sampler would go by, and cannot here; and the value that it can
  'euler': dict(
    use_karras_sigmas=False,
    use_exponential_sigmas=False,
    use_beta_sigmas=False,
    interpolation_type='linear',
    final_sigmas_type='zero',
  ),
  'dpm++2m': dict(
    use_karras_sigmas=False,
    use_exponential_sigmas=False,
    use_beta_sigmas=False,
    use_lu_lambdas=False,
    final_sigmas_type='zero',
    lambda_min_clipped=None,
  ),
}


class SamplerPlan(NamedTuple):
  """What a sampler does in its S steps, from noise to image."""

  t: (
    np.ndarray
  )  # i32[S], or f32[S] where they lie between training steps: what the network is asked at
  signal: np.ndarray  # f32[S], sqrt(a) before the step
  noise: np.ndarray  # f32[S], sqrt(1 - a) before the step
  next_signal: np.ndarray  # f32[S], sqrt(a) after the step; 1 is the clean image
  next_noise: np.ndarray  # f32[S], sqrt(1 - a) after the step
  ahead: np.ndarray  # f32[S], c: how far the step looks ahead along the last two clean images


def initial_latents(keys: Array, shape: tuple[int, int, int]) -> Array:
  """Keys [B], one for each image, so that an image does not depend on its batch; shape (h, w, Z) -> f32[B, h, w, Z]."""
  return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def timesteps(
  num_train_steps: int,
  steps: int,
  spacing: str | None = None,
  steps_offset: int = 1,
  sampler: str = 'ddim',
  strength: float = 1.0,
) -> np.ndarray:
  """The timesteps to visit, from noise to image: the last int(steps * strength) of i32[steps], or of f32[steps].

  Lin et al. 2023 (arXiv 2305.08891, table 2) name the spacings; None is the default of the sampler's class in diffusers:

    'leading'    counts up from `steps_offset` in strides of T // steps, and never sees pure noise
    'trailing'   counts down from T - 1 in strides of T / steps
    'linspace'   goes evenly from T - 1 to 0; Euler's lie between the training steps, those of the others are rounded

  DPM-Solver++ plans a step more by the first and the last of these and leaves the one at the clean end out.

  Raises:
    ValueError: no such sampler or spacing; more steps than T, or a first step beyond T - 1; a strength that leaves no step.
  """
  if sampler not in SAMPLERS:
    raise ValueError(f'sampler={sampler!r} is not one of {", ".join(map(repr, SAMPLERS))}')
  spacing = SPACINGS[sampler] if spacing is None else spacing
  skipped = int(sampler == 'dpm++2m' and spacing in ('leading', 'linspace'))
  if not 0 < steps <= num_train_steps - skipped:
    raise ValueError(f'steps={steps} must be in 1..{num_train_steps - skipped}')
  if spacing == 'leading':
    visited = (np.arange(steps)[::-1] + skipped) * (
      num_train_steps // (steps + skipped)
    ) + steps_offset
  elif (
    spacing == 'trailing'
  ):  # not np.arange(T, 0, -T / steps), which for 62 numbers of steps has one too many
    visited = np.round(num_train_steps - np.arange(steps) * (num_train_steps / steps)) - 1
  elif spacing == 'linspace':
    visited = np.linspace(0, num_train_steps - 1, steps + skipped)[::-1][:steps]
    visited = visited if sampler == 'euler' else visited.round()
  else:
    raise ValueError(f"spacing={spacing!r} is not 'leading', 'trailing' or 'linspace'")
  if visited[0] >= num_train_steps:
    raise ValueError(
      f'steps={steps} with steps_offset={steps_offset} begins at {visited[0]}, past the {num_train_steps} trained'
    )
  visited = visited[steps - min(int(steps * strength), steps) :]
  if not len(visited):
    raise ValueError(f'strength={strength} leaves none of {steps} steps; raise one of them')
  between = sampler == 'euler' and spacing == 'linspace'
  return visited.astype(np.float32 if between else np.int32)


def make_plan(
  scheduler: Scheduler, steps: int, *, sampler: str = 'ddim', strength: float = 1.0
) -> SamplerPlan:
  """The steps of a sampler, at its `timesteps`.

  DDIM (Song et al. 2021, equation 12 with eta 0) goes T // steps back, and in the end to the schedule's first step, or, with
  `set_alpha_to_one`, to the clean image. Euler (Karras et al. 2022, algorithm 1: DDIM, but for where it goes) and DPM-Solver++ 2M (Lu et
  al. 2022, algorithm 2) go to the next timestep, and in the end to the clean image; 2M does not look ahead in its first step, for
  want of an earlier one, nor in its last.

  Raises:
    ValueError: as `timesteps`; an option that the sampler cannot follow; a first step without any signal, of
      which a predicted noise cannot say what is clean.
  """
  t = timesteps(
    scheduler.num_train_timesteps,
    steps,
    scheduler.timestep_spacing,
    scheduler.steps_offset,
    sampler,
    strength,
  )
  for name, value in REFUSED.get(sampler, {}).items():
    if getattr(scheduler, name) != value:
      raise ValueError(
        f'sampler={sampler!r} cannot draw with {name}={getattr(scheduler, name)!r} of scheduler_config.json, only with {value!r}; '
        "draw with sampler='ddim', or change it there"
      )
  levels = scheduler.schedule.alphas_cumprod.astype(np.float64)
  if sampler == 'ddim':
    back = t - scheduler.num_train_timesteps // steps
    end = 1.0 if scheduler.set_alpha_to_one else levels[0]
    here, following = levels[t], np.where(back < 0, end, levels[np.maximum(back, 0)])
    if here[0] == 0 and scheduler.prediction_type == 'epsilon':
      raise ValueError(
        f'steps={steps} begin at timestep {t[0]}, where rescale_betas_zero_snr leaves no signal: there a network of '
        "prediction_type='epsilon' does not say what is clean; take timestep_spacing='leading', or sampler='euler'"
      )
  else:
    if scheduler.rescale_betas_zero_snr:
      levels[-1] = LEAST_SIGNAL
    sigmas = np.interp(t, np.arange(len(levels)), np.sqrt((1 - levels) / levels))
    here = 1 / (1 + sigmas**2)
    following = np.append(here[1:], 1.0)
  ahead = np.zeros(len(t))
  if sampler == 'dpm++2m' and len(t) > 2:
    gains = np.diff(
      np.log(here / (1 - here)) / 2
    )  # of log(signal / noise), by each step but the last
    ahead[1:-1] = gains[1:] / gains[:-1] / 2
  rest = (np.sqrt(here), np.sqrt(1 - here), np.sqrt(following), np.sqrt(1 - following), ahead)
  return SamplerPlan(t, *(x.astype(np.float32) for x in rest))


def guided_denoiser(
  denoise: Denoiser,
  condition: tuple,
  null_condition: tuple | None,
  guidance_scale: float | Array,
  rescale: float = 0.0,
) -> Denoiser:
  """Classifier-free guidance (Ho & Salimans 2022): null + scale * (conditional - null), both in one batch of 2B.

  `condition` holds what `denoise` takes after the timesteps, any trees of arrays with leading axis B; `null_condition` the
  same trees for the unconditional branch, with or without that axis. Without it there is no guidance, and no second branch.
  With `rescale`, that share of the result has the deviation of the conditional prediction, image by image (Lin et al. 2023,
  section 3.4).
  """
  if null_condition is None:
    return lambda latents, t: denoise(latents, t, *condition)
  both = jax.tree.map(
    lambda c, n: jnp.concatenate([c, jnp.broadcast_to(n, c.shape).astype(c.dtype)]),
    condition,
    null_condition,
  )

  def predict(latents: Array, t: Array) -> Array:
    given, null = jnp.split(
      denoise(jnp.concatenate([latents, latents]), jnp.concatenate([t, t]), *both), 2
    )
    found = null + guidance_scale * (given - null)
    if rescale:
      axes = tuple(range(1, found.ndim))
      found = found * (
        1 - rescale + rescale * given.std(axes, keepdims=True) / found.std(axes, keepdims=True)
      )
    return found

  return predict


def clean_and_noise(
  latents: Array, prediction: Array, signal: Array, sigma: Array, kind: str
) -> tuple[Array, Array]:
  """What a prediction says that x_0 and the noise are, given x_t = signal * x_0 + sigma * noise.

  Args:
    latents, prediction: x_t and what the network says of it, f32[B, h, w, Z].
    signal, sigma: f32 scalars.
    kind: 'epsilon', 'v_prediction' or 'sample'.

  Raises:
    ValueError: no such kind.
  """
  if kind == 'epsilon':
    return (latents - sigma * prediction) / signal, prediction
  if kind == 'v_prediction':
    return signal * latents - sigma * prediction, signal * prediction + sigma * latents
  if kind == 'sample':
    return prediction, (latents - signal * prediction) / sigma
  raise ValueError(f"prediction={kind!r} is not 'epsilon', 'v_prediction' or 'sample'")


def limited(clean: Array, scheduler: Scheduler, sampler: str) -> Array:
  """Clean latents f32[B, h, w, Z], clipped or thresholded as the scheduler config wants it of this sampler.

  Dynamic thresholding (Saharia et al. 2022, section 2.3): each image is cut to +-s and divided by s, where s
  is a quantile of its absolute values, in 1..sample_max_value.
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
  condition: tuple,
  null_condition: tuple | None = None,
  *,
  steps: int,
  scheduler: Scheduler = Scheduler(),
  sampler: str = 'ddim',
  guidance_scale: float | Array = 1.0,
  rescale: float = 0.0,
  start: Array | None = None,
  strength: float = 1.0,
) -> Array:
  """A deterministic sampler with classifier-free guidance, as one scan. The published decoder (specification, Inference) is

      sample(unet, initial_latents(keys, (64, 64, 4)), (context, mask), (null_context, null_mask), steps=50, guidance_scale=5.)

  Args:
    denoise: (latents, timesteps i32[B] or f32[B], *condition) -> prediction, float32.
    latents: f32[B, h, w, Z], unit Gaussian; see `initial_latents`.
    condition, null_condition, guidance_scale, rescale: see `guided_denoiser`.
    steps: how many timesteps to visit.
    scheduler: how the network was trained, and the options of the sampler.
    sampler: 'ddim', 'euler' or 'dpm++2m'; see `make_plan`.
    start: clean latents f32[B, h, w, Z] to begin from in place of pure noise (Meng et al. 2022, SDEdit); `latents` is then the noise
      that is laid over them, as much as the first step that is left expects.
    strength: with `start`, the share of the steps that is made.

  Returns:
    f32[B, h, w, Z].

  Raises:
    ValueError: as `make_plan`, and for a prediction_type that is not known.
  """
  todo = make_plan(scheduler, steps, sampler=sampler, strength=1.0 if start is None else strength)
  predict = guided_denoiser(denoise, condition, null_condition, guidance_scale, rescale)
  latents = latents.astype(jnp.float32)
  if start is not None:
    latents = todo.signal[0] * start + todo.noise[0] * latents
  elif sampler == 'euler' and (scheduler.timestep_spacing or SPACINGS[sampler]) != 'leading':
    latents = (
      latents * todo.noise[0]
    )  # diffusers begins with sigma times the noise, without a signal

  def step(carry: tuple[Array, Array], now: SamplerPlan) -> tuple[tuple[Array, Array], None]:
    latents, before = carry
    t = jnp.full(len(latents), now.t)
    prediction = predict(latents, t).astype(jnp.float32)
    clean, noise = clean_and_noise(
      latents, prediction, now.signal, now.noise, scheduler.prediction_type
    )
    clean = limited(clean, scheduler, sampler)
    if (
      sampler == 'dpm++2m'
    ):  # which knows the clean image only, and DDIM goes on with the noise that was predicted
      noise = (latents - now.signal * clean) / now.noise
    further = now.ahead * (clean - before)
    moved = now.next_signal * (clean + further) + now.next_noise * (
      noise - now.signal / now.noise * further
    )
    return (moved, clean), None

  return jax.lax.scan(step, (latents, latents), todo)[0][0]
