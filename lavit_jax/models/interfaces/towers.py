"""Images -> patch features: a frozen image encoder, cut and normed as an interface expects.

    LaVIT                  Tower(eva_g)                              EVA-g, 40 blocks
    BLIP-2, InstructBLIP   Tower(eva_g, cut=1, keep_cls=True)        39 blocks; `ln_vision` follows
    Emu                    Tower(eva_g, keep_cls=True)               40 blocks; `ln_visual` follows
    LLaVA                  Tower(clip_l, cut=1)                      `hidden_states[-2]`
    OpenFlamingo           Tower(clip_l)                             as its authors trained
                           Tower(clip_l, final_norm=True)            as later open_clip computes

`ln_vision` and `ln_visual` are trained, and belong to the interfaces.

Axes: B images, N rows of features, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax import Array

from lavit_jax.models.clip_vit import ClipViT
from lavit_jax.models.vit import ViT, preprocess
from lavit_jax.sharding import constrain_batch


@dataclasses.dataclass(frozen=True)
class Tower:
  """An image encoder, and which of its features an interface reads.

  Attributes:
    encoder: the module. Its parameters are those of the whole encoder, wherever it is cut.
    cut: how many blocks at the end are left out.
    keep_cls: whether the first row is CLS, before those of the patches.
    final_norm: whether the encoder's own last norm is applied to every row.
  """

  encoder: ViT | ClipViT
  cut: int = 0
  keep_cls: bool = False
  final_norm: bool = False

  @property
  def num_features(self) -> int:
    """N."""
    return self.encoder.num_patches + int(self.keep_cls)

  def features(self, params: Mapping[str, Any], images: Array) -> Array:
    """Images uint8[B, H, W, 3] -> dtype[B, N, D].

    Raises:
      ValueError: the cut leaves no block.
    """
    return self.features_of_pixels(params, preprocess(images))

  def features_of_pixels(self, params: Mapping[str, Any], pixels: Array) -> Array:
    """Normalized images f32[B, H, W, 3] -> dtype[B, N, D]; raises as `features`."""
    num_layers = self.encoder.num_layers - self.cut
    if not 0 < num_layers <= self.encoder.num_layers:
      raise ValueError(f'cut={self.cut} must be in 0..{self.encoder.num_layers - 1}')
    encoder = self.encoder.clone(num_layers=num_layers)
    blocks = jax.tree.map(lambda leaf: leaf[:num_layers], params['blocks'])
    variables = {'params': {**params, 'blocks': blocks}}
    x: Any = encoder.apply(variables, pixels)
    x = x if self.keep_cls else x[:, 1:]
    if self.final_norm:
      x = encoder.apply(variables, x, method='final_norm')
    # Split by width as well, they make XLA compute wrong latents in the resampler's gradient.
    return constrain_batch(x)
