"""Options of the user's API: search, sampling, guidance, random keys, dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.errors import UserError
from lavit_jax.inference import compiled, text_generation
from lavit_jax.inference.outputs import TextOutput
from lavit_jax.inference.pipeline import Lavit

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)


def texts_of(outputs):
  return [output.text for output in outputs]


def scores_of(outputs):
  return [output.score for output in outputs]


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


def test_weight_and_cache_dtypes(shallow_folder, shallow_parts, model):
  expected = model.caption_outputs(IMAGES, seed=None)
  for options in (
    dict(weights_dtype='int8'),
    dict(cache_dtype='int8'),
    dict(cache_dtype='bfloat16'),
  ):
    small = Lavit.from_pretrained(shallow_folder, **options)
    scores = scores_of(small.caption_outputs(IMAGES, seed=None))
    assert 0 < np.abs(np.subtract(scores, scores_of(expected))).max() < 0.5, options
    types = {x.dtype.name for x in jax.tree.leaves(small.params['llama'])}
    assert types == ({'int8', 'float32'} if 'weights_dtype' in options else {'float32'})
    assert {x.dtype.name for x in jax.tree.leaves(small.params['vit'])} == {'float32'}
  params = dict(shallow_parts)
  Lavit(model.modules, params, model.tokenizer, weights_dtype='int8').caption(IMAGES)
  assert params['llama']['layers']['mlp']['up']['kernel'].dtype == jnp.float32  # not changed
  with pytest.raises(
    UserError, match='the params of another model have their weights_dtype and mesh'
  ):
    Lavit(model.modules, model.params, model.tokenizer, weights_dtype='int8')
  for options in (dict(weights_dtype='int4'), dict(cache_dtype='float64')):
    with pytest.raises(UserError, match="is not known; choose one of None, .*'int8'"):
      Lavit.from_pretrained(shallow_folder, **options)
