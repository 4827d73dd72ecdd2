"""Options of the language model: defaults as published; a value that is not allowed is named."""

import dataclasses
import math

import numpy as np
import pytest

from lavit_jax.errors import UserError
from lavit_jax.inference.generation_config import (
  GenerationConfig,
  GenerationOptions,
  VariantDefaults,
  resolve_generation_config,
)

TEXT = GenerationConfig(8, 36, num_beams=2)
CODES = GenerationConfig(20, 200, do_sample=True, guidance_scale=4.0)


def test_options_replace_defaults():
  assert resolve_generation_config(TEXT, {}, 2048) == TEXT
  assert resolve_generation_config(CODES, {}, 256) == CODES
  options = dict(do_sample=True, top_p=0.9)
  sampled = GenerationConfig(8, 36, do_sample=True, top_p=0.9)
  assert resolve_generation_config(TEXT, options, 2048) == sampled
  options = dict(do_sample=False, num_beams=np.int64(5), length_penalty=-1, early_stopping='never')
  searched = GenerationConfig(8, 36, num_beams=5, length_penalty=-1, early_stopping='never')
  assert resolve_generation_config(TEXT, options, 2048) == searched
  options = dict(top_k=None, temperature=np.float32(0.5), max_new_tokens=50)
  expected = dataclasses.replace(CODES, max_new_tokens=50, temperature=0.5, top_k=None)
  assert resolve_generation_config(CODES, options, 256) == expected


def test_neutral_values_turn_options_off():
  options = dict(top_p=1.0, repetition_penalty=1, guidance_scale=1)
  expected = dataclasses.replace(CODES, guidance_scale=None)
  assert resolve_generation_config(CODES, options, 256) == expected


def test_equal_numbers_have_one_type():
  options = dict(length_penalty=-1, num_beams=np.int64(3))
  config = resolve_generation_config(TEXT, options, 2048)
  assert type(config.length_penalty) is float  # so that they compile one program
  assert type(config.num_beams) is int


def test_defaults_are_those_published():
  published = VariantDefaults()
  assert published.caption_tokens == (8, 36)
  assert published.answer_tokens == (2, 10)
  assert published.image_tokens == (20, 200)


def test_option_types_have_all_fields():
  fields = {field.name for field in dataclasses.fields(GenerationConfig)}
  assert set(GenerationOptions.__annotations__) == fields - {'guidance_scale'}


INVALID = {
  'min_new_tokens': (-1, 1.5, None),
  'max_new_tokens': (0, None, 5, 9999),
  'num_beams': (0, -1, 2.5, None, '3'),
  'length_penalty': ('1', math.nan),
  'early_stopping': ('soon', 2),
  'temperature': (0, -1, math.nan, math.inf, None, '1'),
  'top_k': (0, -1, 2.5),
  'top_p': (0, 1.1, -1, 'x'),
  'repetition_penalty': (0, -2, math.inf),
  'num_return_sequences': (0, None, 1.5),
}


@pytest.mark.parametrize('name, values', INVALID.items())
def test_invalid_values_of_text(name, values):
  sampling = dict(do_sample=True) if name in ('temperature', 'top_k', 'top_p') else {}
  for value in values:
    with pytest.raises(UserError, match=name):
      resolve_generation_config(TEXT, {name: value, **sampling}, 2048)


@pytest.mark.parametrize(
  'name, values', (INVALID | {'guidance_scale': (-1, True, math.nan, 'much')}).items()
)
def test_invalid_values_of_codes(name, values):
  if name in ('num_beams', 'length_penalty', 'early_stopping'):
    return
  for value in values:
    with pytest.raises(UserError, match=name):
      resolve_generation_config(CODES, {name: value}, 2048)


def test_do_sample_is_a_boolean():
  with pytest.raises(UserError, match="do_sample='yes' is not allowed; choose True or False"):
    resolve_generation_config(TEXT, dict(do_sample='yes'), 2048)


def test_options_without_effect():
  for defaults, options in (
    (TEXT, dict(temperature=2.0)),
    (TEXT, dict(top_k=5)),
    (TEXT, dict(do_sample=True, num_beams=3)),
    (CODES, dict(num_beams=3)),
  ):
    with pytest.raises(UserError, match='has no effect'):
      resolve_generation_config(defaults, options, 2048)
  with pytest.raises(UserError, match='num_return_sequences=3 of num_beams=2'):
    resolve_generation_config(TEXT, dict(num_return_sequences=3), 2048)


def test_unknown_options():
  for defaults, name in ((TEXT, 'guidance_scale'), (TEXT, 'size'), (CODES, 'do_sample')):
    with pytest.raises(UserError, match=f'no such option: {name}; choose among min_new_tokens, '):
      resolve_generation_config(defaults, {name: 1}, 2048)
  with pytest.raises(UserError, match='no such option: temperatur; did you mean temperature?'):
    resolve_generation_config(TEXT, dict(temperatur=1), 2048)


def test_fewest_and_most_tokens_in_order():
  with pytest.raises(
    UserError,
    match='min_new_tokens=20 with max_new_tokens=5 is not allowed; '
    'choose min_new_tokens <= max_new_tokens <= 64',
  ):
    resolve_generation_config(CODES, dict(max_new_tokens=5), 64)
