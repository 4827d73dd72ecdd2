"""LaVIT's continuous tokens under the protocol of the interfaces (paper, section 3.1).

Axes: B images, N patches, D feature width, H width of the language model.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from lavit_jax.models.interfaces.base import NO_CONTEXT, Context, VisualTokens, require
from lavit_jax.models.layers import Dtype
from lavit_jax.models.sequence import compact
from lavit_jax.models.tokenizer import Understanding


class LavitInterface(nn.Module):
  """`Understanding`, with its parameters, and the kept vectors moved to the front."""

  hidden_size: int
  num_layers: int
  num_heads: int
  mlp_dim: int
  llm_dim: int
  dtype: Dtype = jnp.float32
  remat: str = 'none'

  in_sequence = True

  def num_vectors(self, num_features: int) -> int:
    """N: all patches may be kept."""
    return num_features

  def setup(self):
    """Makes the submodules."""
    self.understanding = Understanding(
      self.hidden_size,
      self.num_layers,
      self.num_heads,
      self.mlp_dim,
      self.llm_dim,
      self.dtype,
      self.remat,
    )
    nn.share_scope(self, self.understanding)

  def __call__(self, features: Array, context: Context = NO_CONTEXT) -> VisualTokens:
    """Patch features [B, N, D] without CLS, and `Context.keep`; see `VisualInterface`."""
    keep = require(context.keep, 'keep', 'LavitInterface')
    return VisualTokens(*compact(self.understanding(features, keep), keep))
