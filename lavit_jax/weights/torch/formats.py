"""Folders of the PyTorch family: which of their files hold which part of the model, and under which names (specification, Checkpoint layout).

a LaVIT folder     visual_tokenizer/, language_model/, pixel_decoding/, highres_pixel_decoding/; any part of it may be absent
a LLaMA folder     config.json and model*.safetensors or pytorch_model*.bin
a diffusers folder unet/ and vae/ of Stable Diffusion 1.5 or of SDXL
a file             the EVA-CLIP image encoder
"""

from __future__ import annotations

import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from lavit_jax.errors import UserError
from lavit_jax.models import lavit, vit
from lavit_jax.models.initialization import init_params
from lavit_jax.models.noise_schedule import Scheduler
from lavit_jax.models.unet import UNet
from lavit_jax.models.vae import AutoencoderKL
from lavit_jax.weights.torch import files as torch_files
from lavit_jax.weights.torch import state_dict_names as names
from lavit_jax.weights.torch import weight_files
from lavit_jax.weights.torch.mapping import (
  MappingPlan,
  NameRule,
  PortingError,
  make_plan,
  torch_shapes,
)
from lavit_jax.weights.torch.names_diffusion import unet_rules, unet_shapes, vae_rules, vae_shapes
from lavit_jax.weights.torch.names_llama import llama_rules
from lavit_jax.weights.torch.names_visual import (
  decoder_rules,
  safety_rules,
  tokenizer_rules,
  understanding_rules,
  vit_rules,
)

DIFFUSERS = ('diffusion_pytorch_model',)
TRANSFORMERS = ('model', 'pytorch_model')
VOCABULARY = ('model.embed_tokens.weight', 'lm_head.weight')  # the two that may have fewer rows
SAID = (  # the keys that a scheduler_config.json of ours always has
  'beta_schedule',
  'beta_start',
  'beta_end',
  'num_train_timesteps',
  'clip_sample',
  'set_alpha_to_one',
  'steps_offset',
  'prediction_type',
)
EXPORT_INFO = 'lavit_jax.json'  # in a folder that we wrote: where it is from
TABLES: dict[
  str, Callable[[lavit.LavitModules], list[list[NameRule]]]
] = {  # by part: the names that its files may use, the usual ones first
  'vit': lambda model: [vit_rules()],
  'tokenizer': lambda model: [tokenizer_rules()],
  'understanding': lambda model: [understanding_rules()],
  'decoder': lambda model: [decoder_rules(1)],
  'highres_decoder': lambda model: [decoder_rules(2)],
  'llama': lambda model: [llama_rules()],
  'unet': lambda model: [unet_rules(model.unet)],
  'highres_unet': lambda model: [unet_rules(model.highres_unet)],
  'vae': lambda model: [vae_rules(model.vae), vae_rules(model.vae, old_attention=True)],
  'highres_vae': lambda model: [
    vae_rules(model.highres_vae),
    vae_rules(model.highres_vae, old_attention=True),
  ],
  'safety_checker': lambda model: [safety_rules(), safety_rules(nested=False)],
  'uncond_embeddings': lambda model: [
    [NameRule('uncond_embeddings', 'value', 'unbatch')],
    [NameRule('uncond_embeddings', 'value')],
  ],
}


@functools.cache
def name_rules(model: lavit.LavitModules, part: str) -> list[list[NameRule]]:
  """The tables of one part."""
  return TABLES[part](model)


class ModuleLocation(NamedTuple):
  """Where a part lies: files that begin with one of `stems` (the first is the one we write), in a folder. An `overlay` replaces some of it."""

  part: str
  folder: str
  stems: tuple[str, ...]
  overlay: tuple[str, str] | None = None  # folder, stem


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


class SourceModule(NamedTuple):
  """A part in a folder: its tensors under the names of the tables, and those that an overlay puts over them."""

  place: ModuleLocation
  state: dict[str, torch_files.Tensor]
  overlay: dict[str, torch_files.Tensor]
  edition: weight_files.Edition | None = None  # the files of `state`, where there was a choice
  others: tuple[str, ...] = ()  # names in the files of tensors that belong to another model
  tied: str | None = (
    None  # the name of the tensor that the files leave out since it is another one's
  )

  @property
  def merged(self) -> dict[str, torch_files.Tensor]:
    return self.state | self.overlay


def detect_kind(src: pathlib.Path) -> str | None:
  """What kind of folder this is, by the names in it; None if none that is known."""
  if any((src / place.folder).is_dir() for place in PUBLISHED):
    return 'LaVIT'
  if (src / 'unet').is_dir() or (src / 'vae').is_dir():
    return (
      'SDXL'
      if read_json(src / 'unet' / 'config.json').get('addition_embed_type') == 'text_time'
      else 'Stable Diffusion'
    )
  return 'LLaMA' if read_json(src / 'config.json').get('model_type') == 'llama' else None


def detect(
  src: pathlib.Path, only: str | None = None, edition_of: str | None = None
) -> tuple[str, list[SourceModule]]:
  """What kind of folder (or file) this is, and the parts that it holds.

  Args:
    src: the folder or file.
    only: a part; nothing else is then looked at.
    edition_of: the variant of the weights to take where a part has it, such as 'fp16'; None goes by `weight_files.RULE`.

  Raises:
    UserError: none that is known, a damaged one, or one that lists a part whose weights are not there.
  """
  if src.is_file():
    return 'EVA-CLIP image encoder', [
      found_in(ModuleLocation('vit', '', (src.stem,)), torch_files.load(src), src)
    ]
  if not src.is_dir():
    raise UserError(f'{src} does not exist')
  kind, found = detect_kind(src), []
  if kind is None:
    names.refuse_foreign_folder(src)
    raise UserError(
      f'{src} is no folder that is known: no visual_tokenizer/, language_model/, pixel_decoding/, unet/ or vae/ in it, and no config.json of a '
      'LLaMA or of lavit_jax'
    )
  for place in locations(kind).values():
    if only not in (None, place.part):
      continue
    folder = src / place.folder
    edition = weight_files.choose(folder, place.stems, edition_of)
    overlay = place.overlay and weight_files.choose(
      src / place.overlay[0], place.overlay[1:], edition_of
    )
    if edition is None:
      check_left(folder, place.part)
      continue
    state = torch_files.load_files(edition.files)
    if place.part == 'understanding' and not overlay and 'vit_proj.weight' not in state:
      continue
    over = torch_files.load_files(overlay.files) if overlay else {}
    found.append(found_in(place, state, folder, over, edition))
  if only is None:
    check_listed(src, kind, [each.place for each in found])
  if not found:
    names.refuse_project_files(src)
    raise UserError(
      f'{src} is a {kind} folder, but holds no weights{f" of {only}" if only else ""}'
    )
  if edition_of is not None and not any(each.edition.variant == edition_of for each in found):
    known = sorted({each.edition.variant or 'none' for each in found})
    raise UserError(
      f'{src} holds no weights of the variant {edition_of!r}; taken without that option are: {", ".join(known)}'
    )
  return kind, found


def found_in(
  place: ModuleLocation, state: dict, file: pathlib.Path, overlay: dict | None = None, edition=None
) -> SourceModule:
  """A part whose tensors have the names of the tables."""
  named = names.normalize(place.part, state, str(file))
  over = names.normalize(place.part, overlay or {}, str(file)).state
  plain, tied = named.state, None
  if place.part == 'llama':
    plain = names.tie_head(named.state, read_json(file / 'config.json'))
    tied = next((name for name in plain if name not in named.state), None)
  return SourceModule(place, plain, over, edition, named.others, tied)


def check_left(folder: pathlib.Path, part: str) -> None:
  """Raises UserError if a folder, in which a part was looked for and not found, does hold weights: they are under a name not known here."""
  held = (
    [file.name for file in sorted(folder.iterdir()) if weight_files.is_weights(file.name)]
    if folder.is_dir()
    else []
  )
  if held and folder.name in ('unet', 'vae', 'safety_checker'):  # the others share their folders
    raise UserError(
      f'{folder} holds {", ".join(held[:3])}, which is none of the names that the weights of {part} are read under '
      f'(.safetensors or .bin); download those, or move the folder away to convert the rest without {part}'
    )


def check_listed(src: pathlib.Path, kind: str, found: list[ModuleLocation]) -> None:
  """Raises UserError if the `model_index.json` of a diffusers folder lists a part of ours that was not found."""
  for place in locations(kind).values():
    folder = src / place.folder
    file = folder.parent / 'model_index.json'
    listed = read_json(file).get(folder.name)
    if isinstance(listed, list) and any(listed) and place not in found:
      raise UserError(
        f'{file} lists {folder.name}, but {folder} holds no weights that are read; download them, or write [null, null] for '
        f'{folder.name} in that file to convert the rest without it'
      )


def locations(kind: str) -> dict[str, ModuleLocation]:
  """By part: where a folder of this kind has it."""
  if kind == 'LLaMA':
    return {'llama': ModuleLocation('llama', '', TRANSFORMERS)}
  if kind in ('Stable Diffusion', 'SDXL'):
    prefix = 'highres_' if kind == 'SDXL' else ''
    pixels = [ModuleLocation(prefix + name, name, DIFFUSERS) for name in ('unet', 'vae')]
    return {
      place.part: place
      for place in (
        *pixels,
        *[ModuleLocation('safety_checker', 'safety_checker', TRANSFORMERS)] * (not prefix),
      )
    }
  return {place.part: place for place in PUBLISHED}


def zeros_view(struct) -> np.ndarray:
  """An array of zeros that takes no memory."""
  return np.broadcast_to(np.zeros((), struct.dtype), struct.shape)


def shapes(model: lavit.LavitModules, parts) -> dict:
  """part -> tree of ShapeDtypeStructs, of those parts that the model has."""
  return {
    part: _shape(model, part)
    for part in parts
    if part == 'uncond_embeddings' or getattr(model, part) is not None
  }


@functools.cache
def _shape(model: lavit.LavitModules, part: str):
  if isinstance(
    module := getattr(model, part, None), UNet | AutoencoderKL
  ):  # their tables have been made of these
    return unet_shapes(module) if isinstance(module, UNet) else vae_shapes(module)
  return jax.eval_shape(lambda: init_params(model, jax.random.key(0), (part,)))[part]


def like_of(tree):
  """A tree for the engine: a bare array goes by the name 'value'."""
  return tree if isinstance(tree, Mapping) else {'value': tree}


def choose_rules(model: lavit.LavitModules, part: str, names) -> int:
  """Which of the part's tables a file uses: the one that knows most of its names."""
  known = [{row.name for row in rows} for rows in name_rules(model, part)]
  return max(range(len(known)), key=lambda n: len(known[n] & names.keys()))


class MappedModule(NamedTuple):
  """A part that fits: how its tensors become leaves, the tensors, and which of the part's tables says so."""

  plan: MappingPlan
  state: dict[str, torch_files.Tensor]
  table: int


def map_modules(
  model: lavit.LavitModules, found: list[SourceModule], allow_missing: str = '', mixed: bool = False
) -> dict[str, MappedModule]:
  """Matches every part with the model.

  A language model may have the text's rows only: it then stays as it is, and a training gives it the others.

  Args:
    model, found: what is to fit.
    allow_missing: regex of torch names that may be missing.
    mixed: layers of one stack may be of several floating types, for the result will be of one.

  Raises:
    PortingError: all that is wrong with any of the parts.
  """
  wanted, fits, problems = shapes(model, [each.place.part for each in found]), {}, []
  for part, each in ((each.place.part, each) for each in found):
    if part not in wanted:
      problems.append(f'{part}: the variant {model.variant!r} has no such part')
      continue
    like, state = like_of(wanted[part]), each.merged
    rows = (
      state['model.embed_tokens.weight'].shape[:1] if 'model.embed_tokens.weight' in state else ()
    )
    if part == 'llama' and rows == (model.vocabulary.text_size,):
      like = {**like, **text_only(like, rows[0])}
    elif part == 'llama' and rows and rows != (model.vocabulary.size,):
      problems.append(
        f'llama: wrong rows: the vocabulary has {rows[0]}; taken are {model.vocabulary.text_size} (the words alone: the rows of '
        f'the visual tokens are added) and {model.vocabulary.size} (with them). Rows that a <pad> token added go by '
        f"transformers' resize_token_embeddings({model.vocabulary.text_size}) before save_pretrained"
      )
      continue
    table = choose_rules(model, part, state)
    try:
      fits[part] = MappedModule(
        make_plan(name_rules(model, part)[table], state, like, allow_missing, mixed), state, table
      )
    except PortingError as error:
      problems += [f'{part}: {problem}' for problem in error.problems]
  if problems:
    raise PortingError(f'checkpoint and variant {model.variant!r} do not fit', problems)
  return fits


def text_only(like: Mapping, rows: int) -> dict:
  """Embedding and head of a language model with this many rows."""
  (_, width), dtype = like['embedding'].shape, like['embedding'].dtype
  return dict(
    embedding=jax.ShapeDtypeStruct((rows, width), dtype),
    head=jax.ShapeDtypeStruct((width, rows), dtype),
  )


def find_variant(found: list[SourceModule]) -> str:
  """The variant whose shapes most of the modules have; among equals the one that shares the most tensors, then the larger one.

  `map_modules` says what is wrong with it, if anything is.
  """

  def shared(model: lavit.LavitModules, each: SourceModule) -> tuple[int, int]:
    """How many tensors of the module have the variant's shape, and how many it has that the variant knows."""
    part, state = each.place.part, each.merged
    wanted = shapes(model, [part])
    if not wanted:
      return 0, 1
    rules = name_rules(model, part)[choose_rules(model, part, state)]
    expected = torch_shapes(rules, like_of(wanted[part]))
    known = [name for name in expected if name in state and name not in VOCABULARY]
    return sum(state[name].shape == expected[name] for name in known), len(known)

  def fitting(variant: str) -> tuple[int, int]:
    model = lavit.build(variant)
    counts = [shared(model, each) for each in found]
    whole = itertools.takewhile(lambda count: count[0] == count[1], counts)
    return sum(1 for _ in whole), sum(same for same, _ in counts)

  return max(reversed(lavit.VARIANTS), key=fitting)


def read_json(file: pathlib.Path) -> dict:
  """A JSON object; {} if there is none."""
  try:
    content = json.loads(file.read_text())
  except (OSError, ValueError):
    return {}
  return content if isinstance(content, dict) else {}


# ------------------------------------------------------------------------------- the descriptions that other libraries want


def llama_config(model: lavit.LavitModules, rows: int) -> dict:
  """transformers' LlamaConfig."""
  llama = model.llama
  scaling = {} if llama.rope_scaling is None else dict(rope_scaling=dict(llama.rope_scaling))
  if llama.max_sequence_length is not None:
    scaling['max_sequence_length'] = llama.max_sequence_length
  return dict(
    architectures=['LlamaForCausalLM'],
    model_type='llama',
    hidden_size=llama.hidden_size,
    intermediate_size=llama.mlp_dim,
    num_hidden_layers=llama.num_layers,
    num_attention_heads=llama.num_heads,
    num_key_value_heads=llama.num_kv_heads,
    head_dim=llama.head_dim,
    vocab_size=rows,
    rms_norm_eps=llama.rms_norm_eps,
    rope_theta=llama.rope_theta,
    **scaling,
    max_position_embeddings=llama.max_position_embeddings,
    hidden_act='silu',
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
  )


def unet_config(unet) -> dict:
  """diffusers' UNet2DConditionModel."""

  def blocks(direction, attention):
    return [f'CrossAttn{direction}Block2D' if has else f'{direction}Block2D' for has in attention]

  added = {}
  if unet.addition_time_embed_dim is not None:
    added = dict(
      addition_embed_type='text_time',
      addition_time_embed_dim=unet.addition_time_embed_dim,
      projection_class_embeddings_input_dim=unet.pooled_dim + 6 * unet.addition_time_embed_dim,
    )
  return dict(
    _class_name='UNet2DConditionModel',
    in_channels=unet.in_channels,
    out_channels=unet.out_channels,
    block_out_channels=unet.block_out_channels,
    layers_per_block=unet.layers_per_block,
    down_block_types=blocks('Down', unet.down_block_attention),
    up_block_types=blocks('Up', unet.down_block_attention[::-1]),
    transformer_layers_per_block=unet.transformer_layers,
    attention_head_dim=unet.num_heads,
    cross_attention_dim=unet.cross_attention_dim,
    norm_num_groups=unet.norm_num_groups,
    norm_eps=unet.norm_eps,
    act_fn='silu',
    flip_sin_to_cos=unet.flip_sin_to_cos,
    freq_shift=int(unet.freq_shift) if unet.freq_shift == int(unet.freq_shift) else unet.freq_shift,
    use_linear_projection=unet.use_linear_projection,
    sample_size=64,
    **added,
  )


def vae_config(vae) -> dict:
  """diffusers' AutoencoderKL."""
  levels = len(vae.block_out_channels)
  moments = (
    {}
    if vae.latents_mean is None
    else dict(latents_mean=vae.latents_mean, latents_std=vae.latents_std)
  )
  shift = dict(shift_factor=vae.shift_factor) if vae.shift_factor else {}
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
    **shift,
    **moments,
    act_fn='silu',
    sample_size=512,
  )


def safety_config(checker) -> dict:
  """diffusers' StableDiffusionSafetyChecker, which is a CLIPConfig."""
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


def extractor_config(checker) -> dict:
  """transformers' CLIPImageProcessor: what the safety checker wants done to its pictures."""
  side = checker.image_size
  return dict(
    image_processor_type='CLIPImageProcessor',
    do_resize=True,
    size=dict(shortest_edge=side),
    resample=3,
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
  """diffusers' DDIMScheduler: the published options always, the others where they are not its default."""
  said = scheduler._asdict()
  options = {key: said[key] for key in SAID}
  for key, value in said.items():
    if key not in SAID and value != Scheduler._field_defaults[key]:
      options[key] = list(value) if isinstance(value, tuple) else value
  return dict(_class_name='DDIMScheduler', **options)


def description(model: lavit.LavitModules, part: str, rows: int | None = None) -> dict | None:
  """The `config.json` by which transformers or diffusers know a part; None if neither has it. `rows`: of the vocabulary, if not the whole."""
  makers = dict(
    llama=lambda _: llama_config(model, rows or model.vocabulary.size),
    unet=unet_config,
    vae=vae_config,
    highres_unet=unet_config,
    highres_vae=vae_config,
    safety_checker=safety_config,
  )
  return makers[part](getattr(model, part)) if part in makers else None


def descriptions(model: lavit.LavitModules, parts, rows: int) -> dict[str, dict]:
  """path -> content of the JSON files that a published folder has for these parts."""
  places = {place.part: place.folder for place in PUBLISHED if place.part in parts}
  files = {
    f'{folder}/config.json': about
    for part, folder in places.items()
    if (about := description(model, part, rows))
  }
  for part in ('unet', 'highres_unet'):
    if part in places:
      files[
        str(pathlib.PurePath(places[part]).with_name('scheduler') / 'scheduler_config.json')
      ] = scheduler_config(getattr(model, part.replace('unet', 'scheduler')))
  if 'safety_checker' in places:
    files['pixel_decoding/feature_extractor/preprocessor_config.json'] = extractor_config(
      model.safety_checker
    )
  return files
