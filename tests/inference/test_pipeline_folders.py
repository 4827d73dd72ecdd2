"""Folders that the user's API opens: of both kinds, with parts missing, read module by module."""

import io
import itertools
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece

from lavit_jax.data.emoji import corpus
from lavit_jax.errors import UserError
from lavit_jax.inference import pipeline
from lavit_jax.inference.pipeline import Lavit
from lavit_jax.weights.store.bundle import bundle
from lavit_jax.weights.torch import convert

TINY = pathlib.Path(pipeline.__file__).parents[1] / 'assets' / 'tiny'
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)


def test_a_task_reads_only_its_modules(shallow_folder, tmp_path):
  folder = shutil.copytree(shallow_folder, tmp_path / 'tiny')
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
  with pytest.raises(UserError, match="holds variant 'shallow'"):
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


def test_decoding_reads_only_the_codebook_of_the_tokenizer(shallow_folder, shallow_parts, tmp_path):
  codes, tokens = [np.arange(20)], []
  for folder in (shallow_folder, tmp_path / 'theirs'):
    if folder != shallow_folder:
      convert.plan_conversion(shallow_folder, folder).run(lambda size: None)
    model = Lavit.from_pretrained(folder)
    drawn = model.decode_images(codes, num_inference_steps=1)
    assert 'tokenizer' not in model.params.loaded
    (embedding,) = jax.tree.leaves(model.params['codebook'])
    np.testing.assert_array_equal(embedding, shallow_parts['tokenizer']['quantizer']['embedding'])
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


def test_weights_of_another_variant_are_named(model, shallow_parts):
  wide = jax.tree.map(lambda x: jnp.zeros((*x.shape[:-1], 2 * x.shape[-1])), shallow_parts['vit'])
  deep = {
    **shallow_parts['vit'],
    'blocks': jax.tree.map(lambda x: jnp.concatenate([x, x]), shallow_parts['vit']['blocks']),
  }
  less = {key: value for key, value in shallow_parts['vit'].items() if key != 'blocks'}
  for vit, fault in (
    (wide, 'instead of'),
    (deep, r'blocks/.*: \(8, .*instead of \(4, '),
    (less, 'blocks/.*: missing'),
  ):
    with pytest.raises(UserError, match=f"weights of vit are not of variant 'shallow', .*{fault}"):
      Lavit(model.modules, dict(shallow_parts, vit=vit), model.tokenizer).tokenize(IMAGES)
