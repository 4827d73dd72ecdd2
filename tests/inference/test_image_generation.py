"""The user's API from codes to images: sizes, initial images, options, the safety checker."""

import logging
import math
import pathlib
import shutil

import image_variants
import jax.numpy as jnp
import numpy as np
import pytest
from image_variants import random_params
from programs import compiled

from lavit_jax.data.text import TextTokenizer
from lavit_jax.errors import UserError
from lavit_jax.inference import generation_config, image_decoder, image_generation
from lavit_jax.inference.pipeline import Lavit
from lavit_jax.models import lavit
from lavit_jax.weights.store import folder
from lavit_jax.weights.torch.api import to_torch
from lavit_jax.weights.torch.descriptions import extractor_config

TOKENIZER = pathlib.Path(lavit.__file__).parents[1] / 'assets' / 'tiny' / 'language_model'
CODES = [np.arange(5), np.array([3]), np.arange(16), np.array([], int), np.array([7, 7])]


@pytest.fixture(scope='module', autouse=True)
def variants():
  with pytest.MonkeyPatch.context() as patch:
    image_variants.install(patch)
    yield


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
  _, scores = compiled(model.modules.safety_checker.apply)({'params': checker}, pixels)
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
