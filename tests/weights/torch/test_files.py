"""Weight files of each format: reading, writing, digests, and damaged or dangerous ones."""

import hashlib
import json
import os
import pathlib
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from tensors import save_tensors

from lavit_jax.errors import UserError
from lavit_jax.weights.torch import digests, files, pickle_files
from lavit_jax.weights.torch.digests import FileDigests, sha256
from lavit_jax.weights.torch.pickle_files import write_pickle
from lavit_jax.weights.torch.safetensors_files import SafetensorsWriter


def state():
  """Arrays of several types and sizes."""
  rng = np.random.default_rng(0)
  return {
    'c.weight': rng.normal(size=(6, 4)).astype(np.float32),
    'a.weight': rng.normal(size=(5, 4)).astype(ml_dtypes.bfloat16),
    'b.bias': rng.normal(size=6).astype(np.float16),
    'ids': np.arange(7),
    'scale': np.array(2.5, np.float32),
  }


def assert_same(tensors, expected):
  assert tensors.keys() == expected.keys()
  for name, array in expected.items():
    read = np.asarray(tensors[name])
    assert tensors[name].shape == read.shape == array.shape
    assert tensors[name].dtype == read.dtype == array.dtype
    assert np.array_equal(read, array)


def write(folder, stem, arrays, **kwargs):
  with SafetensorsWriter(folder, stem, arrays, **kwargs) as writer:
    for name in reversed(arrays):  # in any order
      writer.write(name, arrays[name])
  return writer


def test_written_files_are_what_safetensors_reads(tmp_path):
  arrays = state()
  writer = write(tmp_path, 'model', arrays)
  assert writer.files == [tmp_path / 'model.safetensors'] and sorted(writer.sums) == sorted(arrays)
  assert_same(load_file(tmp_path / 'model.safetensors'), arrays)
  assert_same(files.load(tmp_path), arrays)
  assert list(files.load(tmp_path)) == list(arrays)


def test_shards_with_their_index(tmp_path):
  arrays = state()
  writer = write(tmp_path, 'model', arrays, shard_bytes=100)
  assert [file.name for file in writer.files] == [
    f'model-0000{n}-of-00003.safetensors' for n in (1, 2, 3)
  ]
  index = json.loads((tmp_path / 'model.safetensors.index.json').read_text())
  assert index['metadata']['total_size'] == sum(x.nbytes for x in arrays.values())
  assert_same(files.load(tmp_path), arrays)
  save_tensors({'visual': np.ones(2)}, tmp_path / 'visual_weight.safetensors')
  assert_same(files.load(tmp_path, 'model'), arrays)
  writer.files[1].unlink()
  with pytest.raises(
    UserError,
    match='lacks model-00002-of-00003.safetensors, which model.safetensors.index.json names',
  ):
    files.load(tmp_path)


def test_announced_tensors_must_be_written(tmp_path):
  with pytest.raises(ValueError, match='never written: ids'):
    with SafetensorsWriter(tmp_path, 'model', {'ids': np.arange(3), 'x': np.ones(2)}) as writer:
      writer.write('x', np.ones(2))
  with pytest.raises(ValueError, match='announced was'):
    with SafetensorsWriter(tmp_path, 'model', {'x': np.ones(2)}) as writer:
      writer.write('x', np.ones(2, np.float32))


def test_pickles_in_and_out(tmp_path):
  torch = pytest.importorskip('torch')
  arrays = state()
  write_pickle(tmp_path / 'm.bin', arrays)
  loaded = torch.load(tmp_path / 'm.bin', weights_only=True)
  assert loaded['a.weight'].dtype == torch.bfloat16 and loaded['ids'].tolist() == list(range(7))
  assert_same(files.load(tmp_path / 'm.bin'), arrays)
  torch.save({k: v.float().T for k, v in loaded.items() if v.ndim == 2}, tmp_path / 'strided.pt')
  assert np.array_equal(
    np.asarray(files.load(tmp_path / 'strided.pt')['c.weight']), arrays['c.weight'].T
  )
  torch.save(loaded, tmp_path / 'old.bin', _use_new_zipfile_serialization=False)
  assert_same(files.load(tmp_path / 'old.bin'), arrays)
  torch.save(loaded['b.bias'], tmp_path / 'bare.bin')
  bare = files.load(tmp_path / 'bare.bin')
  assert list(bare) == ['bare']
  write_pickle(tmp_path / 'bare.bin', bare)
  assert isinstance(torch.load(tmp_path / 'bare.bin', weights_only=True), torch.Tensor)


def test_a_large_pickle_is_mapped_again(tmp_path, monkeypatch):
  pytest.importorskip('torch')
  monkeypatch.setattr(pickle_files, 'REOPEN_BYTES', 10)
  write_pickle(tmp_path / 'm.bin', state())
  assert_same(files.load(tmp_path / 'm.bin'), state())


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
  torch = pytest.importorskip('torch')

  class Mischief:
    def __reduce__(self):
      return os.system, (f'touch {tmp_path}/ran',)

  for new in (True, False):
    torch.save(
      {'x': torch.ones(2), 'y': Mischief()},
      tmp_path / 'evil.bin',
      _use_new_zipfile_serialization=new,
    )
    with pytest.raises(
      UserError, match='evil.bin holds more than tensors and would run code; it is refused'
    ):
      files.load(tmp_path / 'evil.bin')
  assert not (tmp_path / 'ran').exists()


def test_damaged_files_are_named_in_one_line(tmp_path):
  pytest.importorskip('torch')
  save_tensors(state(), tmp_path / 'a.safetensors')
  write_pickle(tmp_path / 'a.bin', state())
  cut = {}
  for suffix in ('safetensors', 'bin'):
    content = (tmp_path / f'a.{suffix}').read_bytes()
    cut |= {f'cut{n}.{suffix}': content[:n] for n in (0, 7, 100, -50)}
  for name, content in {**cut, 'junk.bin': b'not a pickle', 'junk.safetensors': b'x' * 99}.items():
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match='is truncated or damaged') as error:
      files.load(tmp_path / name)
    assert name in str(error.value) and '\n' not in str(error.value)
  with pytest.raises(UserError, match='does not exist'):
    files.load(tmp_path / 'nothing')
  with pytest.raises(UserError, match='safetensors files and no index'):
    files.load(tmp_path)
  (tmp_path / 'empty').mkdir()
  with pytest.raises(UserError, match='holds no .safetensors and no .bin'):
    files.load(tmp_path / 'empty')


def test_a_flipped_bit_of_a_zip_is_found(tmp_path):
  pytest.importorskip('torch')
  file = tmp_path / 'a.bin'
  write_pickle(file, {'x': np.arange(1000)})
  assert len(sha256(file)) == 64
  content = bytearray(file.read_bytes())
  content[content.index(np.arange(1000).tobytes()) + 500] ^= 1
  file.write_bytes(content)
  assert zipfile.is_zipfile(file)
  with pytest.raises(UserError, match='a.bin is truncated or damaged .the checksum of a/data/0'):
    sha256(pathlib.Path(file))


def test_digests_do_not_depend_on_the_order_of_reading(tmp_path, monkeypatch):
  arrays = {name: np.random.default_rng(n).normal(size=40 + n) for n, name in enumerate('abcdef')}
  save_tensors(arrays, tmp_path / 'm.safetensors')
  file = tmp_path / 'm.safetensors'
  tensors = files.load(file)
  expected = hashlib.sha256(file.read_bytes()).hexdigest()
  monkeypatch.setattr(digests, 'GAP_BYTES', 100)
  read = []
  read_range = digests.read_range

  def record_range(path, start, size):
    read.append((start, size))
    return read_range(path, start, size)

  monkeypatch.setattr(digests, 'read_range', record_range)
  for order in ('abcdef', 'acbedf', 'f', 'bb', ''):
    with FileDigests() as file_digests:
      arrived = {name: np.asarray(tensors[name]) for name in order}
      read.clear()
      for name in order:
        file_digests.add(tensors[name], arrived[name]).result()
      assert file_digests.hexdigest(file) == expected, order
      if order == 'abcdef':  # only the header is read apart from the tensors
        assert sum(size for _, size in read) == tensors['a'].offset


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
  save_tensors({'x': np.ones(5000)}, tmp_path / 'm.safetensors')
  tensor = files.load(tmp_path / 'm.safetensors')['x']
  os.truncate(tmp_path / 'm.safetensors', 6000)
  with pytest.raises(UserError, match='is truncated or damaged'):
    np.asarray(tensor)
