"""What goes to safetensors is contiguous: its `save_file` writes memory as it lies."""

import pathlib
import re

import numpy as np
import pytest
from safetensors.numpy import load_file
from tensors import save_tensors

from lavit_jax.weights.torch.safetensors_files import SafetensorsWriter

ROOT = pathlib.Path(__file__).parents[3]
X = np.arange(12, dtype=np.float32).reshape(3, 4)
LAYOUTS = {
  'plain': X,
  'transposed': X.T,
  'fortran': np.asfortranarray(X),
  'every_other': X[:, ::2],
  'backwards': X[::-1],
  'broadcast': np.broadcast_to(X[0], (3, 4)),
  'scalar': np.float32(3),
  'swapped': np.arange(24.0, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1),
}


def write(tensors, path: pathlib.Path) -> None:
  """By the package's own writer."""
  with SafetensorsWriter(path.parent, path.stem, tensors) as writer:
    for name, x in tensors.items():
      writer.write(name, x)


@pytest.mark.parametrize('save', [save_tensors, write])
def test_arrays_of_any_layout_come_back(tmp_path, save):
  save(LAYOUTS, tmp_path / 'all.safetensors')
  found = load_file(tmp_path / 'all.safetensors')
  assert found.keys() == LAYOUTS.keys()
  for name, x in LAYOUTS.items():
    assert found[name].shape == x.shape, name
    np.testing.assert_array_equal(found[name], x, name)


def test_nothing_else_calls_save_file():
  """In package, tests and benchmarks `tests/tensors.py` alone does. (torch's own refuses them.)"""
  module = r'safetensors\.(numpy|flax)'
  call = re.compile(rf'{module} import [^\n]*\bsave|{module}\.save|safetensors\.serialize')
  files = []
  for folder in ('lavit_jax', 'tests', 'benchmarks'):
    files += (ROOT / folder).rglob('*.py')
  assert len(files) > 100
  found = {
    str(file.relative_to(ROOT))
    for file in files
    if file != pathlib.Path(__file__) and call.search(file.read_text())
  }
  assert found == {'tests/tensors.py'}
