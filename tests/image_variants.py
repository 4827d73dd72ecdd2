"""Variants with small image decoders, and their random parameters."""

import jax
import numpy as np
from nano import NANO

from lavit_jax.inference import generation_config
from lavit_jax.models import lavit
from lavit_jax.weights.torch import name_tables

SDXL = dict(
  block_out_channels=(8, 16),
  layers_per_block=1,
  down_block_attention=(False, True),
  transformer_layers=(1, 2),
  num_heads=(2, 2),
  norm_num_groups=4,
  use_linear_projection=True,
  addition_time_embed_dim=8,
)
HIGHRES_VAE = dict(
  block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, scaling_factor=0.5
)
CHECKER = dict(
  image_size=16, patch_size=8, hidden_size=16, num_layers=2, num_heads=2, mlp_dim=24, output_dim=12
)
CONFIGS = {
  'both': {
    **NANO,
    'highres_decoder': dict(num_layers=1, context_dims=(16, 24), pooled_dim=20),
    'highres_vae': HIGHRES_VAE,
    'highres_unet': dict(SDXL, cross_attention_dim=40, pooled_dim=20),
    'safety_checker': CHECKER,
    'uncond_rows': 3,
  },
  'golden': dict(  # of tests/data/golden/config.json
    text_vocab_size=100,
    vit=dict(
      image_size=56,
      patch_size=14,
      hidden_size=64,
      num_layers=3,
      num_heads=4,
      head_dim=16,
      mlp_dim=279,
      output_dim=32,
    ),
    tokenizer=dict(
      hidden_size=64, num_layers=2, num_heads=4, mlp_dim=279, codebook_size=128, code_dim=8
    ),
    llama=NANO['llama'],
    decoder=dict(num_layers=2, context_dims=(24,)),
    highres_decoder=dict(num_layers=2, context_dims=(24, 40), pooled_dim=40),
    unet={**NANO['unet'], 'cross_attention_dim': 24},
    vae={**NANO['vae'], 'scaling_factor': 0.18},
    uncond_rows=3,
    highres_unet=dict(SDXL, cross_attention_dim=64, pooled_dim=40),
    highres_vae=HIGHRES_VAE,
  ),
}


def install(patch):
  """Adds the variants to the table while `patch`, a MonkeyPatch, lasts."""
  for name, config in CONFIGS.items():
    patch.setitem(lavit.VARIANTS, name, config)
  patch.setitem(
    generation_config.VARIANT_DEFAULTS,
    'both',
    generation_config.VariantDefaults(
      (1, 4), (1, 4), (2, 4), 16, highres_sizes=((16, 24), (24, 16))
    ),
  )


def random_params(variant, *names):
  """Random parameters that keep signals at about one, by numpy, so that nothing compiles."""
  rng = np.random.default_rng(1)

  def normal(leaf):
    fan_in = np.prod(leaf.shape[-2:-1] if leaf.ndim < 4 else leaf.shape[:3])
    return jax.device_put(rng.normal(0, fan_in**-0.5, leaf.shape).astype(np.float32))

  shapes = name_tables.module_shapes(lavit.build(variant), names or name_tables.TABLES)
  return jax.tree.map(normal, shapes)
