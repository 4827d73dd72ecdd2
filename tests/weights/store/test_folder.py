"""Our own folder of weights: what goes in comes out, and what is damaged is named."""

import errno
import json
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

import lavit_jax
from lavit_jax.errors import UserError
from lavit_jax.weights.store import arrays as leaves
from lavit_jax.weights.store import disk
from lavit_jax.weights.store.folder import bundle, load_params, read_config, save_params

WORDS = pathlib.Path(lavit_jax.__file__).parent / 'assets' / 'tiny' / 'language_model'
PARTS = {
  'vit': {
    'blocks': {'kernel': np.linspace(-1, 1, 1200, dtype=np.float32).reshape(40, 30)},
    'ids': np.arange(3, dtype=np.int32),
  },
  'uncond_embeddings': np.ones((1, 4), np.float32),
}


def test_float32_comes_back_as_it_was(tmp_path):
  save_params(tmp_path / 'model', 'tiny', PARTS, {'step': 7})
  parts = load_params(tmp_path / 'model', variant='tiny')
  np.testing.assert_array_equal(parts['vit']['blocks']['kernel'], PARTS['vit']['blocks']['kernel'])
  np.testing.assert_array_equal(parts['uncond_embeddings'], PARTS['uncond_embeddings'])
  assert {x.stat().st_mode & 0o044 for x in (tmp_path / 'model').rglob('*')} == {
    0o044
  }  # anyone may read them
  config = read_config(tmp_path / 'model')
  assert config['metadata'] == {'step': 7} and config['parts']['vit']['parameters'] == 1203


def test_bfloat16_rounds_once_and_integers_stay(tmp_path):
  save_params(tmp_path / 'model', 'tiny', PARTS, dtype='bfloat16')
  stored = ocp.PyTreeCheckpointer().restore(
    tmp_path / 'model' / 'parts' / 'vit'
  )  # anyone's Orbax reads it
  assert stored['blocks']['kernel'].dtype == ml_dtypes.bfloat16 and stored['ids'].dtype == np.int32
  kernel = load_params(tmp_path / 'model', ['vit'])['vit']['blocks']['kernel']
  np.testing.assert_array_equal(
    kernel, PARTS['vit']['blocks']['kernel'].astype(ml_dtypes.bfloat16).astype(np.float32)
  )


def test_a_second_save_replaces_the_first(tmp_path):
  save_params(tmp_path / 'model', 'tiny', PARTS)
  save_params(tmp_path / 'model', 'tiny', {'vae': {'w': np.zeros(2, np.float32)}})
  assert sorted(x.name for x in (tmp_path / 'model').iterdir()) == [
    'checksums.json',
    'config.json',
    'parts',
  ]
  assert [x.name for x in tmp_path.iterdir()] == ['model']


@pytest.mark.parametrize(
  'error',
  [
    OSError(errno.ENOSPC, 'No space left on device'),
    ValueError('...: No space left on device [...]'),
  ],
)
def test_full_disk_leaves_the_old_folder_and_nothing_else(tmp_path, monkeypatch, error):
  save_params(tmp_path / 'model', 'tiny', PARTS)

  def full(*_):
    raise error

  monkeypatch.setattr(leaves.Writer, 'write', full)
  with pytest.raises(UserError, match='No space left on device'):
    save_params(tmp_path / 'model', 'tiny', PARTS)
  assert [x.name for x in tmp_path.iterdir()] == ['model']
  assert set(read_config(tmp_path / 'model')['parts']) == set(PARTS)


def test_leaves_come_in_any_order_and_as_large_as_they_like(tmp_path, monkeypatch):
  for module, name in ((leaves, 'SMALL_BYTES'), (leaves, 'CHUNK_BYTES'), (disk, 'FLUSH_BYTES')):
    monkeypatch.setattr(module, name, 64)
  rng = np.random.default_rng(0)
  arrays = {
    'layers/kernel': rng.normal(size=(5, 6, 7)).astype(ml_dtypes.bfloat16),
    'layers/scale': rng.normal(size=(5, 3)).astype(np.float32),
    'table': rng.normal(size=(40, 3)).astype(np.float16),
    'step': np.array(3, np.int64),
  }
  stacked = ('layers/kernel', 'layers/scale')
  with leaves.Writer(tmp_path / 'part', arrays, stacked) as writer:
    for row in (3, 0, 4, 1, 2):
      for path in stacked:
        writer.write(path, row, arrays[path][row])
    for path in ('table', 'step'):
      writer.write(path, None, arrays[path])
  restored = leaves.flatten(ocp.PyTreeCheckpointer().restore(tmp_path / 'part'))
  for path, store in leaves.open_leaves(tmp_path / 'part', arrays).items():
    array = store.read().result()
    assert array.dtype == arrays[path].dtype == restored[path].dtype
    np.testing.assert_array_equal(array, arrays[path])
    np.testing.assert_array_equal(restored[path], arrays[path])
    assert (
      leaves.checksum(array) == writer.sums[path] != leaves.checksum(array + array.dtype.type(1))
    )


def test_a_part_with_a_slice_missing_is_no_part(tmp_path):
  with pytest.raises(ValueError, match='never written: b'):
    with leaves.Writer(tmp_path / 'part', dict(a=np.zeros(2), b=np.zeros((2, 3))), ['b']) as writer:
      writer.write('a', None, np.zeros(2))
      writer.write('b', 1, np.zeros(3))
  assert not (tmp_path / 'part').exists()


def test_parts_go_straight_onto_a_mesh(tmp_path):
  save_params(tmp_path / 'model', 'tiny', PARTS, dtype='bfloat16')
  place = jax.sharding.SingleDeviceSharding(jax.devices()[-1])
  seen = []

  def shardings(tree):
    seen.append(tree)
    return jax.tree.map(lambda _: place, tree)

  parts = load_params(tmp_path / 'model', shardings=shardings)
  host = load_params(tmp_path / 'model')
  assert jax.tree.structure(parts) == jax.tree.structure(host) == jax.tree.structure(PARTS)
  jax.tree.map(np.testing.assert_array_equal, parts, host)
  assert {(x.sharding, x.dtype) for x in jax.tree.leaves(parts)} == {
    (place, np.dtype('float32')),
    (place, np.dtype('int32')),
  }
  assert [list(tree) for tree in seen] == [['vit'], ['uncond_embeddings']]


def test_a_folder_may_be_named_by_a_way_around(tmp_path, monkeypatch):
  save_params(tmp_path / 'model', 'tiny', {'vae': {'kernel': np.arange(6.0)}})
  (tmp_path / 'runs').mkdir()
  monkeypatch.chdir(tmp_path / 'runs')
  assert load_params('../model')['vae']['kernel'].tolist() == list(range(6))
  mesh = jax.make_mesh((1,), ('x',))
  places = lambda tree: jax.tree.map(
    lambda _: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()), tree
  )  # noqa: E731
  assert load_params('../model', shardings=places)['vae']['kernel'].tolist() == list(range(6))


def test_what_is_no_checkpoint_is_left_alone(tmp_path, monkeypatch):
  (tmp_path / 'runs' / 'encoder').mkdir(parents=True)
  (tmp_path / 'notes').write_text('mine')
  (tmp_path / 'theirs').mkdir()
  (tmp_path / 'theirs' / 'config.json').write_text('{"model_type": "llama"}')
  for name, fault in (
    ('runs', 'is not a checkpoint of'),
    ('notes', 'is not a checkpoint of'),
    ('theirs', 'not a lavit_jax checkpoint'),
  ):
    with pytest.raises(UserError, match=fault):
      save_params(tmp_path / name, 'tiny', PARTS)
  assert (
    sorted(x.name for x in tmp_path.iterdir()) == ['notes', 'runs', 'theirs']
    and (tmp_path / 'runs' / 'encoder').is_dir()
  )
  (tmp_path / 'here').mkdir()
  monkeypatch.chdir(tmp_path / 'here')
  save_params('.', 'tiny', PARTS)  # empty: nothing is lost
  (tmp_path / 'link').symlink_to(tmp_path / 'here')
  save_params(tmp_path / 'link', 'small', PARTS)
  assert (tmp_path / 'link').is_symlink() and read_config(tmp_path / 'here')['variant'] == 'small'


def test_damage_is_named(tmp_path):
  folder = save_params(tmp_path / 'model', 'tiny', PARTS)
  with pytest.raises(UserError, match="holds variant 'tiny', but 'lavit_7b'"):
    load_params(folder, variant='lavit_7b')
  with pytest.raises(UserError, match="no part 'llama'; it holds vit, uncond_embeddings"):
    load_params(folder, ['llama'])
  data = max((folder / 'parts' / 'vit').rglob('*/d/*'), key=lambda x: x.stat().st_size)
  content = data.read_bytes()
  at = content.index(PARTS['vit']['blocks']['kernel'].tobytes())
  data.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
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


def test_bundle_takes_the_last_of_each_part_and_the_words(tmp_path):
  first = save_params(tmp_path / 'first', 'tiny', PARTS, {'stage': 'encoder', 'steps': 1})
  second = save_params(
    tmp_path / 'second',
    'tiny',
    {'vit': {'w': np.ones(2, np.float32)}},
    {'stage': 'encoder', 'steps': 2},
  )
  with pytest.raises(UserError, match='words/tokenizer.json does not exist'):
    bundle(tmp_path / 'model', [first, second], tmp_path / 'words')
  model = bundle(tmp_path / 'model', [first, second], WORDS)
  assert sorted(load_params(model)) == ['uncond_embeddings', 'vit'] and list(
    load_params(model)['vit']
  ) == ['w']
  assert read_config(model)['metadata']['vit'] == {'stage': 'encoder', 'steps': 2}
  assert (model / 'tokenizer' / 'tokenizer.json').read_bytes() == (
    WORDS / 'tokenizer.json'
  ).read_bytes()
  other = save_params(tmp_path / 'other', 'small', PARTS)
  with pytest.raises(UserError, match="holds variant 'small', but 'tiny'"):
    bundle(tmp_path / 'model', [first, other], WORDS)
  with pytest.raises(UserError, match='2048 ids, but the text vocabulary of the model has 32000'):
    bundle(tmp_path / 'model', [other], WORDS)
