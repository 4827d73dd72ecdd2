"""Renames the tensors of a source as the name tables have them, and refuses other projects' files.

Training scripts wrap their model: `torch.compile` puts `_orig_mod.` before the names,
DistributedDataParallel `module.`, FSDP `_fsdp_wrapped_module.`. A larger model has one of ours
under a prefix: EVA-CLIP the image encoder under `visual.`, open_clip's EVA01-g-14, whose encoder is
timm's, under `visual.trunk.`, BLIP-2 under `visual_encoder.`.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from lavit_jax.errors import UserError
from lavit_jax.weights.torch.tensors import LazyTensor

WRAPPERS = ('module', '_orig_mod', '_fsdp_wrapped_module', '_checkpoint_wrapped_module')
ANCHORS = {  # module -> a name that only it has; what is before it is the prefix of all its names
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
EMBEDDING = 'model.embed_tokens.weight'
HEAD = 'lm_head.weight'


# --- Names of the tables ---------------------------------------------------------------------


class NormalizedState(NamedTuple):
  """Tensors under the names of the tables.

  Attributes:
    state: torch name -> tensor.
    prefix: what was removed from their names.
    others: names without that prefix: tensors of another model, which are left out.
  """

  state: dict[str, LazyTensor]
  prefix: str
  others: tuple[str, ...]


def normalize(module: str, state: Mapping[str, LazyTensor], source: str) -> NormalizedState:
  """Removes wrappers and the prefix of a module from the names of its tensors.

  Args:
    module: whose tables will be used.
    state: torch name -> tensor.
    source: the name of the file or folder in messages.

  Raises:
    UserError: two tensors would have one name, or the file is of another project.
  """
  unwrapped = _unwrap_names(state, source)
  anchor = ANCHORS.get(module)
  if anchor is None or anchor in unwrapped:
    return NormalizedState(unwrapped, '', ())
  prefixes = {name.removesuffix(anchor) for name in unwrapped if name.endswith(f'.{anchor}')}
  if len(prefixes) != 1:
    refuse_foreign(unwrapped, source)
    return NormalizedState(unwrapped, '', ())
  prefix = prefixes.pop()
  with_prefix = {}
  others = {}
  for name, tensor in unwrapped.items():
    if name.startswith(prefix):
      with_prefix[name.removeprefix(prefix)] = tensor
    else:
      others[name] = tensor
  if module == 'vit':  # the one module that published files of larger models hold
    return NormalizedState(with_prefix, prefix, tuple(others))
  return NormalizedState({**with_prefix, **others}, prefix, ())  # the others are a mistake


def _unwrap_names(state: Mapping[str, LazyTensor], source: str) -> dict[str, LazyTensor]:
  """Removes the names of wrappers, wherever they are in a name."""
  unwrapped = {}
  for name, tensor in state.items():
    short = '.'.join(piece for piece in name.split('.') if piece not in WRAPPERS)
    if short in unwrapped:
      raise UserError(
        f'{source} holds two tensors that are {short} once {", ".join(WRAPPERS)} are removed; '
        'save the state_dict of one model'
      )
    unwrapped[short] = tensor
  return unwrapped


def tie_head(state: Mapping[str, LazyTensor], config: Mapping) -> dict[str, LazyTensor]:
  """Adds the embedding or the head that the files leave out because the two are tied.

  As in transformers 5, `tie_word_embeddings` counts where one of the two is missing; where both are
  there, each is read as it is.

  Args:
    state: torch name -> tensor, of a language model.
    config: its `config.json`.
  """
  present = [name for name in (EMBEDDING, HEAD) if name in state]
  if len(present) != 1 or config.get('tie_word_embeddings') is not True:
    return dict(state)
  missing = HEAD if present == [EMBEDDING] else EMBEDDING
  return {**state, missing: state[present[0]]}


# --- Files of other projects -----------------------------------------------------------------


class ForeignProject(NamedTuple):
  """Files that must be converted by the tools of their project first.

  Attributes:
    pattern: matches the beginning of a tensor name that only these files have.
    description: what they are.
    remedy: how they become a folder that is read here.
  """

  pattern: str
  description: str
  remedy: str


META_LLAMA = ForeignProject(
  r'tok_embeddings\.weight$|layers\.\d+\.attention\.wq\.weight$',
  "a LLaMA with the names of Meta's own release",
  'transformers makes a folder of it: convert_llama_weights_to_hf.py of transformers 4 '
  "(pip install 'transformers<5', then python -m "
  'transformers.models.llama.convert_llama_weights_to_hf --input_dir DIR --output_dir FOLDER); '
  'then give FOLDER to --src',
)
LORA_ADAPTER = ForeignProject(
  r'.*\.lora_(A|B|up|down)\.',
  'a LoRA adapter, which is a change to another model',
  'give its model to --src and this folder to --adapter, or merge it by peft '
  '(merge_and_unload().save_pretrained(FOLDER)) and give that folder to --src',
)
FOREIGN = (
  ForeignProject(
    r'model\.diffusion_model\.',
    'a Stable Diffusion checkpoint in one file, with the names of CompVis',
    'diffusers makes a folder of it: '
    'StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER), or '
    'StableDiffusionXLPipeline for SDXL; then give that folder to --src',
  ),
  ForeignProject(
    r'(first_stage_model\.)?(encoder|decoder)\.(down|up)\.0\.block\.0\.',
    'a VAE in one file, with the names of CompVis',
    'diffusers makes a folder of it: '
    'AutoencoderKL.from_single_file(FILE).save_pretrained(FOLDER/vae); then give FOLDER to --src',
  ),
  META_LLAMA,
  ForeignProject(
    r'(visual\.)?transformer\.resblocks\.',
    "a CLIP with OpenAI's image encoder",
    'LaVIT reads images by EVA-CLIP g/14; give an EVA file, such as eva_clip_psz14.pt or '
    "open_clip's EVA01-g-14",
  ),
  LORA_ADAPTER,
  ForeignProject(
    r'.*\.(qweight|qzeros|weight\.quant_state\.\w+|SCB)$',
    'a quantized model',
    'give the model in float32, float16 or bfloat16',
  ),
)


def refuse_foreign(names: Iterable[str], source: str) -> None:
  """Raises UserError, with the remedy, if tensors have the names of a foreign project."""
  for name in names:
    for project in FOREIGN:
      if re.match(project.pattern, name):
        raise UserError(f'{source} is {project.description} ({name}); {project.remedy}')


def refuse_project_files(src: pathlib.Path) -> None:
  """Raises UserError, with the remedy, if a folder has a file that only one project has."""
  names = sorted(file.name for file in src.iterdir())
  for name in names:
    if re.fullmatch(r'consolidated(\.\d+)?\.(pth|safetensors)', name):
      raise UserError(f'{src} holds {name}: {META_LLAMA.description}; {META_LLAMA.remedy}')
  if 'adapter_config.json' in names:
    raise UserError(
      f'{src} holds adapter_config.json: {LORA_ADAPTER.description}; {LORA_ADAPTER.remedy}'
    )


def refuse_foreign_folder(src: pathlib.Path) -> None:
  """As `refuse_project_files`, for a folder of no known kind: single weight files count too."""
  refuse_project_files(src)
  for file in sorted(src.iterdir()):
    if file.suffix in ('.ckpt', '.safetensors', '.pt', '.pth', '.bin') and file.is_file():
      raise UserError(
        f'{src} is not a known folder, but holds {file.name}; if that is the EVA-CLIP image '
        'encoder, or to learn what it is, give the file itself to --src'
      )
