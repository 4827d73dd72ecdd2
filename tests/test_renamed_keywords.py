"""Functions take the old names of their keywords, with a warning."""

import pathlib

import jax
import numpy as np
import pytest

import lavit_jax
from lavit_jax.errors import UserError
from lavit_jax.renamed_keywords import accept_old_keywords
from lavit_jax.weights.store.folder import load_params, save_params
from lavit_jax.weights.torch import api

TINY = pathlib.Path(lavit_jax.__file__).parent / 'assets' / 'tiny'


@accept_old_keywords(part='module')
def read(path, module=None):
  return path, module


def test_an_old_keyword_is_renamed_with_a_warning_at_the_call():
  with pytest.warns(DeprecationWarning, match='part=; use module=') as caught:
    assert read('folder', part='vit') == ('folder', 'vit')
  assert caught[0].filename == __file__
  assert read('folder', module='vit') == read('folder', 'vit') == ('folder', 'vit')


def test_an_old_and_a_new_keyword_for_the_same_are_refused():
  with pytest.raises(UserError, match='part and module are the same; leave part out'):
    read('folder', part='vit', module='vae')


def test_functions_for_pytorch_files_and_folders(tmp_path):
  with pytest.warns(DeprecationWarning, match='part=; use module='):
    params = api.from_torch(TINY, part='vae', variant='tiny')
  with pytest.warns(DeprecationWarning, match='part=; use module='):
    assert api.torch_settings(TINY, part='vae') == api.torch_settings(TINY, 'vae')
  with pytest.warns(DeprecationWarning, match='part=; use module='):
    source = api.open_torch(TINY, part='vae', variant='tiny')
  assert len(source.structs) == len(jax.tree.leaves(params))
  with pytest.warns(DeprecationWarning, match='part=; use module='):
    file = api.to_torch(params, tmp_path / 'vae.safetensors', part='vae', variant='tiny')
  jax.tree.map(np.testing.assert_array_equal, api.from_torch(file, 'vae', variant='tiny'), params)
  with pytest.warns(DeprecationWarning, match='parts=; use params='):
    save_params(tmp_path / 'folder', 'tiny', parts={'vae': params})
  jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path / 'folder')['vae'], params)
