"""The kernel for long rows, interpreted here, against PyTorch's attention and against our own products and mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.models.splash import LONG, packed_attention, picture_attention, splash_attention

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


@pytest.mark.parametrize('attend', [picture_attention, functools.partial(splash_attention, interpret=True)], ids=['products', 'kernel'])
def test_of_pictures_as_torch(attend):
  """Heads of 40, as Stable Diffusion's."""
  torch = pytest.importorskip('torch')
  q, k, v, cotangent = (jax.random.normal(key, (2, 256, 3, 40)) for key in jax.random.split(jax.random.key(1), 4))
  out, pull = jax.vjp(attend, q, k, v)
  leaves = [torch.tensor(np.asarray(x)).requires_grad_() for x in (q, k, v)]
  want = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves)).transpose(1, 2)
  want.backward(torch.tensor(np.asarray(cotangent)))
  for got, want in zip((out, *pull(cotangent)), (want.detach(), *(x.grad for x in leaves)), strict=True):
    np.testing.assert_allclose(got, want, atol=2e-5)


def program(platform, function, *like):
  """The jaxpr of a mesh of `platform`."""
  device = jax.sharding.AbstractDevice(device_kind=platform, num_cores=1, platform=platform)
  mesh = jax.sharding.AbstractMesh((2, 2, 2), ('data', 'fsdp', 'tensor'), axis_types=(jax.sharding.AxisType.Auto,) * 3, abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    return str(jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(*each) for each in like)))


def test_the_kernel_is_for_tpus():
  """The program of a TPU's mesh holds the kernel, that of a CPU's does not."""
  packed = (packed_attention, *[((8, 256, 4, 128), jnp.bfloat16)] * 3, ((8, 256), jnp.int32))
  assert 'pallas_call' in program('tpu', *packed) and 'pallas_call' not in program('cpu', *packed)


@pytest.mark.parametrize('rows, length, kernel', [(8, LONG, True), (2, LONG, True), (8, LONG // 4, False), (8, LONG + 1, False)])
def test_the_kernel_is_for_long_rows(rows, length, kernel):
  """Two rows, which four devices cannot share, go to each of them."""
  assert ('pallas_call' in program('tpu', picture_attention, *[((rows, length, 4, 40), jnp.bfloat16)] * 3)) == kernel
