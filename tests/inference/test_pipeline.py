"""The user's API on random weights: shapes, prompts, determinism, lazy parts, and what it says to bad input."""

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
PICTURES = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)


@pytest.fixture(scope='module')
def model(tiny_folder):
  return Lavit.from_pretrained(tiny_folder)


def test_tokenize(model):
  ids, keep, counts = model.tokenize(PICTURES, seed=None)
  assert keep.shape == (2, 64) and keep.dtype == bool
  np.testing.assert_array_equal(counts, keep.sum(-1))
  assert [len(row) for row in ids] == counts.tolist() and min(counts) > 0
  assert all(0 <= row.min() and row.max() < 1024 for row in ids)
  again = model.tokenize(
    [Image.fromarray(PICTURES[1])], seed=None
  )  # alone, it is what it is in a batch
  np.testing.assert_array_equal(again.ids[0], ids[1])
  sampled = [model.tokenize(PICTURES, seed=seed).keep for seed in (0, 0, 1)]
  np.testing.assert_array_equal(sampled[0], sampled[1])
  assert (sampled[0] != sampled[2]).any()
  np.testing.assert_array_equal(
    model.tokenize(PICTURES).keep, sampled[0]
  )  # sampled, unless asked otherwise


def test_words_from_pictures(model):
  captions = model.caption(PICTURES, seed=None)
  assert len(captions) == 2 and all(isinstance(text, str) and '.' not in text for text in captions)
  assert model.caption(PICTURES[::-1], seed=None) == captions[::-1]
  answers = model.answer(
    PICTURES, ['What is this?', 'Where is the rather long question about the picture?']
  )
  assert len(answers) == 2 and all(
    text == text.lower() and not set(text) & set('\n,.') for text in answers
  )


class Intercepted(Exception):
  pass


def intercept(seen):
  def embed(prompts, *_):
    seen.append(prompts)
    raise Intercepted

  return embed


def test_the_prompt_is_picture_then_question(model, monkeypatch):
  seen = []
  monkeypatch.setattr(model, 'embed_prompts', intercept(seen))
  with pytest.raises(Intercepted):
    model.answer(PICTURES[:1], ['What is {this}?'])
  ((start, features, end, question),) = seen[0]
  counts = model.tokenize(PICTURES[:1]).counts
  assert (start, features, end) == ([2048], range(counts[0]), [2049])
  assert model.tokenizer.decode(question) == 'Question: What is {this}? Answer:'


def test_synthesis_prompts_hold_codes(model, monkeypatch):
  seen = []
  monkeypatch.setattr(model, 'embed_prompts', intercept(seen))
  keys = rng.purpose_keys(
    rng.Purpose.PATCHES, rng.example_keys(3, 1)[np.zeros(2, int)], np.arange(2)
  )  # of the row's, one a picture
  ids = model.run_batches(compiled.tokenize, ('vit', 'tokenizer'), PICTURES[:2], keys)
  first, second = ([row[kept] + 2050] for row, kept in zip(*ids))
  owl = [model.tokenizer.encode('owl')]
  for bracketed, expected in (
    (True, [[2048], *first, [2049], *owl, [2048], *second, [2049], [2048]]),
    (False, [*first, *owl, *second, [2048]]),
  ):  # the released weights, jy0205/LaVIT: codes, words, one [IMG]
    monkeypatch.setattr(model, 'defaults', model.defaults._replace(bracketed=bracketed))
    with pytest.raises(Intercepted):
      model.synthesize([[PICTURES[0], 'owl', PICTURES[1]]], seed=3)
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


def test_pictures(model):
  drawn = model.decode_images([np.array([], int), np.arange(64)], num_inference_steps=2)
  assert drawn.shape == (2, 64, 64, 3) and drawn.dtype == np.uint8 and (drawn[0] != drawn[1]).any()
  np.testing.assert_array_equal(
    model.decode_images([np.array([], int), np.arange(7)], num_inference_steps=2)[0], drawn[0]
  )
  assert (
    model.decode_images([np.array([], int), np.arange(64)], num_inference_steps=2, seed=1)[0]
    != drawn[0]
  ).any()
  rebuilt = model.reconstruct(PICTURES, num_inference_steps=2, seed=5)
  np.testing.assert_array_equal(
    rebuilt,
    model.decode_images(model.tokenize(PICTURES, seed=5).ids, num_inference_steps=2, seed=5),
  )
  prompts = [['an owl'], ['a key']]
  generated = model.generate(['an owl', 'a key'], num_inference_steps=2, seed=3)
  np.testing.assert_array_equal(
    generated,
    model.decode_images(model.sample_codes(prompts, seed=3), num_inference_steps=2, seed=3),
  )
  mixed = model.synthesize(
    [[PICTURES[0], 'an owl'], [PICTURES[1], 'a key', PICTURES[0]]], num_inference_steps=2
  )
  assert mixed.shape == (2, 64, 64, 3)


@pytest.mark.parametrize(
  'call, message',
  [
    (lambda m: m.generate(['  ']), 'empty'),
    (lambda m: m.synthesize([[]]), 'empty'),
    (lambda m: m.answer(PICTURES[:1], ['']), 'empty'),
    (lambda m: m.answer(PICTURES, ['What is this?']), '2 images but 1 question'),
    (lambda m: m.generate(['owl ' * 3000]), 'prompt is .* tokens long; shorten it to 4046'),
    (lambda m: m.caption(['nowhere.png']), 'nowhere.png'),
    (lambda m: m.synthesize(['on a red background']), 'each prompt in brackets'),
    (lambda m: m.synthesize([pathlib.Path('owl.png'), 'red']), 'owl.png: no such file'),
    (lambda m: m.synthesize(['owl.png', 'red']), 'each prompt in brackets'),
    (lambda m: m.synthesize([PICTURES[0]]), 'each prompt in brackets'),
    (lambda m: m.synthesize([bytearray(4)]), 'each prompt in brackets'),
    (lambda m: m.synthesize([[PICTURES[0]], 'red']), 'each prompt in brackets'),
    (lambda m: m.synthesize(None), 'each prompt in brackets'),
    (lambda m: m.decode_images([np.arange(65)]), 'at most 64 numbers in 0..1023'),
    (lambda m: m.decode_images([np.array([1024])]), 'at most 64 numbers in 0..1023'),
    (lambda m: m.decode_images(np.arange(5)), 'those of several images a list of these; got 0'),
    (
      lambda m: m.decode_images([np.array([1.5])]),
      'a list of whole numbers, those of several images a list of these; got .1.5',
    ),
    (lambda m: m.caption(5), 'images are paths, .* got int'),
    (lambda m: m.caption(PICTURES, ['a']), '2 images but 1 prompts'),
    (lambda m: m.caption(PICTURES, None), 'prompt=None is not allowed; give a text, or a list'),
    (lambda m: m.caption(PICTURES, ['', None]), 'None is not a text'),
    (lambda m: m.caption(PICTURES, '\udcff'), r"prompt: '\\udcff' is not a text"),
    (lambda m: m.answer(PICTURES, None), 'questions=None is not allowed'),
    (lambda m: m.caption(PICTURES, num_beams=0), 'num_beams=0 is not allowed'),
    (
      lambda m: m.answer(PICTURES[:1], ['What?'], temperature=0.5),
      'temperature has no effect in beam search',
    ),
    (lambda m: m.caption(PICTURES, do_sample=True, seed=None), 'random sampling needs a seed'),
    (lambda m: m.sample_codes([[PICTURES[0]]], seed=None), 'random sampling needs a seed'),
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
      lambda m: m.caption(PICTURES, max_new_tokens=4094),
      'max_new_tokens=4094 is not allowed; .* <= 4093',
    ),
  ],
)
def test_bad_input(model, call, message):
  with pytest.raises(UserError, match=message):
    call(model)


def test_a_fault_of_the_settings_is_no_row_s(model):
  for call in (
    lambda: model.caption(PICTURES, 'word ' * 3000),
    lambda: model.caption(PICTURES, max_new_tokens=4096),
    lambda: model.caption(PICTURES, '\ud800'),
    lambda: model.generate(['an owl'], negative_prompt=' '),
    lambda: model.generate(['an owl'], negative_prompt='word ' * 3000),
  ):
    with pytest.raises(UserError) as caught:
      call()
    assert type(caught.value) is UserError  # which would be the row's, were it an InputError


def test_prompts_too_long_are_told_before_anything_runs(model, monkeypatch):
  monkeypatch.setattr(model, 'run', lambda *_, **__: pytest.fail('ran'))
  long = 'word ' * 3000
  with pytest.raises(
    InputError, match='the prompt, 33 of 33, is at least [0-9]+ tokens long; shorten it to 4080'
  ):
    model.answer(np.repeat(PICTURES[:1], 33, 0), ['What is this?'] * 32 + [long])
  with pytest.raises(
    InputError, match='the prompt, 2 of 2, is at least [0-9]+ tokens long; shorten it to 4046'
  ):
    model.synthesize([[PICTURES[0], 'red'], [PICTURES[0], long]])


def test_what_fits_by_its_own_number_of_tokens_is_not_refused(model, monkeypatch):
  (count,) = model.tokenize(PICTURES[:1]).counts
  monkeypatch.setattr(
    model.params, 'max_length', 2 + count + len(model.tokenizer.encode('an owl')) + 36
  )
  assert len(model.caption(PICTURES[:1], 'an owl')) == 1
  monkeypatch.setattr(model.params, 'max_length', model.params.max_length - 1)
  with pytest.raises(
    InputError,
    match=f'^the prompt is {2 + count + len(model.tokenizer.encode("an owl"))} tokens long; shorten',
  ):
    model.caption(PICTURES[:1], 'an owl')


def test_nothing_becomes_nothing(model):
  ids, keep, counts = model.tokenize([])
  assert ids == [] and keep.shape == (0, 64) and keep.dtype == bool and counts.shape == (0,)
  assert (
    model.caption([])
    == model.answer([], [])
    == model.sample_codes([])
    == model.caption_outputs([], do_sample=True)
    == []
  )


def test_one_prompt_of_words_and_pictures_needs_no_brackets(model):
  prompt = [PICTURES[0], 'in the snow']
  np.testing.assert_array_equal(
    model.synthesize(prompt, num_inference_steps=1),
    model.synthesize([prompt], num_inference_steps=1),
  )
  assert len(model.sample_codes(prompt)) == 1


def test_one_picture_in_memory_is_one(model):
  buffer = io.BytesIO()
  Image.fromarray(PICTURES[0]).save(buffer, 'PNG')
  for data in (buffer.getvalue(), bytearray(buffer.getvalue()), buffer.getbuffer()):
    np.testing.assert_array_equal(model.tokenize(data).ids, model.tokenize(PICTURES[:1]).ids)


@pytest.mark.parametrize('dtype', ['float99', 'int8', 'float64'])
def test_types_that_are_not_known(tiny_folder, dtype):
  with pytest.raises(
    UserError, match=f"dtype='{dtype}' is not known; choose one of None, 'float32'"
  ):
    Lavit.from_pretrained(tiny_folder, dtype=dtype)


def test_only_the_parts_of_a_task_are_read(tiny_folder, tmp_path):
  folder = shutil.copytree(tiny_folder, tmp_path / 'tiny')
  data = max((folder / 'parts' / 'understanding').rglob('*/d/*'), key=lambda x: x.stat().st_size)
  data.write_bytes(data.read_bytes()[:1000])
  shutil.rmtree(folder / 'parts' / 'llama')
  model = Lavit.from_pretrained(folder)
  assert not model.params.loaded
  model.tokenize(PICTURES)
  assert model.params.loaded == {'vit', 'tokenizer'}
  with pytest.raises(UserError, match='/understanding is truncated'):
    model.caption(PICTURES)
  with pytest.raises(UserError, match='/llama is missing'):
    model.generate(['an owl'])
  with pytest.raises(UserError, match="holds variant 'tiny'"):
    Lavit.from_pretrained(folder, variant='small')
  with pytest.raises(UserError, match='nowhere is not a lavit_jax checkpoint'):
    Lavit.from_pretrained('nowhere')
  shutil.rmtree(folder / 'tokenizer')
  model = Lavit.from_pretrained(folder)
  model.tokenize(PICTURES)
  for task in (lambda: model.caption(PICTURES), lambda: model.generate(['an owl'])):
    with pytest.raises(UserError, match='tokenizer/tokenizer.json does not exist'):
      task()
  assert model.params.loaded == {'vit', 'tokenizer'}  # said before anything was read


def test_drawing_reads_the_codebook_alone(tiny_folder, tiny_parts, tmp_path):
  codes, tokens = [np.arange(20)], []
  for folder in (tiny_folder, tmp_path / 'theirs'):
    if folder != tiny_folder:
      convert.plan_conversion(tiny_folder, folder).run(lambda size: None)
    model = Lavit.from_pretrained(folder)
    drawn = model.decode_images(codes, num_inference_steps=1)
    assert 'tokenizer' not in model.params.loaded
    (embedding,) = jax.tree.leaves(model.params['codebook'])
    np.testing.assert_array_equal(embedding, tiny_parts['tokenizer']['quantizer']['embedding'])
    tokens.append(model.tokenize(PICTURES).ids)
    assert (
      model.params['tokenizer']['quantizer']['embedding'] is embedding
    )  # the one that was there
    whole = Lavit.from_pretrained(folder)
    whole.tokenize(PICTURES)
    np.testing.assert_array_equal(whole.decode_images(codes, num_inference_steps=1), drawn)
    assert (
      whole.params['codebook']['quantizer']['embedding']
      is whole.params['tokenizer']['quantizer']['embedding']
    )
  jax.tree.map(np.testing.assert_array_equal, *tokens)


def test_a_folder_with_a_sentencepiece_model_alone_is_opened(tmp_path):
  model, letters = io.BytesIO(), np.random.default_rng(0).choice(list('abcdefghij '), 20_000)
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
    assert (tmp_path / file / 'tokenizer.model').read_bytes() == model.getvalue() and not (
      tmp_path / file / 'tokenizer.json'
    ).exists()
  told = [
    Lavit.from_pretrained(tmp_path / name).answer(
      PICTURES, ['What is this?', 'How many?'], details=True
    )
    for name in ('theirs', 'ours', 'again')
  ]
  by = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
  for rows in told:
    assert [row.ids.tolist() for row in rows] == [row.ids.tolist() for row in told[0]]
    assert all(
      re.split(r'[\n,.]', by.decode([i for i in row.ids.tolist() if i > 2]).strip())[0]
      .strip()
      .lower()
      == row.text
      for row in rows
    )
  bundled = bundle(tmp_path / 'bundled', [tmp_path / 'ours'], theirs / 'language_model')
  assert Lavit.from_pretrained(bundled).words.encode('owl') == tuple(by.encode('owl'))


def test_a_folder_of_pytorch_names_says_the_same(tmp_path):
  theirs = TINY
  convert.plan_conversion(theirs, tmp_path / 'ours').run(lambda size: None)
  first, second = (Lavit.from_pretrained(path) for path in (theirs, tmp_path / 'ours'))
  assert first.caption(PICTURES) == second.caption(PICTURES)
  np.testing.assert_array_equal(
    first.reconstruct(PICTURES, num_inference_steps=2),
    second.reconstruct(PICTURES, num_inference_steps=2),
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
      Lavit(model.modules, dict(tiny_parts, vit=vit), model.tokenizer).tokenize(PICTURES)


def test_batches_cover_everything_in_few_shapes():
  for count in (0, 1, 5, 16, 17, 40):
    rows = [row for n, rows in batching.batch_ranges(count, 16) for row in rows[:n]]
    assert rows == list(range(count))
  assert [len(rows) for _, rows in batching.batch_ranges(21, 16)] == [16, 8]


def test_details(model):
  told = model.caption_outputs(PICTURES, seed=None)
  assert [each.text for each in told] == model.caption(PICTURES, seed=None)
  least, most = model.defaults.caption_tokens
  assert all(
    model.tokenizer.decode(each.ids).split('.')[0].strip() == each.text and each.score < 0
    for each in told
  )
  assert all(least <= len(each.ids) <= most for each in told)
  questions = ['What is this?', 'Where is it?']
  assert [each.text for each in model.answer_outputs(PICTURES, questions)] == model.answer(
    PICTURES, questions
  )
  sampled = model.sample_code_outputs([['an owl']])[0]
  np.testing.assert_array_equal(sampled.codes, model.sample_codes([['an owl']])[0])
  np.testing.assert_array_equal(sampled.ids[sampled.ids >= 2050] - 2050, sampled.codes)
  assert sampled.score < 0


def test_several_samples_of_a_prompt(model):
  prompts = [
    ['an owl'],
    [PICTURES[0], 'and', PICTURES[1], 'on a red background', PICTURES[0]],
  ]  # none, and several pictures
  one, three = model.sample_codes(prompts), model.sample_codes(prompts, num_return_sequences=3)
  assert len(three) == 6
  np.testing.assert_array_equal(three[0], one[0])
  np.testing.assert_array_equal(three[3], one[1])
  assert len({tuple(row) for row in three}) == 6
  for options in (dict(top_p=0.5), dict(repetition_penalty=1.5), dict(negative_prompt='a key')):
    assert any(
      a.tolist() != b.tolist() for a, b in zip(model.sample_codes(prompts, **options), one)
    ), options
  with pytest.raises(UserError, match='num_return_sequences=0 is not allowed'):
    model.sample_codes(prompts, num_return_sequences=0)
  drawn = model.generate_outputs(['an owl', 'a key'], num_return_sequences=2, num_inference_steps=1)
  assert (
    drawn.images.shape == (4, 64, 64, 3)
    and drawn.flagged.tolist() == [False] * 4
    and len(np.unique(drawn.images, axis=0)) == 4
  )
  alone = model.sample_code_outputs([['an owl'], ['a key']])
  for ours, one in zip(drawn.codes[::2], alone, strict=True):
    np.testing.assert_array_equal(ours.ids, one.ids)
    np.testing.assert_allclose(ours.score, one.score, rtol=1e-5)


def test_words_by_search_and_by_sampling(model):
  one, three = (
    model.caption_outputs(PICTURES),
    model.caption_outputs(PICTURES, num_beams=4, num_return_sequences=3),
  )
  assert len(three) == 6 and all(
    three[i].score > three[i + 1].score > three[i + 2].score for i in (0, 3)
  )
  sampled = model.caption(PICTURES, do_sample=True, num_return_sequences=3)
  assert len({*sampled}) == 6 and sampled[::3] == model.caption(PICTURES, do_sample=True)
  assert sampled != model.caption(PICTURES, do_sample=True, num_return_sequences=3, seed=1)
  greedy = model.caption_outputs(PICTURES, do_sample=True, top_k=1)
  assert [each.text for each in greedy] == model.caption(PICTURES, num_beams=1)
  fewer, longer = (
    model.caption_outputs(PICTURES, **options)
    for options in (dict(max_new_tokens=4), dict(length_penalty=-9.0))
  )
  assert all(len(each.ids) == 4 for each in fewer) and [each.score for each in longer] != [
    each.score for each in one
  ]
  assert model.caption(PICTURES, repetition_penalty=3.0) != [each.text for each in one]
  assert model.answer_outputs(PICTURES[:1], ['What?'], num_return_sequences=5)[0].score > -100


def test_a_caption_goes_on_from_its_prompt(model, monkeypatch):
  seen = []
  monkeypatch.setattr(model, 'embed_prompts', intercept(seen))
  for prompt, expected in (
    ('a picture of', ['a picture of'] * 2),
    (['an owl', ' '], ['an owl', '']),
  ):
    with pytest.raises(Intercepted):
      model.caption(PICTURES, prompt)
    assert [
      model.tokenizer.decode(pieces[3]) if len(pieces[3]) else '' for pieces in seen.pop()
    ] == expected


def test_questions_that_the_picture_does_not_answer(model, monkeypatch):
  asked = []

  def tell(runner, images, prompts, *_):
    asked.append([model.tokenizer.decode(each) for each in prompts])
    judged = [
      'I know nothing' if 'What' in text else 'No, not' if 'Who' in text else 'Yes'
      for text in asked[-1]
    ]
    return [
      TextOutput(says if 'answerable? Answer:' in text else 'Yes', np.array([1]), -1.0)
      for text, says in zip(asked[-1], judged)
    ]

  monkeypatch.setattr(text_generation, 'continue_images', tell)
  assert model.answer(PICTURES, ['What is it?', 'Who is it?']) == ['yes', 'yes']
  assert model.answer(PICTURES, ['What is it?', 'Who is it?'], check_answerable=True) == [
    'yes',
    'unanswerable',
  ]  # by the word, not its letters
  assert asked[-1][1] == 'Question: Is the question: "Who is it?" answerable? Answer:'


def test_no_guidance_takes_no_second_row(model, monkeypatch):
  rows, embed = [], model.embed_prompts
  monkeypatch.setattr(
    model,
    'embed_prompts',
    lambda prompts, *rest: rows.append(len(prompts)) or embed(prompts, *rest),
  )
  codes = [
    model.sample_codes([['an owl']], guidance_scale=guidance)[0].tolist()
    for guidance in (None, 1, 1.0001, 4)
  ]
  assert rows == [1, 1, 2, 2] and codes[0] == codes[1] == codes[2] != codes[3]


def test_each_purpose_has_keys_of_its_own(model, monkeypatch):
  """Of all that a call draws at random: patches of the pictures of a prompt, every step of every sample, latents."""
  seen, run = [], model.run

  def watch(program, names, *args, **kwargs):
    for each in jax.tree.leaves((args, kwargs)):
      if isinstance(each, jax.Array) and jnp.issubdtype(each.dtype, jax.dtypes.prng_key):
        seen.append((program, each))
    return run(program, names, *args, **kwargs)

  monkeypatch.setattr(model, 'run', watch)
  model.synthesize(
    [[PICTURES[0], PICTURES[1], PICTURES[0], PICTURES[1]]],
    num_return_sequences=2,
    num_inference_steps=1,
  )
  steps = np.arange(model.defaults.image_tokens[1])
  drawn = []
  for program, keys in seen:
    drawn.append(
      keys
      if program is not compiled.generate
      else jax.vmap(lambda key: jax.vmap(jax.random.fold_in, (None, 0))(key, steps))(keys).ravel()
    )
  every = jax.random.key_data(jnp.concatenate(drawn))
  assert len(seen) == 3 and len(np.unique(every, axis=0)) == len(every) == 4 + 2 * len(steps) + 2
  seen.clear()
  model.reconstruct(PICTURES, num_inference_steps=1)
  every = jax.random.key_data(jnp.concatenate([keys for _, keys in seen]))
  assert len(np.unique(every, axis=0)) == len(every) == 4


def test_the_device_is_given_more_before_the_host_waits(model, monkeypatch):
  events, run, get = [], model.run, jax.device_get
  monkeypatch.setattr(
    model,
    'run',
    lambda program, *args, **kwargs: (
      program is not compiled.embed and events.append(program.__name__),
      run(program, *args, **kwargs),
    )[1],
  )
  monkeypatch.setattr(batching, 'MAX_BATCH', 2)
  monkeypatch.setattr(jax, 'device_get', lambda x: events.append('fetch') or get(x))
  model.caption(np.repeat(PICTURES, 3, 0))
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
    [PICTURES[0], 'an owl', PICTURES[1]],
    ['a key'],
    [PICTURES[1], PICTURES[0], 'red', PICTURES[1], 'blue'],
  ]
  keep = model.sample_codes(prompts, seed=4)
  np.testing.assert_array_equal(model.sample_codes(prompts[:1], seed=4)[0], keep[0])
  np.testing.assert_array_equal(
    model.sample_codes([prompts[0], ['a rather long text about a key'], ['a key']], seed=4)[0],
    keep[0],
  )


def test_prompts_of_the_same_bucket_compile_once(model):
  model.answer(PICTURES, ['What is this?'] * 2, seed=None)
  model.sample_codes([['an owl'], ['a key']])
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: compiled.append(event) if 'backend_compile' in event else None
  )
  model.answer(PICTURES, ['What is the colour of the background?', 'How many?'], seed=None)
  model.answer(PICTURES, ['Is it red?', 'Where is the owl in this picture?'], seed=None)
  model.sample_codes(
    [['three pizzas and a key on a white background'], ['a']],
    temperature=0.7,
    guidance_scale=2.0,
    seed=9,
  )
  assert not compiled
  jax.jit(lambda x: x + 1)(jnp.ones(3))
  assert compiled  # the listener listens


def test_small_weights_and_caches(tiny_folder, tiny_parts, model):
  expected = model.caption_outputs(PICTURES, seed=None)
  for options in (
    dict(weights_dtype='int8'),
    dict(cache_dtype='int8'),
    dict(cache_dtype='bfloat16'),
  ):
    small = Lavit.from_pretrained(tiny_folder, **options)
    told = small.caption_outputs(PICTURES, seed=None)
    assert 0 < max(abs(one.score - other.score) for one, other in zip(told, expected)) < 0.5, (
      options
    )
    types = {x.dtype.name for x in jax.tree.leaves(small.params['llama'])}
    assert types == ({'int8', 'float32'} if 'weights_dtype' in options else {'float32'})
    assert {x.dtype.name for x in jax.tree.leaves(small.params['vit'])} == {'float32'}
  mine = dict(tiny_parts)
  Lavit(model.modules, mine, model.tokenizer, weights_dtype='int8').caption(PICTURES)
  assert (
    mine['llama']['layers']['mlp']['up']['kernel'].dtype == jnp.float32
  )  # what was given is not taken to pieces
  with pytest.raises(
    UserError, match='the params of another model have their weights_dtype and mesh'
  ):
    Lavit(model.modules, model.params, model.tokenizer, weights_dtype='int8')
  for options in (dict(weights_dtype='int4'), dict(cache_dtype='float64')):
    with pytest.raises(UserError, match="is not known; choose one of None, .*'int8'"):
      Lavit.from_pretrained(tiny_folder, **options)


def test_a_bar_only_on_terminals_and_for_long_work(monkeypatch):
  monkeypatch.setattr(batching, 'SHOW_AFTER', 0.2)
  monkeypatch.setenv('TERM', 'xterm')
  for terminal, batches, pause, shown in (
    (True, 1, 0.8, True),
    (False, 1, 0.8, False),
    (True, 3, 0.0, False),
  ):

    def dispatched():
      for _ in range(batches):
        time.sleep(pause)
        yield 4, np.zeros(3)

    screen = io.StringIO()
    screen.isatty = lambda: terminal
    monkeypatch.setattr('sys.stderr', screen)
    assert [n for n, _ in batching.fetch_batches(dispatched(), 4 * batches, 'codes')] == [
      4
    ] * batches
    assert ('codes' in screen.getvalue()) == shown
