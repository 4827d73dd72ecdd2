"""Attention over long rows: on TPUs by JAX's splash kernel, on NVIDIA's GPUs by cuDNN, which hold no scores [H, S, S]; elsewhere by products.

The program for cuDNN has been lowered, but never compiled or run: there was no GPU. It is for Ampere and later; what cuDNN refuses goes by
products.

Of packed rows: causal inside their segments, and the kernel skips the half of the scores that causality forbids. Of pictures: every position to
every position.

Axes: R rows, S slots of a row, H heads, G key-value heads, d head width.
"""

import math
from collections import Counter
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec as P

from lavit_jax.models.layers import BATCH_AXES, SAVED_ATTENTION, TENSOR_AXIS, attention
from lavit_jax.models.sequence import segment_mask

LANES = 128  # the kernel's blocks and head widths are multiples of this
BLOCK = 512  # slots of a block, at most
LONG = 1024  # slots from which on a picture's scores are a burden


def packed_attention(q: Array, k: Array, v: Array, segments: Array) -> Array:
  """Attention of each slot to the slots of its own segment up to itself, softmax in float32.

  Args:
    q: [R, S, H, d]. k, v: [R, S, G, d], where G divides H. All rotated and unscaled.
    segments: i32[R, S] (`sequence.PackedBatch.segments`).

  Returns:
    [R, S, H, d] in the dtype of v.
  """
  if _platform() == 'tpu' and q.shape[1] % LANES == 0 and q.shape[3] % LANES == 0:
    return _over_mesh(splash_attention, q, k, v, segments)
  if _platform() == 'cuda' and cudnn_takes(q):
    return _over_mesh(cudnn_attention, q, k, v, segments)
  return attention(q, k, v, segment_mask(segments))


def image_attention(q: Array, k: Array, v: Array) -> Array:
  """Attention of every position to every position, softmax in float32; [R, S, H, d] each, unscaled, to the same in the dtype of v."""
  if _platform() == 'tpu' and q.shape[1] >= LONG and q.shape[1] % LANES == 0:
    return _over_mesh(splash_attention, q, k, v)
  if _platform() == 'cuda' and q.shape[1] >= LONG and cudnn_takes(q):
    return _over_mesh(cudnn_attention, q, k, v)
  return attention(q, k, v)


def splash_attention(
  q: Array, k: Array, v: Array, segments: Array | None = None, interpret: bool = False
) -> Array:
  """`packed_attention`, or without segments `image_attention`, by the kernel, on one device; `interpret` runs it where there is no TPU.
  S is a multiple of 128, with segments d too.
  """
  length, heads = q.shape[1], q.shape[2]
  block = math.gcd(length, BLOCK)
  sizes = splash.BlockSizes(
    block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, use_fused_bwd_kernel=True
  )
  mask = splash.MultiHeadMask(
    [(splash.FullMask if segments is None else splash.CausalMask)((length, length))] * heads
  )
  kernel = splash.make_splash_mha_single_device(
    mask, block_sizes=sizes, residual_checkpoint_name=SAVED_ATTENTION, interpret=interpret
  )
  q = q * q.shape[3] ** -0.5
  inputs = [x.swapaxes(1, 2) for x in (q, k, v)]
  if segments is not None:
    inputs.append(splash.SegmentIds(segments, segments))
  return jax.vmap(kernel)(*inputs).swapaxes(1, 2).astype(v.dtype)


def cudnn_attention(q: Array, k: Array, v: Array, segments: Array | None = None) -> Array:
  """As `splash_attention`, by cuDNN. The mask of the segments becomes a bias [R, 1, S, S] in the dtype of q, the same for all heads; told that
  it is causal too, cuDNN leaves out what that forbids.
  """
  mask = None if segments is None else segment_mask(segments)
  return jax.nn.dot_product_attention(
    q, k, v, mask=mask, is_causal=segments is not None, implementation='cudnn'
  )


def cudnn_takes(q: Array) -> bool:
  """Whether cuDNN attends with such queries: of 16 bits, heads of a multiple of 8 up to 128, an even number of slots."""
  return (
    q.dtype in (jnp.bfloat16, jnp.float16)
    and q.shape[3] % 8 == 0
    and q.shape[3] <= 128
    and q.shape[1] % 2 == 0
  )


def kernel_flops(name: str, shapes: Sequence[tuple[int, ...]]) -> float:
  """Operations of one call of the kernel in a compiled program, by its name there and the shapes of its operands: forward has two
  products of [S, d] and [d, S], backward five (the scores again among them), with segments in the blocks that causality does not forbid.
  """
  times = Counter(
    shape for shape in map(tuple, shapes) if len(shape) >= 3
  )  # queries, keys and values have one shape, masks others
  *rows, heads, length, width = max(
    times, key=lambda shape: (times[shape], math.prod(shape))
  )  # of one row, that axis is left out
  blocks = length // math.gcd(length, BLOCK)
  share = (blocks + 1) / (2 * blocks) if 'segmented' in name else 1
  products = 2 if 'fwd' in name else 5
  return products * 2 * math.prod(rows) * heads * length**2 * width * share


def _platform() -> str:
  """What the program being traced is for, as its mesh says, else the machine; 'cuda' are GPUs of Ampere and later, whose kind begins so."""
  device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
  return (
    'cuda'
    if device.platform == 'gpu' and device.device_kind.startswith('NVIDIA')
    else device.platform
  )


def _over_mesh(kernel, q: Array, *others: Array) -> Array:
  """The kernel on each device's rows and heads, q, k, v and maybe segments: the compiler cannot split a kernel by itself."""
  mesh = jax.sharding.get_abstract_mesh()
  if not {*BATCH_AXES, TENSOR_AXIS} <= set(mesh.axis_names):
    return kernel(q, *others)
  rows = (
    BATCH_AXES if q.shape[0] % math.prod(mesh.shape[axis] for axis in BATCH_AXES) == 0 else None
  )
  heads = TENSOR_AXIS if others[0].shape[2] % mesh.shape[TENSOR_AXIS] == 0 else None
  spec = P(rows, None, heads)
  split = jax.shard_map(
    kernel, in_specs=(spec, spec, spec, P(rows))[: 1 + len(others)], out_specs=spec, check_vma=False
  )
  return split(q, *others)
