"""Codes -> pictures: both ways against diffusers, from the golden codes on; sizes, starts and the safety checker in the user's API."""

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
from lavit_jax.porting import to_torch
from lavit_jax.weights.store import folder
from lavit_jax.weights.torch import name_tables
from lavit_jax.weights.torch.configs import rules
from lavit_jax.weights.torch.configs.scheduler import CONFIG_FILES
from lavit_jax.weights.torch.descriptions import extractor_config

WORDS = pathlib.Path(lavit.__file__).parents[1] / 'assets' / 'tiny' / 'language_model'
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
ROWS = {
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
    for name, row in ROWS.items():
      patch.setitem(lavit.VARIANTS, name, row)
    patch.setitem(
      generation_config.VARIANT_DEFAULTS,
      'both',
      generation_config.VariantDefaults(
        (1, 4), (1, 4), (2, 4), 16, highres_sizes=((16, 24), (24, 16))
      ),
    )
    yield


def random_parts(variant, *names):
  """Parameters that keep signals at about one, drawn by numpy: nothing compiles."""
  rng = np.random.default_rng(1)

  def normal(leaf):
    fan_in = np.prod(leaf.shape[-2:-1] if leaf.ndim < 4 else leaf.shape[:3])
    return jnp.asarray(rng.normal(0, fan_in**-0.5, leaf.shape), jnp.float32)

  return jax.tree.map(
    normal, name_tables.module_shapes(lavit.build(variant), names or name_tables.TABLES)
  )


@pytest.fixture(scope='module')
def parts():
  parts = random_parts('both')
  for name in ('concepts_thresholds', 'special_thresholds'):
    parts['safety_checker'][name] = jnp.full_like(
      parts['safety_checker'][name], 2.0
    )  # a cosine is never above
  return parts


def opened(parts, **options):
  return Lavit(lavit.build('both'), parts, TextTokenizer.load(WORDS, 2048), **options)


@pytest.fixture(scope='module')
def model(parts):
  return opened(parts)


# ------------------------------------------------------------------------------------------------------- against diffusers


@pytest.mark.parametrize(
  'decoder_config, sampler, started, told',
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
def test_golden_codes_become_the_pictures_that_diffusers_draws(
  golden, tmp_path, decoder_config, sampler, started, told
):
  torch, diffusers = pytest.importorskip('torch'), pytest.importorskip('diffusers')
  model, io, size, steps, strength = lavit.build('golden'), golden.io, (16, 24), 5, 0.6
  unet = decoder_config.prefix + 'unet'
  vae = decoder_config.prefix + 'vae'
  parts = random_parts('golden', unet, vae, 'uncond_embeddings')
  parts |= {
    'codebook': golden.params['tokenizer'],
    **{name: golden.params[name] for name in ('decoder', 'highres_decoder')},
  }
  counts = io['kept_token_counts']
  mask = np.arange(16) < counts[:, None]
  ids = np.zeros((len(counts), 16), np.int32)
  ids[mask] = io['code_ids']
  keys = jax.random.split(jax.random.key(3), len(ids))
  start = (
    np.random.default_rng(0).integers(0, 256, (len(ids), *size, 3), np.uint8) if started else None
  )
  settings = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule='scaled_linear',
    steps_offset=1,
    timestep_spacing='leading',
  )
  settings = (
    settings | told
    if sampler != 'ddim'
    else {**settings, 'clip_sample': False, 'set_alpha_to_one': False, **told}
  )
  (tmp_path / 'scheduler_config.json').write_text(json.dumps(settings))
  config = image_decoder.DecodingConfig(
    decoder=decoder_config,
    size=size,
    num_inference_steps=steps,
    sampler=sampler,
    strength=strength,
    scheduler=Scheduler(**rules.apply_rules(CONFIG_FILES[0], settings, model, tmp_path)),
  )
  drawn = image_decoder.decode_images(
    model,
    {name: parts[name] for name in decoder_config.modules},
    ids,
    mask,
    keys,
    start,
    guidance_scale=decoder_config.guidance_scale,
    config=config,
  )

  def nchw(x):
    return torch.from_numpy(np.moveaxis(np.array(x), -1, 1).copy())

  for part in (unet, vae):
    to_torch(parts[part], tmp_path / part, part, variant='golden')
  peer, decoder = (
    getattr(diffusers, name).from_pretrained(tmp_path / part).eval()
    for name, part in (('UNet2DConditionModel', unet), ('AutoencoderKL', vae))
  )
  scheduler = (
    diffusers.DDIMScheduler if sampler == 'ddim' else diffusers.EulerDiscreteScheduler
  ).from_pretrained(tmp_path)
  scheduler.set_timesteps(steps)
  visited = scheduler.timesteps[-int(steps * strength) :] if started else scheduler.timesteps
  x = nchw(jax.vmap(lambda key: jax.random.normal(key, (8, 12, 4)))(keys))
  if decoder_config.prefix:
    context = torch.from_numpy(io['highres_context'])
    context, given = (
      torch.cat([context, torch.zeros_like(context)]),
      torch.from_numpy(io['highres_pooled']),
    )
    more = dict(
      added_cond_kwargs=dict(
        text_embeds=torch.cat([given, torch.zeros_like(given)]),
        time_ids=torch.tensor([[16.0, 24.0, 0.0, 0.0, 16.0, 24.0]]).repeat(2 * len(ids), 1),
      )
    )
  else:
    null = np.concatenate([parts['uncond_embeddings'], np.zeros((13, 24), np.float32)])
    context = torch.from_numpy(np.concatenate([io['lowres_context'], np.stack([null] * len(ids))]))
    more = dict(
      encoder_attention_mask=torch.cat(
        [torch.ones(len(ids), 16), torch.arange(16)[None].repeat(len(ids), 1) < 3]
      ).bool()
    )
  with torch.no_grad():
    if started:
      of = decoder.encode(nchw(start / 127.5 - 1).float()).latent_dist
      own = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 1), (8, 12, 4)))(keys)
      x = scheduler.add_noise(
        decoder.config.scaling_factor * (of.mean + of.std * nchw(own)),
        x,
        visited[:1].repeat(len(ids)),
      )
    else:
      x = x * scheduler.init_noise_sigma
    for t in visited:
      seen = scheduler.scale_model_input(torch.cat([x, x]), t)
      given, null = peer(seen, t, context, **more).sample.chunk(2)
      x = scheduler.step(null + decoder_config.guidance_scale * (given - null), t, x).prev_sample
    want = decoder.decode(x / decoder.config.scaling_factor).sample
  want = np.moveaxis((want / 2 + 0.5).clamp(0, 1).numpy() * 255, 1, -1)
  assert 0.2 < ((0 < want) & (want < 255)).mean() and want.std() > 20
  # Half a byte of rounding, and a quarter for what float32 adds up to over the steps, at guidance.
  np.testing.assert_allclose(drawn.images, want, atol=0.5 + 0.25)
  assert not drawn.flagged.any()


# ----------------------------------------------------------------------------------------------------------- the user's API


def test_both_ways_by_size(model):
  assert model.decode_images(CODES[:1], num_inference_steps=1).shape == (1, 16, 16, 3)
  wide = model.generate(['an owl', 'a key'], size=(16, 24), num_inference_steps=1, seed=2)
  assert wide.shape == (2, 16, 24, 3) and wide.dtype == np.uint8 and wide.std() > 1
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
  """lavit_7b draws it in bfloat16, of latents an eighth as high and wide; nothing is computed."""
  full, seen = lavit.build('lavit_7b', 'bfloat16'), []
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
  sample = diffusion.sample_latents
  monkeypatch.setattr(
    diffusion,
    'sample_latents',
    lambda denoise, noise, *args, **kwargs: (
      seen.append(noise.shape) or sample(denoise, noise, *args, **kwargs)
    ),
  )
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))
  drawn = jax.eval_shape(
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
  assert seen == [(2, height // 8, width // 8, 4)]
  assert (drawn.images.shape, drawn.images.dtype, drawn.flagged.shape) == (
    (2, height, width, 3),
    jnp.uint8,
    (2,),
  )


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


def test_a_picture_does_not_depend_on_its_batch(model):
  together = model.decode_images(
    CODES, size=(16, 24), num_inference_steps=2, seed=[4, 5, 6, 7, 8]
  )  # four at a time
  assert len(np.unique(together.reshape(5, -1), axis=0)) == 5
  for i in (2, 4):
    np.testing.assert_allclose(
      model.decode_images([CODES[i]], size=(16, 24), num_inference_steps=2, seed=[4 + i])[0].astype(
        int
      ),
      together[i],
      atol=1,
    )


def test_pieces_and_tiles_of_the_decoder(model, monkeypatch):
  whole = np.concatenate(
    [
      model.decode_images([codes], num_inference_steps=1, seed=[seed])
      for seed, codes in enumerate(CODES[:2])
    ]
  ).astype(int)
  monkeypatch.setattr(image_decoder, 'MAX_PIXELS', 16 * 16)  # one at a time
  np.testing.assert_allclose(
    model.decode_images(CODES[:2], num_inference_steps=1, seed=[0, 1]), whole, atol=1
  )
  monkeypatch.setattr(image_decoder, 'MAX_PIXELS', 16 * 16 - 1)
  monkeypatch.setattr(image_generation, 'TILE_SIZE', 8)
  tiled = model.decode_images(CODES[:1], num_inference_steps=1, seed=[0]).astype(int)
  assert (tiled != whole[:1]).any() and np.corrcoef(tiled.ravel(), whole[:1].ravel())[0, 1] > 0.5


def test_each_picture_begins_from_its_own_start(model):
  dark, light = (
    np.full((40, 60, 3), value, np.uint8) for value in (20, 220)
  )  # scaled to the size that is drawn
  apart, alike, one = (
    model.decode_images(
      CODES[:2], size=(16, 24), num_inference_steps=5, init_images=start, strength=0.4
    )
    for start in ([dark, light], [dark, dark], dark)
  )
  np.testing.assert_array_equal(alike, one)
  np.testing.assert_array_equal(apart[0], alike[0])
  assert np.abs(apart[1].astype(int) - alike[1]).mean() > 1


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
      dict(do_sample=True, held=3),
      'no such option: do_sample, held; .*choose among prompts, guidance_scale, ',
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
def test_bad_settings_are_told_before_anything_runs(parts, options, message):
  lazy = opened(
    dict.fromkeys(parts) | {'llama': parts['llama']} if 'seed' in options else dict.fromkeys(parts)
  )
  with pytest.raises(UserError, match=message):
    lazy.generate(['an owl', 'a key'], **options)


def test_equal_guidance_is_one_program(model):
  count = []
  for guidance in (5, 5.0, np.float32(5), np.int64(5), jnp.float32(5)):
    model.decode_images(CODES[:1], num_inference_steps=1, guidance_scale=guidance)
    count.append(image_decoder.decode_images._cache_size())
  assert len({*count}) == 1


def test_a_size_is_whole_numbers_however_it_is_given(model):
  assert model.decode_images(
    CODES[:1], num_inference_steps=1, size=np.array([16.0, 24.0])
  ).shape == (1, 16, 24, 3)


def test_nothing_is_drawn_of_nothing(model):
  for drawn in (
    model.decode_images([]),
    model.reconstruct([]),
    model.generate([]),
    model.synthesize([]),
  ):
    assert drawn.shape == (0, 16, 16, 3) and drawn.dtype == np.uint8
  pictures, flagged = model.decode_image_outputs([], size=(16, 24))
  assert pictures.shape == (0, 16, 24, 3) and flagged.shape == (0,)
  assert model.generate_outputs([]).codes == []


def test_a_checkpoint_without_the_highres_parts_says_so(parts):
  lowres = opened({name: part for name, part in parts.items() if not name.startswith('highres')})
  with pytest.raises(
    UserError,
    match='16x24 needs highres_decoder, highres_unet, highres_vae, which .* not have; choose 16x16',
  ):
    lowres.generate(['an owl'], size=(16, 24))


# ------------------------------------------------------------------------------------------------------ the safety checker


def test_flagged_pictures_are_black_and_reported(parts, model, caplog):
  transformers = pytest.importorskip('transformers')
  codes = CODES[:4]
  plain = opened(parts, safety_checker=False).decode_images(
    codes, size=(16, 24), num_inference_steps=1
  )
  np.testing.assert_array_equal(
    model.decode_images(codes, size=(16, 24), num_inference_steps=1), plain
  )
  assert not [record for record in caplog.records if record.name.startswith('lavit_jax')]
  processor = transformers.CLIPImageProcessor(**extractor_config(model.modules.safety_checker))
  seen = processor(list(plain), return_tensors='np')['pixel_values'].transpose(0, 2, 3, 1)
  _, scores = model.modules.safety_checker.apply({'params': parts['safety_checker']}, seen)
  highest = np.max(scores, 1) + 2
  _, low, high, _ = np.sort(highest)
  assert high - low > 0.004  # scores are rounded to three places
  strict = parts | {
    'safety_checker': parts['safety_checker']
    | {'concepts_thresholds': jnp.full(17, (low + high) / 2)}
  }
  with caplog.at_level(logging.WARNING):
    drawn = opened(strict).decode_images(codes, size=(16, 24), num_inference_steps=1)
  bad = highest >= high
  assert not drawn[bad].any()
  np.testing.assert_array_equal(drawn[~bad], plain[~bad])
  told = [
    record.getMessage().split(' was')[0]
    for record in caplog.records
    if record.name.startswith('lavit_jax')
  ]
  assert told == [f'image {i + 1} of 4' for i in bad.nonzero()[0]]
  caplog.clear()
  found = opened(strict).decode_image_outputs(codes, size=(16, 24), num_inference_steps=1)
  np.testing.assert_array_equal(found.images, drawn)
  np.testing.assert_array_equal(found.flagged, bad)
  assert not [record for record in caplog.records if record.name.startswith('lavit_jax')]


def test_the_folder_says_whether_there_is_a_checker(parts, tmp_path):
  folder.save_params(tmp_path / 'ours', 'both', parts, tokenizer=WORDS)
  to_torch(parts['unet'], tmp_path / 'theirs' / 'pixel_decoding' / 'unet', 'unet', variant='both')
  to_torch(
    parts['safety_checker'],
    tmp_path / 'theirs' / 'pixel_decoding' / 'safety_checker',
    'safety_checker',
    variant='both',
  )
  shutil.copytree(
    WORDS, tmp_path / 'theirs' / 'language_model', ignore=shutil.ignore_patterns('*.safetensors')
  )
  for name in ('ours', 'theirs'):
    held = Lavit.from_pretrained(tmp_path / name, variant='both').parts
    assert (
      'safety_checker' in held
      and 'unet' in held
      and ('vae' in held) == (name == 'ours')
      and not held.loaded
    )  # nothing has been read
  for wanted, read in ((True, True), (False, False)):
    model = Lavit.from_pretrained(tmp_path / 'ours', safety_checker=wanted)
    model.decode_images(CODES[:1], num_inference_steps=1)
    assert ('safety_checker' in model.params.loaded) == read


def test_a_missing_checker_is_not_silent(parts, recwarn):
  without = {name: part for name, part in parts.items() if name != 'safety_checker'}
  with pytest.warns(UserWarning, match='has no safety checker'):
    opened(without).decode_images(CODES[:1], num_inference_steps=1)
  recwarn.clear()
  opened(without, safety_checker=False).decode_images(CODES[:1], num_inference_steps=1)
  assert not [w for w in recwarn if 'safety' in str(w.message)]
