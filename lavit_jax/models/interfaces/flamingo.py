"""Flamingo: a resampler (resampler.py), and gated layers that read it (gated_cross_attention.py).

Source: Alayrac et al. 2022, Flamingo, section 2; the sizes are OpenFlamingo's.

Axes: B images, N rows of features, n latents, W width of features and latents, H width of the
language model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from lavit_jax.models.interfaces.base import (
  NO_CONTEXT,
  Context,
  RowImages,
  VisualTokens,
  all_count,
)
from lavit_jax.models.interfaces.gated_cross_attention import GatedLayers
from lavit_jax.models.interfaces.resampler import PerceiverResampler
from lavit_jax.models.layers import Dtype
from lavit_jax.models.llama import ExtraLayers


class FlamingoInterface(nn.Module):
  """The latents for the gated layers of the language model; the sequence has brackets alone.

  Attributes:
    llm_dim: H.
    llm_layers: of the language model.
    every: a gated layer stands before the last of this many of them.
    num_latents: n.
    num_layers: of the resampler.
    num_heads: of the attention, in the resampler and in the gated layers.
    head_dim: its width of a head.
    mlp_dim: hidden width of the resampler's feed-forwards; in the gated layers it is 4 * H.
    dtype: of the computation.
    remat: policy of the resampler's stack. Gated layers have that of the language model.
  """

  llm_dim: int
  llm_layers: int
  every: int
  num_latents: int
  num_layers: int
  num_heads: int
  head_dim: int
  mlp_dim: int
  dtype: Dtype = jnp.float32
  remat: str = 'none'

  in_sequence = False

  def num_vectors(self, num_features: int) -> int:
    """n, none of which takes a slot of the sequence."""
    del num_features
    return self.num_latents

  def setup(self):
    """Makes the submodules."""
    self.resampler = PerceiverResampler(
      self.num_latents,
      self.num_layers,
      self.num_heads,
      self.head_dim,
      self.mlp_dim,
      self.dtype,
      self.remat,
    )
    self.gated = GatedLayers(**self._gated_fields())

  def _gated_fields(self) -> dict[str, Any]:
    return dict(
      num_layers=self.llm_layers // self.every,
      hidden_size=self.llm_dim,
      num_heads=self.num_heads,
      head_dim=self.head_dim,
      mlp_dim=4 * self.llm_dim,
      every=self.every,
      dtype=self.dtype,
    )

  def __call__(self, features: Array, context: Context = NO_CONTEXT) -> VisualTokens:
    """Features [B, N, W] -> vectors [B, n, W]; see `VisualInterface`."""
    del context
    vectors = self.resampler(features)
    if self.is_initializing():
      # The gated layers run inside the language model, but their parameters are of this module.
      slot = jnp.zeros((len(vectors), 1, self.llm_dim))
      self.gated(slot, RowImages(vectors[:, None], jnp.zeros(slot.shape[:2], jnp.int32)))
    return all_count(vectors)

  @nn.nowrap
  def extra_layers(self, params: Mapping[str, Any], images: RowImages) -> ExtraLayers:
    """See `LayeredInterface`."""
    gated = GatedLayers(**self._gated_fields(), parent=None)
    return gated.extra_layers(params['gated'], images)
