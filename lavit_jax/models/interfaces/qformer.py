"""BLIP-2's Q-Former: learned queries that read an image, and may read a text with it.

It is a BERT whose odd layers have no cross-attention. Queries and text share the self-attention,
and have MLPs of their own. Sources: Li et al. 2023, BLIP-2, section 3.1; Dai et al. 2023,
InstructBLIP, section 2.3.

Axes: B images, N rows of features, E feature width, Q queries, T text slots, D width, V vocabulary,
H width of the language model.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from lavit_jax.models.attention import Attend, CrossAttention, attention
from lavit_jax.models.interfaces.base import (
  NO_CONTEXT,
  Context,
  VisualTokens,
  all_count,
  require,
)
from lavit_jax.models.layers import Dtype, LayerNorm, Mlp
from lavit_jax.models.remat import scan_blocks
from lavit_jax.sharding import constrain_batch

BERT_EPSILON = 1e-12
LAYERS_OF_A_PAIR = 2  # one with cross-attention, one without


class QFormerOutput(NamedTuple):
  """The last hidden states.

  Attributes:
    queries: dtype[B, Q, D]; Q is 0 without an image.
    text: dtype[B, T, D]; T is 0 without a text.
  """

  queries: Array
  text: Array


def joint_mask(num_queries: int, text_mask: Array, causal: bool = False) -> Array:
  """Who sees whom among two queries and three words, of which the last is padding.

        matching         causal
        q q w w w        q q w w w
      q x x x x .      q x x . . .
      q x x x x .      q x x . . .
      w x x x x .      w x x x . .
      w x x x x .      w x x x x .
      w x x x x .      w x x x x .

  Args:
    num_queries: Q.
    text_mask: bool[B, T], False in padding.
    causal: whether a word sees no later one, and queries see no word (captioning).

  Returns:
    bool[B, 1, Q + T, Q + T], queries of the attention down.
  """
  batch, num_words = text_mask.shape
  present = jnp.concatenate([jnp.ones((batch, num_queries), bool), text_mask], axis=1)
  mask = present[:, None, None, :]
  slots = jnp.arange(num_queries + num_words)
  if causal:
    earlier = slots[:, None] >= slots
    return mask & (earlier | (slots < num_queries))
  return jnp.broadcast_to(mask, (batch, 1, len(slots), len(slots)))


class Dropout(NamedTuple):
  """Sets a share of the values to zero, and scales the others; without a key it does nothing."""

  rate: float
  key: Array | None

  def part(self, number: int) -> Dropout:
    """Dropout for one place of a layer."""
    return self if self.key is None else Dropout(self.rate, jax.random.fold_in(self.key, number))

  def __call__(self, x: Array) -> Array:
    """[...] -> [...]."""
    if self.key is None or self.rate == 0:
      return x
    kept = jax.random.bernoulli(self.key, 1 - self.rate, x.shape)
    return jnp.where(kept, x / (1 - self.rate), jnp.zeros((), x.dtype))


class QFormerLayer(nn.Module):
  """Self-attention of all, cross-attention of the queries, an MLP for each kind; post-norm.

  It sows its output as the intermediate 'stream' [B, Q + T, D].
  """

  num_heads: int
  mlp_dim: int
  has_cross: bool
  has_text: bool
  dropout_rate: float
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: Array, num_queries: int, features: Array | None, mask: Array, key: Array | None
  ) -> Array:
    """Input x [B, Q + T, D] -> dtype[B, Q + T, D]."""
    drop = Dropout(self.dropout_rate, key)

    def attend(part: int) -> Attend:
      return partial(attention, mask=mask if part == 0 else None, dropout=drop.part(part))

    def add(x: Array, change: Array, name: str, part: int) -> Array:
      return LayerNorm(BERT_EPSILON, self.dtype, name=name)(x + drop.part(part)(change))

    def attention_layer(name: str) -> CrossAttention:
      return CrossAttention(self.num_heads, self.dtype, name=name)

    def mlp(name: str) -> Mlp:
      return Mlp(self.mlp_dim, self.dtype, name=name)

    x = constrain_batch(x)
    x = add(x, attention_layer('self_attn')(x, x, attend(0)), 'self_norm', 1)
    queries = x[:, :num_queries]
    text = x[:, num_queries:]
    if num_queries:
      if self.has_cross:
        assert features is not None
        crossed = attention_layer('cross_attn')(queries, features, attend(2))
        queries = add(queries, crossed, 'cross_norm', 3)
      queries = add(queries, mlp('query_mlp')(queries), 'query_norm', 4)
    if self.has_text and text.shape[1]:
      text = add(text, mlp('text_mlp')(text), 'text_norm', 5)
    x = jnp.concatenate([queries, text], axis=1)
    self.sow('intermediates', 'stream', x)
    return x


class QFormerPair(nn.Module):
  """A layer with cross-attention, and one without."""

  num_queries: int
  num_heads: int
  mlp_dim: int
  has_text: bool
  dropout_rate: float
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: Array, features: Array | None, mask: Array, keys: Array | None
  ) -> tuple[Array, None]:
    """Input x [B, Q + T, D], keys [2] -> (dtype[B, Q + T, D], None)."""
    for number, name in enumerate(('cross_layer', 'plain_layer')):
      layer = QFormerLayer(
        self.num_heads,
        self.mlp_dim,
        has_cross=number == 0,
        has_text=self.has_text,
        dropout_rate=self.dropout_rate,
        dtype=self.dtype,
        name=name,
      )
      key = None if keys is None else keys[number]
      num_queries = 0 if features is None else self.num_queries
      x = layer(x, num_queries, features, mask, key)
    return x, None


class QFormer(nn.Module):
  """The Q-Former; the published one is (32, 768, 12, 12, 3072), with a vocabulary of 30,523.

  Attributes:
    num_queries: Q.
    hidden_size: D.
    num_layers: an even number; layers 0, 2, 4, ... have cross-attention.
    num_heads: of every attention.
    mlp_dim: hidden width of the MLPs.
    vocab_size: V, or 0 for the queries alone.
    max_positions: longest text.
    dropout_rate: of training, where a call has a key.
    dtype: of the computation.
    remat: policy of the layers ('none' or a key of `remat.REMAT_POLICIES`).
  """

  num_queries: int
  hidden_size: int
  num_layers: int
  num_heads: int
  mlp_dim: int
  vocab_size: int = 0
  max_positions: int = 512
  dropout_rate: float = 0.1
  dtype: Dtype = jnp.float32
  remat: str = 'none'

  def setup(self):
    """Makes the parameters and submodules."""
    if self.num_layers % LAYERS_OF_A_PAIR:
      raise ValueError(f'num_layers={self.num_layers} must be even: every other layer crosses')
    table = nn.initializers.normal(0.02)
    width = self.hidden_size
    self.query_tokens = self.param('query_tokens', table, (self.num_queries, width))
    if self.vocab_size:
      self.word_embed = self.param('word_embed', table, (self.vocab_size, width))
      self.pos_embed = self.param('pos_embed', table, (self.max_positions, width))
    self.embed_norm = LayerNorm(BERT_EPSILON, self.dtype)
    in_axes = (nn.broadcast, nn.broadcast, 0)
    num_pairs = self.num_layers // LAYERS_OF_A_PAIR
    self.pairs = scan_blocks(QFormerPair, num_pairs, self.remat, in_axes)(
      self.num_queries,
      self.num_heads,
      self.mlp_dim,
      bool(self.vocab_size),
      self.dropout_rate,
      self.dtype,
    )

  def __call__(
    self,
    features: Array,
    text: Array | None = None,
    text_mask: Array | None = None,
    *,
    causal: bool = False,
    key: Array | None = None,
  ) -> QFormerOutput:
    """Reads images, and texts with them.

    Args:
      features: [B, N, E], normalized.
      text: ids i32[B, T]; None for the queries alone.
      text_mask: bool[B, T], False in padding; None if there is none.
      causal: see `joint_mask`.
      key: one key for dropout; None without it.
    """
    batch = features.shape[0]
    queries = self.query_tokens.astype(self.dtype)
    queries = jnp.broadcast_to(queries, (batch, *queries.shape))
    text, text_mask = self._complete(batch, text, text_mask)
    x = jnp.concatenate([queries, self._embed_text(text)], axis=1)
    mask = joint_mask(self.num_queries, text_mask, causal)
    x = self._run(x, features, mask, key)
    return QFormerOutput(x[:, : self.num_queries], x[:, self.num_queries :])

  def encode_text(
    self, text: Array, text_mask: Array | None = None, key: Array | None = None
  ) -> Array:
    """Texts without images: ids i32[B, T] and bool[B, T] -> dtype[B, T, D]."""
    text, text_mask = self._complete(len(text), text, text_mask)
    return self._run(self._embed_text(text), None, joint_mask(0, text_mask), key)

  def _complete(
    self, batch: int, text: Array | None, text_mask: Array | None
  ) -> tuple[Array, Array]:
    if text is None:
      # `init` sees a word, so that it makes all parameters.
      num_words = 1 if self.is_initializing() and self.vocab_size else 0
      text = jnp.zeros((batch, num_words), jnp.int32)
      text_mask = None
    elif not self.vocab_size:
      raise ValueError('this Q-Former has vocab_size=0 and reads no text')
    if text_mask is None:
      text_mask = jnp.ones(text.shape, bool)
    return text, text_mask

  def _embed_text(self, text: Array) -> Array:
    """Ids i32[B, T] -> dtype[B, T, D], before the norm; queries have no positions."""
    if not self.vocab_size:
      return jnp.zeros((*text.shape, self.hidden_size), self.dtype)
    embedded = self.word_embed[text] + self.pos_embed[: text.shape[1]]
    return embedded.astype(self.dtype)

  def _run(self, x: Array, features: Array | None, mask: Array, key: Array | None) -> Array:
    x = self.embed_norm(x)
    keys = None
    if key is not None:
      split = jax.random.split(key, 1 + self.num_layers)
      x = Dropout(self.dropout_rate, split[0])(x)
      keys = split[1:].reshape(-1, LAYERS_OF_A_PAIR)
    x, _ = self.pairs(x, features, mask, keys)
    return x


class QFormerInterface(nn.Module):
  """Norm of the features, Q-Former and Linear(D, H): BLIP-2, and with a vocabulary InstructBLIP."""

  llm_dim: int
  num_queries: int
  hidden_size: int
  num_layers: int
  num_heads: int
  mlp_dim: int
  vocab_size: int = 0
  max_positions: int = 512
  dropout_rate: float = 0.1
  dtype: Dtype = jnp.float32
  remat: str = 'none'

  in_sequence = True

  def num_vectors(self, num_features: int) -> int:
    """Q."""
    del num_features
    return self.num_queries

  def setup(self):
    """Makes the submodules."""
    self.ln_vision = LayerNorm(1e-5, self.dtype)
    self.qformer = QFormer(
      self.num_queries,
      self.hidden_size,
      self.num_layers,
      self.num_heads,
      self.mlp_dim,
      self.vocab_size,
      self.max_positions,
      self.dropout_rate,
      self.dtype,
      self.remat,
    )
    self.vit_proj = nn.Dense(self.llm_dim, dtype=self.dtype)

  def __call__(self, features: Array, context: Context = NO_CONTEXT) -> VisualTokens:
    """Features [B, N, E] with CLS; the instruction counts if the Q-Former has a vocabulary.

    See `VisualInterface`.
    """
    text = None
    if self.vocab_size:
      text = require(context.instruction, 'instruction', 'QFormerInterface with a vocabulary')
    out = self.qformer(self.ln_vision(features), text, context.instruction_mask, key=context.key)
    return all_count(self.vit_proj(out.queries))
