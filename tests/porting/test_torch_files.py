"""Weight files: of every kind, in and out, and the bad ones."""

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
from lavit_jax.porting import torch_files


def state():
  """Arrays of several types and sizes."""
  rng = np.random.default_rng(0)
  return {'c.weight': rng.normal(size=(6, 4)).astype(np.float32), 'a.weight': rng.normal(size=(5, 4)).astype(ml_dtypes.bfloat16),
          'b.bias': rng.normal(size=6).astype(np.float16), 'ids': np.arange(7), 'scale': np.array(2.5, np.float32)}


def same(read, wanted) -> bool:
  return read.keys() == wanted.keys() and all(
      read[k].shape == wanted[k].shape and read[k].dtype == np.asarray(read[k]).dtype == wanted[k].dtype
      and np.array_equal(np.asarray(read[k]), wanted[k]) for k in wanted)


def write(folder, stem, arrays, **kwargs):
  with torch_files.Writer(folder, stem, arrays, **kwargs) as writer:
    for name in reversed(arrays):  # in any order
      writer.write(name, arrays[name])
  return writer


def test_written_files_are_what_safetensors_reads(tmp_path):
  arrays = state()
  writer = write(tmp_path, 'model', arrays)
  assert writer.files == [tmp_path / 'model.safetensors'] and sorted(writer.sums) == sorted(arrays)
  assert same(load_file(tmp_path / 'model.safetensors'), arrays)
  assert same(torch_files.load(tmp_path), arrays) and list(torch_files.load(tmp_path)) == list(arrays)


def test_shards_with_their_index(tmp_path):
  arrays = state()
  writer = write(tmp_path, 'model', arrays, shard_bytes=100)
  assert [file.name for file in writer.files] == [f'model-0000{n}-of-00003.safetensors' for n in (1, 2, 3)]
  index = json.loads((tmp_path / 'model.safetensors.index.json').read_text())
  assert index['metadata']['total_size'] == sum(x.nbytes for x in arrays.values())
  assert same(torch_files.load(tmp_path), arrays)
  save_tensors({'visual': np.ones(2)}, tmp_path / 'visual_weight.safetensors')
  assert same(torch_files.load(tmp_path, 'model'), arrays)
  writer.files[1].unlink()
  with pytest.raises(UserError, match='lacks model-00002-of-00003.safetensors, which model.safetensors.index.json names'):
    torch_files.load(tmp_path)


def test_what_was_announced_must_come(tmp_path):
  with pytest.raises(ValueError, match='never written: ids'):
    with torch_files.Writer(tmp_path, 'model', {'ids': np.arange(3), 'x': np.ones(2)}) as writer:
      writer.write('x', np.ones(2))
  with pytest.raises(ValueError, match='announced was'):
    with torch_files.Writer(tmp_path, 'model', {'x': np.ones(2)}) as writer:
      writer.write('x', np.ones(2, np.float32))


def test_pickles_in_and_out(tmp_path):
  torch = pytest.importorskip('torch')
  arrays = state()
  torch_files.to_pickle(tmp_path / 'm.bin', arrays)
  theirs = torch.load(tmp_path / 'm.bin', weights_only=True)
  assert theirs['a.weight'].dtype == torch.bfloat16 and theirs['ids'].tolist() == list(range(7))
  assert same(torch_files.load(tmp_path / 'm.bin'), arrays)
  torch.save({k: v.float().T for k, v in theirs.items() if v.ndim == 2}, tmp_path / 'strided.pt')
  assert np.array_equal(np.asarray(torch_files.load(tmp_path / 'strided.pt')['c.weight']), arrays['c.weight'].T)
  torch.save(theirs, tmp_path / 'old.bin', _use_new_zipfile_serialization=False)
  assert same(torch_files.load(tmp_path / 'old.bin'), arrays)
  torch.save(theirs['b.bias'], tmp_path / 'bare.bin')
  bare = torch_files.load(tmp_path / 'bare.bin')
  assert list(bare) == ['bare']
  torch_files.to_pickle(tmp_path / 'bare.bin', bare)
  assert isinstance(torch.load(tmp_path / 'bare.bin', weights_only=True), torch.Tensor)


def test_a_large_pickle_is_mapped_anew(tmp_path, monkeypatch):
  pytest.importorskip('torch')
  monkeypatch.setattr(torch_files, 'REOPEN_BYTES', 10)
  torch_files.to_pickle(tmp_path / 'm.bin', state())
  assert same(torch_files.load(tmp_path / 'm.bin'), state())


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
  torch = pytest.importorskip('torch')

  class Mischief:
    def __reduce__(self):
      return os.system, (f'touch {tmp_path}/ran',)

  for new in (True, False):
    torch.save({'x': torch.ones(2), 'y': Mischief()}, tmp_path / 'evil.bin', _use_new_zipfile_serialization=new)
    with pytest.raises(UserError, match='evil.bin holds more than tensors and would run code; it is refused'):
      torch_files.load(tmp_path / 'evil.bin')
  assert not (tmp_path / 'ran').exists()


def test_bad_files_are_told_in_one_line(tmp_path):
  pytest.importorskip('torch')
  save_tensors(state(), tmp_path / 'a.safetensors')
  torch_files.to_pickle(tmp_path / 'a.bin', state())
  cut = {f'cut{n}.{kind}': (tmp_path / f'a.{kind}').read_bytes()[:n] for kind in ('safetensors', 'bin') for n in (0, 7, 100, -50)}
  for name, content in {**cut, 'junk.bin': b'not a pickle', 'junk.safetensors': b'x' * 99}.items():
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match='is truncated or damaged') as error:
      torch_files.load(tmp_path / name)
    assert name in str(error.value) and '\n' not in str(error.value)
  with pytest.raises(UserError, match='does not exist'):
    torch_files.load(tmp_path / 'nothing')
  with pytest.raises(UserError, match='safetensors files and no index'):
    torch_files.load(tmp_path)
  (tmp_path / 'empty').mkdir()
  with pytest.raises(UserError, match='holds no .safetensors and no .bin'):
    torch_files.load(tmp_path / 'empty')


def test_a_flipped_bit_of_a_zip_is_found(tmp_path):
  pytest.importorskip('torch')
  file = tmp_path / 'a.bin'
  torch_files.to_pickle(file, {'x': np.arange(1000)})
  assert len(torch_files.sha256(file)) == 64
  content = bytearray(file.read_bytes())
  content[content.index(np.arange(1000).tobytes()) + 500] ^= 1
  file.write_bytes(content)
  assert zipfile.is_zipfile(file)
  with pytest.raises(UserError, match='a.bin is truncated or damaged .the checksum of a/data/0'):
    torch_files.sha256(pathlib.Path(file))


def test_a_file_counts_to_its_digest_in_whatever_order_it_is_read(tmp_path, monkeypatch):
  arrays = {name: np.random.default_rng(n).normal(size=40 + n) for n, name in enumerate('abcdef')}
  save_tensors(arrays, tmp_path / 'm.safetensors')
  file, tensors = tmp_path / 'm.safetensors', torch_files.load(tmp_path / 'm.safetensors')
  wanted = hashlib.sha256(file.read_bytes()).hexdigest()
  monkeypatch.setattr(torch_files, 'GAP_BYTES', 100)
  read = []
  monkeypatch.setattr(torch_files, '_read', lambda *args, real=torch_files._read: (read.append(args[1:]), real(*args))[1])
  for order, gaps in (('abcdef', 1), ('acbedf', None), ('f', None), ('bb', None), ('', 0)):
    with torch_files.Digests() as digests:
      arrived = {name: np.asarray(tensors[name]) for name in order}
      read.clear()
      for name in order:
        digests.add(tensors[name], arrived[name]).result()
      assert digests.of(file) == wanted, order
      if gaps == 1:  # nothing but the header was read again
        assert sum(size for _, size in read) == tensors['a'].offset


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
  save_tensors({'x': np.ones(5000)}, tmp_path / 'm.safetensors')
  tensor = torch_files.load(tmp_path / 'm.safetensors')['x']
  os.truncate(tmp_path / 'm.safetensors', 6000)
  with pytest.raises(UserError, match='is truncated or damaged'):
    np.asarray(tensor)
