"""Flamingo's Perceiver resampler: learned latents that attend to the patches of an image.

Two interfaces: its latents go into the sequence by a Linear(W, H), or the gated layers of the
language model attend to them (flamingo.py). Source: Alayrac et al. 2022, Flamingo,
section 2.1; the sizes and details are OpenFlamingo's.

Axes: B images, N rows of features, n latents, W width of features and latents, H width of the
language model.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from lavit_jax.models.attention import QKV, attend_and_project, attention
from lavit_jax.models.interfaces.base import NO_CONTEXT, Context, VisualTokens, all_count
from lavit_jax.models.layers import Dtype, LayerNorm, gelu
from lavit_jax.models.remat import scan_blocks
from lavit_jax.sharding import constrain_batch


class FeedForward(nn.Module):
  """Norm, Linear, exact GELU, Linear, without biases."""

  mlp_dim: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[..., W] -> dtype[..., W]."""

    def linear(features: int, name: str) -> nn.Dense:
      return nn.Dense(features, use_bias=False, dtype=self.dtype, name=name)

    hidden = linear(self.mlp_dim, 'fc1')(LayerNorm(dtype=self.dtype, name='norm')(x))
    return linear(x.shape[-1], 'fc2')(gelu(hidden))


class ResamplerBlock(nn.Module):
  """Latents attend to patches and latents, then a feed-forward; each is added.

  It sows its output as the intermediate 'stream' [B, n, W].
  """

  num_heads: int
  head_dim: int
  mlp_dim: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, latents: Array, features: Array) -> tuple[Array, None]:
    """Latents [B, n, W] and features [B, N, W] -> (dtype[B, n, W], None)."""
    width = self.num_heads * self.head_dim
    latents = constrain_batch(latents)
    queries = LayerNorm(dtype=self.dtype, name='latent_norm')(latents)
    media = LayerNorm(dtype=self.dtype, name='media_norm')(features)
    q = nn.Dense(width, use_bias=False, dtype=self.dtype, name='query')(queries)
    seen = jnp.concatenate([media, queries], axis=1)
    k, v = QKV(width, use_bias=False, dtype=self.dtype, count=2, name='kv')(seen)
    project = nn.Dense(latents.shape[-1], use_bias=False, dtype=self.dtype, name='proj')
    latents = latents + attend_and_project(q, k, v, self.num_heads, attention, project)
    latents = latents + FeedForward(self.mlp_dim, self.dtype, name='mlp')(latents)
    self.sow('intermediates', 'stream', latents)
    return latents, None


class PerceiverResampler(nn.Module):
  """The resampler; OpenFlamingo's is (64, 6, 8, 64, 4096), 1024 wide."""

  num_latents: int
  num_layers: int
  num_heads: int
  head_dim: int
  mlp_dim: int
  dtype: Dtype = jnp.float32
  remat: str = 'none'

  @nn.compact
  def __call__(self, features: Array) -> Array:
    """Features [B, N, W] -> dtype[B, n, W]."""
    batch, _, width = features.shape
    latents = self.param('latents', nn.initializers.normal(1.0), (self.num_latents, width))
    latents = jnp.broadcast_to(latents.astype(self.dtype), (batch, *latents.shape))
    make_blocks = scan_blocks(ResamplerBlock, self.num_layers, self.remat)
    blocks = make_blocks(self.num_heads, self.head_dim, self.mlp_dim, self.dtype, name='blocks')
    latents, _ = blocks(latents, features)
    return LayerNorm(dtype=self.dtype, name='norm')(latents)


class ResamplerInterface(nn.Module):
  """The latents in the sequence, by a Linear(W, H)."""

  llm_dim: int
  num_latents: int
  num_layers: int
  num_heads: int
  head_dim: int
  mlp_dim: int
  dtype: Dtype = jnp.float32
  remat: str = 'none'

  in_sequence = True

  def num_vectors(self, num_features: int) -> int:
    """The latents, n."""
    del num_features
    return self.num_latents

  @nn.compact
  def __call__(self, features: Array, context: Context = NO_CONTEXT) -> VisualTokens:
    """See `VisualInterface`."""
    del context
    resampler = PerceiverResampler(
      self.num_latents,
      self.num_layers,
      self.num_heads,
      self.head_dim,
      self.mlp_dim,
      self.dtype,
      self.remat,
      name='resampler',
    )
    project = nn.Dense(self.llm_dim, dtype=self.dtype, name='vit_proj')
    return all_count(project(resampler(features)))
