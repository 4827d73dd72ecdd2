"""Patch features -> discrete visual tokens of dynamic number: select, merge, quantize.

Source: paper, section 3.1. `keep` f32[B, N] is 1 where a patch becomes a token, and 0 where it is
dropped and merged; all N slots stay in the arrays.

Axes: B images, N patches, D feature width, K codes, C code width, H language-model width, L layers.
"""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from lavit_jax.models.layers import Dtype
from lavit_jax.models.lora import Dense
from lavit_jax.models.merger import Merged, Merger
from lavit_jax.models.quantizer import Quantizer
from lavit_jax.models.selector import Selector, gumbel_keep


class TokenizerOutput(NamedTuple):
  """The tokens of a feature map; slots of `ids` and `codes` count only where `keep` is 1.

  Attributes:
    log_probs: f32[B, N, 2]; class 0 is keep.
    keep: f32[B, N]; 0 or 1.
    merged: [B, N, D].
    ids: i32[B, N].
    codes: f32[B, N, C]; the codebook rows of `ids`.
    in_bucket: f32[]; see `merger.Merged`.
  """

  log_probs: Array
  keep: Array
  merged: Array
  ids: Array
  codes: Array
  in_bucket: Array


class DynamicTokenizer(nn.Module):
  """Selector, merger and quantizer: a feature map becomes as many discrete tokens as it needs.

  `counterfactual` and `capacities` are those of the merger.
  """

  hidden_size: int
  num_layers: int
  num_heads: int
  mlp_dim: int
  codebook_size: int
  code_dim: int
  dtype: Dtype = jnp.float32
  remat: str = 'none'
  counterfactual: bool = False
  capacities: tuple[int, ...] = ()

  def setup(self):
    """Makes the parameters and submodules."""
    self.selector = Selector(self.hidden_size)
    self.merger = Merger(
      self.hidden_size,
      self.num_layers,
      self.num_heads,
      self.mlp_dim,
      self.dtype,
      self.remat,
      self.counterfactual,
      self.capacities,
    )
    self.quantizer = Quantizer(self.hidden_size, self.codebook_size, self.code_dim, self.dtype)

  def __call__(self, x: Array, key: Array | None = None) -> TokenizerOutput:
    """Tokenizes patch features.

    Args:
      x: [B, N, D], without the CLS row.
      key: samples the choice of patches; one key, or keys [B], one for each image. Without a key
        the choice is deterministic.
    """
    log_probs = self.select(x)
    keep = gumbel_keep(log_probs, key=key)
    merged, in_bucket = self.merge_outputs(x, keep)
    ids, _ = self.quantize(merged)
    return TokenizerOutput(log_probs, keep, merged, ids, self.lookup(ids), in_bucket)

  def select(self, x: Array) -> Array:
    """[B, N, D] -> log-probabilities f32[B, N, 2]."""
    return self.selector(x)

  def merge(self, x: Array, keep: Array) -> Array:
    """[B, N, D] and keep f32[B, N] -> dtype[B, N, D]."""
    return self.merger(x, keep)

  def merge_outputs(self, x: Array, keep: Array, selector_trains: bool | Array = False) -> Merged:
    """Merges as `merge` does, and returns `in_bucket` too; see `Merger.merge`."""
    return self.merger.merge(x, keep, selector_trains)

  def quantize(self, merged: Array) -> tuple[Array, Array]:
    """[B, N, D] -> (ids i32[B, N], z f32[B, N, C])."""
    return self.quantizer(merged)

  def lookup(self, ids: Array) -> Array:
    """i32[...] -> code vectors f32[..., C]."""
    return self.quantizer.lookup(ids)


class Understanding(nn.Module):
  """Continuous tokens for the language model: stage 2's own merger, then a projection.

  `capacities` is that of the merger.
  """

  hidden_size: int
  num_layers: int
  num_heads: int
  mlp_dim: int
  llm_dim: int
  dtype: Dtype = jnp.float32
  remat: str = 'none'
  capacities: tuple[int, ...] = ()

  def setup(self):
    """Makes the submodules."""
    self.merger = Merger(
      self.hidden_size,
      self.num_layers,
      self.num_heads,
      self.mlp_dim,
      self.dtype,
      self.remat,
      capacities=self.capacities,
    )
    self.vit_proj = Dense(self.llm_dim, dtype=self.dtype)

  def __call__(self, x: Array, keep: Array) -> Array:
    """Patch features [B, N, D] and keep f32[B, N] -> dtype[B, N, H]."""
    return self.merge_outputs(x, keep).rows

  def merge_outputs(self, x: Array, keep: Array) -> Merged:
    """Merges and projects as the call does, and returns `in_bucket` too."""
    merged = self.merger.merge(x, keep)
    return merged._replace(rows=self.vit_proj(merged.rows))
