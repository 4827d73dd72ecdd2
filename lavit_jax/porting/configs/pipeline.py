"""The `model_index.json` of a diffusers folder: which models its pipeline is made of."""

from __future__ import annotations

from lavit_jax.porting.configs.rules import Checked, Family, constant, harmless

RULES = {
  'unet': Checked(
    constant(['diffusers', 'UNet2DConditionModel'], [None, None], None),
    None,
    'choose a checkpoint with a UNet2DConditionModel',
  ),
  'vae': Checked(
    constant(['diffusers', 'AutoencoderKL'], [None, None], None),
    None,
    'choose a checkpoint with an AutoencoderKL',
  ),
  'requires_aesthetics_score': Checked(
    constant(False, None),
    False,
    'choose the base model: a refiner takes other numbers beside the picture size',
  ),
  **harmless('scheduler_config.json says it', 'scheduler'),
  **harmless(
    'words are not what a picture is drawn from here',
    'text_encoder',
    'text_encoder_2',
    'tokenizer',
    'tokenizer_2',
    'force_zeros_for_empty_prompt',
  ),
  **harmless('of image prompts, which are not used here', 'image_encoder'),
  **harmless(
    'the checker is used where it is there, and its absence is told at drawing',
    'safety_checker',
    'feature_extractor',
    'requires_safety_checker',
  ),
  **harmless('no watermark is laid over pictures', 'add_watermarker'),
}

FAMILIES = tuple(
  Family(part, '../model_index.json', "diffusers' StableDiffusionPipeline", RULES)
  for part in ('unet', 'highres_unet')
)
