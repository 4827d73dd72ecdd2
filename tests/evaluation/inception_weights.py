"""Random Inception-v3 weights, and the script that asked torch-fidelity for its features.

    pip install torch-fidelity==0.4.0 torchvision==0.28.0 --no-deps
    PYTHONPATH=tests/evaluation python -m inception_weights

writes inception_golden.npz: the shapes of all weights, and the features of images in float64.
"""

import json
import pathlib
import tempfile
import zlib

import numpy as np

GOLDEN = pathlib.Path(__file__).with_name('inception_golden.npz')
SIZES = {'small': (2, 40, 56, 3), 'large': (1, 321, 300, 3), 'shrunk': (2, 40, 56, 3)}
SHRUNK = 107  # pixels of the input instead of 299, for a fast test; the last block has 2 x 2


def random_weights(shapes):
  """Weights under which no layer dies, by their names: the same everywhere."""
  state = {}
  for name, shape in shapes.items():
    random = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith('conv.weight'):
      values = random.normal(size=shape) * np.sqrt(2 / np.prod(shape[1:]))
    elif name.endswith(('bn.weight', 'running_var')):
      values = random.uniform(0.5, 1.5, shape)
    else:
      values = random.normal(size=shape) * 0.1
    state[name] = values.astype(np.float32)
  return state


def random_images(size):
  """uint8[size]."""
  return np.random.RandomState(0).randint(0, 256, size).astype(np.uint8)


def main():
  import torch
  from torch_fidelity import feature_extractor_inceptionv3 as reference

  class Shapes(reference.FeatureExtractorInceptionV3):
    """It keeps its shapes instead of loading weights."""

    def load_state_dict(self, state):
      self.shapes = {
        name: list(tensor.shape)
        for name, tensor in self.state_dict().items()
        if 'num_batches' not in name
      }

  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'weights.pth'
    torch.save({}, path)
    shapes = Shapes('shapes', ['2048'], str(path)).shapes
    state = {name: torch.tensor(array) for name, array in random_weights(shapes).items()}
    state |= {
      name.replace('running_mean', 'num_batches_tracked'): torch.tensor(0)
      for name in shapes
      if name.endswith('running_mean')
    }
    torch.save(state, path)
    model = reference.FeatureExtractorInceptionV3('fid', ['2048'], str(path), 'float64')
  arrays = {'shapes': np.array(json.dumps(shapes))}
  for name, size in SIZES.items():
    model.INPUT_IMAGE_SIZE = SHRUNK if name == 'shrunk' else 299
    with torch.no_grad():
      (features,) = model(torch.tensor(random_images(size)).permute(0, 3, 1, 2))
    arrays[name] = features.numpy()
  np.savez_compressed(GOLDEN, **arrays)


if __name__ == '__main__':
  main()
