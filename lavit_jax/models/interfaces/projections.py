"""LLaVA's projections: a vector of the language model for every patch.

Sources: Liu et al. 2023, Visual Instruction Tuning, section 4.1 (v1), and Improved Baselines with
Visual Instruction Tuning, section 3.3 (v1.5).

Axes: B images, N patches, D feature width, H width of the language model.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from lavit_jax.models.interfaces.base import NO_CONTEXT, Context, VisualTokens, all_count
from lavit_jax.models.layers import Dtype, gelu


class LinearProjection(nn.Module):
  """LLaVA v1: one Linear(D, H) with bias."""

  llm_dim: int
  dtype: Dtype = jnp.float32

  in_sequence = True

  def num_vectors(self, num_features: int) -> int:
    """N."""
    return num_features

  @nn.compact
  def __call__(self, features: Array, context: Context = NO_CONTEXT) -> VisualTokens:
    """See `VisualInterface`."""
    del context
    return all_count(nn.Dense(self.llm_dim, dtype=self.dtype, name='vit_proj')(features))


class MlpProjection(nn.Module):
  """LLaVA v1.5, `mlp2x_gelu`: Linear(D, H), exact GELU, Linear(H, H)."""

  llm_dim: int
  dtype: Dtype = jnp.float32

  in_sequence = True

  def num_vectors(self, num_features: int) -> int:
    """N."""
    return num_features

  @nn.compact
  def __call__(self, features: Array, context: Context = NO_CONTEXT) -> VisualTokens:
    """See `VisualInterface`."""
    del context
    hidden = gelu(nn.Dense(self.llm_dim, dtype=self.dtype, name='fc1')(features))
    return all_count(nn.Dense(self.llm_dim, dtype=self.dtype, name='fc2')(hidden))
