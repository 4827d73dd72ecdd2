"""Our checkpoint folders: what is saved is loaded, and what is damaged is named."""

import errno
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from lavit_jax.errors import UserError
from lavit_jax.weights.store.folder import load_params, read_config, save_params
from lavit_jax.weights.store.writer import ModuleWriter

PARAMS = {
  'vit': {
    'blocks': {'kernel': np.linspace(-1, 1, 1200, dtype=np.float32).reshape(40, 30)},
    'ids': np.arange(3, dtype=np.int32),
  },
  'uncond_embeddings': np.ones((1, 4), np.float32),
}
KERNEL = PARAMS['vit']['blocks']['kernel']


def test_float32_is_exact(tmp_path):
  save_params(tmp_path / 'model', 'tiny', PARAMS, {'step': 7})
  params = load_params(tmp_path / 'model', variant='tiny')
  np.testing.assert_array_equal(params['vit']['blocks']['kernel'], KERNEL)
  np.testing.assert_array_equal(params['uncond_embeddings'], PARAMS['uncond_embeddings'])
  modes = {path.stat().st_mode & 0o044 for path in (tmp_path / 'model').rglob('*')}
  assert modes == {0o044}  # readable by anyone
  config = read_config(tmp_path / 'model')
  assert config['metadata'] == {'step': 7} and config['parts']['vit']['parameters'] == 1203


def test_bfloat16_rounds_once_and_integers_stay(tmp_path):
  save_params(tmp_path / 'model', 'tiny', PARAMS, dtype='bfloat16')
  # Plain Orbax reads it.
  stored = ocp.PyTreeCheckpointer().restore(tmp_path / 'model' / 'parts' / 'vit')
  assert stored['blocks']['kernel'].dtype == ml_dtypes.bfloat16 and stored['ids'].dtype == np.int32
  kernel = load_params(tmp_path / 'model', ['vit'])['vit']['blocks']['kernel']
  np.testing.assert_array_equal(kernel, KERNEL.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_a_second_save_replaces_the_first(tmp_path):
  save_params(tmp_path / 'model', 'tiny', PARAMS)
  save_params(tmp_path / 'model', 'tiny', {'vae': {'w': np.zeros(2, np.float32)}})
  names = sorted(path.name for path in (tmp_path / 'model').iterdir())
  assert names == ['checksums.json', 'config.json', 'parts']
  assert [path.name for path in tmp_path.iterdir()] == ['model']


@pytest.mark.parametrize(
  'error',
  [
    OSError(errno.ENOSPC, 'No space left on device'),
    ValueError('...: No space left on device [...]'),
  ],
)
def test_a_full_disk_leaves_the_old_folder_and_nothing_else(tmp_path, monkeypatch, error):
  save_params(tmp_path / 'model', 'tiny', PARAMS)

  def write(*_):
    raise error

  monkeypatch.setattr(ModuleWriter, 'write', write)
  with pytest.raises(UserError, match='No space left on device'):
    save_params(tmp_path / 'model', 'tiny', PARAMS)
  assert [path.name for path in tmp_path.iterdir()] == ['model']
  assert set(read_config(tmp_path / 'model')['parts']) == set(PARAMS)


def test_modules_go_directly_to_a_mesh(tmp_path):
  save_params(tmp_path / 'model', 'tiny', PARAMS, dtype='bfloat16')
  sharding = SingleDeviceSharding(jax.devices()[-1])
  trees = []

  def shardings(tree):
    trees.append(tree)
    return jax.tree.map(lambda _: sharding, tree)

  params = load_params(tmp_path / 'model', shardings=shardings)
  host = load_params(tmp_path / 'model')
  assert jax.tree.structure(params) == jax.tree.structure(host) == jax.tree.structure(PARAMS)
  jax.tree.map(np.testing.assert_array_equal, params, host)
  assert {(x.sharding, x.dtype) for x in jax.tree.leaves(params)} == {
    (sharding, np.dtype('float32')),
    (sharding, np.dtype('int32')),
  }
  assert [list(tree) for tree in trees] == [['vit'], ['uncond_embeddings']]


def test_a_path_may_have_dots(tmp_path, monkeypatch):
  save_params(tmp_path / 'model', 'tiny', {'vae': {'kernel': np.arange(6.0)}})
  (tmp_path / 'runs').mkdir()
  monkeypatch.chdir(tmp_path / 'runs')
  assert load_params('../model')['vae']['kernel'].tolist() == list(range(6))
  sharding = NamedSharding(jax.make_mesh((1,), ('x',)), PartitionSpec())

  def shardings(tree):
    return jax.tree.map(lambda _: sharding, tree)

  params = load_params('../model', shardings=shardings)
  assert params['vae']['kernel'].tolist() == list(range(6))


def test_other_folders_are_never_replaced(tmp_path, monkeypatch):
  (tmp_path / 'runs' / 'encoder').mkdir(parents=True)
  (tmp_path / 'notes').write_text('mine')
  (tmp_path / 'theirs').mkdir()
  (tmp_path / 'theirs' / 'config.json').write_text('{"model_type": "llama"}')
  for name, message in (
    ('runs', 'is not a checkpoint of'),
    ('notes', 'is not a checkpoint of'),
    ('theirs', 'not a lavit_jax checkpoint'),
  ):
    with pytest.raises(UserError, match=message):
      save_params(tmp_path / name, 'tiny', PARAMS)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['notes', 'runs', 'theirs']
  assert (tmp_path / 'runs' / 'encoder').is_dir()
  (tmp_path / 'here').mkdir()
  monkeypatch.chdir(tmp_path / 'here')
  save_params('.', 'tiny', PARAMS)  # empty: nothing is lost
  (tmp_path / 'link').symlink_to(tmp_path / 'here')
  save_params(tmp_path / 'link', 'small', PARAMS)
  assert (tmp_path / 'link').is_symlink() and read_config(tmp_path / 'here')['variant'] == 'small'


def test_damage_is_named(tmp_path):
  folder = save_params(tmp_path / 'model', 'tiny', PARAMS)
  with pytest.raises(UserError, match="holds variant 'tiny', but 'lavit_7b'"):
    load_params(folder, variant='lavit_7b')
  with pytest.raises(UserError, match="no module 'llama'; it holds vit, uncond_embeddings"):
    load_params(folder, ['llama'])
  data = max((folder / 'parts' / 'vit').rglob('*/d/*'), key=lambda path: path.stat().st_size)
  content = data.read_bytes()
  position = content.index(KERNEL.tobytes())
  flipped = bytes([content[position] ^ 1])
  data.write_bytes(content[:position] + flipped + content[position + 1 :])
  with pytest.raises(
    UserError,
    match='model/parts/vit is truncated or damaged .the checksum of blocks/kernel is another',
  ):
    load_params(folder, ['vit'])
  data.write_bytes(content[:1000])
  with pytest.raises(UserError, match='model/parts/vit is truncated or damaged'):
    load_params(folder, ['vit'])
  shutil.rmtree(folder / 'parts' / 'vit')
  with pytest.raises(UserError, match='model/parts/vit is missing'):
    load_params(folder)
  (folder / 'checksums.json').write_text('{}')
  with pytest.raises(UserError, match='checksums.json is missing or damaged'):
    load_params(folder, ['uncond_embeddings'])
  for config in (
    {'format': 99, 'variant': 'tiny', 'parts': {}, 'metadata': {}},
    {'format': 2, 'parts': {}},
  ):
    (folder / 'config.json').write_text(json.dumps(config))
    with pytest.raises(UserError, match='format 2'):
      load_params(folder)
  with pytest.raises(UserError, match='config.json is missing'):
    load_params(tmp_path / 'nowhere')
