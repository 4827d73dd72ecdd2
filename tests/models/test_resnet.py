"""The blocks that the U-Net and the VAE share, against definitions in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.models.resnet import Downsample, GroupNorm, Upsample


@pytest.mark.parametrize('offset', [0., 1000.])
def test_group_norm_is_exact_far_from_zero(offset):
  x = (np.random.default_rng(0).standard_normal((2, 5, 3, 12)) + offset).astype(np.float32)
  groups = x.astype(np.float64).reshape(2, 15, 4, 3)
  want = (groups - groups.mean((1, 3), keepdims=True)) / np.sqrt(groups.var((1, 3), keepdims=True) + 1e-5)
  params = {'params': {'scale': np.arange(12.), 'bias': np.ones(12)}}
  got = GroupNorm(4, 1e-5).apply(params, x)
  np.testing.assert_allclose(got, want.reshape(x.shape) * np.arange(12.) + 1, atol=1e-5 if not offset else 2e-3)


def test_group_norm_has_float32_statistics_in_bfloat16():
  x = (np.random.default_rng(0).standard_normal((1, 64, 64, 4)) + 3).astype(jnp.bfloat16)
  module = GroupNorm(2, 1e-5, jnp.bfloat16)
  got = module.apply(module.init(jax.random.key(0), x), x)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(got.astype(np.float32).mean(), 0, atol=1e-3)


def identity(module, x):
  """Parameters that make the module's 3x3 convolution copy the pixel under its middle."""
  kernel = np.zeros((3, 3, x.shape[-1], x.shape[-1]), np.float32)
  kernel[1, 1] = np.eye(x.shape[-1])
  return module.apply({'params': {'conv': {'kernel': kernel, 'bias': np.zeros(x.shape[-1])}}}, x)


def test_upsample_repeats_and_the_two_paddings_of_downsample_differ():
  x = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
  np.testing.assert_array_equal(identity(Upsample(), x), x.repeat(2, 1).repeat(2, 2))
  np.testing.assert_array_equal(identity(Downsample((1, 1)), x), x[:, ::2, ::2])
  np.testing.assert_array_equal(identity(Downsample((0, 1)), x), x[:, 1::2, 1::2])
