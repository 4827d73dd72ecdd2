"""The names of a source's tensors, made those that the tables know: wrappers off, prefixes off, tied tensors in their place.

A training wraps its model: `torch.compile` puts `_orig_mod.` before the names, DistributedDataParallel `module.`, FSDP
`_fsdp_wrapped_module.`. A larger model holds one of ours under a prefix: EVA-CLIP's files the image encoder under `visual.`,
open_clip's EVA01-g-14, whose encoder is timm's, under `visual.trunk.`, BLIP-2's under `visual_encoder.`.
Files in the layout of another project are recognised here too, so that a message can say what to do with them.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from lavit_jax.errors import UserError

WRAPPERS = ('module', '_orig_mod', '_fsdp_wrapped_module', '_checkpoint_wrapped_module')
ANCHORS = {  # by part: a name that only this part has, whose prefix is the prefix of all its names
  'vit': 'patch_embed.proj.weight',
  'llama': 'model.embed_tokens.weight',
  'unet': 'time_embedding.linear_1.weight',
  'highres_unet': 'time_embedding.linear_1.weight',
  'vae': 'encoder.conv_in.weight',
  'highres_vae': 'encoder.conv_in.weight',
  'safety_checker': 'concept_embeds',
  'tokenizer': 'quantize.embedding.weight',
  'decoder': 'decode_task_layer.0.weight',
  'highres_decoder': 'decode_task_layer.0.weight',
}
EMBEDDING, HEAD = 'model.embed_tokens.weight', 'lm_head.weight'

# What other projects' files look like: a name that only they have, what they are, and what makes a folder of them that is read here.
FOREIGN = (
  (
    r'model\.diffusion_model\.',
    'a Stable Diffusion checkpoint in one file, with the names of CompVis',
    'diffusers makes a folder of it: StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER), or '
    'StableDiffusionXLPipeline for SDXL; then give that folder to --src',
  ),
  (
    r'(first_stage_model\.)?(encoder|decoder)\.(down|up)\.0\.block\.0\.',
    'a VAE in one file, with the names of CompVis',
    'diffusers makes a folder of it: AutoencoderKL.from_single_file(FILE).save_pretrained(FOLDER/vae); then give FOLDER to --src',
  ),
  (
    r'tok_embeddings\.weight$|layers\.\d+\.attention\.wq\.weight$',
    "a LLaMA with the names of Meta's own release",
    "transformers makes a folder of it: convert_llama_weights_to_hf.py of transformers 4 (pip install 'transformers<5', then python -m "
    'transformers.models.llama.convert_llama_weights_to_hf --input_dir DIR --output_dir FOLDER); then give FOLDER to --src',
  ),
  (
    r'(visual\.)?transformer\.resblocks\.',
    "a CLIP with OpenAI's image encoder",
    "LaVIT reads images by EVA-CLIP g/14; give an EVA file, such as eva_clip_psz14.pt or open_clip's EVA01-g-14",
  ),
  (
    r'.*\.lora_(A|B|up|down)\.',
    'a LoRA adapter, which is a change to another model',
    'merge it into its model first (peft: merge_and_unload().save_pretrained(FOLDER)) and give that folder to --src',
  ),
  (
    r'.*\.(qweight|qzeros|weight\.quant_state\.\w+|SCB)$',
    'a quantised model',
    'give the model in float32, float16 or bfloat16',
  ),
)


class Named(NamedTuple):
  """Tensors under the names of the tables, and what became of the others."""

  state: dict
  prefix: str  # that was taken off
  others: tuple[str, ...]  # names without the prefix: tensors of another model, left out


def normalize(part: str, state: Mapping, file: str) -> Named:
  """Takes wrappers and the prefix of a part off the names of its tensors.

  Args:
    part: whose tables will be used.
    state: torch name -> tensor.
    file: what to call the source in messages.

  Raises:
    UserError: two tensors would have one name, or the file is of another project.
  """
  plain = {}
  for name, tensor in state.items():
    short = '.'.join(piece for piece in name.split('.') if piece not in WRAPPERS)
    if short in plain:
      raise UserError(
        f'{file} holds two tensors that are {short} once {", ".join(WRAPPERS)} are taken off; save the state_dict of one model'
      )
    plain[short] = tensor
  anchor = ANCHORS.get(part)
  if anchor is None or anchor in plain:
    return Named(plain, '', ())
  prefixes = {name.removesuffix(anchor) for name in plain if name.endswith(f'.{anchor}')}
  if len(prefixes) != 1:
    refuse_foreign(plain, file)
    return Named(plain, '', ())
  prefix = prefixes.pop()
  inside = {
    name.removeprefix(prefix): tensor for name, tensor in plain.items() if name.startswith(prefix)
  }
  others = {name: tensor for name, tensor in plain.items() if not name.startswith(prefix)}
  if part != 'vit':  # of which alone larger models are known: elsewhere a strange name is a mistake
    return Named({**inside, **others}, prefix, ())
  return Named(inside, prefix, tuple(others))


def refuse_foreign(names: Iterable[str], file: str) -> None:
  """Raises UserError if the names are of a project whose files must be converted by its own tools first."""
  for name in names:
    for pattern, what, remedy in FOREIGN:
      if re.match(pattern, name):
        raise UserError(f'{file} is {what} ({name}); {remedy}')


def refuse_project_files(src: pathlib.Path) -> None:
  """As `refuse_foreign`, for a folder, by the names of files that only one project has."""
  files = sorted(src.iterdir())
  consolidated = [
    file for file in files if re.fullmatch(r'consolidated(\.\d+)?\.(pth|safetensors)', file.name)
  ]
  if consolidated:
    what, remedy = FOREIGN[2][1:]
    raise UserError(f'{src} holds {consolidated[0].name}: {what}; {remedy}')
  if any(file.name == 'adapter_config.json' for file in files):
    what, remedy = FOREIGN[4][1:]
    raise UserError(f'{src} holds adapter_config.json: {what}; {remedy}')


def refuse_foreign_folder(src: pathlib.Path) -> None:
  """As `refuse_project_files`, for a folder that is none of ours: single files are named too."""
  refuse_project_files(src)
  single = [
    file
    for file in sorted(src.iterdir())
    if file.suffix in ('.ckpt', '.safetensors', '.pt', '.pth', '.bin') and file.is_file()
  ]
  if single:
    raise UserError(
      f'{src} is no folder that is known, but holds {single[0].name}; if that is the EVA-CLIP image encoder, or to be told '
      f'what it is, give the file itself to --src'
    )


def tie_head(state: Mapping, config: Mapping) -> dict:
  """A language model's tensors, with the one of embedding and head that the file leaves out as they are one.

  As transformers 5 does: `tie_word_embeddings` counts where one of the two is missing; where both are there, each is taken as it is.

  Args:
    state: torch name -> tensor.
    config: of its `config.json`.
  """
  there = [name for name in (EMBEDDING, HEAD) if name in state]
  if len(there) != 1 or config.get('tie_word_embeddings') is not True:
    return dict(state)
  missing = HEAD if there == [EMBEDDING] else EMBEDDING
  return {**state, missing: state[there[0]]}
