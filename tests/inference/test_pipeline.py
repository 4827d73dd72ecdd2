"""The user's API: shapes, prompts, determinism, lazy parameters, and errors of bad input."""

import functools
import io
import itertools
import pathlib
import re
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from PIL import Image

from lavit_jax.data.emoji import corpus
from lavit_jax.errors import InputError, UserError
from lavit_jax.inference import (
  batching,
  compiled,
  generation_config,
  pipeline,
  rng,
  text_generation,
)
from lavit_jax.inference.outputs import TextOutput
from lavit_jax.inference.pipeline import Lavit
from lavit_jax.weights.store.bundle import bundle
from lavit_jax.weights.torch import convert

TINY = pathlib.Path(pipeline.__file__).parents[1] / 'assets' / 'tiny'
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)


@pytest.fixture(scope='module')
def model(tiny_folder):
  return Lavit.from_pretrained(tiny_folder)


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
def test_unknown_dtypes(tiny_folder, dtype):
  with pytest.raises(
    UserError, match=f"dtype='{dtype}' is not known; choose one of None, 'float32'"
  ):
    Lavit.from_pretrained(tiny_folder, dtype=dtype)


def test_a_task_reads_only_its_modules(tiny_folder, tmp_path):
  folder = shutil.copytree(tiny_folder, tmp_path / 'tiny')
  data = max((folder / 'parts' / 'understanding').rglob('*/d/*'), key=lambda x: x.stat().st_size)
  data.write_bytes(data.read_bytes()[:1000])
  shutil.rmtree(folder / 'parts' / 'llama')
  model = Lavit.from_pretrained(folder)
  assert not model.params.loaded
  model.tokenize(IMAGES)
  assert model.params.loaded == {'vit', 'tokenizer'}
  with pytest.raises(UserError, match='/understanding is truncated'):
    model.caption(IMAGES)
  with pytest.raises(UserError, match='/llama is missing'):
    model.generate(['an owl'])
  with pytest.raises(UserError, match="holds variant 'tiny'"):
    Lavit.from_pretrained(folder, variant='small')
  with pytest.raises(UserError, match='nowhere is not a lavit_jax checkpoint'):
    Lavit.from_pretrained('nowhere')
  shutil.rmtree(folder / 'tokenizer')
  model = Lavit.from_pretrained(folder)
  model.tokenize(IMAGES)
  for task in (lambda: model.caption(IMAGES), lambda: model.generate(['an owl'])):
    with pytest.raises(UserError, match='tokenizer/tokenizer.json does not exist'):
      task()
  assert model.params.loaded == {'vit', 'tokenizer'}  # said before anything was read


def test_decoding_reads_only_the_codebook_of_the_tokenizer(tiny_folder, tiny_parts, tmp_path):
  codes, tokens = [np.arange(20)], []
  for folder in (tiny_folder, tmp_path / 'theirs'):
    if folder != tiny_folder:
      convert.plan_conversion(tiny_folder, folder).run(lambda size: None)
    model = Lavit.from_pretrained(folder)
    drawn = model.decode_images(codes, num_inference_steps=1)
    assert 'tokenizer' not in model.params.loaded
    (embedding,) = jax.tree.leaves(model.params['codebook'])
    np.testing.assert_array_equal(embedding, tiny_parts['tokenizer']['quantizer']['embedding'])
    tokens.append(model.tokenize(IMAGES).ids)
    assert model.params['tokenizer']['quantizer']['embedding'] is embedding  # not read again
    whole = Lavit.from_pretrained(folder)
    whole.tokenize(IMAGES)
    np.testing.assert_array_equal(whole.decode_images(codes, num_inference_steps=1), drawn)
    assert (
      whole.params['codebook']['quantizer']['embedding']
      is whole.params['tokenizer']['quantizer']['embedding']
    )
  jax.tree.map(np.testing.assert_array_equal, *tokens)


def test_a_folder_with_only_a_sentencepiece_model(tmp_path):
  model = io.BytesIO()
  letters = np.random.default_rng(0).choice(list('abcdefghij '), 20_000)
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=itertools.chain(corpus.training_texts('embedded'), ''.join(letters).split()),
    model_writer=model,
    model_type='bpe',
    vocab_size=2048,
    byte_fallback=True,
    normalization_rule_name='identity',
    remove_extra_whitespaces=False,
    character_coverage=0.9999,
    minloglevel=2,
  )
  theirs = shutil.copytree(
    TINY, tmp_path / 'theirs', ignore=shutil.ignore_patterns('tokenizer.json')
  )
  (theirs / 'language_model' / 'tokenizer.model').write_bytes(model.getvalue())
  convert.plan_conversion(theirs, tmp_path / 'ours').run(lambda size: None)
  convert.plan_conversion(tmp_path / 'ours', tmp_path / 'again').run(lambda size: None)
  for file in ('theirs/language_model', 'ours/tokenizer', 'again/language_model'):
    assert (tmp_path / file / 'tokenizer.model').read_bytes() == model.getvalue()
    assert not (tmp_path / file / 'tokenizer.json').exists()
  processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
  expected_ids = None
  for name in ('theirs', 'ours', 'again'):
    opened = Lavit.from_pretrained(tmp_path / name)
    outputs = opened.answer_outputs(IMAGES, ['What is this?', 'How many?'])
    ids = [output.ids.tolist() for output in outputs]
    expected_ids = expected_ids or ids
    assert ids == expected_ids
    for output in outputs:
      text = processor.decode([i for i in output.ids.tolist() if i > 2])
      assert re.split(r'[\n,.]', text.strip())[0].strip().lower() == output.text
  bundled = bundle(tmp_path / 'bundled', [tmp_path / 'ours'], theirs / 'language_model')
  assert Lavit.from_pretrained(bundled).tokenizer.encode('owl') == tuple(processor.encode('owl'))


def test_a_pytorch_folder_gives_the_same_results(tmp_path):
  theirs = TINY
  convert.plan_conversion(theirs, tmp_path / 'ours').run(lambda size: None)
  first, second = (Lavit.from_pretrained(path) for path in (theirs, tmp_path / 'ours'))
  assert first.caption(IMAGES) == second.caption(IMAGES)
  np.testing.assert_array_equal(
    first.reconstruct(IMAGES, num_inference_steps=2),
    second.reconstruct(IMAGES, num_inference_steps=2),
  )
  for name in second.params.loaded:
    jax.tree.map(np.testing.assert_array_equal, first.params[name], second.params[name])
  (tmp_path / 'theirs' / 'language_model').mkdir(parents=True)
  with pytest.raises(UserError, match='holds no weights'):
    Lavit.from_pretrained(tmp_path / 'theirs')


def test_weights_of_another_variant_are_named(model, tiny_parts):
  wide = jax.tree.map(lambda x: jnp.zeros((*x.shape[:-1], 2 * x.shape[-1])), tiny_parts['vit'])
  deep = {
    **tiny_parts['vit'],
    'blocks': jax.tree.map(lambda x: jnp.concatenate([x, x]), tiny_parts['vit']['blocks']),
  }
  less = {key: value for key, value in tiny_parts['vit'].items() if key != 'blocks'}
  for vit, fault in (
    (wide, 'instead of'),
    (deep, r'blocks/.*: \(8, .*instead of \(4, '),
    (less, 'blocks/.*: missing'),
  ):
    with pytest.raises(UserError, match=f"weights of vit are not of variant 'tiny', .*{fault}"):
      Lavit(model.modules, dict(tiny_parts, vit=vit), model.tokenizer).tokenize(IMAGES)


def test_batches_cover_everything_in_few_shapes():
  for count in (0, 1, 5, 16, 17, 40):
    rows = [row for n, rows in batching.batch_ranges(count, 16) for row in rows[:n]]
    assert rows == list(range(count))
  assert [len(rows) for _, rows in batching.batch_ranges(21, 16)] == [16, 8]


def texts_of(outputs):
  return [output.text for output in outputs]


def scores_of(outputs):
  return [output.score for output in outputs]


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


def test_several_sequences_of_a_prompt(model):
  prompts = [['an owl'], [IMAGES[0], 'and', IMAGES[1], 'on a red background', IMAGES[0]]]
  one = model.sample_codes(prompts)
  three = model.sample_codes(prompts, num_return_sequences=3)
  assert len(three) == 6
  np.testing.assert_array_equal(three[0], one[0])
  np.testing.assert_array_equal(three[3], one[1])
  assert len({tuple(codes) for codes in three}) == 6
  for options in (dict(top_p=0.5), dict(repetition_penalty=1.5), dict(negative_prompt='a key')):
    changed = model.sample_codes(prompts, **options)
    assert [x.tolist() for x in changed] != [x.tolist() for x in one], options
  with pytest.raises(UserError, match='num_return_sequences=0 is not allowed'):
    model.sample_codes(prompts, num_return_sequences=0)
  options = dict(num_return_sequences=2, num_inference_steps=1)
  output = model.generate_outputs(['an owl', 'a key'], **options)
  assert output.images.shape == (4, 64, 64, 3)
  assert output.flagged.tolist() == [False] * 4
  assert len(np.unique(output.images, axis=0)) == 4
  first_codes = model.sample_code_outputs([['an owl'], ['a key']])
  for codes, expected in zip(output.codes[::2], first_codes, strict=True):
    np.testing.assert_array_equal(codes.ids, expected.ids)
    np.testing.assert_allclose(codes.score, expected.score, rtol=1e-5)


def test_text_by_search_and_by_sampling(model):
  one = model.caption_outputs(IMAGES)
  three = model.caption_outputs(IMAGES, num_beams=4, num_return_sequences=3)
  assert len(three) == 6
  for i in (0, 3):
    assert three[i].score > three[i + 1].score > three[i + 2].score
  sampled = model.caption(IMAGES, do_sample=True, num_return_sequences=3)
  assert len({*sampled}) == 6
  assert sampled[::3] == model.caption(IMAGES, do_sample=True)
  assert sampled != model.caption(IMAGES, do_sample=True, num_return_sequences=3, seed=1)
  greedy = model.caption_outputs(IMAGES, do_sample=True, top_k=1)
  assert texts_of(greedy) == model.caption(IMAGES, num_beams=1)
  short = model.caption_outputs(IMAGES, max_new_tokens=4)
  assert all(len(output.ids) == 4 for output in short)
  assert scores_of(model.caption_outputs(IMAGES, length_penalty=-9.0)) != scores_of(one)
  assert model.caption(IMAGES, repetition_penalty=3.0) != texts_of(one)
  assert model.answer_outputs(IMAGES[:1], ['What?'], num_return_sequences=5)[0].score > -100


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


def test_unanswerable_questions(model, monkeypatch):
  calls = []

  def continue_images(runner, images, prompts, *_):
    texts = [model.tokenizer.decode(prompt) for prompt in prompts]
    calls.append(texts)
    outputs = []
    for text in texts:
      answer = 'Yes'
      if 'answerable? Answer:' in text and 'What' in text:
        answer = 'I know nothing'
      elif 'answerable? Answer:' in text and 'Who' in text:
        answer = 'No, not'
      outputs.append(TextOutput(answer, np.array([1]), -1.0))
    return outputs

  monkeypatch.setattr(text_generation, 'continue_images', continue_images)
  assert model.answer(IMAGES, ['What is it?', 'Who is it?']) == ['yes', 'yes']
  answers = model.answer(IMAGES, ['What is it?', 'Who is it?'], check_answerable=True)
  assert answers == ['yes', 'unanswerable']  # 'know' and 'nothing' are not 'no'
  assert calls[-1][1] == 'Question: Is the question: "Who is it?" answerable? Answer:'


def test_without_guidance_there_is_no_second_row(model, monkeypatch):
  rows = []
  embed_prompts = model.embed_prompts

  def count_rows(prompts, *args):
    rows.append(len(prompts))
    return embed_prompts(prompts, *args)

  monkeypatch.setattr(model, 'embed_prompts', count_rows)
  codes = [
    model.sample_codes([['an owl']], guidance_scale=guidance)[0].tolist()
    for guidance in (None, 1, 1.0001, 4)
  ]
  assert rows == [1, 1, 2, 2]
  assert codes[0] == codes[1] == codes[2] != codes[3]


def test_each_purpose_has_keys_of_its_own(model, monkeypatch):
  """The keys of patches of all images of a prompt, of steps of all samples, and of latents."""
  calls = []
  run = model.run

  def record_keys(program, module_names, *args, **kwargs):
    for leaf in jax.tree.leaves((args, kwargs)):
      if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        calls.append((program, leaf))
    return run(program, module_names, *args, **kwargs)

  monkeypatch.setattr(model, 'run', record_keys)
  model.synthesize(
    [[IMAGES[0], IMAGES[1], IMAGES[0], IMAGES[1]]],
    num_return_sequences=2,
    num_inference_steps=1,
  )
  steps = np.arange(model.defaults.image_tokens[1])
  fold_steps = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
  used = []
  for program, keys in calls:
    used.append(fold_steps(keys, steps).ravel() if program is compiled.generate else keys)
  data = jax.random.key_data(jnp.concatenate(used))
  assert len(calls) == 3
  assert len(np.unique(data, axis=0)) == len(data) == 4 + 2 * len(steps) + 2
  calls.clear()
  model.reconstruct(IMAGES, num_inference_steps=1)
  data = jax.random.key_data(jnp.concatenate([keys for _, keys in calls]))
  assert len(np.unique(data, axis=0)) == len(data) == 4


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


def test_weight_and_cache_dtypes(tiny_folder, tiny_parts, model):
  expected = model.caption_outputs(IMAGES, seed=None)
  for options in (
    dict(weights_dtype='int8'),
    dict(cache_dtype='int8'),
    dict(cache_dtype='bfloat16'),
  ):
    small = Lavit.from_pretrained(tiny_folder, **options)
    scores = scores_of(small.caption_outputs(IMAGES, seed=None))
    assert 0 < np.abs(np.subtract(scores, scores_of(expected))).max() < 0.5, options
    types = {x.dtype.name for x in jax.tree.leaves(small.params['llama'])}
    assert types == ({'int8', 'float32'} if 'weights_dtype' in options else {'float32'})
    assert {x.dtype.name for x in jax.tree.leaves(small.params['vit'])} == {'float32'}
  params = dict(tiny_parts)
  Lavit(model.modules, params, model.tokenizer, weights_dtype='int8').caption(IMAGES)
  assert params['llama']['layers']['mlp']['up']['kernel'].dtype == jnp.float32  # not changed
  with pytest.raises(
    UserError, match='the params of another model have their weights_dtype and mesh'
  ):
    Lavit(model.modules, model.params, model.tokenizer, weights_dtype='int8')
  for options in (dict(weights_dtype='int4'), dict(cache_dtype='float64')):
    with pytest.raises(UserError, match="is not known; choose one of None, .*'int8'"):
      Lavit.from_pretrained(tiny_folder, **options)


def slow_batches(count, pause):
  for _ in range(count):
    time.sleep(pause)
    yield 4, np.zeros(3)


def test_the_progress_bar_needs_a_terminal_and_long_work(monkeypatch):
  monkeypatch.setattr(batching, 'SHOW_AFTER', 0.2)
  monkeypatch.setenv('TERM', 'xterm')
  for terminal, batches, pause, shown in (
    (True, 1, 0.8, True),
    (False, 1, 0.8, False),
    (True, 3, 0.0, False),
  ):
    stderr = io.StringIO()
    stderr.isatty = functools.partial(bool, terminal)
    monkeypatch.setattr('sys.stderr', stderr)
    fetched = batching.fetch_batches(slow_batches(batches, pause), 4 * batches, 'codes')
    assert [n for n, _ in fetched] == [4] * batches
    assert ('codes' in stderr.getvalue()) == shown
