"""The kernel for long rows, interpreted here, against PyTorch's attention and against our own products and mask."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.models.splash import LONG, cudnn_attention, packed_attention, picture_attention, splash_attention

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
    np.testing.assert_allclose(got, want, atol=1e-4)


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
    np.testing.assert_allclose(got, want, atol=1e-4)


def on_a_mesh(platform, kind, function, *like):
  """function(*inputs) for 2 x 2 x 2 devices that are not here."""
  device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
  mesh = jax.sharding.AbstractMesh((2, 2, 2), ('data', 'fsdp', 'tensor'), axis_types=(jax.sharding.AxisType.Auto,) * 3, abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    return function(*(jax.ShapeDtypeStruct(*each) for each in like))


def program(platform, function, *like):
  """The jaxpr of a mesh of `platform`."""
  return str(on_a_mesh(platform, platform, jax.make_jaxpr(function), *like))


def test_the_kernel_is_for_tpus():
  """The program of a TPU's mesh holds the kernel, that of a CPU's does not."""
  packed = (packed_attention, *[((8, 256, 4, 128), jnp.bfloat16)] * 3, ((8, 256), jnp.int32))
  assert 'pallas_call' in program('tpu', *packed) and 'pallas_call' not in program('cpu', *packed)


@pytest.mark.parametrize('rows, length, kernel', [(8, LONG, True), (2, LONG, True), (8, LONG // 4, False), (8, LONG + 1, False)])
def test_the_kernel_is_for_long_rows(rows, length, kernel):
  """Two rows, which four devices cannot share, go to each of them."""
  assert ('pallas_call' in program('tpu', picture_attention, *[((rows, length, 4, 40), jnp.bfloat16)] * 3)) == kernel


def lowered(attend, dtype=jnp.bfloat16, width=128, length=256, kind='NVIDIA H100 80GB HBM3', segmented=True):
  """The program for such GPUs, forward and backward."""
  shape = (8, length, 4, width)
  like = [(shape, dtype)] * 3 + [((8, length), jnp.int32)] * segmented

  def loss(q, *others):
    return attend(q, *others).astype(jnp.float32).sum()

  function = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
  return on_a_mesh('gpu', kind, lambda *inputs: function.trace(*inputs).lower(lowering_platforms=('cuda',)).as_text(), *like)


@pytest.fixture
def with_cudnn(monkeypatch):
  """JAX asks the library for its version, which is not here; all its other rules are as they are."""
  from jax._src.cudnn import fused_attention_stablehlo
  monkeypatch.setattr(fused_attention_stablehlo, 'cuda_versions', types.SimpleNamespace(cudnn_get_version=lambda: 91000))


def test_gpus_attend_by_cudnn(with_cudnn):
  """Forward and backward, on each device's rows and heads, without the scores of all heads in float32."""
  text = lowered(packed_attention)
  assert '__cudnn$fmhaScaleBiasSoftmax(' in text and '__cudnn$fmhaScaleBiasSoftmaxBackward(' in text
  assert 'tensor<2x2x256x256xf32>' not in text and 'tensor<8x4x256x256xf32>' not in text
  text = lowered(picture_attention, width=40, length=LONG, segmented=False)
  assert '__cudnn$fmhaSoftmax(' in text and '__cudnn$fmhaSoftmaxBackward(' in text


@pytest.mark.parametrize('changes', [dict(dtype=jnp.float32), dict(width=12), dict(width=136), dict(length=255),
                                     dict(kind='Tesla V100-SXM2-16GB'), dict(kind='AMD Instinct MI300X')])
def test_what_cudnn_does_not_take_goes_by_products(with_cudnn, changes):
  text = lowered(packed_attention, **changes)
  assert 'cudnn' not in text and 'dot_general' in text


def test_the_mask_that_cudnn_gets(heads, expected, monkeypatch):
  """The same call by JAX's own products, in float32: no GPU is here."""
  attend = jax.nn.dot_product_attention
  monkeypatch.setattr(jax.nn, 'dot_product_attention', lambda *args, **options: attend(*args, **options | dict(implementation='xla')))
  out, pull = jax.vjp(lambda q, k, v: cudnn_attention(q, k, v, jnp.asarray(SEGMENTS)), *heads[:3])
  for got, want in zip((out, *pull(heads[3])), expected, strict=True):
    np.testing.assert_allclose(got, want, atol=1e-4)
