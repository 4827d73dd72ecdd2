"""The image encoder against the golden case."""

import jax.numpy as jnp
import numpy as np

from lavit_jax.models.vit import preprocess


def test_golden_features_and_head(golden, run):
  images = golden.io['images'].transpose(0, 2, 3, 1)
  features = run('vit', images)
  np.testing.assert_allclose(features, golden.io['vit_features'], atol=1e-4, rtol=0)
  pooled = run('vit', features, method='pooled')
  np.testing.assert_allclose(pooled, golden.io['vit_pooled_head'], atol=1e-4, rtol=0)


def test_bfloat16_is_near_float32(golden, run):
  features = run('vit', golden.io['images'].transpose(0, 2, 3, 1), dtype=jnp.bfloat16)
  assert features.dtype == jnp.bfloat16
  error = np.abs(np.float32(features) - golden.io['vit_features'])
  assert error.mean() < 0.02 * golden.io['vit_features'].std()


def test_preprocess_normalizes_each_channel():
  images = np.zeros((1, 2, 2, 3), np.uint8)
  images[..., 0] = 255
  images[..., 1] = 51
  expected = [
    (1 - 0.48145466) / 0.26862954,
    (0.2 - 0.4578275) / 0.26130258,
    -0.40821073 / 0.27577711,
  ]
  out = preprocess(images)
  assert out.dtype == jnp.float32
  np.testing.assert_allclose(out[0, 1, 1], expected, rtol=1e-6)
