"""The variants: every size of a model is data, and `lavit.build` makes the modules from it.

A config has the keyword arguments of each module. The tiny model and the 7B one run the same code.

Sources: `lavit_7b` is docs/specification.md (paper, section 4.1); `tiny` and `small` are choices.
"""

from __future__ import annotations

from typing import Any

from lavit_jax.models.vae import SD_SCALING_FACTOR, SDXL_SCALING_FACTOR

LLAMA_TEXT_VOCABULARY = 32000  # of LLaMA's sentencepiece model

STABLE_DIFFUSION_UNET = dict(
  block_out_channels=(320, 640, 1280, 1280),
  layers_per_block=2,
  down_block_attention=(True, True, True, False),
  transformer_layers=(1, 1, 1, 1),
  num_heads=(8, 8, 8, 8),
  cross_attention_dim=768,
)
SDXL_UNET = dict(
  block_out_channels=(320, 640, 1280),
  layers_per_block=2,
  down_block_attention=(False, True, True),
  transformer_layers=(1, 2, 10),
  num_heads=(5, 10, 20),
  cross_attention_dim=2048,
  use_linear_projection=True,
  addition_time_embed_dim=256,
  pooled_dim=1280,
)
STABLE_DIFFUSION_VAE = dict(
  block_out_channels=(128, 256, 512, 512), layers_per_block=2, scaling_factor=SD_SCALING_FACTOR
)
SDXL_VAE = dict(
  block_out_channels=(128, 256, 512, 512), layers_per_block=2, scaling_factor=SDXL_SCALING_FACTOR
)
CLIP_SAFETY_CHECKER = dict(
  image_size=224,
  patch_size=14,
  hidden_size=1024,
  num_layers=24,
  num_heads=16,
  mlp_dim=4096,
  output_dim=768,
)

VARIANTS: dict[str, dict[str, Any]] = {
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
    text_vocab_size=LLAMA_TEXT_VOCABULARY,
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
      hidden_size=768,
      num_layers=6,
      num_heads=12,
      mlp_dim=3072,
      codebook_size=16384,
      code_dim=32,
      capacities=(104, 128, 176),
    ),
    decoder=dict(num_layers=6, context_dims=(768,)),
    llama=dict(
      hidden_size=768, num_layers=12, num_heads=12, num_kv_heads=12, head_dim=64, mlp_dim=2048
    ),
    unet=STABLE_DIFFUSION_UNET,
    vae=STABLE_DIFFUSION_VAE,
    safety_checker=CLIP_SAFETY_CHECKER,
    uncond_rows=77,
  ),
  'lavit_7b': dict(
    text_vocab_size=LLAMA_TEXT_VOCABULARY,
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
    unet=STABLE_DIFFUSION_UNET,
    vae=STABLE_DIFFUSION_VAE,
    highres_unet=SDXL_UNET,
    highres_scheduler=dict(timestep_spacing='leading'),
    highres_vae=SDXL_VAE,
    safety_checker=CLIP_SAFETY_CHECKER,
    uncond_rows=77,
  ),
}
