"""Descriptions (`config.json` and its like) by which transformers and diffusers load modules."""

from __future__ import annotations

import pathlib
from collections.abc import Collection

from lavit_jax.models import lavit, vit
from lavit_jax.models.llama import Llama
from lavit_jax.models.noise_schedule import Scheduler
from lavit_jax.models.safety_checker import SafetyChecker
from lavit_jax.models.unet import UNet
from lavit_jax.models.vae import AutoencoderKL
from lavit_jax.weights.torch.formats import PUBLISHED

SCHEDULER_KEYS = (  # always written; other options only where they differ from diffusers' default
  'beta_schedule',
  'beta_start',
  'beta_end',
  'num_train_timesteps',
  'clip_sample',
  'set_alpha_to_one',
  'steps_offset',
  'prediction_type',
)


def descriptions(
  model: lavit.LavitModules, modules: Collection[str], vocab_size: int
) -> dict[str, dict]:
  """By path: the content of the JSON files that a LaVIT folder has for these modules.

  Args:
    model: of the variant.
    modules: their names.
    vocab_size: rows of the language model's embedding.
  """
  folders = {
    location.module: location.folder for location in PUBLISHED if location.module in modules
  }
  files = {}
  for module, folder in folders.items():
    content = description(model, module, vocab_size)
    if content is not None:
      files[f'{folder}/config.json'] = content
  for unet, scheduler in (('unet', model.scheduler), ('highres_unet', model.highres_scheduler)):
    if unet in folders:
      folder = pathlib.PurePath(folders[unet]).with_name('scheduler')
      files[str(folder / 'scheduler_config.json')] = scheduler_config(scheduler)
  if 'safety_checker' in folders and model.safety_checker is not None:
    path = 'pixel_decoding/feature_extractor/preprocessor_config.json'
    files[path] = extractor_config(model.safety_checker)
  return files


def description(
  model: lavit.LavitModules, module: str, vocab_size: int | None = None
) -> dict | None:
  """The `config.json` of a module; None if neither transformers nor diffusers has its class.

  Args:
    model: of the variant.
    module: its name.
    vocab_size: rows of the language model's embedding, if they are not the whole vocabulary.
  """
  if module == 'llama':
    return llama_config(model.llama, vocab_size or model.vocabulary.size)
  if module in ('unet', 'highres_unet'):
    return unet_config(getattr(model, module))
  if module in ('vae', 'highres_vae'):
    return vae_config(getattr(model, module))
  if module == 'safety_checker' and model.safety_checker is not None:
    return safety_config(model.safety_checker)
  return None


def llama_config(llama: Llama, vocab_size: int) -> dict:
  """The LlamaConfig of transformers."""
  optional = {}
  if llama.rope_scaling is not None:
    optional['rope_scaling'] = dict(llama.rope_scaling)
  if llama.max_sequence_length is not None:
    optional['max_sequence_length'] = llama.max_sequence_length
  return dict(
    architectures=['LlamaForCausalLM'],
    model_type='llama',
    hidden_size=llama.hidden_size,
    intermediate_size=llama.mlp_dim,
    num_hidden_layers=llama.num_layers,
    num_attention_heads=llama.num_heads,
    num_key_value_heads=llama.num_kv_heads,
    head_dim=llama.head_dim,
    vocab_size=vocab_size,
    rms_norm_eps=llama.rms_norm_eps,
    rope_theta=llama.rope_theta,
    **optional,
    max_position_embeddings=llama.max_position_embeddings,
    hidden_act='silu',
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
  )


def unet_config(unet: UNet) -> dict:
  """The config of a UNet2DConditionModel of diffusers."""

  def block_types(direction: str, attention: tuple[bool, ...]) -> list[str]:
    return [
      f'CrossAttn{direction}Block2D' if has_attention else f'{direction}Block2D'
      for has_attention in attention
    ]

  freq_shift = unet.freq_shift
  if freq_shift == int(freq_shift):
    freq_shift = int(freq_shift)  # as diffusers writes it
  optional = {}
  if unet.addition_time_embed_dim is not None and unet.pooled_dim is not None:
    pooled_and_sizes = unet.pooled_dim + 6 * unet.addition_time_embed_dim
    optional = dict(
      addition_embed_type='text_time',
      addition_time_embed_dim=unet.addition_time_embed_dim,
      projection_class_embeddings_input_dim=pooled_and_sizes,
    )
  return dict(
    _class_name='UNet2DConditionModel',
    in_channels=unet.in_channels,
    out_channels=unet.out_channels,
    block_out_channels=unet.block_out_channels,
    layers_per_block=unet.layers_per_block,
    down_block_types=block_types('Down', unet.down_block_attention),
    up_block_types=block_types('Up', unet.down_block_attention[::-1]),
    transformer_layers_per_block=unet.transformer_layers,
    attention_head_dim=unet.num_heads,  # the number of heads, whatever diffusers calls it
    cross_attention_dim=unet.cross_attention_dim,
    norm_num_groups=unet.norm_num_groups,
    norm_eps=unet.norm_eps,
    act_fn='silu',
    flip_sin_to_cos=unet.flip_sin_to_cos,
    freq_shift=freq_shift,
    use_linear_projection=unet.use_linear_projection,
    sample_size=64,
    **optional,
  )


def vae_config(vae: AutoencoderKL) -> dict:
  """The config of an AutoencoderKL of diffusers."""
  levels = len(vae.block_out_channels)
  optional = {}
  if vae.shift_factor:
    optional['shift_factor'] = vae.shift_factor
  if vae.latents_mean is not None:
    optional['latents_mean'] = vae.latents_mean
    optional['latents_std'] = vae.latents_std
  return dict(
    _class_name='AutoencoderKL',
    in_channels=3,
    out_channels=3,
    block_out_channels=vae.block_out_channels,
    layers_per_block=vae.layers_per_block,
    latent_channels=vae.latent_channels,
    norm_num_groups=vae.norm_num_groups,
    down_block_types=['DownEncoderBlock2D'] * levels,
    up_block_types=['UpDecoderBlock2D'] * levels,
    scaling_factor=vae.scaling_factor,
    **optional,
    act_fn='silu',
    sample_size=512,
  )


def safety_config(checker: SafetyChecker) -> dict:
  """The config of a StableDiffusionSafetyChecker of diffusers, which is a CLIPConfig."""
  vision = dict(
    model_type='clip_vision_model',
    hidden_size=checker.hidden_size,
    intermediate_size=checker.mlp_dim,
    hidden_act='quick_gelu',
    num_hidden_layers=checker.num_layers,
    num_attention_heads=checker.num_heads,
    image_size=checker.image_size,
    patch_size=checker.patch_size,
    projection_dim=checker.output_dim,
    layer_norm_eps=1e-5,
  )
  return dict(
    architectures=['StableDiffusionSafetyChecker'],
    model_type='clip',
    projection_dim=checker.output_dim,
    vision_config=vision,
  )


def extractor_config(checker: SafetyChecker) -> dict:
  """The CLIPImageProcessor of transformers: how images are prepared for the safety checker."""
  side = checker.image_size
  return dict(
    image_processor_type='CLIPImageProcessor',
    do_resize=True,
    size=dict(shortest_edge=side),
    resample=3,  # bicubic
    do_center_crop=True,
    crop_size=dict(height=side, width=side),
    do_rescale=True,
    rescale_factor=1 / 255,
    do_normalize=True,
    image_mean=vit.MEAN,
    image_std=vit.STD,
    do_convert_rgb=True,
  )


def scheduler_config(scheduler: Scheduler) -> dict:
  """The config of a DDIMScheduler of diffusers."""
  values = scheduler._asdict()
  options = {key: values[key] for key in SCHEDULER_KEYS}
  for key, value in values.items():
    if key not in SCHEDULER_KEYS and value != Scheduler._field_defaults[key]:
      options[key] = list(value) if isinstance(value, tuple) else value
  return dict(_class_name='DDIMScheduler', **options)
