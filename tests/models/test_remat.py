"""A scanned stack of blocks against a loop over them."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.models.remat import scan_blocks


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, shift, slice):
    x = x + nn.tanh(nn.Dense(x.shape[-1])(x)) + shift + slice
    return x, x


@pytest.mark.parametrize('remat', ['none', 'full', 'minimal'])
def test_scan_blocks_is_a_loop(remat):
  x = normal(2, 4)
  slices = normal(3, 2, 4, seed=1)
  stack = scan_blocks(Block, 3, remat, in_axes=(nn.broadcast, 0))()
  params = stack.init(jax.random.key(0), x, 0.5, slices)['params']
  kernels = params['Dense_0']['kernel']
  assert kernels.shape == (3, 4, 4) and not np.allclose(kernels[0], kernels[1])

  def scanned(params):
    return stack.apply({'params': params}, x, 0.5, slices)

  def loop(params):
    y = x
    outs = []
    for n in range(3):
      layer = jax.tree.map(lambda a, n=n: a[n], params)
      y, out = Block().apply({'params': layer}, y, 0.5, slices[n])
      outs.append(out)
    return y, jnp.stack(outs)

  def gradient(function):
    return jax.grad(lambda params: jnp.square(function(params)[1]).sum())(params)

  jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), scanned(params), loop(params))
  jax.tree.map(
    partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), gradient(scanned), gradient(loop)
  )


def test_an_unknown_policy_is_an_error_with_the_known_ones():
  with pytest.raises(ValueError, match="remat='al' is not one of 'none', 'full', 'save_qkv_proj'"):
    scan_blocks(Block, 2, 'al')
