"""The training stages (specification, Training): what each reads, makes, and learns by.

    encoder       images, captions               -> vit                   contrastive     tiny only
    autoencoder   images                         -> vae                   L1, a little KL tiny only
    tokenizer     vit                            -> tokenizer, decoder    stage 1
    detokenizer   vit, tokenizer, decoder, vae   -> unet, decoder         stage 1b
                  vit, interface, vae            -> unet                  with the condition `emu`
    lm            vit, tokenizer                 -> llama, understanding  stage 2
                  vit                            -> llama, interface      with another interface
    qformer       vit, captions                  -> interface             before lm with `qformer`

A stage is a handful of pure functions (base.py), built by a module of this package; the loop
(training/loop.py) is the same for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from lavit_jax.errors import UserError
from lavit_jax.models.lavit import LavitModules
from lavit_jax.training.stages import (
  autoencoder,
  detokenizer,
  encoder,
  language_model,
  qformer,
  tokenizer,
)
from lavit_jax.training.stages.autoencoder import AutoencoderOptions
from lavit_jax.training.stages.base import BatchLayout, ModuleNames, Stage
from lavit_jax.training.stages.detokenizer import DetokenizerOptions
from lavit_jax.training.stages.encoder import EncoderOptions
from lavit_jax.training.stages.language_model import LanguageModelOptions
from lavit_jax.training.stages.qformer import QFormerOptions
from lavit_jax.training.stages.tokenizer import TokenizerOptions

StageOptions = (
  EncoderOptions
  | AutoencoderOptions
  | TokenizerOptions
  | DetokenizerOptions
  | LanguageModelOptions
  | QFormerOptions
)


def _any_size(model: LavitModules) -> int:
  del model
  return 1


class StageType(NamedTuple):
  """How a stage is configured and built.

  `modules` are those of its usual options (`stage_modules`).
  """

  options: type[StageOptions]
  build: Callable[[Any, LavitModules, BatchLayout], Stage]
  modules: ModuleNames
  task: str  # `data.task` of its configs
  section: str  # a key of its configs that no other stage's configs have
  accumulates: bool = True  # whether a batch may be computed in pieces
  reads_vit: bool = True
  image_multiple: Callable[[LavitModules], int] = _any_size  # see the function below
  shades_patches: bool = False  # whether its drawn images show kept patches


STAGES = {
  'encoder': StageType(
    EncoderOptions,
    encoder.build,
    encoder.MODULES,
    task='contrastive',
    section='text_tower',
    accumulates=False,
  ),
  'autoencoder': StageType(
    AutoencoderOptions,
    autoencoder.build,
    autoencoder.MODULES,
    task='images',
    section='kl_weight',
    reads_vit=False,
    image_multiple=autoencoder.image_multiple,
  ),
  'tokenizer': StageType(
    TokenizerOptions,
    tokenizer.build,
    tokenizer.MODULES,
    task='images',
    section='tokenizer',
    accumulates=False,
    shades_patches=True,
  ),
  'detokenizer': StageType(
    DetokenizerOptions,
    detokenizer.build,
    detokenizer.MODULES,
    task='images',
    section='detokenizer',
    image_multiple=detokenizer.image_multiple,
    shades_patches=True,
  ),
  'lm': StageType(
    LanguageModelOptions,
    language_model.build,
    language_model.MODULES,
    task='lm',
    section='lm',
    shades_patches=True,
  ),
  'qformer': StageType(
    QFormerOptions,
    qformer.build,
    qformer.MODULES,
    task='lm',
    section='qformer',
    accumulates=False,
  ),
}


def stage_type(name: str) -> StageType:
  """The stage of this name.

  Raises:
    UserError: there is none.
  """
  if name not in STAGES:
    raise UserError(f'unknown stage {name!r}; known: {", ".join(STAGES)}')
  return STAGES[name]


def stage_modules(name: str, options: StageOptions) -> ModuleNames:
  """The modules whose parameters a stage with these options reads from folders."""
  if isinstance(options, LanguageModelOptions):
    return language_model.module_names(options)
  if isinstance(options, DetokenizerOptions):
    return detokenizer.module_names(options)
  return stage_type(name).modules


def interface_name(options: StageOptions) -> str | None:
  """The interface that a stage with these options trains, or shows images by; None: neither."""
  if isinstance(options, LanguageModelOptions):
    return options.interface
  return qformer.INTERFACE if isinstance(options, QFormerOptions) else None


def build_stage(
  name: str, options: StageOptions, model: LavitModules, layout: BatchLayout
) -> Stage:
  """Builds a stage.

  Args:
    name: of the stage.
    options: its own options, of the type that it has.
    model: the modules.
    layout: the sizes of a batch.

  Raises:
    UserError: there is no such stage, or it cannot train with these sizes.
  """
  return stage_type(name).build(options, model, layout)


def image_multiple(name: str, model: LavitModules, draws_images: bool) -> int:
  """The number of pixels of which the side of a stage's images must be a multiple.

  Args:
    name: of the stage.
    model: the modules.
    draws_images: whether the run draws images, patch by patch.
  """
  kind = stage_type(name)
  multiple = kind.image_multiple(model)
  if draws_images and kind.shades_patches:
    multiple = math.lcm(multiple, model.image_size // model.vit.patch_size)
  return multiple
