"""Attention over long rows by kernels that store no scores [H, S, S].

On TPUs it is JAX's splash kernel, on NVIDIA's GPUs cuDNN; elsewhere plain products
(attention.py). The program for cuDNN has been lowered, but never compiled or run: there was no
GPU. It is for Ampere and later; shapes that cuDNN refuses take plain products.

Packed rows: causal inside their segments, and the kernel skips the half of the scores that
causality forbids. Images: every position to every position.

Axes: R rows, S slots of a row, H heads, G key-value heads, d head width.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from lavit_jax.models.attention import attention
from lavit_jax.models.packing import segment_mask
from lavit_jax.models.remat import SAVED_ATTENTION
from lavit_jax.sharding import BATCH_AXES, TENSOR_AXIS, batch_shards

LANES = 128  # the blocks and head widths of the splash kernel are multiples of this
BLOCK = 512  # slots of a block, at most
LONG = 1024  # slots from which an image's scores take too much memory


def packed_attention(q: Array, k: Array, v: Array, segments: Array) -> Array:
  """Attention of each slot to the slots of its own segment up to itself, softmax in float32.

  Args:
    q: [R, S, H, d], rotated and unscaled.
    k: [R, S, G, d], rotated; G divides H.
    v: [R, S, G, d].
    segments: i32[R, S] (`packing.PackedBatch.segments`).

  Returns:
    [R, S, H, d] in the dtype of v.
  """
  chex.assert_rank([q, k, v], 4)
  chex.assert_equal_shape([k, v])
  chex.assert_shape(segments, q.shape[:2])
  platform = _platform()
  if platform == 'tpu' and q.shape[1] % LANES == 0 and q.shape[3] % LANES == 0:
    return _over_mesh(splash_attention, q, k, v, segments)
  if platform == 'cuda' and cudnn_supports(q):
    return _over_mesh(cudnn_attention, q, k, v, segments)
  return attention(q, k, v, segment_mask(segments))


def image_attention(q: Array, k: Array, v: Array) -> Array:
  """Attention of every position to every position, softmax in float32.

  Args:
    q: [R, S, H, d], unscaled.
    k: [R, S, H, d].
    v: [R, S, H, d].

  Returns:
    [R, S, H, d] in the dtype of v.
  """
  chex.assert_rank([q, k, v], 4)
  chex.assert_equal_shape([q, k, v])
  platform = _platform()
  if platform == 'tpu' and q.shape[1] >= LONG and q.shape[1] % LANES == 0:
    return _over_mesh(splash_attention, q, k, v)
  if platform == 'cuda' and q.shape[1] >= LONG and cudnn_supports(q):
    return _over_mesh(cudnn_attention, q, k, v)
  return attention(q, k, v)


def splash_attention(
  q: Array, k: Array, v: Array, segments: Array | None = None, interpret: bool = False
) -> Array:
  """The splash kernel on one device: `packed_attention`, or `image_attention` without segments.

  S is a multiple of 128, and with segments d is too.

  Args:
    q: [R, S, H, d], unscaled.
    k: [R, S, G, d].
    v: [R, S, G, d].
    segments: i32[R, S] of packed rows; None for images.
    interpret: runs the kernel where there is no TPU.

  Returns:
    [R, S, H, d] in the dtype of v.
  """
  # Only here: Pallas takes long to import, and without a TPU nothing else needs it.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  length, heads = q.shape[1:3]
  block = math.gcd(length, BLOCK)
  sizes = splash.BlockSizes(
    block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, use_fused_bwd_kernel=True
  )
  head_mask = splash.FullMask if segments is None else splash.CausalMask
  kernel: Any = splash.make_splash_mha_single_device(
    splash.MultiHeadMask([head_mask((length, length))] * heads),
    block_sizes=sizes,
    residual_checkpoint_name=SAVED_ATTENTION,
    interpret=interpret,
  )
  q = q * q.shape[3] ** -0.5
  inputs: list[Any] = [x.swapaxes(1, 2) for x in (q, k, v)]
  if segments is not None:
    inputs.append(splash.SegmentIds(segments, segments))
  return jax.vmap(kernel)(*inputs).swapaxes(1, 2).astype(v.dtype)


def cudnn_attention(q: Array, k: Array, v: Array, segments: Array | None = None) -> Array:
  """As `splash_attention`, by cuDNN.

  The mask of the segments becomes a bias [R, 1, S, S] in the dtype of q, the same for all heads.
  `is_causal` repeats a part of it: with it, cuDNN skips the products that causality forbids.
  """
  mask = None if segments is None else segment_mask(segments)
  return jax.nn.dot_product_attention(
    q, k, v, mask=mask, is_causal=segments is not None, implementation='cudnn'
  )


def cudnn_supports(q: Array) -> bool:
  """Whether cuDNN takes queries of this shape and dtype.

  It takes 16 bits, head widths that are multiples of 8 up to 128, and even numbers of slots.
  """
  length, _, width = q.shape[1:]
  is_half = q.dtype in (jnp.bfloat16, jnp.float16)
  return is_half and width % 8 == 0 and width <= 128 and length % 2 == 0


def kernel_flops(name: str, shapes: Sequence[tuple[int, ...]]) -> float:
  """Operations of one call of the splash kernel in a compiled program.

  The forward pass has two products of [S, d] and [d, S], the backward pass five (the scores are
  computed again). With segments, only blocks that causality allows count.

  Args:
    name: of the kernel in the program.
    shapes: of its operands.
  """
  # Queries, keys and values share one shape, which is the most frequent; masks have others.
  counts = Counter(tuple(shape) for shape in shapes if len(shape) >= 3)
  operand = max(counts, key=lambda shape: (counts[shape], math.prod(shape)))
  *rows, heads, length, width = operand  # a program of one row has no axis of rows
  blocks = length // math.gcd(length, BLOCK)
  share = (blocks + 1) / (2 * blocks) if 'segmented' in name else 1
  products = 2 if 'fwd' in name else 5
  return products * 2 * math.prod(rows) * heads * length**2 * width * share


def _platform() -> str:
  """The platform that the program is traced for: that of its mesh, else of this machine.

  'cuda' stands for GPUs of Ampere and later; the names of older ones do not begin with NVIDIA.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
  if device.platform == 'gpu' and device.device_kind.startswith('NVIDIA'):
    return 'cuda'
  return device.platform


def _over_mesh(kernel: Callable[..., Array], q: Array, *others: Array) -> Array:
  """Runs a kernel on each device's rows and heads: the compiler cannot split a kernel by itself.

  Args:
    kernel: of q, k, v and maybe segments.
    q: the queries.
    others: k, v and maybe segments.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not {*BATCH_AXES, TENSOR_AXIS} <= set(mesh.axis_names):
    return kernel(q, *others)
  key_heads = others[0].shape[2]
  rows = BATCH_AXES if q.shape[0] % batch_shards(mesh) == 0 else None
  heads = TENSOR_AXIS if key_heads % mesh.shape[TENSOR_AXIS] == 0 else None
  spec = P(rows, None, heads)
  in_specs = (spec, spec, spec, P(rows))[: 1 + len(others)]
  split = jax.shard_map(kernel, in_specs=in_specs, out_specs=spec, check_vma=False)
  return split(q, *others)
