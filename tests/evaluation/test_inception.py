"""Inception-v3 against torch-fidelity, on random weights."""

import json

import chex
import inception_weights
import jax
import numpy as np
import pytest
from tensors import save_tensors

from lavit_jax.errors import UserError
from lavit_jax.evaluation import inception


@pytest.fixture(scope='module')
def golden():
  with np.load(inception_weights.GOLDEN) as file:
    return dict(file)


@pytest.fixture(scope='module')
def state(golden):
  return inception_weights.random_weights(json.loads(str(golden['shapes'])))


@pytest.fixture(scope='module')
def weights_file(state, tmp_path_factory):
  path = tmp_path_factory.mktemp('inception') / 'weights.safetensors'
  save_tensors(state, path)
  return path


@pytest.mark.parametrize(
  'name',
  [
    'shrunk',
    pytest.param('small', marks=pytest.mark.slow),
    pytest.param('large', marks=pytest.mark.slow),
  ],
)
def test_features_are_those_of_torch_fidelity(name, golden, weights_file, monkeypatch):
  if name == 'shrunk':
    monkeypatch.setattr(inception, 'SIZE', inception_weights.SHRUNK)
  weights = inception.read_weights(weights_file)
  images = inception_weights.random_images(inception_weights.SIZES[name])
  features = jax.jit(inception.extract_features)(weights, images)
  np.testing.assert_allclose(features, golden[name], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_torch_files(state, weights_file, tmp_path):
  """A pickle and TorchScript of the same weights."""
  torch = pytest.importorskip('torch', reason="no torch; pip install -e '.[torch]'")
  tensors = {name: torch.tensor(array) for name, array in state.items()}
  torch.save(tensors, tmp_path / 'weights.pth')
  module = torch.nn.Module()
  for name, tensor in tensors.items():
    *parents, last = name.split('.')
    place = module
    for parent in parents:
      if parent not in dict(place.named_children()):
        place.add_module(parent, torch.nn.Module())
      place = getattr(place, parent)
    place.register_buffer(last, tensor)
  torch.jit.script(module).save(tmp_path / 'weights.pt')
  expected = inception.read_weights(weights_file)
  for file in ('weights.pth', 'weights.pt'):
    chex.assert_trees_all_equal(inception.read_weights(tmp_path / file), expected)


def test_other_weights_are_refused(state, tmp_path):
  few = {name: array for name, array in state.items() if not name.startswith('Mixed_7c')}
  save_tensors(few, tmp_path / 'few.safetensors')
  with pytest.raises(UserError, match=r"few.safetensors is not .*'Mixed_7c.branch1x1.bn.weight'"):
    inception.read_weights(tmp_path / 'few.safetensors')
