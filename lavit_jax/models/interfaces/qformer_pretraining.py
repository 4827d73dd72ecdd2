"""The Q-Former with the heads of its first stage, which needs no language model.

Source: Li et al. 2023, BLIP-2, section 3.2. There are three passes: queries with the caption
(causal: captioning, and, as queries see no word, the queries for contrast), the caption alone, and
queries with captions that may belong to another image (matching).

Axes: B pairs, N rows of features, E feature width, Q queries, D width, P width of the common space,
T text slots, V vocabulary.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from lavit_jax.models.interfaces.qformer import BERT_EPSILON, QFormer
from lavit_jax.models.interfaces.qformer_losses import (
  captioning_loss,
  contrastive_loss,
  hard_negatives,
  matching_loss,
  similarities,
)
from lavit_jax.models.layers import Dtype, LayerNorm, gelu
from lavit_jax.models.quantizer import l2_normalize
from lavit_jax.sharding import constrain_batch

INITIAL_TEMPERATURE = 0.07
FORMS = 3  # of a pair in matching: as it is, with another image, with another text


class QFormerLosses(NamedTuple):
  """The losses, f32[] each, with equal weights in the published sum; and what to log.

  Attributes:
    contrastive: ITC.
    matching: ITM.
    captioning: ITG.
    image_to_text: share of the images whose most similar text is theirs.
    matched: share of right decisions of ITM.
  """

  contrastive: Array
  matching: Array
  captioning: Array
  image_to_text: Array
  matched: Array

  @property
  def total(self) -> Array:
    """The sum of the three, f32[]."""
    return self.contrastive + self.matching + self.captioning


class QFormerPretraining(nn.Module):
  """Q-Former, norm of the features, and heads; the published `output_dim` is 256."""

  num_queries: int
  hidden_size: int
  num_layers: int
  num_heads: int
  mlp_dim: int
  vocab_size: int
  output_dim: int = 256
  max_positions: int = 512
  dropout_rate: float = 0.1
  dtype: Dtype = jnp.float32
  remat: str = 'none'

  def setup(self):
    """Makes the parameters and submodules."""

    def dense(features: int) -> nn.Dense:
      return nn.Dense(features, dtype=self.dtype)

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
    self.image_proj = dense(self.output_dim)
    self.text_proj = dense(self.output_dim)
    self.matching_head = dense(2)
    self.word_fc = dense(self.hidden_size)
    self.word_norm = LayerNorm(BERT_EPSILON, self.dtype)
    self.word_bias = self.param('word_bias', nn.initializers.zeros, (self.vocab_size,))
    self.temperature = self.param('temperature', nn.initializers.constant(INITIAL_TEMPERATURE), ())

  def __call__(
    self,
    features: Array,
    text: Array,
    text_mask: Array,
    negative_keys: Array,
    *,
    decode_id: int,
    key: Array | None = None,
  ) -> QFormerLosses:
    """The losses of a batch.

    Args:
      features: [B, N, E] of the tower, with CLS.
      text: ids i32[B, T]; the first is CLS, and captioning has `decode_id` in its place.
      text_mask: bool[B, T], False in padding.
      negative_keys: typed keys [B, 2], which draw the negatives of each row.
      decode_id: of the decode token, outside BERT's own vocabulary.
      key: one key for dropout; None without it.
    """
    parts = [None] * FORMS if key is None else list(jax.random.split(key, FORMS))
    features = self.ln_vision(features)
    caption = text.at[:, 0].set(decode_id)
    read = self.qformer(features, caption, text_mask, causal=True, key=parts[0])
    captioning = captioning_loss(self.word_logits(read.text), caption, text_mask)

    # `read.queries` are those of the image alone: queries see no word of a causal text.
    texts = self.project_texts(text, text_mask, parts[1])
    cosines = similarities(self.project_images(read.queries), texts)
    own = jnp.arange(len(cosines))

    other_text = hard_negatives(cosines, self.temperature, negative_keys[:, 0])
    other_image = hard_negatives(cosines.T, self.temperature, negative_keys[:, 1])
    # [B, 3, ...] and not [3, B, ...]: all forms of a pair stay on the device of its row.
    of_image = jnp.stack([own, other_image, own], axis=1).reshape(-1)
    of_text = jnp.stack([own, own, other_text], axis=1).reshape(-1)
    logits = self.matching_logits(
      constrain_batch(features[of_image]), text[of_text], text_mask[of_text], parts[2]
    )
    is_pair = of_image == of_text
    return QFormerLosses(
      contrastive_loss(cosines, self.temperature),
      matching_loss(logits, is_pair),
      captioning,
      (cosines.argmax(-1) == own).mean(),
      (logits.argmax(-1) == is_pair).mean(),
    )

  def similarities(self, features: Array, text: Array, text_mask: Array) -> Array:
    """The similarities of images [B, N, E] and texts i32[B, T], f32[B, B]: images down."""
    queries = self.qformer(self.ln_vision(features)).queries
    return similarities(self.project_images(queries), self.project_texts(text, text_mask))

  def project_images(self, queries: Array) -> Array:
    """Queries [B, Q, D] that read an image alone -> f32[B, Q, P] of unit length."""
    return l2_normalize(self.image_proj(queries))

  def project_texts(self, text: Array, text_mask: Array, key: Array | None = None) -> Array:
    """Ids i32[B, T] and bool[B, T] -> f32[B, P] of unit length."""
    return l2_normalize(self.text_proj(self.qformer.encode_text(text, text_mask, key)[:, 0]))

  def matching_logits(
    self, features: Array, text: Array, text_mask: Array, key: Array | None = None
  ) -> Array:
    """Normed features [B, N, E] and texts -> f32[B, 2]; class 1 is a pair."""
    queries = self.qformer(features, text, text_mask, key=key).queries
    return self.matching_head(queries).astype(jnp.float32).mean(1)

  def word_logits(self, text: Array) -> Array:
    """Hidden states of words [..., D] -> f32[..., V], by the embedding of words."""
    hidden = self.word_norm(gelu(self.word_fc(text)))
    table = self.qformer.word_embed.astype(self.dtype)
    logits = jnp.matmul(hidden, table.T, preferred_element_type=jnp.float32)
    return logits + self.word_bias
