"""Modules that are written slice by slice: any order, any size, complete or absent."""

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lavit_jax.weights.store import arrays, checksums, disk, writer


def test_leaves_arrive_in_any_order_and_size(tmp_path, monkeypatch):
  for module, name in (
    (writer, 'SMALL_BYTES'),
    (writer, 'CHUNK_BYTES'),
    (checksums, 'CHUNK_BYTES'),
    (arrays, 'CHUNK_BYTES'),
    (disk, 'FLUSH_BYTES'),
  ):
    monkeypatch.setattr(module, name, 64)
  rng = np.random.default_rng(0)
  leaves = {
    'layers/kernel': rng.normal(size=(5, 6, 7)).astype(ml_dtypes.bfloat16),
    'layers/scale': rng.normal(size=(5, 3)).astype(np.float32),
    'table': rng.normal(size=(40, 3)).astype(np.float16),
    'step': np.array(3, np.int64),
  }
  stacked = ('layers/kernel', 'layers/scale')
  with writer.ModuleWriter(tmp_path / 'module', leaves, stacked) as module_writer:
    for layer in (3, 0, 4, 1, 2):
      for path in stacked:
        module_writer.write(path, layer, leaves[path][layer])
    for path in ('table', 'step'):
      module_writer.write(path, None, leaves[path])
  sums = module_writer.sums
  restored = arrays.flatten(ocp.PyTreeCheckpointer().restore(tmp_path / 'module'))
  for path, store in arrays.open_leaves(tmp_path / 'module', leaves).items():
    array = store.read().result()
    assert array.dtype == leaves[path].dtype == restored[path].dtype
    np.testing.assert_array_equal(array, leaves[path])
    np.testing.assert_array_equal(restored[path], leaves[path])
    assert checksums.checksum(array) == sums[path]
    assert checksums.checksum(array + array.dtype.type(1)) != sums[path]
  for path, checksum, _ in checksums.checksums(tmp_path / 'module', leaves):
    sums[path] ^= checksum
  assert not any(sums.values())


def test_a_missing_slice_leaves_no_module(tmp_path):
  structs = dict(a=np.zeros(2), b=np.zeros((2, 3)))
  with pytest.raises(ValueError, match='never written: b'):
    with writer.ModuleWriter(tmp_path / 'module', structs, ['b']) as module_writer:
      module_writer.write('a', None, np.zeros(2))
      module_writer.write('b', 1, np.zeros(3))
  assert not (tmp_path / 'module').exists()
