"""The samplers against diffusers' schedulers, over whole trajectories."""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scheduler_peers import PEERS, SETTINGS

from lavit_jax.models.diffusion import guided_denoiser, initial_latents, sample_latents
from lavit_jax.models.noise_schedule import (
  Scheduler,
  add_noise,
  scaled_linear,
  training_target,
  velocity,
)
from lavit_jax.models.sampler_plans import SAMPLERS, make_plan
from lavit_jax.models.unet import UNet
from lavit_jax.weights.torch import mapping
from lavit_jax.weights.torch.names_diffusion import unet_rules, unet_shapes

torch = pytest.importorskip('torch')
diffusers = pytest.importorskip('diffusers')
Img2Img = diffusers.StableDiffusionImg2ImgPipeline
rescale_noise_cfg = pytest.importorskip(
  'diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion'
).rescale_noise_cfg

SCHEDULE = scaled_linear()
RNG = np.random.default_rng(0)
LATENTS = RNG.standard_normal((2, 4, 4, 4), np.float32)
CONTEXT, NULL = (
  RNG.standard_normal((2, 3, 12), np.float32),
  RNG.standard_normal((3, 12), np.float32),
)
MASK, NULL_MASK = np.array([[1, 1, 0], [1, 0, 0]], bool), np.array([1, 0, 0], bool)


def peer_sample(
  denoise,
  latents,
  *,
  steps,
  guidance_scale,
  sampler='ddim',
  rescale=0.0,
  start=None,
  strength=1.0,
  **settings,
):
  """The trajectory of diffusers, driven as its pipelines do, in numpy.

  `denoise(latents, t)` returns the conditional and the unconditional prediction.
  """
  scheduler = PEERS[sampler].from_config(SETTINGS | settings)
  scheduler.set_timesteps(steps)
  x, visited = torch.from_numpy(latents), scheduler.timesteps
  if start is None:
    x = x * scheduler.init_noise_sigma
  else:
    visited, _ = Img2Img.get_timesteps(
      types.SimpleNamespace(scheduler=scheduler), steps, strength, None
    )
    if sampler == 'pndm':
      # The pipeline cuts the list in which the second timestep stands twice, so that the network
      # gets every timestep but the first one step too late. Here the one after the cut is doubled.
      rest = scheduler._timesteps[::-1][steps - int(steps * strength) :]
      visited = torch.from_numpy(np.insert(rest, 1, rest[1:2]).astype(np.int64))
    x = scheduler.add_noise(torch.from_numpy(start), x, visited[:1].repeat(len(x)))
  for t in visited:
    seen = scheduler.scale_model_input(x, t)
    given, null = (torch.from_numpy(np.array(p)) for p in denoise(seen.numpy(), float(t)))
    found = null + guidance_scale * (given - null)
    x = scheduler.step(
      rescale_noise_cfg(found, given, rescale) if rescale else found, t, x
    ).prev_sample
  return x.numpy()


def toy(latents, t, context, mask):
  """A smooth prediction that depends on every input."""
  level = (context * mask[..., None]).sum((1, 2))[:, None, None, None]
  return jnp.tanh(latents + 0.1 * level) * (0.5 + t[:, None, None, None] / 2000)


OPTIONS = (
  'steps',
  'sampler',
  'rescale',
  'start',
  'strength',
)  # of the call; all else is said by the scheduler config


def toy_pair(latents, t):
  t = jnp.full(2, t)
  return toy(latents, t, CONTEXT, MASK), toy(
    latents, t, np.stack([NULL, NULL]), np.stack([NULL_MASK, NULL_MASK])
  )


def assert_same_trajectory(**settings):
  want = peer_sample(toy_pair, LATENTS, guidance_scale=3.0, **settings)
  call = {key: settings.pop(key) for key in OPTIONS if key in settings}
  got = sample_latents(
    toy,
    LATENTS,
    (CONTEXT, MASK),
    (NULL, NULL_MASK),
    guidance_scale=3.0,
    scheduler=Scheduler(**settings),
    **call,
  )
  assert np.abs(want - LATENTS).max() > 0.5
  # Each step rounds latents of up to 10 times the result, and guidance multiplies by 5,
  # in up to 50 steps.
  scale = 10 * max(1, np.abs(want).max())
  np.testing.assert_allclose(got, want, rtol=0, atol=scale * 5 * 50 * np.finfo(np.float32).eps)
  return got


@pytest.mark.parametrize('sampler', SAMPLERS)
@pytest.mark.parametrize(
  'spacing,prediction,steps',
  [
    (None, 'epsilon', 7),
    ('leading', 'epsilon', 50),
    ('trailing', 'epsilon', 7),
    ('linspace', 'epsilon', 50),
    (None, 'v_prediction', 50),
    ('leading', 'v_prediction', 7),
    ('trailing', 'v_prediction', 50),
    ('linspace', 'v_prediction', 7),
    ('trailing', 'sample', 7),
  ],
)
def test_trajectory_matches_diffusers(sampler, prediction, spacing, steps):
  if (sampler, prediction) == ('pndm', 'sample'):
    with pytest.raises(ValueError, match="'pndm' mixes predicted noises"):
      make_plan(Scheduler(prediction_type=prediction), steps, sampler=sampler)
    return
  assert_same_trajectory(
    prediction_type=prediction,
    sampler=sampler,
    steps=steps,
    **({'timestep_spacing': spacing} if spacing else {}),
  )


@pytest.mark.parametrize('sampler', SAMPLERS)
@pytest.mark.parametrize(
  'options',
  [
    dict(clip_sample=True),
    dict(clip_sample=True, clip_sample_range=0.3, prediction_type='sample'),
    dict(thresholding=True, sample_max_value=1.6, dynamic_thresholding_ratio=0.8),
    dict(thresholding=True, clip_sample=True, sample_max_value=5.0, prediction_type='v_prediction'),
    dict(
      beta_schedule='squaredcos_cap_v2', prediction_type='v_prediction', timestep_spacing='leading'
    ),
    dict(
      beta_schedule='linear', beta_start=1e-4, beta_end=0.02, set_alpha_to_one=True, steps_offset=0
    ),
    dict(trained_betas=tuple(np.linspace(0.001, 0.02, 200).tolist()), num_train_timesteps=200),
    dict(rescale_betas_zero_snr=True, prediction_type='v_prediction', timestep_spacing='trailing'),
    dict(rescale_betas_zero_snr=True, prediction_type='v_prediction', timestep_spacing='linspace'),
    dict(rescale_betas_zero_snr=True, prediction_type='sample', timestep_spacing='trailing'),
    dict(rescale_betas_zero_snr=True, timestep_spacing='leading'),
  ],
)
def test_options_match_diffusers(sampler, options):
  """DDIM has all options, DPM++ no clip_sample, Euler and PNDM neither that nor thresholding."""
  scheduler = Scheduler(**options)
  if sampler == 'pndm':
    if scheduler.rescale_betas_zero_snr or scheduler.prediction_type == 'sample':
      with pytest.raises(ValueError, match="sampler='pndm'"):
        make_plan(scheduler, 12, sampler=sampler)
      return
  changed = assert_same_trajectory(sampler=sampler, steps=12, **options)
  plain = sample_latents(
    toy, LATENTS, (CONTEXT, MASK), (NULL, NULL_MASK), guidance_scale=3.0, steps=12, sampler=sampler
  )
  ignored = set() if sampler == 'ddim' else {'clip_sample'}
  assert (
    options.keys() <= ignored
    or sampler in ('euler', 'pndm')
    and 'thresholding' in options
    or np.abs(changed - plain).max() > 1e-3
  )


@pytest.mark.parametrize('sampler', SAMPLERS)
@pytest.mark.parametrize('steps', [1, 2, 3])
def test_short_trajectories_match_too(sampler, steps):
  assert_same_trajectory(sampler=sampler, steps=steps, timestep_spacing='trailing')


def test_the_samplers_differ():
  results = [
    sample_latents(toy, LATENTS, (CONTEXT, MASK), steps=7, sampler=sampler) for sampler in SAMPLERS
  ]
  assert min(np.abs(a - b).max() for a, b in itertools.combinations(results, 2)) > 1e-3


@pytest.mark.parametrize('sampler', SAMPLERS)
def test_rescaled_guidance_matches_diffusers(sampler):
  plain, rescaled = (
    assert_same_trajectory(sampler=sampler, steps=10, rescale=rescale) for rescale in (0.0, 0.7)
  )
  assert np.abs(plain - rescaled).max() > 0.01


@pytest.mark.parametrize('sampler', SAMPLERS)
@pytest.mark.parametrize('spacing', ['leading', 'trailing', 'linspace'])
@pytest.mark.parametrize(
  'steps,strength', [(10, 0.6), (50, 0.58), (25, 0.05), (7, 1.0)]
)  # int(50 * 0.58) is 28: it rounds down
def test_a_noised_start_matches_diffusers_img2img(sampler, spacing, steps, strength):
  start = RNG.standard_normal(LATENTS.shape, np.float32)
  assert_same_trajectory(
    timestep_spacing=spacing, sampler=sampler, steps=steps, start=start, strength=strength
  )


def test_tiny_unet_trajectory_matches_diffusers():
  module = UNet(
    block_out_channels=(8, 16),
    layers_per_block=1,
    down_block_attention=(False, True),
    transformer_layers=(1, 1),
    num_heads=(2, 2),
    cross_attention_dim=12,
    norm_num_groups=4,
  )
  torch.manual_seed(0)
  model = diffusers.UNet2DConditionModel(
    block_out_channels=(8, 16),
    layers_per_block=1,
    down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'),
    up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'),
    attention_head_dim=2,
    cross_attention_dim=12,
    norm_num_groups=4,
  ).eval()
  state = {name: p.numpy() for name, p in model.state_dict().items()}
  params = {'params': mapping.from_state_dict(unet_rules(module), state, unet_shapes(module))}

  @torch.no_grad()
  def both(latents, t):
    x = torch.from_numpy(np.moveaxis(latents, -1, 1).copy())
    for context, mask in (
      (CONTEXT, MASK),
      (np.stack([NULL, NULL]), np.stack([NULL_MASK, NULL_MASK])),
    ):
      y = model(
        x, t, torch.from_numpy(context), encoder_attention_mask=torch.from_numpy(mask)
      ).sample
      yield np.moveaxis(y.numpy(), 1, -1)

  @jax.jit
  def draw(params, scale):
    return sample_latents(
      lambda *inputs: module.apply(params, *inputs),
      LATENTS,
      (CONTEXT, MASK),
      (NULL, NULL_MASK),
      steps=10,
      guidance_scale=scale,
    )

  want = peer_sample(both, LATENTS, steps=10, guidance_scale=5.0)
  np.testing.assert_allclose(draw(params, 5.0), want, rtol=0, atol=1e-4)


def test_an_image_does_not_depend_on_its_batch():
  keys = jax.random.split(jax.random.key(0), 3)

  def draw(rows):
    return sample_latents(
      toy,
      initial_latents(keys[rows], (4, 4, 4)),
      (CONTEXT[:1].repeat(len(rows), 0), MASK[:1].repeat(len(rows), 0)),
      steps=5,
    )

  together = draw(np.arange(3))
  np.testing.assert_allclose(draw(np.array([2]))[0], together[2], atol=1e-6)
  assert not np.allclose(together[0], together[1])


def test_guidance_interpolates_and_extrapolates():
  t = jnp.array([5, 5])
  given = toy(LATENTS, t, CONTEXT, MASK)
  null = toy(LATENTS, t, np.stack([NULL, NULL]), np.stack([NULL_MASK, NULL_MASK]))
  for scale, want in ((0.0, null), (1.0, given), (3.0, 3 * given - 2 * null)):
    got = guided_denoiser(toy, (CONTEXT, MASK), (NULL, NULL_MASK), scale)(LATENTS, t)
    np.testing.assert_allclose(got, want, atol=1e-5)
  np.testing.assert_array_equal(guided_denoiser(toy, (CONTEXT, MASK), None, 3.0)(LATENTS, t), given)


def test_bfloat16_denoiser_is_finite():
  def denoise(latents, t, *condition):
    return toy(latents, t, *condition).astype(jnp.bfloat16)

  got = sample_latents(
    denoise, LATENTS, (CONTEXT, MASK), (NULL, NULL_MASK), steps=10, guidance_scale=3.0
  )
  assert got.dtype == jnp.float32 and np.isfinite(got).all()


def test_schedule_and_training_targets_match_diffusers():
  scheduler = PEERS['ddim'].from_config(SETTINGS)
  np.testing.assert_allclose(SCHEDULE.betas, scheduler.betas, rtol=1e-5)
  np.testing.assert_allclose(SCHEDULE.alphas_cumprod, scheduler.alphas_cumprod, rtol=2e-5)
  noise, t = LATENTS[::-1].copy(), np.array([0, 999])
  arrays = [torch.from_numpy(x) for x in (LATENTS, noise, t)]
  np.testing.assert_allclose(
    add_noise(SCHEDULE, LATENTS, noise, t), scheduler.add_noise(*arrays), atol=1e-5
  )
  np.testing.assert_allclose(
    velocity(SCHEDULE, LATENTS, noise, t), scheduler.get_velocity(*arrays), atol=1e-5
  )


def test_bad_prediction_is_named():
  with pytest.raises(ValueError, match="prediction='flow'"):
    sample_latents(
      toy, LATENTS, (CONTEXT, MASK), steps=2, scheduler=Scheduler(prediction_type='flow')
    )
  with pytest.raises(ValueError, match="prediction='flow'"):
    training_target('flow', SCHEDULE, LATENTS, LATENTS, np.array([0, 1]))
