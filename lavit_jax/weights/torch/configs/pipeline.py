"""Rules for the `model_index.json` of a diffusers folder, which lists the models of a pipeline."""

from __future__ import annotations

from lavit_jax.weights.torch.configs.rules import Checked, ConfigFile, Rule, constant, harmless

ABSENT = [None, None]  # how diffusers lists a model that the pipeline lacks

RULES: dict[str, Rule] = {
  'unet': Checked(
    constant(['diffusers', 'UNet2DConditionModel'], ABSENT, None),
    None,
    'choose a checkpoint with a UNet2DConditionModel',
  ),
  'vae': Checked(
    constant(['diffusers', 'AutoencoderKL'], ABSENT, None),
    None,
    'choose a checkpoint with an AutoencoderKL',
  ),
  'requires_aesthetics_score': Checked(
    constant(False, None),
    False,
    'choose the base model: a refiner has other inputs beside the image size',
  ),
  **harmless('scheduler_config.json is used', 'scheduler'),
  **harmless(
    'images are generated from codes, not from text',
    'text_encoder',
    'text_encoder_2',
    'tokenizer',
    'tokenizer_2',
    'force_zeros_for_empty_prompt',
  ),
  **harmless('of image prompts, which are not used here', 'image_encoder'),
  **harmless(
    'the checker is used if its weights are there; generation warns if they are not',
    'safety_checker',
    'feature_extractor',
    'requires_safety_checker',
  ),
  **harmless('images get no watermark', 'add_watermarker'),
}

CONFIG_FILES = tuple(
  ConfigFile(module, '../model_index.json', "diffusers' StableDiffusionPipeline", RULES)
  for module in ('unet', 'highres_unet')
)
