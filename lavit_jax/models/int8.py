"""Eight-bit weights and caches: integers, and one float32 scale for each row of them (symmetric, nothing to train).

A matrix of weights [I, O] is kept as int8[O, I] with a scale an output channel, and is turned back into floats inside the product, so
that memory is read a byte a weight: on TPUs the compiler fuses the conversion into the product. XLA's products on CPUs do not; see `_on_cpu`.

Axes: N rows of activations, I input and O output channels.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

LANES = 32  # partial sums of an output channel: as many float32 as two vector registers hold
TERMS = 64  # products of one partial sum, at most: they are unrolled
FEW = 2  # rows up to which partial sums beat a conversion of the weights
BLOCK = 256  # output channels that are converted at a time


class Int8(NamedTuple):
  """values * scale[..., None]."""

  values: Array  # int8[..., n]
  scale: Array  # f32[...]


def quantize(x: Array) -> Int8:
  """Each row [..., n] to the nearest multiples of its greatest absolute value / 127; a row of zeros stays one."""
  x = x.astype(jnp.float32)
  scale = jnp.abs(x).max(-1) / 127
  scale = jnp.where(scale == 0, 1.0, scale)
  return Int8(jnp.round(x / scale[..., None]).astype(jnp.int8), scale)


def dequantize(x: Array | Int8, dtype: Any) -> Array:
  """The numbers again, dtype[..., n]; an array is only cast."""
  return (x.values * x.scale[..., None] if isinstance(x, Int8) else x).astype(dtype)


def quantize_weights(params: dict) -> dict:
  """The parameters of a language model with every kernel, and the head, as Int8; norms and the embedding table as they are.

  Leaves are removed from `params` as they are converted, so that memory never holds both models.
  """
  out = {}
  for name in list(params):
    leaf = params.pop(name)
    out[name] = quantize_weights(leaf) if isinstance(leaf, dict) else quantize_weight(name, leaf)
  return out


def quantize_weight(name: str, leaf: Array) -> Array | Int8:
  """The same of one leaf, by the last word of its path."""
  return _quantize_matrix(leaf) if name in ('kernel', 'head') else leaf


@jax.jit
def _quantize_matrix(kernel: Array) -> Int8:
  return quantize(kernel.swapaxes(-1, -2))


def weight(module: nn.Module, name: str, init: Callable, shape: tuple[int, int]) -> Array | Int8:
  """The matrix `name` among a module's parameters: f32[I, O], or whatever stands in its place as Int8."""
  if module.has_variable('params', name) and isinstance(
    given := module.get_variable('params', name), Int8
  ):
    return given
  return module.param(name, init, shape)


class Linear(nn.Module):
  """x @ kernel without a bias; [..., I] -> dtype[..., O]. The kernel is f32[I, O] or Int8."""

  features: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    kernel = weight(self, 'kernel', nn.initializers.lecun_normal(), (x.shape[-1], self.features))
    return product(x.astype(self.dtype), kernel, self.dtype)


def product(x: Array, kernel: Array | Int8, out_dtype: Any) -> Array:
  """x [..., I] by a kernel [I, O] in the dtype of x: out_dtype[..., O]."""
  if not isinstance(kernel, Int8):
    return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=out_dtype)
  # In a loop the weights are constant, and XLA would convert them all before it begins: they must seem to depend on x.
  values, rows = jax.lax.optimization_barrier((kernel.values, x.reshape(-1, x.shape[-1])))
  # Chips that hold parts of I send each other their sums: in the output's type, as with float weights, or these would be twice the bytes.
  sums = functools.partial(
    _product, dtype=jnp.promote_types(out_dtype, jnp.bfloat16)
  )  # float16 is too narrow for them, before the scale
  y = (
    jax.lax.platform_dependent(
      rows, values, cpu=_on_cpu, default=lambda *given: sums(*given).astype(jnp.float32)
    )
    * kernel.scale
  )
  return y.reshape(*x.shape[:-1], -1).astype(out_dtype)


def _product(x: Array, values: Array, dtype: Any = jnp.float32) -> Array:
  """[N, I] by int8[O, I]: dtype[N, O]."""
  return jax.lax.dot_general(
    x, values.astype(x.dtype), (((1,), (1,)), ((), ())), preferred_element_type=dtype
  )


def _on_cpu(x: Array, values: Array) -> Array:
  """The same where a conversion does not fuse with a product but with sums and multiplications that are written out.

  Of one or two rows (decoding), O x `width` partial sums run over I in a single pass over the integers, and a product with ones adds
  them up. Of more, blocks of the weights are converted that stay in the cache.

  A token of 12 layers of width 768 and a head of 48,386 on two cores took 9.4 ms by partial sums of 32 (11.3 of 16, 11.4 of 64), 18.8 by
  blocks, 63 by converting whole matrices, over 500 by a multiplication and a sum, which are not vectorised; 21.9 with float32 weights.
  """
  (n, inputs), outputs = x.shape, values.shape[0]
  width = next(
    (w for w in range(LANES, inputs + 1, LANES) if inputs % w == 0 and inputs // w <= TERMS), None
  )
  if n <= FEW and width:
    x = x.astype(jnp.float32)[:, None]
    terms = [
      x[..., i : i + width] * values[:, i : i + width].astype(jnp.float32)
      for i in range(0, inputs, width)
    ]
    while (
      len(terms) > 1
    ):  # by pairs: rounding errors grow with the depth of the tree, not with its leaves
      terms = [sum(terms[i : i + 2]) for i in range(0, len(terms), 2)]
    return jax.lax.optimization_barrier(terms[0]) @ jnp.ones(
      width
    )  # or the sums would be fused into what computes the parts

  size = min(BLOCK, outputs)

  def block(i: Array, y: Array) -> Array:
    start = jnp.minimum(i * size, outputs - size)  # the last block overlaps the one before
    part = _product(x, jax.lax.dynamic_slice_in_dim(values, start, size))
    return jax.lax.dynamic_update_slice_in_dim(y, part, start, 1)

  return jax.lax.fori_loop(0, -(-outputs // size), block, jnp.zeros((n, outputs)))
