"""The user's API: shapes, prompts, determinism, the order of computations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lavit_jax.inference import batching, compiled, generation_config, rng

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)


def texts_of(outputs):
  return [output.text for output in outputs]


def test_tokenize(model):
  ids, keep, counts = model.tokenize(IMAGES, seed=None)
  assert keep.shape == (2, 64) and keep.dtype == bool
  np.testing.assert_array_equal(counts, keep.sum(-1))
  assert [len(codes) for codes in ids] == counts.tolist()
  assert min(counts) > 0
  assert all(0 <= codes.min() and codes.max() < 1024 for codes in ids)
  alone = model.tokenize([Image.fromarray(IMAGES[1])], seed=None)
  np.testing.assert_array_equal(alone.ids[0], ids[1])
  sampled = [model.tokenize(IMAGES, seed=seed).keep for seed in (0, 0, 1)]
  np.testing.assert_array_equal(sampled[0], sampled[1])
  assert (sampled[0] != sampled[2]).any()
  np.testing.assert_array_equal(model.tokenize(IMAGES).keep, sampled[0])  # the default is seed 0


def test_select_patches(model):
  probabilities, keep, counts = model.select_patches(IMAGES)
  assert probabilities.dtype == np.float32
  np.testing.assert_array_equal(keep, model.tokenize(IMAGES, seed=None).keep)
  np.testing.assert_array_equal(counts, keep.sum(-1))
  for image_probabilities, image_keep in zip(probabilities, keep, strict=True):
    assert abs(image_keep.sum() - image_probabilities.sum()) <= 0.5 + 1e-4
    assert image_probabilities[image_keep].min() >= image_probabilities[~image_keep].max()
  # Sampled patches are as frequent: 32 draws of 128 patches are within five deviations.
  sampled = [model.tokenize(IMAGES, seed=seed).keep for seed in range(32)]
  deviation = np.sqrt((probabilities * (1 - probabilities)).sum() / 32)
  assert abs(np.sum(sampled) / 32 - probabilities.sum()) < 5 * deviation


def test_text_from_images(model):
  captions = model.caption(IMAGES, seed=None)
  assert len(captions) == 2
  assert all(isinstance(text, str) and '.' not in text for text in captions)
  assert model.caption(IMAGES[::-1], seed=None) == captions[::-1]
  answers = model.answer(
    IMAGES, ['What is this?', 'Where is the rather long question about the picture?']
  )
  assert len(answers) == 2
  assert all(text == text.lower() and not set(text) & set('\n,.') for text in answers)


class Intercepted(Exception):
  """Raised in place of a computation."""


def intercept(calls):
  """A stub of `embed_prompts` that records prompts."""

  def embed_prompts(prompts, *_):
    calls.append(prompts)
    raise Intercepted

  return embed_prompts


def test_the_prompt_is_image_then_question(model, monkeypatch):
  seen = []
  monkeypatch.setattr(model, 'embed_prompts', intercept(seen))
  with pytest.raises(Intercepted):
    model.answer(IMAGES[:1], ['What is {this}?'])
  ((start, features, end, question),) = seen[0]
  counts = model.tokenize(IMAGES[:1]).counts
  assert (start, features, end) == ([2048], range(counts[0]), [2049])
  assert model.tokenizer.decode(question) == 'Question: What is {this}? Answer:'


def test_synthesis_prompts_have_codes(model, monkeypatch):
  seen = []
  monkeypatch.setattr(model, 'embed_prompts', intercept(seen))
  keys = rng.purpose_keys(
    rng.Purpose.PATCHES, rng.example_keys(3, 1)[np.zeros(2, int)], np.arange(2)
  )  # of the row's, one a picture
  ids = model.run_batches(compiled.tokenize, ('vit', 'tokenizer'), IMAGES[:2], keys)
  first, second = ([row[kept] + 2050] for row, kept in zip(*ids))
  owl = [model.tokenizer.encode('owl')]
  for bracketed, expected in (
    (True, [[2048], *first, [2049], *owl, [2048], *second, [2049], [2048]]),
    (False, [*first, *owl, *second, [2048]]),
  ):  # the released weights, jy0205/LaVIT: codes, words, one [IMG]
    monkeypatch.setattr(model, 'defaults', model.defaults._replace(bracketed=bracketed))
    with pytest.raises(Intercepted):
      model.synthesize([[IMAGES[0], 'owl', IMAGES[1]]], seed=3)
    prompt, against = seen.pop()
    assert [list(piece) for piece in prompt] == [list(piece) for piece in expected] and against == [
      [2048]
    ]
  assert (
    generation_config.VARIANT_DEFAULTS['tiny'].bracketed
    and not generation_config.VariantDefaults().bracketed
  )


def test_generated_codes(model):
  codes = model.sample_codes([['an owl'], ['two pizzas on a white background']], seed=1)
  _, most = model.defaults.image_tokens
  assert all(len(row) <= most and ((0 <= row) & (row < 1024)).all() for row in codes)
  again = model.sample_codes([['an owl'], ['a key']], seed=1)
  np.testing.assert_array_equal(again[0], codes[0])
  other = model.sample_codes([['an owl'], ['a key']], seed=2)
  assert other[0].tolist() != codes[0].tolist()


def test_images(model):
  drawn = model.decode_images([np.array([], int), np.arange(64)], num_inference_steps=2)
  assert drawn.shape == (2, 64, 64, 3) and drawn.dtype == np.uint8 and (drawn[0] != drawn[1]).any()
  np.testing.assert_array_equal(
    model.decode_images([np.array([], int), np.arange(7)], num_inference_steps=2)[0], drawn[0]
  )
  assert (
    model.decode_images([np.array([], int), np.arange(64)], num_inference_steps=2, seed=1)[0]
    != drawn[0]
  ).any()
  rebuilt = model.reconstruct(IMAGES, num_inference_steps=2, seed=5)
  np.testing.assert_array_equal(
    rebuilt,
    model.decode_images(model.tokenize(IMAGES, seed=5).ids, num_inference_steps=2, seed=5),
  )
  prompts = [['an owl'], ['a key']]
  generated = model.generate(['an owl', 'a key'], num_inference_steps=2, seed=3)
  np.testing.assert_array_equal(
    generated,
    model.decode_images(model.sample_codes(prompts, seed=3), num_inference_steps=2, seed=3),
  )
  mixed = model.synthesize(
    [[IMAGES[0], 'an owl'], [IMAGES[1], 'a key', IMAGES[0]]], num_inference_steps=2
  )
  assert mixed.shape == (2, 64, 64, 3)


def test_outputs(model):
  outputs = model.caption_outputs(IMAGES, seed=None)
  assert texts_of(outputs) == model.caption(IMAGES, seed=None)
  fewest, most = model.defaults.caption_tokens
  for output in outputs:
    assert model.tokenizer.decode(output.ids.tolist()).split('.')[0].strip() == output.text
    assert output.score < 0
    assert fewest <= len(output.ids) <= most
  questions = ['What is this?', 'Where is it?']
  outputs = model.answer_outputs(IMAGES, questions)
  assert texts_of(outputs) == model.answer(IMAGES, questions)
  sampled = model.sample_code_outputs([['an owl']])[0]
  np.testing.assert_array_equal(sampled.codes, model.sample_codes([['an owl']])[0])
  np.testing.assert_array_equal(sampled.ids[sampled.ids >= 2050] - 2050, sampled.codes)
  assert sampled.score < 0


def test_a_caption_continues_its_prompt(model, monkeypatch):
  seen = []
  monkeypatch.setattr(model, 'embed_prompts', intercept(seen))
  for prompt, expected in (
    ('a picture of', ['a picture of'] * 2),
    (['an owl', ' '], ['an owl', '']),
  ):
    with pytest.raises(Intercepted):
      model.caption(IMAGES, prompt)
    texts = [model.tokenizer.decode(pieces[3]) for pieces in seen.pop()]
    assert texts == expected


def test_the_next_batch_is_dispatched_before_the_host_waits(model, monkeypatch):
  events = []
  run = model.run
  device_get = jax.device_get

  def record_run(program, *args, **kwargs):
    if program is not compiled.embed:
      events.append(program.__name__)
    return run(program, *args, **kwargs)

  def record_get(arrays):
    events.append('fetch')
    return device_get(arrays)

  monkeypatch.setattr(model, 'run', record_run)
  monkeypatch.setattr(batching, 'MAX_BATCH', 2)
  monkeypatch.setattr(jax, 'device_get', record_get)
  model.caption(np.repeat(IMAGES, 3, 0))
  assert events == [
    'read',
    'read',
    'beam_search',
    'read',
    'beam_search',
    'fetch',
    'beam_search',
    'fetch',
    'fetch',
  ]


def test_interleaved_prompts_do_not_depend_on_their_batch(model):
  prompts = [
    [IMAGES[0], 'an owl', IMAGES[1]],
    ['a key'],
    [IMAGES[1], IMAGES[0], 'red', IMAGES[1], 'blue'],
  ]
  codes = model.sample_codes(prompts, seed=4)
  np.testing.assert_array_equal(model.sample_codes(prompts[:1], seed=4)[0], codes[0])
  others = [prompts[0], ['a rather long text about a key'], ['a key']]
  np.testing.assert_array_equal(model.sample_codes(others, seed=4)[0], codes[0])


def test_prompts_of_the_same_bucket_compile_once(model):
  model.answer(IMAGES, ['What is this?'] * 2, seed=None)
  model.sample_codes([['an owl'], ['a key']])
  compilations = []

  def record(event, *_, **__):
    if 'backend_compile' in event:
      compilations.append(event)

  jax.monitoring.register_event_duration_secs_listener(record)
  model.answer(IMAGES, ['What is the colour of the background?', 'How many?'], seed=None)
  model.answer(IMAGES, ['Is it red?', 'Where is the owl in this picture?'], seed=None)
  model.sample_codes(
    [['three pizzas and a key on a white background'], ['a']],
    temperature=0.7,
    guidance_scale=2.0,
    seed=9,
  )
  assert not compilations
  jax.jit(lambda x: x + 1)(jnp.ones(3))
  assert compilations  # the listener works
