"""Eight-bit weights and caches: integers, and one float32 scale for each row of them.

The quantization is symmetric, without training. A matrix of weights [I, O] is stored as int8[O, I]
with a scale for each output channel. The product converts it to floats, so that it reads one byte
for each weight: on TPUs the compiler fuses the conversion into the product. XLA's products on CPUs
do not fuse it; see `_product_on_cpu`.

Axes: N rows of activations, I input and O output channels.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lavit_jax.models.lora import add_low_rank

LANES = 32  # partial sums of an output channel: the float32 of two vector registers
MAX_TERMS = 64  # products of one partial sum: they are unrolled
FEW_ROWS = 2  # up to here, partial sums are faster than a conversion of the weights
BLOCK = 256  # output channels that are converted at a time


class Int8(NamedTuple):
  """The numbers values * scale[..., None]."""

  values: Array  # int8[..., n]
  scale: Array  # f32[...]


def quantize(x: Array) -> Int8:
  """Rounds each row [..., n] to multiples of its greatest absolute value / 127.

  A row of zeros stays zero, with the scale 1.
  """
  x = x.astype(jnp.float32)
  scale = jnp.abs(x).max(-1) / 127
  scale = jnp.where(scale == 0, 1.0, scale)
  return Int8(jnp.round(x / scale[..., None]).astype(jnp.int8), scale)


def dequantize(x: Array | Int8, dtype: Any) -> Array:
  """The numbers of an Int8 as dtype[..., n]; an array is only cast."""
  if isinstance(x, Int8):
    x = x.values * x.scale[..., None]
  return x.astype(dtype)


def quantize_weights(params: dict) -> dict:
  """The parameters of a language model with every kernel, and the head, as Int8.

  Norms and the embedding table stay floats. Leaves are removed from `params` as they are converted,
  so that memory never holds both models.
  """
  quantized = {}
  for name in list(params):
    leaf = params.pop(name)
    if isinstance(leaf, dict):
      quantized[name] = quantize_weights(leaf)
    else:
      quantized[name] = quantize_weight(name, leaf)
  return quantized


def quantize_weight(name: str, leaf: Array) -> Array | Int8:
  """One leaf of `quantize_weights`, by the last component of its path."""
  return _quantize_matrix(leaf) if name in ('kernel', 'head') else leaf


@jax.jit
def _quantize_matrix(kernel: Array) -> Int8:
  return quantize(kernel.swapaxes(-1, -2))


def weight(module: nn.Module, name: str, init: Callable, shape: tuple[int, int]) -> Array | Int8:
  """The matrix `name` of a module's parameters: f32[I, O], or Int8 if they were quantized."""
  if module.has_variable('params', name):
    stored = module.get_variable('params', name)
    if isinstance(stored, Int8):
      return stored
  return module.param(name, init, shape)


class Linear(nn.Module):
  """x @ kernel without a bias; the kernel is f32[I, O] or Int8, and may have an adapter."""

  features: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[..., I] -> dtype[..., O]."""
    kernel = weight(self, 'kernel', nn.initializers.lecun_normal(), (x.shape[-1], self.features))
    (y,) = add_low_rank(self, x, [product(x.astype(self.dtype), kernel, self.dtype)])
    return y


def product(x: Array, kernel: Array | Int8, out_dtype: Any) -> Array:
  """Multiplies x by a kernel, in the dtype of x.

  Args:
    x: [..., I].
    kernel: [I, O], or Int8 with values [O, I].
    out_dtype: of the result, and of its sums (but see below).

  Returns:
    out_dtype[..., O].
  """
  if not isinstance(kernel, Int8):
    return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=out_dtype)
  return _int8_product(x, kernel, out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _int8_product(x: Array, kernel: Int8, out_dtype: Any) -> Array:
  """`product` by an Int8, through which gradients pass to x; the Int8 itself has none.

  Without a rule of its own, backward would keep the kernels as floats.
  """
  chex.assert_shape(kernel.values, (None, x.shape[-1]))
  # In a loop the weights are constant, and XLA would convert all of them before it begins. The
  # barrier makes them seem to depend on x.
  rows = x.reshape(-1, x.shape[-1])
  values, rows = jax.lax.optimization_barrier((kernel.values, rows))
  # Devices that hold parts of I exchange their sums: in the output's dtype, as with float weights,
  # or these would be twice the bytes. Before the scale, float16 is too narrow for them.
  sum_dtype = jnp.promote_types(out_dtype, jnp.bfloat16)

  def product_elsewhere(rows: Array, values: Array) -> Array:
    return _product(rows, values, sum_dtype).astype(jnp.float32)

  y = jax.lax.platform_dependent(rows, values, cpu=_product_on_cpu, default=product_elsewhere)
  y = y * kernel.scale
  return y.reshape(*x.shape[:-1], -1).astype(out_dtype)


def _product_forward(x: Array, kernel: Int8, out_dtype: Any) -> tuple[Array, tuple]:
  return _int8_product(x, kernel, out_dtype), (kernel, jnp.zeros((0,), x.dtype))


def _product_backward(out_dtype: Any, kept: tuple, gradient: Array) -> tuple[Array, Int8]:
  del out_dtype
  kernel, like = kept
  scaled = (gradient * kernel.scale).astype(like.dtype)
  of_x = jnp.matmul(scaled, kernel.values.astype(like.dtype), preferred_element_type=like.dtype)
  no_gradient = np.zeros(kernel.values.shape, jax.dtypes.float0)
  return of_x, Int8(no_gradient, jnp.zeros_like(kernel.scale))  # pyright: ignore[reportArgumentType]


_int8_product.defvjp(_product_forward, _product_backward)


def _product(x: Array, values: Array, dtype: Any = jnp.float32) -> Array:
  """[N, I] by int8[O, I]: dtype[N, O]."""
  contract_inputs = (((1,), (1,)), ((), ()))
  return jax.lax.dot_general(
    x, values.astype(x.dtype), contract_inputs, preferred_element_type=dtype
  )


def _product_on_cpu(x: Array, values: Array) -> Array:
  """`_product` in float32 where a conversion fuses with written-out sums, but not with a product.

  One or two rows (decoding) take partial sums, more rows blocks of converted weights.

  A token of 12 layers of width 768 and a head of 48,386 on two cores took 9.4 ms by partial sums of
  32 lanes (11.3 of 16, 11.4 of 64), 18.8 by blocks, 63 by converting whole matrices, over 500 by a
  multiplication and a sum, which are not vectorized; 21.9 with float32 weights.
  """
  num_rows, inputs = x.shape
  if num_rows <= FEW_ROWS:
    for width in range(LANES, inputs + 1, LANES):
      if inputs % width == 0 and inputs // width <= MAX_TERMS:
        return _product_by_partial_sums(x, values, width)
  return _product_by_blocks(x, values)


def _product_by_partial_sums(x: Array, values: Array, width: int) -> Array:
  """Takes O x `width` partial sums over I in one pass, and adds them by a product with ones."""
  x = x.astype(jnp.float32)[:, None]
  terms = []
  for start in range(0, x.shape[-1], width):
    part = slice(start, start + width)
    terms.append(x[..., part] * values[:, part].astype(jnp.float32))
  # They are added by pairs: rounding errors grow with the depth of the tree, not with its leaves.
  while len(terms) > 1:
    terms = [sum(terms[i : i + 2]) for i in range(0, len(terms), 2)]
  # Without the barrier, the last sums would be fused into the computation of the terms.
  return jax.lax.optimization_barrier(terms[0]) @ jnp.ones(width)


def _product_by_blocks(x: Array, values: Array) -> Array:
  """Converts `BLOCK` output channels at a time, which stay in the cache."""
  outputs = values.shape[0]
  size = min(BLOCK, outputs)

  def multiply_block(i: Array, y: Array) -> Array:
    start = jnp.minimum(i * size, outputs - size)  # the last block overlaps the one before
    part = _product(x, jax.lax.dynamic_slice_in_dim(values, start, size))
    return jax.lax.dynamic_update_slice_in_dim(y, part, start, 1)

  num_blocks = -(-outputs // size)
  return jax.lax.fori_loop(0, num_blocks, multiply_block, jnp.zeros((x.shape[0], outputs)))
