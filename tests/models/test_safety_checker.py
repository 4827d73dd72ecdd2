"""The input of the safety checker against transformers.

Its output is compared in tests/weights/torch/test_exported_folders.py.
"""

import jax
import numpy as np
import pytest

from lavit_jax.models import lavit, vit
from lavit_jax.models.safety_checker import center_square
from lavit_jax.weights.torch.descriptions import extractor_config

transformers = pytest.importorskip('transformers')


@pytest.mark.parametrize(
  'height,width', [(512, 512), (224, 224), (64, 64), (832, 1216), (1344, 768), (301, 257)]
)
def test_images_are_cropped_as_by_transformers(height, width):
  rng = np.random.default_rng(height)
  blocks = rng.integers(0, 256, (1, 1 + height // 32, 1 + width // 32, 3))
  smooth = np.kron(blocks, np.ones((1, 32, 32, 1)))[:, :height, :width]
  images = np.clip(smooth + rng.normal(0, 20, smooth.shape), 0, 255).astype(np.uint8)
  processor = transformers.CLIPImageProcessor(
    **extractor_config(lavit.build('small').safety_checker)
  )
  want = processor([images[0]], return_tensors='np')['pixel_values'].transpose(0, 2, 3, 1)
  got = jax.jit(lambda x: vit.preprocess(center_square(x, 224)))(images)
  assert got.shape == want.shape == (1, 224, 224, 3)
  # Where rounding meets a tie between the passes, that byte is spread by 1.3 and rounded again.
  np.testing.assert_allclose(got, want, rtol=0, atol=2 / 255 / min(vit.STD) + 1e-5)
  assert (np.abs(got - want) > 1e-5).mean() < 1e-3
