"""Recognizes folders of the PyTorch family, and the files of each module in them.

a LaVIT folder     visual_tokenizer/, language_model/, pixel_decoding/, highres_pixel_decoding/;
                   any module of it may be absent (specification, Checkpoint layout)
a LLaMA folder     config.json and model*.safetensors or pytorch_model*.bin
a diffusers folder unet/ and vae/ of Stable Diffusion 1.5 or of SDXL
a file             the EVA-CLIP image encoder
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Collection, Mapping
from typing import NamedTuple

from lavit_jax.errors import UserError
from lavit_jax.weights.torch import files as torch_files
from lavit_jax.weights.torch import state_dict_names, weight_files
from lavit_jax.weights.torch.tensors import LazyTensor

# The kinds of sources; they are recorded in the metadata of checkpoints.
LAVIT = 'LaVIT'
LLAMA = 'LLaMA'
STABLE_DIFFUSION = 'Stable Diffusion'
SDXL = 'SDXL'
EVA_CLIP = 'EVA-CLIP image encoder'

DIFFUSERS = ('diffusion_pytorch_model',)
TRANSFORMERS = ('model', 'pytorch_model')
EXPORT_INFO = 'lavit_jax.json'  # in a folder that was exported from one of ours: its origin


class ModuleLocation(NamedTuple):
  """Where the files of a module are.

  Attributes:
    module: its name.
    folder: relative to the source.
    stems: the stems that its files may have; the first is the one that is written.
    overlay: (folder, stem) of a file whose tensors replace some of the module's.
  """

  module: str
  folder: str
  stems: tuple[str, ...]
  overlay: tuple[str, str] | None = None


PUBLISHED = (
  ModuleLocation('vit', 'visual_tokenizer', ('eva_vitg_psz14',)),
  ModuleLocation('tokenizer', 'visual_tokenizer', ('tokenizer_encoder',)),
  ModuleLocation(
    'understanding',
    'visual_tokenizer',
    ('tokenizer_encoder',),
    overlay=('language_model', 'visual_weight'),
  ),
  ModuleLocation('decoder', 'visual_tokenizer', ('tokenizer_decoder',)),
  ModuleLocation('highres_decoder', 'visual_tokenizer', ('highres_tokenizer_decoder',)),
  ModuleLocation('llama', 'language_model', TRANSFORMERS),
  ModuleLocation('unet', 'pixel_decoding/unet', DIFFUSERS),
  ModuleLocation('vae', 'pixel_decoding/vae', DIFFUSERS),
  ModuleLocation('safety_checker', 'pixel_decoding/safety_checker', TRANSFORMERS),
  ModuleLocation('uncond_embeddings', 'pixel_decoding', ('uncond_embeddings',)),
  ModuleLocation('highres_unet', 'highres_pixel_decoding/unet', DIFFUSERS),
  ModuleLocation('highres_vae', 'highres_pixel_decoding/vae', DIFFUSERS),
)
LOCATIONS: dict[str, tuple[ModuleLocation, ...]] = {  # by the kind of a folder
  LAVIT: PUBLISHED,
  LLAMA: (ModuleLocation('llama', '', TRANSFORMERS),),
  STABLE_DIFFUSION: (
    ModuleLocation('unet', 'unet', DIFFUSERS),
    ModuleLocation('vae', 'vae', DIFFUSERS),
    ModuleLocation('safety_checker', 'safety_checker', TRANSFORMERS),
  ),
  SDXL: (
    ModuleLocation('highres_unet', 'unet', DIFFUSERS),
    ModuleLocation('highres_vae', 'vae', DIFFUSERS),
  ),
}


def locations(kind: str) -> dict[str, ModuleLocation]:
  """By module: where a folder of this kind has it; of other kinds, where a LaVIT folder has it."""
  return {location.module: location for location in LOCATIONS.get(kind, PUBLISHED)}


class SourceModule(NamedTuple):
  """The tensors of a module in a source, under the names of the name tables.

  Attributes:
    location: where they are.
    state: torch name -> tensor.
    overlay: torch name -> tensor that replaces one of `state`, or is added.
    edition: the files of `state`, where there was a choice.
    others: names of tensors in the same files that belong to another model.
    tied: the name of the tensor that the files leave out since it equals another one.
  """

  location: ModuleLocation
  state: dict[str, LazyTensor]
  overlay: dict[str, LazyTensor]
  edition: weight_files.Edition | None = None
  others: tuple[str, ...] = ()
  tied: str | None = None

  @property
  def module(self) -> str:
    """The name of the module."""
    return self.location.module

  @property
  def merged(self) -> dict[str, LazyTensor]:
    """`state` with the overlay over it."""
    return self.state | self.overlay


def module_folders(sources: Collection[SourceModule]) -> dict[str, str]:
  """By module: its folder, relative to the source."""
  return {source.module: source.location.folder for source in sources}


# --- Recognition -----------------------------------------------------------------------------


def detect_kind(src: pathlib.Path) -> str | None:
  """The kind of a folder, by the names in it; None if it is unknown."""
  if any((src / location.folder).is_dir() for location in PUBLISHED):
    return LAVIT
  if (src / 'unet').is_dir() or (src / 'vae').is_dir():
    unet = read_json(src / 'unet' / 'config.json')
    return SDXL if unet.get('addition_embed_type') == 'text_time' else STABLE_DIFFUSION
  if read_json(src / 'config.json').get('model_type') == 'llama':
    return LLAMA
  return None


def detect(
  src: pathlib.Path, only: str | None = None, weights_variant: str | None = None
) -> tuple[str, list[SourceModule]]:
  """Recognizes a folder or file and opens the modules in it.

  Args:
    src: the folder or file.
    only: the one module to open; None opens all.
    weights_variant: the variant of the weight files, such as 'fp16', where a module has it; None
      goes by `weight_files.RULE`.

  Returns:
    The kind and the modules.

  Raises:
    UserError: an unknown or damaged source, or one that lists a module without its weights.
  """
  if src.is_file():
    location = ModuleLocation('vit', '', (src.stem,))
    return EVA_CLIP, [source_module(location, torch_files.load(src), src)]
  if not src.is_dir():
    raise UserError(f'{src} does not exist')
  kind = detect_kind(src)
  if kind is None:
    state_dict_names.refuse_foreign_folder(src)
    raise UserError(
      f'{src} is not a known folder: it has no visual_tokenizer/, language_model/, '
      'pixel_decoding/, unet/ or vae/, and no config.json of a LLaMA or of lavit_jax'
    )
  sources = []
  for location in locations(kind).values():
    if only is None or location.module == only:
      source = _open_module(src, location, weights_variant)
      if source is not None:
        sources.append(source)
  if only is None:
    _check_model_index(src, kind, sources)
  if not sources:
    state_dict_names.refuse_project_files(src)
    of_module = f' of {only}' if only else ''
    raise UserError(f'{src} is a {kind} folder, but holds no weights{of_module}')
  _check_weights_variant(src, sources, weights_variant)
  return kind, sources


def source_module(
  location: ModuleLocation,
  state: Mapping[str, LazyTensor],
  path: pathlib.Path,
  overlay: Mapping[str, LazyTensor] | None = None,
  edition: weight_files.Edition | None = None,
) -> SourceModule:
  """A module whose tensors have the names of the name tables.

  Args:
    location: the module and where it is.
    state: torch name -> tensor, as in the files.
    path: the file or folder, for messages; a language model's `config.json` is read there.
    overlay: torch name -> tensor that replaces one of `state`.
    edition: the files of `state`.

  Raises:
    UserError: two tensors would have one name, or the file is of another project.
  """
  normalized = state_dict_names.normalize(location.module, state, str(path))
  overlay = state_dict_names.normalize(location.module, overlay or {}, str(path)).state
  tensors = normalized.state
  tied = None
  if location.module == 'llama':
    tensors = state_dict_names.tie_head(normalized.state, read_json(path / 'config.json'))
    tied = next((name for name in tensors if name not in normalized.state), None)
  return SourceModule(location, tensors, overlay, edition, normalized.others, tied)


def _open_module(
  src: pathlib.Path, location: ModuleLocation, weights_variant: str | None
) -> SourceModule | None:
  """The module at a location of a folder; None if it is not there."""
  folder = src / location.folder
  edition = weight_files.choose(folder, location.stems, weights_variant)
  if edition is None:
    _check_unread_weights(folder, location.module)
    return None
  overlay_edition = None
  if location.overlay is not None:
    overlay_folder, overlay_stem = location.overlay
    overlay_edition = weight_files.choose(src / overlay_folder, (overlay_stem,), weights_variant)
  state = torch_files.load_files(edition.files)
  if overlay_edition is not None:
    overlay = torch_files.load_files(overlay_edition.files)
  elif location.module == 'understanding' and 'vit_proj.weight' not in state:
    return None  # the file holds the tokenizer alone
  else:
    overlay = {}
  return source_module(location, state, folder, overlay, edition)


def _check_unread_weights(folder: pathlib.Path, module: str) -> None:
  """Raises UserError if the folder of an absent module holds weights under an unknown name."""
  if folder.name not in ('unet', 'vae', 'safety_checker'):
    return  # other modules share their folders
  files = sorted(folder.iterdir()) if folder.is_dir() else []
  weights = [file.name for file in files if weight_files.is_weights(file.name)]
  if weights:
    raise UserError(
      f'{folder} holds {", ".join(weights[:3])}, which is none of the names that the weights of '
      f'{module} are read under (.safetensors or .bin); download those, or move the folder away to '
      f'convert the rest without {module}'
    )


def _check_model_index(src: pathlib.Path, kind: str, sources: list[SourceModule]) -> None:
  """Raises UserError if the `model_index.json` of diffusers lists a module without weights."""
  opened = {source.module for source in sources}
  for location in locations(kind).values():
    folder = src / location.folder
    index = folder.parent / 'model_index.json'
    listed = read_json(index).get(folder.name)
    is_used = isinstance(listed, list) and any(listed)  # [null, null] says that it is not
    if is_used and location.module not in opened:
      raise UserError(
        f'{index} lists {folder.name}, but {folder} holds no weights that are read; download them, '
        f'or write [null, null] for {folder.name} in that file to convert the rest without it'
      )


def _check_weights_variant(
  src: pathlib.Path, sources: list[SourceModule], weights_variant: str | None
) -> None:
  """Raises UserError if no module has the requested variant of the weight files."""
  if weights_variant is None:
    return
  variants = {source.edition.variant for source in sources if source.edition is not None}
  if weights_variant not in variants:
    chosen = ', '.join(sorted(variant or 'none' for variant in variants))
    raise UserError(
      f'{src} holds no weights of the variant {weights_variant!r}; '
      f'without that option, these are read: {chosen}'
    )


def read_json(file: pathlib.Path) -> dict:
  """A JSON object; {} if there is none."""
  try:
    content = json.loads(file.read_text())
  except (OSError, ValueError):
    return {}
  return content if isinstance(content, dict) else {}
