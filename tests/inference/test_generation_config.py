"""What may be asked of the language model: defaults as published, and every value that cannot be is told by name."""

import math

import jax
import numpy as np
import pytest

from lavit_jax.errors import UserError
from lavit_jax.inference.generation_config import (
  GenerationConfig,
  IndexedSeed,
  Purpose,
  VariantDefaults,
  example_keys,
  purpose_keys,
  resolve_generation_config,
  sample_keys,
)

WORDS, CODES = GenerationConfig(8, 36, beams=2), GenerationConfig(20, 200, guidance=4.0)


def test_what_is_asked_for():
  assert (
    resolve_generation_config(WORDS, {}, 2048) == WORDS
    and resolve_generation_config(CODES, {}, 256) == CODES
  )
  assert resolve_generation_config(WORDS, dict(sample=True, top_p=0.9), 2048) == GenerationConfig(
    8, 36, top_p=0.9
  )
  assert resolve_generation_config(
    WORDS, dict(sample=False, beams=np.int64(5), length_penalty=-1, early_stopping='never'), 2048
  ) == GenerationConfig(8, 36, 5, -1, 'never')
  assert resolve_generation_config(
    CODES, dict(top_k=None, temperature=np.float32(0.5), max_tokens=50), 256
  ) == GenerationConfig(20, 50, temperature=0.5, top_k=None, guidance=4.0)
  assert resolve_generation_config(
    CODES, dict(top_p=1.0, repetition_penalty=1, guidance=1), 256
  ) == CODES._replace(guidance=None)  # off, and costs nothing
  kinds = {
    name: type(value)
    for name, value in resolve_generation_config(
      WORDS, dict(length_penalty=-1, beams=np.int64(3)), 2048
    )
    ._asdict()
    .items()
  }
  assert (
    kinds['length_penalty'] is float and kinds['beams'] is int
  )  # one program, whatever number was written
  published = VariantDefaults()
  assert (published.caption_tokens, published.answer_tokens, published.image_tokens) == (
    (8, 36),
    (2, 10),
    (20, 200),
  )


@pytest.mark.parametrize('task', [WORDS, CODES])
@pytest.mark.parametrize(
  'name, values',
  [
    ('min_tokens', (-1, 1.5, None)),
    ('max_tokens', (0, None, 5, 9999)),
    ('beams', (0, -1, 2.5, None, '3')),
    ('length_penalty', ('1', math.nan)),
    ('early_stopping', ('soon', 2)),
    ('temperature', (0, -1, math.nan, math.inf, None, '1')),
    ('top_k', (0, -1, 2.5)),
    ('top_p', (0, 1.1, -1, 'x')),
    ('repetition_penalty', (0, -2, math.inf)),
    ('num_samples', (0, None, 1.5)),
    ('guidance', (-1, True, math.nan, 'much')),
  ],
)
def test_values_that_cannot_be(task, name, values):
  of_search, of_sampling = (
    ('beams', 'length_penalty', 'early_stopping'),
    ('temperature', 'top_k', 'top_p', 'guidance'),
  )
  if name in (of_search if task is CODES else of_sampling[3:]):
    return
  sample = dict(sample=True) if task is WORDS and name in of_sampling else {}
  for value in values:
    with pytest.raises(UserError, match=name):
      resolve_generation_config(task, {name: value, **sample}, 2048)


def test_settings_that_would_play_no_part():
  for task, asked in (
    (WORDS, dict(temperature=2.0)),
    (WORDS, dict(top_k=5)),
    (WORDS, dict(sample=True, beams=3)),
    (CODES, dict(beams=3)),
  ):
    with pytest.raises(UserError, match='plays no part'):
      resolve_generation_config(task, asked, 2048)
  with pytest.raises(UserError, match='num_samples=3 of 2 beams'):
    resolve_generation_config(WORDS, dict(num_samples=3), 2048)
  for task, name in ((WORDS, 'guidance'), (WORDS, 'size'), (CODES, 'sample')):
    with pytest.raises(UserError, match=f'no such setting: {name}; choose among min_tokens, '):
      resolve_generation_config(task, {name: 1}, 2048)


def test_the_fewest_and_the_most_are_told_by_name():
  with pytest.raises(
    UserError,
    match='min_tokens=20 to max_tokens=5 cannot be; choose min_tokens and max_tokens in order, and at most 64',
  ):
    resolve_generation_config(CODES, dict(max_tokens=5), 64)


@pytest.mark.parametrize(
  'seed', [-1, 2**32, 1.5, '1', True, [0, -1], [0, 0.5], [0, None], IndexedSeed(-1, [0, 1])]
)
def test_seeds_that_cannot_be(seed):
  with pytest.raises(UserError, match=r'seed=.* cannot be; choose a whole number in 0..4294967295'):
    example_keys(seed, 2)


def test_seeds_of_any_integer_type():
  data = jax.random.key_data(example_keys(3, 2))
  for seed in (np.int64(3), np.array(3), jax.numpy.int32(3)):
    np.testing.assert_array_equal(jax.random.key_data(example_keys(seed, 2)), data)
  assert example_keys(2**32 - 1, 2).shape == (2,) and example_keys(0, 0).shape == example_keys(
    [], 0
  ).shape == (0,)


def test_keys_follow_the_row_and_differ_by_purpose():
  data = jax.random.key_data
  keys = example_keys(3, 4)
  np.testing.assert_array_equal(
    data(example_keys(IndexedSeed(3, [2, 0]), 2)), data(keys)[np.array([2, 0])]
  )
  several = [sample_keys(purpose, keys, 3) for purpose in Purpose]
  every = np.concatenate([data(each) for each in several])
  assert len(np.unique(every, axis=0)) == len(every) == 36
  np.testing.assert_array_equal(
    data(several[1]).reshape(4, 3, -1)[:, 0], data(sample_keys(Purpose.TOKENS, keys, 1))
  )
  np.testing.assert_array_equal(
    data(several[0]).reshape(4, 3, -1)[:, 2], data(purpose_keys(Purpose.PATCHES, keys, 2))
  )
  assert (
    purpose_keys(Purpose.PATCHES, None) is None and example_keys(None, 4, optional=True) is None
  )
