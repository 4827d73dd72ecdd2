"""Codes to images: against diffusers, from golden codes; sizes, initial images, safety checker."""

import functools
import json
import logging
import math
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nano import NANO

from lavit_jax.data.text import TextTokenizer
from lavit_jax.errors import UserError
from lavit_jax.inference import generation_config, image_decoder, image_generation
from lavit_jax.inference.pipeline import Lavit
from lavit_jax.models import diffusion, lavit
from lavit_jax.models.noise_schedule import Scheduler
from lavit_jax.weights.store import folder
from lavit_jax.weights.torch import name_tables
from lavit_jax.weights.torch.api import to_torch
from lavit_jax.weights.torch.configs import rules
from lavit_jax.weights.torch.configs.scheduler import CONFIG_FILES
from lavit_jax.weights.torch.descriptions import extractor_config

TOKENIZER = pathlib.Path(lavit.__file__).parents[1] / 'assets' / 'tiny' / 'language_model'
SDXL = dict(
  block_out_channels=(8, 16),
  layers_per_block=1,
  down_block_attention=(False, True),
  transformer_layers=(1, 2),
  num_heads=(2, 2),
  norm_num_groups=4,
  use_linear_projection=True,
  addition_time_embed_dim=8,
)
HIGHRES_VAE = dict(
  block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, scaling_factor=0.5
)
CHECKER = dict(
  image_size=16, patch_size=8, hidden_size=16, num_layers=2, num_heads=2, mlp_dim=24, output_dim=12
)
CONFIGS = {
  'both': {
    **NANO,
    'highres_decoder': dict(num_layers=1, context_dims=(16, 24), pooled_dim=20),
    'highres_vae': HIGHRES_VAE,
    'highres_unet': dict(SDXL, cross_attention_dim=40, pooled_dim=20),
    'safety_checker': CHECKER,
    'uncond_rows': 3,
  },
  'golden': dict(  # of tests/data/golden/config.json
    text_vocab_size=100,
    vit=dict(
      image_size=56,
      patch_size=14,
      hidden_size=64,
      num_layers=3,
      num_heads=4,
      head_dim=16,
      mlp_dim=279,
      output_dim=32,
    ),
    tokenizer=dict(
      hidden_size=64, num_layers=2, num_heads=4, mlp_dim=279, codebook_size=128, code_dim=8
    ),
    llama=NANO['llama'],
    decoder=dict(num_layers=2, context_dims=(24,)),
    highres_decoder=dict(num_layers=2, context_dims=(24, 40), pooled_dim=40),
    unet={**NANO['unet'], 'cross_attention_dim': 24},
    vae={**NANO['vae'], 'scaling_factor': 0.18},
    uncond_rows=3,
    highres_unet=dict(SDXL, cross_attention_dim=64, pooled_dim=40),
    highres_vae=HIGHRES_VAE,
  ),
}
CODES = [np.arange(5), np.array([3]), np.arange(16), np.array([], int), np.array([7, 7])]


@pytest.fixture(scope='module', autouse=True)
def variants():
  with pytest.MonkeyPatch.context() as patch:
    for name, config in CONFIGS.items():
      patch.setitem(lavit.VARIANTS, name, config)
    patch.setitem(
      generation_config.VARIANT_DEFAULTS,
      'both',
      generation_config.VariantDefaults(
        (1, 4), (1, 4), (2, 4), 16, highres_sizes=((16, 24), (24, 16))
      ),
    )
    yield


def random_params(variant, *names):
  """Random parameters that keep signals at about one, by numpy, so that nothing compiles."""
  rng = np.random.default_rng(1)

  def normal(leaf):
    fan_in = np.prod(leaf.shape[-2:-1] if leaf.ndim < 4 else leaf.shape[:3])
    return jnp.asarray(rng.normal(0, fan_in**-0.5, leaf.shape), jnp.float32)

  shapes = name_tables.module_shapes(lavit.build(variant), names or name_tables.TABLES)
  return jax.tree.map(normal, shapes)


@pytest.fixture(scope='module')
def params():
  params = random_params('both')
  checker = params['safety_checker']
  for name in ('concepts_thresholds', 'special_thresholds'):
    checker[name] = jnp.full_like(checker[name], 2.0)  # above every cosine
  return params


def open_model(params, **options):
  return Lavit(lavit.build('both'), params, TextTokenizer.load(TOKENIZER, 2048), **options)


@pytest.fixture(scope='module')
def model(params):
  return open_model(params)


# -------------------------------------------------------------------------------- against diffusers


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


# ----------------------------------------------------------------------------------- the user's API


def test_the_size_selects_the_decoder(model):
  assert model.decode_images(CODES[:1], num_inference_steps=1).shape == (1, 16, 16, 3)
  wide = model.generate(['an owl', 'a key'], size=(16, 24), num_inference_steps=1, seed=2)
  assert wide.shape == (2, 16, 24, 3) and wide.dtype == np.uint8
  assert wide.std() > 1
  codes = model.sample_codes([['an owl'], ['a key']], seed=2)
  np.testing.assert_array_equal(
    wide,
    model.decode_images(codes, size=(16, 24), num_inference_steps=1, guidance_scale=7.0, seed=2),
  )
  mixed = model.synthesize_outputs(
    [[np.zeros((8, 8), np.uint8), 'an owl']], size=(16, 24), num_inference_steps=1
  )
  assert mixed.images.shape == (1, 16, 24, 3) and mixed.flagged.shape == (1,)
  np.testing.assert_array_equal(
    wide,
    model.generate_outputs(
      ['an owl', 'a key'], size=(16, 24), num_inference_steps=1, seed=2
    ).images,
  )


@pytest.mark.parametrize(
  'height, width', [(1024, 1024), (896, 1152), (832, 1216), (768, 1344), (1216, 832), (1152, 896)]
)
def test_every_published_size_of_sdxl_at_full_scale(height, width, monkeypatch):
  """With lavit_7b in bfloat16, from latents of an eighth of the size; nothing is computed."""
  full = lavit.build('lavit_7b', 'bfloat16')
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


def test_defaults_are_those_published():
  available = (*image_decoder.LOWRES.modules, *image_decoder.HIGHRES.modules)
  for size, steps, guidance in (
    (None, 50, 5.0),
    ((512, 512), 50, 5.0),
    ((1024, 1024), 25, 7.0),
    ((768, 1344), 25, 7.0),
  ):
    request = image_generation.resolve_image_request(
      2, generation_config.VariantDefaults(), available, size=size
    )
    assert request.guidance_scale == guidance
    assert request.config.num_inference_steps == steps
    assert request.config.sampler == 'ddim'
    assert request.config.guidance_rescale == 0.0
    assert request.config.vae_tile_size is None
  large = generation_config.VariantDefaults(highres_sizes=((2048, 2048),))
  request = image_generation.resolve_image_request(2, large, available, size=(2048, 2048))
  assert request.config.vae_tile_size == 1024


def test_an_image_does_not_depend_on_its_batch(model):
  options = dict(size=(16, 24), num_inference_steps=2)
  together = model.decode_images(CODES, seed=[4, 5, 6, 7, 8], **options)  # four at a time
  assert len(np.unique(together.reshape(5, -1), axis=0)) == 5
  for i in (2, 4):
    alone = model.decode_images([CODES[i]], seed=[4 + i], **options)[0]
    np.testing.assert_allclose(alone.astype(int), together[i], atol=1)


def test_batches_and_tiles_of_the_vae(model, monkeypatch):
  images = []
  for seed, codes in enumerate(CODES[:2]):
    images.append(model.decode_images([codes], num_inference_steps=1, seed=[seed]))
  whole = np.concatenate(images).astype(int)
  monkeypatch.setattr(image_decoder, 'MAX_PIXELS', 16 * 16)  # one at a time
  np.testing.assert_allclose(
    model.decode_images(CODES[:2], num_inference_steps=1, seed=[0, 1]), whole, atol=1
  )
  monkeypatch.setattr(image_decoder, 'MAX_PIXELS', 16 * 16 - 1)
  monkeypatch.setattr(image_generation, 'TILE_SIZE', 8)
  tiled = model.decode_images(CODES[:1], num_inference_steps=1, seed=[0]).astype(int)
  assert (tiled != whole[:1]).any()
  assert np.corrcoef(tiled.ravel(), whole[:1].ravel())[0, 1] > 0.5


def test_each_image_starts_from_its_own_initial_image(model):
  dark = np.full((40, 60, 3), 20, np.uint8)  # resized to the size of the output
  light = np.full((40, 60, 3), 220, np.uint8)
  different, same, single = (
    model.decode_images(
      CODES[:2], size=(16, 24), num_inference_steps=5, init_images=init_images, strength=0.4
    )
    for init_images in ([dark, light], [dark, dark], dark)
  )
  np.testing.assert_array_equal(same, single)
  np.testing.assert_array_equal(different[0], same[0])
  assert np.abs(different[1].astype(int) - same[1]).mean() > 1


@pytest.mark.parametrize(
  'options, message',
  [
    (dict(size=(512, 512)), '512x512 cannot be generated; choose one of .*: 16x16, 16x24, 24x16$'),
    (dict(size=16), '16 cannot be generated'),
    (dict(sampler='heun'), "sampler='heun' is not one of 'ddim', 'euler', 'dpm\\+\\+2m'"),
    (dict(num_inference_steps=0), 'num_inference_steps=0 is not allowed'),
    (dict(num_inference_steps=2000), 'steps=2000 must be in'),
    (dict(guidance_rescale=2.0), 'guidance_rescale=2.0'),
    (dict(vae_tile_size=3), 'vae_tile_size=3'),
    *(
      (
        dict(decoder_guidance_scale=value),
        f'decoder_guidance_scale={value!r} is not allowed; choose a number from 0 up, or None',
      )
      for value in (math.nan, math.inf, -1, '5')
    ),
    *(
      (
        dict(num_inference_steps=value),
        f'num_inference_steps={value!r} is not allowed; choose a whole number from 1 up',
      )
      for value in (2.0, '2', True)
    ),
    (dict(guidance_rescale=None), 'guidance_rescale=None is not allowed; choose a number in 0..1'),
    (dict(vae_tile_size=64.5), 'vae_tile_size=64.5 is not allowed; choose a whole number'),
    (dict(strength='1'), "strength='1' is not allowed; choose a number above 0"),
    (
      dict(do_sample=True, zoom=3),
      'no such option: do_sample, zoom; .*choose among prompts, guidance_scale, ',
    ),
    (
      dict(init_images=5),
      'images are paths, bytes, PIL images or arrays, one or a list of them; got int',
    ),
    (dict(negative_prompt=' '), 'negative_prompt: the text is empty'),
    (
      dict(negative_prompt='word ' * 3000),
      'negative_prompt: the prompt is .* tokens long; shorten it to',
    ),
    (dict(negative_prompt=['a', 'b']), r"negative_prompt: \['a', 'b'\] is not a text"),
    (
      dict(negative_prompt='a key', guidance_scale=1),
      'negative_prompt has no effect without guidance',
    ),
    (dict(seed=-1), 'seed=-1 is not allowed'),
    (dict(init_images=[np.zeros((4, 4), np.uint8)] * 3), '3 initial images for 2'),
    (dict(init_images=np.zeros((4, 4), np.uint8), strength=0.0), 'strength=0.0'),
    (
      dict(init_images=np.zeros((4, 4), np.uint8), strength=0.1, num_inference_steps=5),
      'strength=0.1 leaves none of 5 steps',
    ),
    (dict(init_images='nowhere.png'), 'nowhere.png'),
    (dict(seed=[1]), '1 seeds for 2'),
  ],
)
def test_options_are_checked_before_anything_runs(params, options, message):
  without_values = dict.fromkeys(params)
  if 'seed' in options:
    without_values['llama'] = params['llama']
  model = open_model(without_values)
  with pytest.raises(UserError, match=message):
    model.generate(['an owl', 'a key'], **options)


def test_equal_guidance_is_one_program(model):
  counts = set()
  for guidance in (5, 5.0, np.float32(5), np.int64(5), jnp.float32(5)):
    model.decode_images(CODES[:1], num_inference_steps=1, guidance_scale=guidance)
    counts.add(image_decoder.decode_images._cache_size())
  assert len(counts) == 1


def test_a_size_may_be_an_array_of_floats(model):
  size = np.array([16.0, 24.0])
  images = model.decode_images(CODES[:1], num_inference_steps=1, size=size)
  assert images.shape == (1, 16, 24, 3)


def test_no_inputs_give_no_images(model):
  for method in (model.decode_images, model.reconstruct, model.generate, model.synthesize):
    images = method([])
    assert images.shape == (0, 16, 16, 3)
    assert images.dtype == np.uint8
  images, flagged = model.decode_image_outputs([], size=(16, 24))
  assert images.shape == (0, 16, 24, 3)
  assert flagged.shape == (0,)
  assert model.generate_outputs([]).codes == []


def test_a_checkpoint_without_the_highres_modules(params):
  lowres = open_model(
    {name: tree for name, tree in params.items() if not name.startswith('highres')}
  )
  with pytest.raises(
    UserError,
    match='16x24 needs highres_decoder, highres_unet, highres_vae, which .* not have; choose 16x16',
  ):
    lowres.generate(['an owl'], size=(16, 24))


# ------------------------------------------------------------------------------- the safety checker


def logged(caplog):
  """The messages of lavit_jax in the log."""
  records = [record for record in caplog.records if record.name.startswith('lavit_jax')]
  return [record.getMessage() for record in records]


def test_flagged_images_are_black_and_reported(params, model, caplog):
  transformers = pytest.importorskip('transformers')
  codes = CODES[:4]
  options = dict(size=(16, 24), num_inference_steps=1)
  plain = open_model(params, safety_checker=False).decode_images(codes, **options)
  np.testing.assert_array_equal(model.decode_images(codes, **options), plain)
  assert not logged(caplog)
  processor = transformers.CLIPImageProcessor(**extractor_config(model.modules.safety_checker))
  pixels = processor(list(plain), return_tensors='np')['pixel_values'].transpose(0, 2, 3, 1)
  checker = params['safety_checker']
  _, scores = model.modules.safety_checker.apply({'params': checker}, pixels)
  highest = np.max(scores, 1) + 2
  _, low, high, _ = np.sort(highest)
  assert high - low > 0.004  # scores are rounded to three places
  strict_checker = checker | {'concepts_thresholds': jnp.full(17, (low + high) / 2)}
  strict = params | {'safety_checker': strict_checker}
  with caplog.at_level(logging.WARNING):
    images = open_model(strict).decode_images(codes, **options)
  flagged = highest >= high
  assert not images[flagged].any()
  np.testing.assert_array_equal(images[~flagged], plain[~flagged])
  names = [message.split(' was')[0] for message in logged(caplog)]
  assert names == [f'image {i + 1} of 4' for i in flagged.nonzero()[0]]
  caplog.clear()
  output = open_model(strict).decode_image_outputs(codes, **options)
  np.testing.assert_array_equal(output.images, images)
  np.testing.assert_array_equal(output.flagged, flagged)
  assert not logged(caplog)


def test_the_safety_checker_is_optional_in_a_folder(params, tmp_path):
  folder.save_params(tmp_path / 'jax', 'both', params, tokenizer=TOKENIZER)
  pixel_decoding = tmp_path / 'torch' / 'pixel_decoding'
  for name in ('unet', 'safety_checker'):
    to_torch(params[name], pixel_decoding / name, name, variant='both')
  shutil.copytree(
    TOKENIZER, tmp_path / 'torch' / 'language_model', ignore=shutil.ignore_patterns('*.safetensors')
  )
  for name in ('jax', 'torch'):
    available = Lavit.from_pretrained(tmp_path / name, variant='both').params
    assert 'safety_checker' in available
    assert 'unet' in available
    assert ('vae' in available) == (name == 'jax')
    assert not available.loaded
  for check in (True, False):
    model = Lavit.from_pretrained(tmp_path / 'jax', safety_checker=check)
    model.decode_images(CODES[:1], num_inference_steps=1)
    assert ('safety_checker' in model.params.loaded) == check


def test_a_missing_safety_checker_is_a_warning(params, recwarn):
  without = {name: tree for name, tree in params.items() if name != 'safety_checker'}
  with pytest.warns(UserWarning, match='has no safety checker'):
    open_model(without).decode_images(CODES[:1], num_inference_steps=1)
  recwarn.clear()
  open_model(without, safety_checker=False).decode_images(CODES[:1], num_inference_steps=1)
  assert not [w for w in recwarn if 'safety' in str(w.message)]
