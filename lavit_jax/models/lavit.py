"""The variants table: every size is a row of data, and one function builds the parts from a row.

A row holds the keyword arguments of each module. The tiny model and the 7B one run the same code.

Sources: `lavit_7b` is docs/specification.md (paper, section 4.1); `tiny` and `small` are choices.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping

import jax.numpy as jnp

from lavit_jax.errors import UserError
from lavit_jax.models import settings as checkpoint_settings
from lavit_jax.models.decoder import FeatureDecoder
from lavit_jax.models.llama import Llama
from lavit_jax.models.noise_schedule import Scheduler
from lavit_jax.models.safety_checker import SafetyChecker
from lavit_jax.models.sequence import Vocabulary
from lavit_jax.models.tokenizer import DynamicTokenizer, Understanding
from lavit_jax.models.unet import UNet
from lavit_jax.models.vae import SD_SCALING_FACTOR, SDXL_SCALING_FACTOR, AutoencoderKL
from lavit_jax.models.vit import ViT

VARIANTS = {
  'tiny': dict(
    text_vocab_size=2048,
    vit=dict(
      image_size=64,
      patch_size=8,
      hidden_size=128,
      num_layers=4,
      num_heads=4,
      head_dim=32,
      mlp_dim=384,
      output_dim=128,
    ),
    tokenizer=dict(
      hidden_size=128, num_layers=2, num_heads=4, mlp_dim=384, codebook_size=1024, code_dim=16
    ),
    decoder=dict(num_layers=2, context_dims=(64,)),
    llama=dict(
      hidden_size=160, num_layers=4, num_heads=5, num_kv_heads=5, head_dim=32, mlp_dim=432
    ),
    unet=dict(
      block_out_channels=(48, 72),
      layers_per_block=1,
      down_block_attention=(False, True),
      transformer_layers=(1, 1),
      num_heads=(4, 4),
      cross_attention_dim=64,
      norm_num_groups=8,
    ),
    vae=dict(
      block_out_channels=(16, 32, 48), layers_per_block=1, norm_num_groups=8, scaling_factor=1.0
    ),
    uncond_rows=1,
  ),
  'small': dict(
    text_vocab_size=32000,
    vit=dict(
      image_size=224,
      patch_size=14,
      hidden_size=768,
      num_layers=12,
      num_heads=12,
      head_dim=64,
      mlp_dim=3072,
      output_dim=512,
    ),
    tokenizer=dict(
      hidden_size=768, num_layers=6, num_heads=12, mlp_dim=3072, codebook_size=16384, code_dim=32
    ),
    decoder=dict(num_layers=6, context_dims=(768,)),
    llama=dict(
      hidden_size=768, num_layers=12, num_heads=12, num_kv_heads=12, head_dim=64, mlp_dim=2048
    ),
    unet=dict(
      block_out_channels=(320, 640, 1280, 1280),
      layers_per_block=2,
      down_block_attention=(True, True, True, False),
      transformer_layers=(1, 1, 1, 1),
      num_heads=(8, 8, 8, 8),
      cross_attention_dim=768,
    ),
    vae=dict(
      block_out_channels=(128, 256, 512, 512), layers_per_block=2, scaling_factor=SD_SCALING_FACTOR
    ),
    safety_checker=dict(
      image_size=224,
      patch_size=14,
      hidden_size=1024,
      num_layers=24,
      num_heads=16,
      mlp_dim=4096,
      output_dim=768,
    ),
    uncond_rows=77,
  ),
  'lavit_7b': dict(
    text_vocab_size=32000,
    vit=dict(
      image_size=224,
      patch_size=14,
      hidden_size=1408,
      num_layers=40,
      num_heads=16,
      head_dim=88,
      mlp_dim=6144,
      output_dim=1024,
    ),
    tokenizer=dict(
      hidden_size=1408, num_layers=12, num_heads=16, mlp_dim=6144, codebook_size=16384, code_dim=32
    ),
    decoder=dict(num_layers=12, context_dims=(768,)),
    highres_decoder=dict(num_layers=12, context_dims=(768, 1280), pooled_dim=1280),
    llama=dict(
      hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128, mlp_dim=11008
    ),
    unet=dict(
      block_out_channels=(320, 640, 1280, 1280),
      layers_per_block=2,
      down_block_attention=(True, True, True, False),
      transformer_layers=(1, 1, 1, 1),
      num_heads=(8, 8, 8, 8),
      cross_attention_dim=768,
    ),
    vae=dict(
      block_out_channels=(128, 256, 512, 512), layers_per_block=2, scaling_factor=SD_SCALING_FACTOR
    ),
    highres_unet=dict(
      block_out_channels=(320, 640, 1280),
      layers_per_block=2,
      down_block_attention=(False, True, True),
      transformer_layers=(1, 2, 10),
      num_heads=(5, 10, 20),
      cross_attention_dim=2048,
      use_linear_projection=True,
      addition_time_embed_dim=256,
      pooled_dim=1280,
    ),
    highres_scheduler=dict(timestep_spacing='leading'),
    highres_vae=dict(
      block_out_channels=(128, 256, 512, 512),
      layers_per_block=2,
      scaling_factor=SDXL_SCALING_FACTOR,
    ),
    safety_checker=dict(
      image_size=224,
      patch_size=14,
      hidden_size=1024,
      num_layers=24,
      num_heads=16,
      mlp_dim=4096,
      output_dim=768,
    ),
    uncond_rows=77,
  ),
}


@dataclasses.dataclass(frozen=True)
class LavitModules:
  """The parts of one variant, as unbound Linen modules; their parameters travel apart, keyed by the field names."""

  variant: str
  vocabulary: Vocabulary
  vit: ViT
  tokenizer: DynamicTokenizer
  understanding: Understanding
  decoder: FeatureDecoder
  highres_decoder: FeatureDecoder | None
  llama: Llama
  unet: UNet
  vae: AutoencoderKL
  highres_unet: UNet | None
  highres_vae: AutoencoderKL | None
  safety_checker: SafetyChecker | None
  uncond_rows: int  # rows of the stored null-text embedding of the U-Net
  scheduler: Scheduler = Scheduler()  # of `unet`
  highres_scheduler: Scheduler = Scheduler()
  settings_text: str = '{}'  # of `settings`, as JSON: what is hashed

  @property
  def settings(self) -> dict[str, dict]:
    """The checkpoint's settings (models/settings.py), where they are not the variant's own."""
    return json.loads(self.settings_text)

  @property
  def image_size(self) -> int:
    """Side of the square picture that the ViT reads, in pixels."""
    return self.vit.image_size

  @property
  def num_patches(self) -> int:
    """N, the most visual tokens an image can have."""
    return (self.vit.image_size // self.vit.patch_size) ** 2


def variant_config(variant: str) -> dict:
  """The row of `VARIANTS` under this name; a `UserError` that names the nearest one if there is none."""
  if variant not in VARIANTS:
    near = difflib.get_close_matches(variant, VARIANTS, 1)
    hint = f' did you mean {near[0]!r}?' if near else ''
    raise UserError(f'unknown variant {variant!r}:{hint} known: {", ".join(VARIANTS)}')
  return VARIANTS[variant]


def build(
  variant: str, dtype: str = 'float32', remat: str = 'none', settings: Mapping | None = None
) -> LavitModules:
  """Builds the parts of a variant.

  Args:
    variant: a key of `VARIANTS`.
    dtype: the compute dtype; parameters are float32 whatever it is, and the VAE computes in float32 (specification, Image decoders).
    remat: rematerialisation policy of the scanned stacks: 'none' or a key of `layers.REMAT_POLICIES`.
    settings: of a checkpoint, {part: {field: value}} (models/settings.py); what they do not name is the variant's own.

  Raises:
    UserError: no such variant, or settings that are not known or not possible.
  """
  settings = checkpoint_settings.validate(variant, variant_config(variant), settings)
  sizes = with_settings(variant_config(variant), settings)
  common = dict(dtype=jnp.dtype(dtype), remat=remat)
  tokenizer = sizes['tokenizer']
  vocabulary = Vocabulary(
    text_size=sizes['text_vocab_size'], codebook_size=tokenizer['codebook_size']
  )
  num_patches = (sizes['vit']['image_size'] // sizes['vit']['patch_size']) ** 2
  stack = {k: tokenizer[k] for k in ('hidden_size', 'num_layers', 'num_heads', 'mlp_dim')}

  def decoder(kwargs):
    sizes = {
      **stack,
      'code_dim': tokenizer['code_dim'],
      'num_patches': num_patches,
      'pooled_dim': None,
      **kwargs,
    }
    return FeatureDecoder(**sizes, **common)

  return LavitModules(
    variant=variant,
    vocabulary=vocabulary,
    vit=ViT(**sizes['vit'], **common),
    tokenizer=DynamicTokenizer(**tokenizer, **common),
    understanding=Understanding(**stack, llm_dim=sizes['llama']['hidden_size'], **common),
    decoder=decoder(sizes['decoder']),
    highres_decoder=decoder(sizes['highres_decoder']) if 'highres_decoder' in sizes else None,
    llama=Llama(vocab_size=vocabulary.size, **sizes['llama'], **common),
    unet=UNet(**sizes['unet'], **common),
    vae=AutoencoderKL(**sizes['vae']),
    highres_unet=UNet(**sizes['highres_unet'], **common) if 'highres_unet' in sizes else None,
    highres_vae=AutoencoderKL(**sizes['highres_vae']) if 'highres_vae' in sizes else None,
    safety_checker=SafetyChecker(**sizes['safety_checker'], **common)
    if 'safety_checker' in sizes
    else None,
    uncond_rows=sizes['uncond_rows'],
    scheduler=Scheduler(**sizes.get('scheduler', {})),
    highres_scheduler=Scheduler(**sizes.get('highres_scheduler', {})),
    settings_text=json.dumps(settings, sort_keys=True),
  )


def with_settings(sizes: dict, settings: Mapping) -> dict:
  """A row of the variants table with the settings in their places; the two of schedulers may be missing there."""
  changed = dict(sizes)
  for name, fields in settings.items():
    frozen = {field: checkpoint_settings.freeze(value) for field, value in fields.items()}
    changed[name] = {**sizes.get(name, {}), **frozen}
  return changed
