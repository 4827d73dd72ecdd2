"""The kernels for long rows, interpreted here, against PyTorch's attention and our own products."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.models.attention_kernels import (
  LONG,
  cudnn_attention,
  image_attention,
  packed_attention,
  splash_attention,
)

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


@pytest.mark.parametrize(
  'attend',
  [packed_attention, functools.partial(splash_attention, interpret=True)],
  ids=['products', 'kernel'],
)
def test_packed_rows_match_torch(attend, heads, expected):
  out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, jnp.asarray(SEGMENTS)), *heads[:3])
  for got, want in zip((out, *pull(heads[3])), expected, strict=True):
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize(
  'attend',
  [image_attention, functools.partial(splash_attention, interpret=True)],
  ids=['products', 'kernel'],
)
def test_images_match_torch(attend):
  """Heads of 40, as Stable Diffusion's."""
  torch = pytest.importorskip('torch')
  keys = jax.random.split(jax.random.key(1), 4)
  q, k, v, cotangent = (jax.random.normal(key, (2, 256, 3, 40)) for key in keys)
  out, pull = jax.vjp(attend, q, k, v)
  leaves = [torch.tensor(np.asarray(x)).requires_grad_() for x in (q, k, v)]
  head_major = [x.transpose(1, 2) for x in leaves]
  torch_out = torch.nn.functional.scaled_dot_product_attention(*head_major).transpose(1, 2)
  torch_out.backward(torch.tensor(np.asarray(cotangent)))
  np.testing.assert_allclose(out, torch_out.detach(), atol=1e-4)
  for gradient, leaf in zip(pull(cotangent), leaves, strict=True):
    np.testing.assert_allclose(gradient, leaf.grad, atol=1e-4)


def on_a_mesh(platform, kind, function, *inputs):
  """function(*structs) for 2 x 2 x 2 absent devices; inputs are (shape, dtype)."""
  device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
  mesh = jax.sharding.AbstractMesh(
    (2, 2, 2),
    ('data', 'fsdp', 'tensor'),
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
    abstract_device=device,
  )
  with jax.sharding.use_abstract_mesh(mesh):
    return function(*(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in inputs))


def program(platform, function, *inputs):
  """The jaxpr of a mesh of `platform`."""
  return str(on_a_mesh(platform, platform, jax.make_jaxpr(function), *inputs))


def test_the_kernel_is_for_tpus():
  """The program for a mesh of TPUs has the kernel, the one for CPUs does not."""
  packed = (packed_attention, *[((8, 256, 4, 128), jnp.bfloat16)] * 3, ((8, 256), jnp.int32))
  assert 'pallas_call' in program('tpu', *packed) and 'pallas_call' not in program('cpu', *packed)


@pytest.mark.parametrize(
  'rows, length, kernel',
  [(8, LONG, True), (2, LONG, True), (8, LONG // 4, False), (8, LONG + 1, False)],
)
def test_the_kernel_is_for_long_rows(rows, length, kernel):
  """Two rows, which do not divide over four devices, are computed on each of them."""
  inputs = [((rows, length, 4, 40), jnp.bfloat16)] * 3
  assert ('pallas_call' in program('tpu', image_attention, *inputs)) == kernel


def lowered(
  attend, dtype=jnp.bfloat16, width=128, length=256, kind='NVIDIA H100 80GB HBM3', segmented=True
):
  """The program for such GPUs, forward and backward."""
  shape = (8, length, 4, width)
  inputs = [(shape, dtype)] * 3
  if segmented:
    inputs.append(((8, length), jnp.int32))

  def loss(q, *others):
    return attend(q, *others).astype(jnp.float32).sum()

  function = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))

  def lower(*structs):
    return function.trace(*structs).lower(lowering_platforms=('cuda',)).as_text()

  return on_a_mesh('gpu', kind, lower, *inputs)


@pytest.fixture
def with_cudnn(monkeypatch):
  """Fakes the version of the library, which is not installed; JAX's other rules stay."""
  from jax._src.cudnn import fused_attention_stablehlo

  monkeypatch.setattr(
    fused_attention_stablehlo,
    'cuda_versions',
    types.SimpleNamespace(cudnn_get_version=lambda: 91000),
  )


def test_gpus_attend_by_cudnn(with_cudnn):
  """Forward and backward, on each device's rows and heads, without float32 scores of all heads."""
  text = lowered(packed_attention)
  assert '__cudnn$fmhaScaleBiasSoftmax(' in text and '__cudnn$fmhaScaleBiasSoftmaxBackward(' in text
  assert 'tensor<2x2x256x256xf32>' not in text and 'tensor<8x4x256x256xf32>' not in text
  text = lowered(image_attention, width=40, length=LONG, segmented=False)
  assert '__cudnn$fmhaSoftmax(' in text and '__cudnn$fmhaSoftmaxBackward(' in text


@pytest.mark.parametrize(
  'changes',
  [
    dict(dtype=jnp.float32),
    dict(width=12),
    dict(width=136),
    dict(length=255),
    dict(kind='Tesla V100-SXM2-16GB'),
    dict(kind='AMD Instinct MI300X'),
  ],
)
def test_shapes_that_cudnn_refuses_take_products(with_cudnn, changes):
  text = lowered(packed_attention, **changes)
  assert 'cudnn' not in text and 'dot_general' in text


def test_the_mask_for_cudnn(heads, expected, monkeypatch):
  """The same call by JAX's own products, in float32, since there is no GPU."""
  attend = jax.nn.dot_product_attention
  monkeypatch.setattr(
    jax.nn,
    'dot_product_attention',
    lambda *args, **options: attend(*args, **options | dict(implementation='xla')),
  )
  out, pull = jax.vjp(lambda q, k, v: cudnn_attention(q, k, v, jnp.asarray(SEGMENTS)), *heads[:3])
  for got, want in zip((out, *pull(heads[3])), expected, strict=True):
    np.testing.assert_allclose(got, want, atol=1e-4)
