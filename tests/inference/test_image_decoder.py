"""Golden codes to images, against diffusers; and every size of SDXL at full scale."""

import dataclasses
import functools
import json

import image_variants
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from image_variants import random_params

from lavit_jax.inference import generation_config, image_decoder, image_generation
from lavit_jax.models import diffusion, lavit
from lavit_jax.models.noise_schedule import Scheduler
from lavit_jax.weights.torch import name_tables
from lavit_jax.weights.torch.api import to_torch
from lavit_jax.weights.torch.configs import rules
from lavit_jax.weights.torch.configs.scheduler import CONFIG_FILES


@pytest.fixture(scope='module', autouse=True)
def variants():
  with pytest.MonkeyPatch.context() as patch:
    image_variants.install(patch)
    yield


@pytest.mark.parametrize(
  'decoder_config, sampler, with_init_images, changes',
  [
    (image_decoder.LOWRES, 'ddim', True, {}),
    (image_decoder.HIGHRES, 'ddim', False, {}),
    (image_decoder.HIGHRES, 'euler', True, {}),
    (
      image_decoder.LOWRES,
      'ddim',
      False,
      dict(prediction_type='v_prediction', timestep_spacing='trailing'),
    ),
    (
      image_decoder.LOWRES,
      'ddim',
      False,
      dict(
        beta_schedule='linear',
        beta_start=0.0001,
        beta_end=0.02,
        steps_offset=0,
        set_alpha_to_one=True,
        num_train_timesteps=500,
      ),
    ),
  ],
)
def test_golden_codes_are_decoded_as_by_diffusers(
  golden, tmp_path, decoder_config, sampler, with_init_images, changes
):
  torch = pytest.importorskip('torch')
  diffusers = pytest.importorskip('diffusers')
  model = lavit.build('golden')
  io = golden.io
  size = (16, 24)
  steps = 5
  strength = 0.6
  unet = decoder_config.prefix + 'unet'
  vae = decoder_config.prefix + 'vae'
  params = random_params('golden', unet, vae, 'uncond_embeddings')
  params['codebook'] = golden.params['tokenizer']
  for name in ('decoder', 'highres_decoder'):
    params[name] = golden.params[name]
  counts = io['kept_token_counts']
  mask = np.arange(16) < counts[:, None]
  ids = np.zeros((len(counts), 16), np.int32)
  ids[mask] = io['code_ids']
  keys = jax.random.split(jax.random.key(3), len(ids))
  init_images = None
  if with_init_images:
    init_images = np.random.default_rng(0).integers(0, 256, (len(ids), *size, 3), np.uint8)
  settings = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule='scaled_linear',
    steps_offset=1,
    timestep_spacing='leading',
  )
  if sampler == 'ddim':
    settings |= dict(clip_sample=False, set_alpha_to_one=False)
  settings |= changes
  (tmp_path / 'scheduler_config.json').write_text(json.dumps(settings))
  config = image_decoder.DecodingConfig(
    decoder=decoder_config,
    size=size,
    num_inference_steps=steps,
    sampler=sampler,
    strength=strength,
    scheduler=Scheduler(**rules.apply_rules(CONFIG_FILES[0], settings, model, tmp_path)),
  )
  decoded = image_decoder.decode_images(
    model,
    {name: params[name] for name in decoder_config.modules},
    ids,
    mask,
    keys,
    init_images,
    guidance_scale=decoder_config.guidance_scale,
    config=config,
  )

  def nchw(x):
    return torch.from_numpy(np.moveaxis(np.array(x), -1, 1).copy())

  for name in (unet, vae):
    to_torch(params[name], tmp_path / name, name, variant='golden')
  peer = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / unet).eval()
  peer_vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / vae).eval()
  is_ddim = sampler == 'ddim'
  scheduler_class = diffusers.DDIMScheduler if is_ddim else diffusers.EulerDiscreteScheduler
  scheduler = scheduler_class.from_pretrained(tmp_path)
  scheduler.set_timesteps(steps)
  visited = (
    scheduler.timesteps[-int(steps * strength) :] if with_init_images else scheduler.timesteps
  )
  x = nchw(jax.vmap(lambda key: jax.random.normal(key, (8, 12, 4)))(keys))
  if decoder_config.prefix:
    context = torch.from_numpy(io['highres_context'])
    context = torch.cat([context, torch.zeros_like(context)])
    pooled = torch.from_numpy(io['highres_pooled'])
    condition = dict(
      added_cond_kwargs=dict(
        text_embeds=torch.cat([pooled, torch.zeros_like(pooled)]),
        time_ids=torch.tensor([[16.0, 24.0, 0.0, 0.0, 16.0, 24.0]]).repeat(2 * len(ids), 1),
      )
    )
  else:
    null = np.concatenate([params['uncond_embeddings'], np.zeros((13, 24), np.float32)])
    context = torch.from_numpy(np.concatenate([io['lowres_context'], np.stack([null] * len(ids))]))
    null_mask = torch.arange(16)[None].repeat(len(ids), 1) < 3
    both_masks = torch.cat([torch.ones(len(ids), 16), null_mask]).bool()
    condition = dict(encoder_attention_mask=both_masks)
  with torch.no_grad():
    if with_init_images:
      encoded = peer_vae.encode(nchw(init_images / 127.5 - 1).float()).latent_dist
      noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 1), (8, 12, 4)))(keys)
      init_latents = peer_vae.config.scaling_factor * (encoded.mean + encoded.std * nchw(noise))
      x = scheduler.add_noise(init_latents, x, visited[:1].repeat(len(ids)))
    else:
      x = x * scheduler.init_noise_sigma
    for t in visited:
      x_twice = scheduler.scale_model_input(torch.cat([x, x]), t)
      prediction, null = peer(x_twice, t, context, **condition).sample.chunk(2)
      guided = null + decoder_config.guidance_scale * (prediction - null)
      x = scheduler.step(guided, t, x).prev_sample
    expected = peer_vae.decode(x / peer_vae.config.scaling_factor).sample
  expected = np.moveaxis((expected / 2 + 0.5).clamp(0, 1).numpy() * 255, 1, -1)
  assert 0.2 < ((0 < expected) & (expected < 255)).mean()
  assert expected.std() > 20
  # Half a byte of rounding, and a quarter for the float32 errors of all steps under guidance.
  np.testing.assert_allclose(decoded.images, expected, atol=0.5 + 0.25)
  assert not decoded.flagged.any()


@pytest.mark.parametrize(
  'height, width', [(1024, 1024), (896, 1152), (832, 1216), (768, 1344), (1216, 832), (1152, 896)]
)
def test_every_published_size_of_sdxl_at_full_scale(height, width, monkeypatch):
  """With lavit_7b in bfloat16, from latents of an eighth of the size; nothing is computed.

  Sizes depend on the levels of the U-Net and their widths, and not on how often a block is
  repeated: it is repeated for the first size alone, so that the others trace less.
  """
  full = lavit.build('lavit_7b', 'bfloat16')
  if (height, width) != (1024, 1024):
    shallow = full.highres_unet.clone(layers_per_block=1, transformer_layers=(1, 1, 1))
    full = dataclasses.replace(full, highres_unet=shallow)
  latent_shapes = []
  request = image_generation.resolve_image_request(
    2,
    generation_config.VariantDefaults(),
    [*name_tables.TABLES, 'codebook'],
    size=(height, width),
  )
  shapes = name_tables.module_shapes(
    full, ('tokenizer', *request.config.decoder.modules[1:], 'safety_checker')
  )
  shapes['codebook'] = shapes.pop('tokenizer')
  sample_latents = diffusion.sample_latents

  def record_shape(denoise, noise, *args, **kwargs):
    latent_shapes.append(noise.shape)
    return sample_latents(denoise, noise, *args, **kwargs)

  monkeypatch.setattr(diffusion, 'sample_latents', record_shape)
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))
  decoded = jax.eval_shape(
    functools.partial(
      image_decoder.decode_images.__wrapped__,
      full,
      guidance_scale=request.guidance_scale,
      config=request.config,
    ),
    shapes,
    jax.ShapeDtypeStruct((2, 256), jnp.int32),
    jax.ShapeDtypeStruct((2, 256), bool),
    keys,
    None,
  )
  assert latent_shapes == [(2, height // 8, width // 8, 4)]
  assert decoded.images.shape == (2, height, width, 3)
  assert decoded.images.dtype == jnp.uint8
  assert decoded.flagged.shape == (2,)
