"""Token ids -> embeddings: CLIP's text encoder (Radford et al. 2021, section 2.4).

Axes: B texts, S positions, D width.
"""

import chex
import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from lavit_jax.models.clip_vit import ClipBlock
from lavit_jax.models.layers import Dtype, LayerNorm
from lavit_jax.models.remat import scan_blocks


class ClipTextEncoder(nn.Module):
  """A causal transformer; that of ViT-L/14 is (49408, 77, 768, 12, 12, 3072)."""

  vocab_size: int
  max_length: int
  hidden_size: int
  num_layers: int
  num_heads: int
  mlp_dim: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, ids: Array, ends: Array) -> Array:
    """Encodes texts.

    Args:
      ids: i32[B, S], S at most `max_length`.
      ends: i32[B], the position of the end token of each text, which sees all of it.

    Returns:
      dtype[B, D], the normed state of the end token.
    """
    chex.assert_rank([ids, ends], [2, 1])
    table = nn.initializers.normal(0.02)
    words = self.param('embed', table, (self.vocab_size, self.hidden_size))
    positions = self.param('pos_embed', table, (self.max_length, self.hidden_size))
    x = (words[ids] + positions[: ids.shape[1]]).astype(self.dtype)
    make_blocks = scan_blocks(ClipBlock, self.num_layers)
    blocks = make_blocks(self.num_heads, self.mlp_dim, self.dtype, causal=True, name='blocks')
    x, _ = blocks(x)
    x = jnp.take_along_axis(x, ends[:, None, None], 1)[:, 0]
    return LayerNorm(dtype=self.dtype, name='norm')(x)
