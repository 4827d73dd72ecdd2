"""The exports of several stages as one model."""

import pathlib

import numpy as np
import pytest

import lavit_jax
from lavit_jax.errors import UserError
from lavit_jax.weights.store.bundle import bundle
from lavit_jax.weights.store.folder import load_params, read_config, save_params

TOKENIZER = pathlib.Path(lavit_jax.__file__).parent / 'assets' / 'tiny' / 'language_model'
PARAMS = {
  'vit': {'kernel': np.ones((4, 3), np.float32)},
  'uncond_embeddings': np.ones((1, 4), np.float32),
}


def test_a_module_comes_from_the_last_source(tmp_path):
  first = save_params(tmp_path / 'first', 'tiny', PARAMS, {'stage': 'encoder', 'steps': 1})
  second = save_params(
    tmp_path / 'second',
    'tiny',
    {'vit': {'w': np.ones(2, np.float32)}},
    {'stage': 'encoder', 'steps': 2},
  )
  with pytest.raises(UserError, match='words/tokenizer.json does not exist'):
    bundle(tmp_path / 'model', [first, second], tmp_path / 'words')
  model = bundle(tmp_path / 'model', [first, second], TOKENIZER)
  params = load_params(model)
  assert sorted(params) == ['uncond_embeddings', 'vit'] and list(params['vit']) == ['w']
  assert read_config(model)['metadata']['vit'] == {'stage': 'encoder', 'steps': 2}
  copied = model / 'tokenizer' / 'tokenizer.json'
  assert copied.read_bytes() == (TOKENIZER / 'tokenizer.json').read_bytes()
  other = save_params(tmp_path / 'other', 'small', PARAMS)
  with pytest.raises(UserError, match="holds variant 'small', but 'tiny'"):
    bundle(tmp_path / 'model', [first, other], TOKENIZER)
  with pytest.raises(UserError, match='2048 ids, but the text vocabulary of the model has 32000'):
    bundle(tmp_path / 'model', [other], TOKENIZER)
