"""The modules of a whole model, built from the config of a variant (variants.py) and settings."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from lavit_jax.errors import UserError
from lavit_jax.models import settings as checkpoint_settings
from lavit_jax.models.clip_vit import CLIP, EVA, ClipViT
from lavit_jax.models.decoder import FeatureDecoder
from lavit_jax.models.interfaces.base import (
  LayeredInterface,
  RegressingInterface,
  VisualInterface,
)
from lavit_jax.models.interfaces.towers import Tower
from lavit_jax.models.interfaces.variants import (
  LAVIT,
  SIZE_FIELDS,
  build_interface,
  build_tower,
  sizes_of,
)
from lavit_jax.models.llama import Llama
from lavit_jax.models.noise_schedule import Scheduler
from lavit_jax.models.safety_checker import SafetyChecker
from lavit_jax.models.tokenizer import DynamicTokenizer, Understanding
from lavit_jax.models.unet import UNet
from lavit_jax.models.vae import AutoencoderKL
from lavit_jax.models.variants import VARIANTS
from lavit_jax.models.vit import ViT
from lavit_jax.models.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class LavitModules:
  """The modules of one variant, as unbound Linen modules.

  Their parameters are separate, in a dict with these field names as keys.

  Attributes:
    variant: name of the variant.
    vocabulary: of text and codes.
    vit: image encoder; LaVIT's is a `ViT`.
    tokenizer: selector, merger and quantizer.
    understanding: merger of the continuous tokens.
    decoder: codes to features, for `unet`.
    highres_decoder: codes to features, for `highres_unet`.
    llama: language model.
    unet: of 512 pixels (SD 1.5), with its `vae` and `scheduler`.
    vae: of `unet`.
    highres_unet: of 1024 pixels (SDXL), with its `highres_vae` and `highres_scheduler`.
    highres_vae: of `highres_unet`.
    safety_checker: of generated images.
    uncond_rows: rows of the stored null-text embedding of `unet`.
    scheduler: of `unet`.
    highres_scheduler: of `highres_unet`.
    settings_text: `settings` as JSON, so that the dataclass is hashable.
    interface: how the language model sees images, in place of `tokenizer` and `understanding`; None
      is LaVIT's own way. With another one there are no codes, and so no images are generated,
      unless it is a `RegressingInterface`.
  """

  variant: str
  vocabulary: Vocabulary
  vit: ViT | ClipViT
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
  uncond_rows: int
  scheduler: Scheduler = Scheduler()
  highres_scheduler: Scheduler = Scheduler()
  settings_text: str = '{}'
  interface: VisualInterface | None = None

  @property
  def settings(self) -> dict[str, dict]:
    """The checkpoint's settings (settings.py) that differ from the variant's own."""
    return json.loads(self.settings_text)

  @property
  def has_padded_vocabulary(self) -> bool:
    """Whether rows of the text may belong to no token, as in models of other systems."""
    return 'text_vocab_size' in self.settings.get('llama', {})

  @property
  def image_size(self) -> int:
    """Side of the square image that the ViT reads, in pixels."""
    return self.vit.image_size

  @property
  def num_patches(self) -> int:
    """N, the most visual tokens an image can have."""
    return self.vit.num_patches

  @property
  def interface_name(self) -> str:
    """The name of the interface (interfaces/variants.py)."""
    return self.settings.get('interface', {}).get('name', LAVIT)

  @property
  def condition_name(self) -> str:
    """What `unet` reads: one of `settings.CONDITIONS`."""
    return self.settings.get('condition', {}).get('name', checkpoint_settings.CODES)

  @property
  def chat_template(self) -> str:
    """How conversations are written: one of `settings.CHAT_TEMPLATES`."""
    return self.settings.get('chat', {}).get('template', LAVIT)

  @property
  def tower(self) -> Tower:
    """What the interface reads of the image encoder."""
    own = self.settings.get('interface', {})
    return build_tower(self.interface_name, self.vit, own.get('cut'), own.get('final_norm'))

  @property
  def max_visual_tokens(self) -> int:
    """The most slots of a sequence that an image can take, besides [IMG] and [/IMG]."""
    if self.interface is None:
      return self.num_patches
    return self.num_image_vectors if self.interface.in_sequence else 0

  @property
  def num_image_vectors(self) -> int:
    """The vectors n of an image by the interface, in the sequence or not."""
    assert self.interface is not None
    return self.interface.num_vectors(self.tower.num_features)

  @property
  def layered_interface(self) -> LayeredInterface | None:
    """The interface, if layers of the language model read its vectors; else None."""
    return self.interface if isinstance(self.interface, LayeredInterface) else None

  @property
  def regressing_interface(self) -> RegressingInterface | None:
    """The interface, if the language model predicts its vectors; else None."""
    return self.interface if isinstance(self.interface, RegressingInterface) else None


def variant_config(variant: str) -> dict[str, Any]:
  """The config of a variant.

  Raises:
    UserError: an unknown variant; it names the nearest one.
  """
  if variant not in VARIANTS:
    near = difflib.get_close_matches(variant, VARIANTS, 1)
    hint = f' did you mean {near[0]!r}?' if near else ''
    raise UserError(f'unknown variant {variant!r}:{hint} known: {", ".join(VARIANTS)}')
  return VARIANTS[variant]


def build(
  variant: str,
  dtype: str = 'float32',
  remat: str = 'none',
  settings: checkpoint_settings.Settings | None = None,
  merger_capacities: tuple[int, ...] | None = None,
) -> LavitModules:
  """Builds the modules of a variant.

  Args:
    variant: a key of `VARIANTS`.
    dtype: the compute dtype. Parameters are always float32, and the VAE computes in float32
      (specification, Image decoders).
    remat: policy of the scanned stacks: 'none' or a key of `remat.REMAT_POLICIES`.
    settings: of a checkpoint, {group: {field: value}} (settings.py), in place of the variant's own.
    merger_capacities: the buckets of both mergers (merger.py), in place of the variant's own. With
      (), they compute all rows, as published.

  Raises:
    UserError: an unknown variant, or settings that are unknown or out of range.
  """
  config = variant_config(variant)
  settings = checkpoint_settings.validate(variant, config, settings)
  config = with_settings(config, settings)
  common: dict[str, Any] = dict(dtype=jnp.dtype(dtype), remat=remat)
  vit = _build_vit(config['vit'], common)
  tokenizer = dict(config['tokenizer'])
  if merger_capacities is not None:
    tokenizer['capacities'] = merger_capacities
  capacities = tokenizer.get('capacities', ())
  merger = {key: tokenizer[key] for key in ('hidden_size', 'num_layers', 'num_heads', 'mlp_dim')}
  llama = dict(config['llama'])
  text_vocab_size = llama.pop('text_vocab_size', config['text_vocab_size'])
  vocabulary = Vocabulary(text_vocab_size, tokenizer['codebook_size'])

  def build_decoder(name: str) -> FeatureDecoder:
    sizes = {**merger, **config[name]}
    return FeatureDecoder(
      **sizes, code_dim=tokenizer['code_dim'], num_patches=vit.num_patches, **common
    )

  def build_other_interface() -> VisualInterface | None:
    fields = config.get('interface', {})
    name = fields.get('name', LAVIT)
    if name == LAVIT:
      return None
    sizes = {field: fields[field] for field in SIZE_FIELDS if field in fields}
    return build_interface(
      name, sizes_of(variant), llama['hidden_size'], llama['num_layers'], dtype, remat, sizes
    )

  unet = dict(config['unet'])
  if (
    config.get('condition', {}).get('name', checkpoint_settings.CODES) != checkpoint_settings.CODES
  ):
    unet['cross_attention_dim'] = llama['hidden_size']  # the vectors, unprojected

  def optional(name: str, make: Any, **arguments: Any) -> Any:
    return make(**config[name], **arguments) if name in config else None

  return LavitModules(
    variant=variant,
    vocabulary=vocabulary,
    vit=vit,
    tokenizer=DynamicTokenizer(**tokenizer, **common),
    understanding=Understanding(
      **merger, llm_dim=llama['hidden_size'], capacities=capacities, **common
    ),
    decoder=build_decoder('decoder'),
    highres_decoder=build_decoder('highres_decoder') if 'highres_decoder' in config else None,
    llama=Llama(vocab_size=vocabulary.size, **llama, **common),
    unet=UNet(**unet, **common),
    vae=AutoencoderKL(**config['vae']),
    highres_unet=optional('highres_unet', UNet, **common),
    highres_vae=optional('highres_vae', AutoencoderKL),
    safety_checker=optional('safety_checker', SafetyChecker, **common),
    uncond_rows=config['uncond_rows'],
    scheduler=Scheduler(**config.get('scheduler', {})),
    highres_scheduler=Scheduler(**config.get('highres_scheduler', {})),
    settings_text=json.dumps(settings, sort_keys=True),
    interface=build_other_interface(),
  )


def _build_vit(config: Mapping[str, Any], common: Mapping[str, Any]) -> ViT | ClipViT:
  """The image encoder of a config; of CLIP's, heads and output have no sizes of their own."""
  sizes = dict(config)
  if sizes.pop('architecture', EVA) != CLIP:
    return ViT(**sizes, **common)
  for field in ('head_dim', 'output_dim'):
    sizes.pop(field)
  return ClipViT(**sizes, **common)


def with_settings(
  config: Mapping[str, Any], settings: checkpoint_settings.Settings
) -> dict[str, Any]:
  """A variant's config with settings in place of its own values.

  The config may lack the two groups of schedulers.
  """
  changed = dict(config)
  for name, fields in settings.items():
    frozen = {field: checkpoint_settings.freeze(value) for field, value in fields.items()}
    changed[name] = {**config.get(name, {}), **frozen}
  return changed
