"""Emu's causal transformer: learned tokens, one after the other, read an image.

It is the decoder of t5-base over embeddings of its own. Sources: Sun et al. 2023, Emu, section 2.1;
Raffel et al. 2020, T5, for the decoder.

Axes: B images, N rows of features, E feature width, n tokens, D width, h heads, d head width,
H width of the language model.
"""

from __future__ import annotations

import math
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from lavit_jax.models.attention import Attend, attend_and_project, attention
from lavit_jax.models.interfaces.base import NO_CONTEXT, Context, VisualTokens, all_count
from lavit_jax.models.layers import Dtype, LayerNorm, RMSNorm
from lavit_jax.models.remat import scan_blocks
from lavit_jax.sharding import constrain_batch

EPSILON = 1e-6  # of all norms
NUM_BUCKETS = 32  # of relative positions
MAX_DISTANCE = 128  # from here on, all distances share the last bucket


def causal_buckets(length: int) -> np.ndarray:
  """The bucket of each key for each query, i32[n, n] in [0, NUM_BUCKETS); 0 for later keys.

  Half of the buckets are for single distances, and the others grow with the logarithm.
  """
  positions = np.arange(length)
  distance = np.maximum(positions[:, None] - positions, 0)
  exact = NUM_BUCKETS // 2
  # float32, as in the published decoder: elsewhere a distance at a border has another bucket.
  ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
  share = ratio / np.float32(math.log(MAX_DISTANCE / exact))
  large = exact + (share * (NUM_BUCKETS - exact)).astype(np.int32)
  return np.where(distance < exact, distance, np.minimum(large, NUM_BUCKETS - 1))


class T5Attention(nn.Module):
  """Multi-head attention without biases; `attend` does not scale."""

  num_heads: int
  head_dim: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array, memory: Array, attend: Attend) -> Array:
    """Input x [B, n, D] and memory [B, K, E] -> dtype[B, n, D]."""

    def linear(features: int, name: str) -> nn.Dense:
      return nn.Dense(features, use_bias=False, dtype=self.dtype, name=name)

    width = self.num_heads * self.head_dim
    q = linear(width, 'query')(x)
    k = linear(width, 'key')(memory)
    v = linear(width, 'value')(memory)
    return attend_and_project(q, k, v, self.num_heads, attend, linear(x.shape[-1], 'proj'))


class T5DecoderBlock(nn.Module):
  """Causal self-attention, cross-attention to the image, and a ReLU feed-forward; pre-norm.

  It sows its output as the intermediate 'stream' [B, n, D].
  """

  num_heads: int
  head_dim: int
  mlp_dim: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array, features: Array, bias: Array) -> tuple[Array, None]:
    """Input x [B, n, D], bias f32[1, h, n, n] -> (dtype[B, n, D], None)."""

    def norm(name: str) -> RMSNorm:
      return RMSNorm(EPSILON, self.dtype, name=name)

    def attention_layer(name: str) -> T5Attention:
      return T5Attention(self.num_heads, self.head_dim, self.dtype, name=name)

    def linear(features: int, name: str) -> nn.Dense:
      return nn.Dense(features, use_bias=False, dtype=self.dtype, name=name)

    x = constrain_batch(x)
    causal = jnp.tril(jnp.ones(bias.shape[-2:], bool))
    attend = partial(attention, mask=causal, scale=1.0, bias=bias)
    y = norm('self_norm')(x)
    x = x + attention_layer('self_attn')(y, y, attend)
    y = norm('cross_norm')(x)
    x = x + attention_layer('cross_attn')(y, features, partial(attention, scale=1.0))
    hidden = nn.relu(linear(self.mlp_dim, 'fc1')(norm('mlp_norm')(x)))
    x = x + linear(x.shape[-1], 'fc2')(hidden)
    self.sow('intermediates', 'stream', x)
    return x, None


class CausalTransformer(nn.Module):
  """The decoder over its learned tokens; the published one is (32, 768, 12, 12, 64, 3072)."""

  num_tokens: int
  hidden_size: int
  num_layers: int
  num_heads: int
  head_dim: int
  mlp_dim: int
  dtype: Dtype = jnp.float32
  remat: str = 'none'

  @nn.compact
  def __call__(self, features: Array) -> Array:
    """Normed features [B, N, E] -> dtype[B, n, D]."""
    shape = (self.num_tokens, self.hidden_size)
    tokens = self.param('tokens', nn.initializers.normal(0.02), shape).astype(self.dtype)
    table_init = nn.initializers.normal(self.hidden_size**-0.5)
    table = self.param('relative_bias', table_init, (NUM_BUCKETS, self.num_heads))
    bias = jnp.moveaxis(table[causal_buckets(self.num_tokens)], -1, 0)[None]
    x = jnp.broadcast_to(tokens, (len(features), *shape))
    make_blocks = scan_blocks(T5DecoderBlock, self.num_layers, self.remat)
    blocks = make_blocks(self.num_heads, self.head_dim, self.mlp_dim, self.dtype, name='blocks')
    x, _ = blocks(x, features.astype(self.dtype), bias.astype(jnp.float32))
    return RMSNorm(EPSILON, self.dtype, name='norm')(x)


class EmuInterface(nn.Module):
  """Norm of the features, causal transformer and Linear(D, H); and the regression head.

  The head is Linear(H, H) without a bias, from hidden states to the input embeddings of the next
  slots (emu_regression.py).
  """

  llm_dim: int
  num_tokens: int
  hidden_size: int
  num_layers: int
  num_heads: int
  head_dim: int
  mlp_dim: int
  dtype: Dtype = jnp.float32
  remat: str = 'none'

  in_sequence = True

  def num_vectors(self, num_features: int) -> int:
    """The learned tokens, n."""
    del num_features
    return self.num_tokens

  def setup(self):
    """Makes the submodules."""
    self.ln_visual = LayerNorm(EPSILON, self.dtype)
    self.transformer = CausalTransformer(
      self.num_tokens,
      self.hidden_size,
      self.num_layers,
      self.num_heads,
      self.head_dim,
      self.mlp_dim,
      self.dtype,
      self.remat,
    )
    self.vit_proj = nn.Dense(self.llm_dim, dtype=self.dtype)
    init = nn.initializers.normal(0.02)
    self.head = nn.Dense(self.llm_dim, use_bias=False, dtype=self.dtype, kernel_init=init)

  def __call__(self, features: Array, context: Context = NO_CONTEXT) -> VisualTokens:
    """Features [B, N, E] with CLS; see `VisualInterface`."""
    del context
    vectors = self.vit_proj(self.transformer(self.ln_visual(features)))
    if self.is_initializing():
      self.regress(vectors)  # so that `init` makes the parameters of the head, too
    return all_count(vectors)

  def regress(self, hidden: Array) -> Array:
    """See `RegressingInterface`."""
    return self.head(hidden)
