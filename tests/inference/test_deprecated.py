"""Old names of the user's API work with a warning; names that never existed are errors."""

import numpy as np
import pytest

from lavit_jax.errors import UserError
from lavit_jax.inference import deprecated
from lavit_jax.inference.generation_config import GenerationOptions
from lavit_jax.inference.image_generation import DecodingOptions
from lavit_jax.inference.outputs import DecodedImages, ImageOutput
from lavit_jax.inference.pipeline import Lavit

# What the keywords were called before, of each method.
OLD_KEYWORDS = {
  '__init__': ('model', 'parts', 'words', 'weights', 'cache'),
  'from_pretrained': ('weights', 'cache'),
  'caption': ('min_tokens', 'max_tokens', 'beams', 'sample', 'num_samples'),
  'answer': ('min_tokens', 'max_tokens', 'beams', 'sample', 'num_samples', 'judge'),
  'generate': (
    'guidance',
    'decoder_guidance',
    'negative',
    'min_tokens',
    'max_tokens',
    'num_samples',
    'steps',
    'rescale',
    'start',
    'tile',
  ),
  'sample_codes': ('guidance', 'negative', 'min_tokens', 'max_tokens', 'num_samples'),
  'decode_images': ('guidance', 'steps', 'rescale', 'start', 'tile'),
  'reconstruct': ('guidance', 'steps', 'rescale', 'start', 'tile'),
}
OLD_KEYWORDS['synthesize'] = OLD_KEYWORDS['generate']


class Recorder:
  """Records the arguments of its methods."""

  @deprecated.api_method(GenerationOptions, outputs='caption_outputs')
  def caption(self, images, *, seed=0, **generation):
    return 'texts', images, seed, generation

  @deprecated.api_method(GenerationOptions)
  def caption_outputs(self, images, *, seed=0, **generation):
    return 'outputs', images, seed, generation

  @deprecated.api_method(positional=('seed', 'size'))
  def tokenize(self, images, *, seed=0, size=1):
    return images, seed, size


def test_every_old_keyword_has_a_new_one_of_its_method():
  for name, keywords in OLD_KEYWORDS.items():
    allowed = getattr(Lavit, name).allowed_keywords
    for keyword in keywords:
      assert keyword not in allowed
      assert deprecated.RENAMED_KEYWORDS[keyword] in allowed, (name, keyword)


def test_old_keywords_are_renamed_with_a_warning():
  with pytest.warns(DeprecationWarning, match='beams=; use num_beams=') as caught:
    result = Recorder().caption('image', beams=3, seed=1)
  assert result == ('texts', 'image', 1, {'num_beams': 3})
  assert caught[0].filename == __file__


def test_details_return_the_outputs():
  with pytest.warns(DeprecationWarning, match='details=True; call caption_outputs') as caught:
    result = Recorder().caption('image', details=True, top_k=5)
  assert result == ('outputs', 'image', 0, {'top_k': 5})
  assert caught[0].filename == __file__
  with pytest.warns(DeprecationWarning, match='details'):
    assert Recorder().caption('image', details=False)[0] == 'texts'


def test_keywords_that_were_positional():
  with pytest.warns(DeprecationWarning, match='seed by position; use keywords') as caught:
    assert Recorder().tokenize('image', 3) == ('image', 3, 1)
  assert caught[0].filename == __file__
  with pytest.warns(DeprecationWarning, match='seed, size by position'):
    assert Recorder().tokenize('image', 3, 4) == ('image', 3, 4)
  with pytest.raises(TypeError, match='positional'):
    Recorder().tokenize('image', 3, 4, 5)
  with pytest.raises(TypeError, match='positional'):
    Recorder().caption('image', 3)


def test_an_old_and_a_new_keyword_for_the_same_are_refused():
  with pytest.raises(UserError, match='beams and num_beams are the same; leave beams out'):
    Recorder().caption('image', beams=3, num_beams=4)


def test_unknown_keywords_are_errors_that_name_the_nearest():
  for keyword, nearest in (('num_beam', 'num_beams'), ('topk', 'top_k'), ('sed', 'seed')):
    with pytest.raises(UserError, match=f'no such option: {keyword}; did you mean {nearest}?'):
      Recorder().caption('image', **{keyword: 1})
  with pytest.raises(UserError, match='no such option: zzz; choose among images, seed, min_new'):
    Recorder().caption('image', zzz=1)
  with pytest.raises(UserError, match='no such option: guidance_scal; did you mean guidance_scale'):
    Lavit.generate(None, ['an owl'], guidance_scal=3)
  with pytest.raises(UserError, match='no such option: wieghts_dtype; did you mean weights_dtype?'):
    Lavit.from_pretrained('nowhere', wieghts_dtype='int8')


def test_old_attributes_of_results():
  images = np.zeros((1, 2, 2, 3), np.uint8)
  decoded = DecodedImages(images, np.zeros(1, bool))
  generated = ImageOutput(images, np.zeros(1, bool), [])
  with pytest.warns(DeprecationWarning, match='.pictures; use .images'):
    assert decoded.pictures is images
  with pytest.warns(DeprecationWarning, match='.pictures; use .images'):
    assert generated.pictures is images
  with pytest.warns(DeprecationWarning, match='.sampled; use .codes'):
    assert generated.sampled is generated.codes


def test_old_names_of_the_model(shallow_folder):
  with pytest.warns(DeprecationWarning, match='cache=; use cache_dtype='):
    model = Lavit.from_pretrained(shallow_folder, cache='bfloat16')
  for old, new in (
    ('model', 'modules'),
    ('parts', 'params'),
    ('words', 'tokenizer'),
    ('cache', 'cache_dtype'),
    ('settings', 'defaults'),
  ):
    with pytest.warns(DeprecationWarning, match=f'.{old}; use .{new}'):
      assert getattr(model, old) is getattr(model, new)
  with pytest.warns(DeprecationWarning, match='draw.*call decode_images'):
    old = model.draw([np.arange(4)], steps=1)
  np.testing.assert_array_equal(old, model.decode_images([np.arange(4)], num_inference_steps=1))


def test_option_types_match_the_keywords():
  decoding = set(DecodingOptions.__annotations__)
  keywords = set(Lavit.decode_images.allowed_keywords)
  assert keywords == decoding | {'codes', 'seed', 'guidance_scale'}
