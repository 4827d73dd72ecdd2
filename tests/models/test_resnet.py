"""The blocks that the U-Net and the VAE share, against definitions in NumPy and PyTorch."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from bounds import assert_within, sum_error

from lavit_jax.models.resnet import Conv, Downsample, GroupNorm, Upsample


@pytest.mark.parametrize('offset', [0.0, 1000.0])
def test_group_norm_is_exact_far_from_zero(offset):
  x = (np.random.default_rng(0).standard_normal((2, 5, 3, 12)) + offset).astype(np.float32)
  groups = x.astype(np.float64).reshape(2, 15, 4, 3)
  want = (groups - groups.mean((1, 3), keepdims=True)) / np.sqrt(
    groups.var((1, 3), keepdims=True) + 1e-5
  )
  params = {'params': {'scale': np.arange(12.0), 'bias': np.ones(12)}}
  got = GroupNorm(4, 1e-5).apply(params, x)
  # The mean of 45 numbers errs as their sum does; scales and deviations make it 11 and 3 times
  # that.
  # From a difference of squares the variance would be off by eps * 1000^2, a tenth.
  error = sum_error(abs(offset) + 3, 45) * 11 * 3
  assert_within(got, want.reshape(x.shape) * np.arange(12.0) + 1, error)


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


@pytest.mark.parametrize('strides,padding', [(1, (1, 1)), (2, (1, 1)), (2, (0, 1))])
@pytest.mark.parametrize('height,product', [(4, True), (12, False)])
def test_convolutions_are_those_of_torch_and_products_where_the_kernel_is_the_larger(
  strides, padding, height, product
):
  torch = pytest.importorskip('torch')
  rng = np.random.default_rng(0)
  features = 48 // strides**2
  x = rng.standard_normal((2, height, 6, 5), np.float32)
  kernel = rng.standard_normal((3, 3, 5, features), np.float32)
  bias = rng.standard_normal(features, np.float32)
  params = {'kernel': kernel, 'bias': bias}
  module = Conv(features, (3, 3), strides, (padding, padding))
  forward = jax.jit(lambda params, x: module.apply({'params': params}, x))
  grads, grad_x = jax.grad(lambda *args: jnp.square(forward(*args)).sum(), (0, 1))(params, x)

  leaf = torch.tensor(x, requires_grad=True)
  weight = torch.tensor(kernel, requires_grad=True)
  padded = torch.nn.functional.pad(leaf.permute(0, 3, 1, 2), padding * 2)
  want = torch.nn.functional.conv2d(
    padded, weight.permute(3, 2, 0, 1), torch.tensor(bias), strides
  ).permute(0, 2, 3, 1)
  want.square().sum().backward()
  np.testing.assert_allclose(forward(params, x), want.detach(), atol=1e-4)
  np.testing.assert_allclose(grads['kernel'], weight.grad, rtol=1e-4, atol=1e-3)
  np.testing.assert_allclose(grad_x, leaf.grad, rtol=1e-4, atol=1e-3)

  assert ('stablehlo.convolution' in forward.lower(params, x).as_text()) != product
  # It is a product on CPU only.
  on_tpu = jax.export.export(forward, platforms=['tpu'])(params, x)
  assert 'stablehlo.convolution' in on_tpu.mlir_module()
