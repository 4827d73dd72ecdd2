"""Weights folders in a store, here fsspec's in memory, which renames and locks nothing."""

import chex
import fsspec
import numpy as np
import pytest

from lavit_jax import cli
from lavit_jax.data import paths
from lavit_jax.errors import Unreachable, UserError
from lavit_jax.inference import pipeline
from lavit_jax.inference.pipeline import Lavit
from lavit_jax.training import parameters
from lavit_jax.training.stages.base import ModuleNames
from lavit_jax.weights.store import remote
from lavit_jax.weights.store.folder import load_params, save_params
from lavit_jax.weights.store.metadata import read_config

MEMORY = fsspec.filesystem('memory')
URL = 'memory://bucket/run/export'
PARAMS = {name: {'a': np.full((2, 3), n, np.float32)} for n, name in enumerate(('vit', 'llama'))}


@pytest.fixture(autouse=True)
def empty_store():
  yield
  MEMORY.store.clear()


@pytest.fixture
def start():
  """The URL of a checkpoint."""
  with remote.target('memory://bucket/start') as path:
    save_params(path, 'tiny', PARAMS)
  return 'memory://bucket/start'


@pytest.fixture
def transfers(monkeypatch):
  """The names of the objects that are written and removed, in their order."""
  names = []
  for method in ('put_file', 'rm_file'):
    original = getattr(type(MEMORY), method)

    def call(self, *args, original=original, method=method):
      names.append((method[:3].rstrip('_'), args[-1].rpartition('/')[2]))
      return original(self, *args)

    monkeypatch.setattr(type(MEMORY), method, call)
  return names


def test_what_is_written_to_a_store_comes_back(tmp_path):
  with remote.target(URL) as path:
    save_params(path, 'tiny', PARAMS, {'steps': 7})
  copy = remote.fetch(URL)
  assert read_config(copy)['metadata'] == {'steps': 7}
  loaded = load_params(copy)
  for name, tree in PARAMS.items():
    np.testing.assert_array_equal(loaded[name]['a'], tree['a'])
  assert remote.fetch(str(tmp_path)) == str(tmp_path)
  with remote.target(str(tmp_path)) as path:
    assert path == str(tmp_path)


def test_the_mark_is_removed_first_and_written_last(transfers):
  with remote.target(URL) as path:
    save_params(path, 'tiny', PARAMS)
  assert transfers[-2:] == [('put', 'config.json'), ('rm', '.unfinished')]
  transfers.clear()
  with remote.target(URL) as path:
    save_params(path, 'tiny', {'vit': PARAMS['vit']})
  written = [name for method, name in transfers if method == 'put']
  assert transfers[0] == ('rm', 'config.json') and written[-1] == 'config.json'
  assert read_config(remote.fetch(URL))['parts'].keys() == {'vit'}
  assert not any('llama' in name for name in MEMORY.find('/bucket'))


def test_a_copy_that_was_cut_short_is_no_checkpoint(monkeypatch):
  put = type(MEMORY).put_file

  def fail(self, local, path, **options):
    if path.endswith('/config.json'):
      raise OSError('connection reset')
    put(self, local, path, **options)

  with monkeypatch.context() as patch:
    patch.setattr(paths, '_WAITS', (0.0,))
    patch.setattr(type(MEMORY), 'put_file', fail)
    with pytest.raises(Unreachable, match=r'cannot be written \(connection reset; tried 2 times'):
      with remote.target(URL) as path:
        save_params(path, 'tiny', PARAMS)
  with pytest.raises(UserError, match='is not a lavit_jax checkpoint'):
    read_config(remote.fetch(URL))
  with remote.target(URL, replaces=False) as path:  # the same command again
    save_params(path, 'tiny', {'vit': PARAMS['vit']})
  assert load_params(remote.fetch(URL)).keys() == {'vit'}
  assert not any(name.endswith(('.unfinished', 'llama')) for name in MEMORY.find('/bucket'))


def test_what_else_is_there_stays():
  MEMORY.pipe_file(f'{URL}/notes', b'mine')
  with pytest.raises(UserError, match='has other files .notes.; choose another address'):
    with remote.target(URL):
      pass


def test_nothing_is_copied_after_an_error():
  with pytest.raises(ZeroDivisionError):
    with remote.target(URL) as path:
      save_params(path, 'tiny', PARAMS)
      raise ZeroDivisionError
  assert not MEMORY.store
  with pytest.raises(UserError, match='memory://bucket/run/export has no files'):
    remote.fetch(URL)


def test_training_copies_only_the_modules_that_its_stage_reads(start):
  modules = ModuleNames(needs=('vit',), takes=('unet',))
  (path,) = parameters.split_folders(start, modules)
  (found,) = parameters.find_modules(modules, [path], [])
  assert found.modules == ('vit',)
  assert load_params(path, found.modules)['vit']['a'].shape == (2, 3)
  with pytest.raises(UserError, match=r'llama is missing'):
    load_params(path, ['llama'])


def test_commands_read_and_write_stores(start, capsys):
  assert cli.main(['inspect', start]) == 0
  assert 'llama' in capsys.readouterr().out
  assert cli.main(['bundle', start, '--dtype', 'float32', '--out', URL]) == 0
  assert capsys.readouterr().out == f'{URL}\n'
  loaded = load_params(remote.fetch(URL))
  np.testing.assert_array_equal(loaded['llama']['a'], PARAMS['llama']['a'])
  assert cli.main(['convert', '--src', start, '--dst', URL])
  assert f'{URL} exists; choose another place, or --force' in capsys.readouterr().err


def test_a_model_in_a_store_is_opened(monkeypatch, start):
  monkeypatch.setattr(remote, 'fetch', lambda url: {start: 'copy'}[url])
  opened = []

  def open_folder(folder, variant):
    opened.append(folder)
    raise UserError('enough')

  monkeypatch.setattr(pipeline, 'open_checkpoint', open_folder)
  with pytest.raises(UserError, match='enough'):
    Lavit.from_pretrained(start)
  assert cli.main(['caption', 'x.png', '--folder', start])
  assert opened == ['copy', 'copy']


@pytest.mark.slow
def test_convert_there_and_back(shallow_folder, capsys):
  assert cli.main(['convert', '--src', str(shallow_folder), '--dst', URL]) == 0
  assert cli.main(['convert', '--src', URL, '--dst', 'memory://bucket/again']) == 0
  again = load_params(remote.fetch('memory://bucket/again'))
  chex.assert_trees_all_equal(again, load_params(shallow_folder))
  assert 'found right' in capsys.readouterr().out
