"""The kernel for packed rows, interpreted here, against PyTorch's attention and against our own products and mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.models.packed_attention import packed_attention, splash_attention

SEGMENTS = np.array([[1] * 100 + [2] * 60 + [3] * 90 + [0] * 6, [1] * 256], np.int32)


@pytest.fixture(scope='module')
def heads():
  """q [2, 256, 4, 128], k and v of two heads, and a cotangent."""
  keys = jax.random.split(jax.random.key(0), 4)
  return [jax.random.normal(key, (2, 256, n, 128)) for key, n in zip(keys, (4, 2, 2, 4))]


@pytest.fixture(scope='module')
def expected(heads):
  """Output and gradients by PyTorch."""
  torch = pytest.importorskip('torch')
  q, k, v = (torch.tensor(np.asarray(x)).transpose(1, 2).requires_grad_() for x in heads[:3])
  segments = torch.tensor(SEGMENTS)
  mask = (segments[:, :, None] == segments[:, None, :]).tril()[:, None]
  out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
  out.backward(torch.tensor(np.asarray(heads[3])).transpose(1, 2))
  return [x.detach().transpose(1, 2).numpy() for x in (out, q.grad, k.grad, v.grad)]


@pytest.mark.parametrize('attend', [packed_attention, functools.partial(splash_attention, interpret=True)], ids=['products', 'kernel'])
def test_as_torch(attend, heads, expected):
  out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, jnp.asarray(SEGMENTS)), *heads[:3])
  for got, want in zip((out, *pull(heads[3])), expected, strict=True):
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_the_kernel_is_for_tpus():
  """The program of a TPU's mesh holds the kernel, that of a CPU's does not."""
  q = jax.ShapeDtypeStruct((8, 256, 4, 128), jnp.bfloat16)
  segments = jax.ShapeDtypeStruct((8, 256), jnp.int32)

  def program(platform):
    device = jax.sharding.AbstractDevice(device_kind=platform, num_cores=1, platform=platform)
    mesh = jax.sharding.AbstractMesh((2, 2, 2), ('data', 'fsdp', 'tensor'), axis_types=(jax.sharding.AxisType.Auto,) * 3, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
      return str(jax.make_jaxpr(packed_attention)(q, q, q, segments))

  assert 'pallas_call' in program('tpu') and 'pallas_call' not in program('cpu')
