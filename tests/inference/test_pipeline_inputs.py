"""What the user's API accepts and refuses: images, texts, options, and how much of them."""

import io
import pathlib

import numpy as np
import pytest
from PIL import Image

from lavit_jax.errors import InputError, UserError
from lavit_jax.inference.pipeline import Lavit

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)


@pytest.mark.parametrize(
  'call, message',
  [
    (lambda m: m.generate(['  ']), 'empty'),
    (lambda m: m.synthesize([[]]), 'empty'),
    (lambda m: m.answer(IMAGES[:1], ['']), 'empty'),
    (lambda m: m.answer(IMAGES, ['What is this?']), '2 images but 1 question'),
    (lambda m: m.generate(['owl ' * 3000]), 'prompt is .* tokens long; shorten it to 4046'),
    (lambda m: m.caption(['nowhere.png']), 'nowhere.png'),
    (lambda m: m.synthesize(['on a red background']), 'each prompt in brackets'),
    (lambda m: m.synthesize([pathlib.Path('owl.png'), 'red']), 'owl.png: no such file'),
    (lambda m: m.synthesize(['owl.png', 'red']), 'each prompt in brackets'),
    (lambda m: m.synthesize([IMAGES[0]]), 'each prompt in brackets'),
    (lambda m: m.synthesize([bytearray(4)]), 'each prompt in brackets'),
    (lambda m: m.synthesize([[IMAGES[0]], 'red']), 'each prompt in brackets'),
    (lambda m: m.synthesize(None), 'each prompt in brackets'),
    (lambda m: m.decode_images([np.arange(65)]), 'at most 64 numbers in 0..1023'),
    (lambda m: m.decode_images([np.array([1024])]), 'at most 64 numbers in 0..1023'),
    (lambda m: m.decode_images(np.arange(5)), 'those of several images a list of these; got 0'),
    (
      lambda m: m.decode_images([np.array([1.5])]),
      'a list of whole numbers, those of several images a list of these; got .1.5',
    ),
    (lambda m: m.caption(5), 'images are paths, .* got int'),
    (lambda m: m.caption(IMAGES, ['a']), '2 images but 1 prompts'),
    (lambda m: m.caption(IMAGES, None), 'prompt=None is not allowed; give a text, or a list'),
    (lambda m: m.caption(IMAGES, ['', None]), 'None is not a text'),
    (lambda m: m.caption(IMAGES, '\udcff'), r"prompt: '\\udcff' is not a text"),
    (lambda m: m.answer(IMAGES, None), 'questions=None is not allowed'),
    (lambda m: m.caption(IMAGES, num_beams=0), 'num_beams=0 is not allowed'),
    (
      lambda m: m.answer(IMAGES[:1], ['What?'], temperature=0.5),
      'temperature has no effect in beam search',
    ),
    (lambda m: m.caption(IMAGES, do_sample=True, seed=None), 'random sampling needs a seed'),
    (lambda m: m.sample_codes([[IMAGES[0]]], seed=None), 'random sampling needs a seed'),
    (lambda m: m.sample_codes([['an owl']], top_k=0), 'top_k=0 is not allowed'),
    (
      lambda m: m.generate(['an owl'], temperature=0),
      'temperature=0 is not allowed; choose a number above 0',
    ),
    (
      lambda m: m.synthesize([['an owl']], guidance_scale='much'),
      "guidance_scale='much' is not allowed",
    ),
    (lambda m: m.generate(['an owl'], max_new_tokens=65), 'max_new_tokens <= 64'),
    (
      lambda m: m.caption(IMAGES, max_new_tokens=4094),
      'max_new_tokens=4094 is not allowed; .* <= 4093',
    ),
  ],
)
def test_bad_input(model, call, message):
  with pytest.raises(UserError, match=message):
    call(model)


def test_errors_in_options_are_not_of_one_row(model):
  for call in (
    lambda: model.caption(IMAGES, 'word ' * 3000),
    lambda: model.caption(IMAGES, max_new_tokens=4096),
    lambda: model.caption(IMAGES, '\ud800'),
    lambda: model.generate(['an owl'], negative_prompt=' '),
    lambda: model.generate(['an owl'], negative_prompt='word ' * 3000),
  ):
    with pytest.raises(UserError) as caught:
      call()
    assert type(caught.value) is UserError  # an InputError would be of one row


def test_long_prompts_are_refused_before_anything_runs(model, monkeypatch):
  monkeypatch.setattr(model, 'run', lambda *_, **__: pytest.fail('ran'))
  long = 'word ' * 3000
  with pytest.raises(
    InputError, match='the prompt, 33 of 33, is at least [0-9]+ tokens long; shorten it to 4080'
  ):
    model.answer(np.repeat(IMAGES[:1], 33, 0), ['What is this?'] * 32 + [long])
  with pytest.raises(
    InputError, match='the prompt, 2 of 2, is at least [0-9]+ tokens long; shorten it to 4046'
  ):
    model.synthesize([[IMAGES[0], 'red'], [IMAGES[0], long]])


def test_a_prompt_may_fill_the_context(model, monkeypatch):
  (count,) = model.tokenize(IMAGES[:1]).counts
  length = 2 + count + len(model.tokenizer.encode('an owl'))
  monkeypatch.setattr(model.params, 'max_length', length + 36)
  assert len(model.caption(IMAGES[:1], 'an owl')) == 1
  monkeypatch.setattr(model.params, 'max_length', model.params.max_length - 1)
  with pytest.raises(InputError, match=f'^the prompt is {length} tokens long; shorten'):
    model.caption(IMAGES[:1], 'an owl')


def test_no_inputs_give_no_outputs(model):
  ids, keep, counts = model.tokenize([])
  assert ids == []
  assert keep.shape == (0, 64)
  assert keep.dtype == bool
  assert counts.shape == (0,)
  assert model.select_patches([]).probabilities.shape == (0, 64)
  assert model.caption([]) == []
  assert model.answer([], []) == []
  assert model.sample_codes([]) == []
  assert model.caption_outputs([], do_sample=True) == []


def test_one_prompt_of_texts_and_images_needs_no_brackets(model):
  prompt = [IMAGES[0], 'in the snow']
  np.testing.assert_array_equal(
    model.synthesize(prompt, num_inference_steps=1),
    model.synthesize([prompt], num_inference_steps=1),
  )
  assert len(model.sample_codes(prompt)) == 1


def test_the_bytes_of_one_image_are_one_image(model):
  buffer = io.BytesIO()
  Image.fromarray(IMAGES[0]).save(buffer, 'PNG')
  for data in (buffer.getvalue(), bytearray(buffer.getvalue()), buffer.getbuffer()):
    np.testing.assert_array_equal(model.tokenize(data).ids, model.tokenize(IMAGES[:1]).ids)


@pytest.mark.parametrize('dtype', ['float99', 'int8', 'float64'])
def test_unknown_dtypes(shallow_folder, dtype):
  with pytest.raises(
    UserError, match=f"dtype='{dtype}' is not known; choose one of None, 'float32'"
  ):
    Lavit.from_pretrained(shallow_folder, dtype=dtype)
