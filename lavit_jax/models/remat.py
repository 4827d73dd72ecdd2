"""Stacks of equal blocks as one scanned body, and which activations backward keeps of each block.

Backward always keeps the input of a block. What else it keeps is a policy: a set of the names
below, which the layers give to their values by `checkpoint_name`. All other values are computed
again.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

SAVED_QKV = 'qkv'  # queries, keys and values
SAVED_ATTENTION = 'attention'  # the results of an attention kernel, before the projection
SAVED_PROJ = 'proj'  # the projected attention
SAVED_MLP_OUT = 'mlp_out'

_policies = jax.checkpoint_policies
REMAT_POLICIES = {  # from the least memory to the least computation
  'full': _policies.nothing_saveable,
  'save_qkv_proj': _policies.save_only_these_names(SAVED_QKV, SAVED_ATTENTION, SAVED_PROJ),
  'save_all_but_mlp_in': _policies.save_only_these_names(
    SAVED_QKV, SAVED_ATTENTION, SAVED_PROJ, SAVED_MLP_OUT
  ),
  'minimal': _policies.save_from_both_policies(  # every product with weights
    _policies.dots_with_no_batch_dims_saveable,
    _policies.save_only_these_names(SAVED_QKV, SAVED_ATTENTION),
  ),
}


def scan_blocks(
  block: type[nn.Module], length: int, remat: str = 'none', in_axes: Any = nn.broadcast
) -> Callable[..., Any]:
  """`length` blocks as one compiled body, their parameters stacked on axis 0.

    x, outputs = scan_blocks(Block, 12, remat)(num_heads=16, name='blocks')(x, mask)

  Values that blocks `sow` as intermediates are stacked on axis 0 too.

  Args:
    block: a module whose call takes (carry, *inputs) and returns (carry, output).
    length: number of blocks.
    remat: 'none' to keep all activations, or a key of `REMAT_POLICIES`.
    in_axes: for each input, `nn.broadcast` (all blocks get it) or the axis with one slice per
      block.

  Returns:
    A constructor of the stack, with the arguments of `block`.

  Raises:
    ValueError: an unknown policy.
  """
  if remat != 'none':
    block = remat_block(block, remat, prevent_cse=False)
  return nn.scan(
    block,
    variable_axes={'params': 0, 'intermediates': 0},
    split_rngs={'params': True},
    in_axes=in_axes,
    out_axes=0,
    length=length,
  )


def remat_block(block: type[nn.Module], remat: str, prevent_cse: bool = True) -> type[nn.Module]:
  """The block with a remat policy.

  Args:
    block: any module.
    remat: a key of `REMAT_POLICIES`.
    prevent_cse: whether XLA must not merge the two computations; a scan needs no such barrier.

  Raises:
    ValueError: an unknown policy.
  """
  if remat not in REMAT_POLICIES:
    policies = ', '.join(repr(name) for name in REMAT_POLICIES)
    raise ValueError(f"remat={remat!r} is not one of 'none', {policies}")
  return nn.remat(block, policy=REMAT_POLICIES[remat], prevent_cse=prevent_cse)
