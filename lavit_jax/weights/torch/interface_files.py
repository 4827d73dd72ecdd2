"""Recognizes the published files of other systems by their names, and splits them into modules.

    form                       modules
    clip                       vit (ClipViT): transformers' CLIPModel, CLIPVisionModel
    llava_v1                   interface (LinearProjection); llama and vit if the file has them
    llava_v1.5                 interface (MlpProjection); llama and vit if the file has them
    llava_transformers         interface (MlpProjection), llama, vit
    openflamingo               interface (FlamingoInterface)
    blip2                      interface (QFormerInterface); vit if the file has one
    instructblip               interface (QFormerInterface with a vocabulary); vit likewise
    blip2_transformers         interface, vit; llama if the file has one
    instructblip_transformers  interface, vit; llama if the file has one
    emu                        interface, llama, vit
    blip2_stage1               pretraining (QFormerPretraining)
    blip2_retrieval            pretraining, less the head of words and the temperature; vit

Names of no module are listed, such as those of other language models than LLaMA.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from lavit_jax.weights.torch import names_blip2, names_interfaces
from lavit_jax.weights.torch.mapping import PortingError
from lavit_jax.weights.torch.name_rules import NameRule
from lavit_jax.weights.torch.names_llama import llama_rules
from lavit_jax.weights.torch.names_visual import clip_rules, vit_rules
from lavit_jax.weights.torch.rule_builders import nested_rules

Tables = dict[str, list[NameRule]]  # by module
Options = dict[str, Any]  # of a form: the arguments of `form_tables`
WITH_QKV_BIAS = ('blip2_retrieval', 'blip2_transformers', 'instructblip_transformers')
FIRST_STAGE = ('blip2_stage1', 'blip2_retrieval')  # their Q-Former reads no image for a LLaMA yet
GATE = re.compile(r'lang_encoder\.(?P<layers>.*)\.(?P<number>\d+)\.gated_cross_attn_layer\.')
CLASS_EMBEDDING = 'embeddings.class_embedding'  # of CLIP's image encoder
EMBEDDING = 'model.embed_tokens.weight'  # of a LLaMA
LAVIS_ENCODER = 'visual_encoder.'  # EVA's, in files of LAVIS that have it
CLIP_ENCODERS = ('vision_model.', '')  # transformers 4 and CLIPModel, CLIPVisionModel of 5


class InterfaceFile(NamedTuple):
  """A file of another system.

  Attributes:
    form: see the top of this file.
    options: of the form, which give its names (`form_tables`).
    tables: by module: the rules of its names.
    states: by module: its tensors.
    others: names of no module, such as the language model of BLIP-2.
  """

  form: str
  options: Options
  tables: Tables
  states: dict[str, dict[str, Any]]
  others: list[str]


def open_interface(state: Mapping[str, Any]) -> InterfaceFile:
  """Recognizes a file.

  Args:
    state: torch name -> tensor, unwrapped (`state_dict_names.normalize`).

  Raises:
    PortingError: no known form; two tensors that should be equal differ.
  """
  recognized = recognize(state)
  if recognized is None:
    raise PortingError(
      'these are not the weights of LLaVA, OpenFlamingo, BLIP-2, InstructBLIP or Emu: no name is '
      'one of theirs; names are, for example, ' + ', '.join(sorted(state)[:3])
    )
  form, options = recognized
  tables = form_tables(form, **options)
  if form == 'blip2_stage1':
    state = names_blip2.split_tied(state)
  if form in WITH_QKV_BIAS:
    state = names_blip2.split_qkv_bias(state)
  patterns = {}
  for module, rules in tables.items():
    patterns[module] = re.compile('|'.join(rule.pattern for rule in rules))
  states: dict[str, dict[str, Any]] = {module: {} for module in tables}
  others = []
  for name, tensor in state.items():
    owners = [module for module, pattern in patterns.items() if pattern.fullmatch(name)]
    if owners:
      states[owners[0]][name] = tensor
    else:
      others.append(name)
  return InterfaceFile(form, options, tables, states, others)


def join_interface(form: str, states: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """The tensors of a file from those of its modules; the inverse of `open_interface`."""
  state: dict[str, Any] = {}
  for tensors in states.values():
    state.update(tensors)
  if form == 'blip2_stage1':
    return names_blip2.repeat_tied(state)
  if form in WITH_QKV_BIAS:
    return names_blip2.join_qkv_bias(state)
  return state


# --- Recognition -----------------------------------------------------------------------------


def recognize(names: Collection[str]) -> tuple[str, Options] | None:
  """The form that has these names, and its options; None if they are of no known form.

  Raises:
    PortingError: a Q-Former without its projection into a language model.
  """
  if 'cformer.causal_tokens' in names:
    return 'emu', {}
  if 'perceiver.latents' in names:
    return _recognize_openflamingo(names)
  if 'Qformer.bert.embeddings.LayerNorm.weight' in names:
    return _recognize_lavis(names)
  if 'query_tokens' in names:
    return _recognize_blip_of_transformers(names)
  return _recognize_llava(names)


def _recognize_openflamingo(names: Collection[str]) -> tuple[str, Options] | None:
  gates = [match for match in map(GATE.match, names) if match]
  if not gates:
    return None
  # The first gated layer stands before the last layer of the first group.
  every = 1 + min(int(match['number']) for match in gates)
  return 'openflamingo', dict(layers=gates[0]['layers'], every=every)


def _recognize_lavis(names: Collection[str]) -> tuple[str, Options]:
  if 'itm_head.weight' in names:
    return 'blip2_stage1', {}
  projections = [name for name in ('opt_proj', 't5_proj', 'llm_proj') if f'{name}.weight' in names]
  if not projections:
    raise PortingError('a Q-Former without opt_proj, t5_proj or llm_proj into a language model')
  text = 'Qformer.bert.embeddings.word_embeddings.weight' in names
  options: Options = dict(projection=projections[0])
  if f'{LAVIS_ENCODER}patch_embed.proj.weight' in names:
    options['tower'] = LAVIS_ENCODER
  return ('instructblip' if text else 'blip2'), options


def _recognize_blip_of_transformers(names: Collection[str]) -> tuple[str, Options] | None:
  if 'vision_projection.weight' in names:
    return 'blip2_retrieval', {}
  if 'language_projection.weight' not in names:
    return None
  text = 'qformer.embeddings.word_embeddings.weight' in names
  form = 'instructblip_transformers' if text else 'blip2_transformers'
  return form, dict(llama=f'language_model.{EMBEDDING}' in names)


def _recognize_llava(names: Collection[str]) -> tuple[str, Options] | None:
  prefixes = [p for p in names_interfaces.LLAVA_TOWERS if f'{p}{CLASS_EMBEDDING}' in names]
  options: Options = dict(tower=prefixes[0] if prefixes else None)
  if 'multi_modal_projector.linear_1.weight' in names:
    return 'llava_transformers', options
  options['llama'] = EMBEDDING in names
  if 'model.mm_projector.weight' in names:
    return 'llava_v1', options
  if 'model.mm_projector.0.weight' in names:
    return 'llava_v1.5', options
  for prefix in CLIP_ENCODERS:
    if f'{prefix}{CLASS_EMBEDDING}' in names and f'{prefix}pre_layrnorm.weight' in names:
      return 'clip', dict(tower=prefix)
  return None


# --- Names of a form -------------------------------------------------------------------------


def form_tables(
  form: str,
  *,
  tower: str | None = None,
  llama: bool = True,
  projection: str = 'llm_proj',
  layers: str = 'model.layers',
  every: int = 1,
) -> Tables:
  """By module: the rules of its names in a form.

  Args:
    form: see the top of this file.
    tower: of LLaVA, CLIP and BLIP-2's own files: what is before the names of the image encoder;
      None without one.
    llama: whether LLaVA's own files, or those of BLIP-2 in transformers, hold a LLaMA.
    projection: of BLIP-2's and InstructBLIP's own files: see `names_blip2.blip2_rules`.
    layers: of OpenFlamingo: see `names_interfaces.gated_rules`.
    every: likewise.
  """
  if form in ('clip', 'llava_v1', 'llava_v1.5', 'llava_transformers'):
    return _llava_tables(form, tower, llama)
  text = form.startswith('instructblip')
  if form in ('blip2', 'instructblip'):
    tables = dict(interface=names_blip2.blip2_rules(projection, text))
    if tower is not None:
      tables['vit'] = nested_rules(tower, '', vit_rules())
    return tables
  if form in ('blip2_transformers', 'instructblip_transformers'):
    tables = dict(
      interface=names_blip2.blip2_transformers_rules(text), vit=names_blip2.blip2_tower_rules()
    )
    if llama:
      tables['llama'] = nested_rules('language_model.', '', llama_rules())
    return tables
  if form == 'openflamingo':
    resampler = nested_rules('', 'resampler/', names_interfaces.resampler_rules())
    gated = nested_rules('', 'gated/', names_interfaces.gated_rules(layers, every))
    return dict(interface=[*resampler, *gated])
  if form == 'emu':
    return dict(
      interface=names_interfaces.emu_rules(),
      llama=names_interfaces.emu_llama_rules(),
      vit=names_interfaces.emu_tower_rules(),
    )
  if form == 'blip2_stage1':
    return dict(pretraining=names_blip2.blip2_pretraining_rules())
  assert form == 'blip2_retrieval', form
  return dict(pretraining=names_blip2.blip2_retrieval_rules(), vit=names_blip2.blip2_tower_rules())


def _llava_tables(form: str, tower: str | None, llama: bool) -> Tables:
  tables = {}
  if form == 'clip':
    return dict(vit=nested_rules(tower or '', '', clip_rules()))
  if form == 'llava_v1':
    tables['interface'] = names_interfaces.llava_linear_rules()
  elif form == 'llava_v1.5':
    tables['interface'] = names_interfaces.llava_mlp_rules()
  else:
    tables['interface'] = names_interfaces.llava_transformers_rules()
  if llama:
    of_language_model = 'language_model.' if form == 'llava_transformers' else ''
    tables['llama'] = nested_rules(of_language_model, '', llama_rules())
  if tower is not None:
    tables['vit'] = names_interfaces.llava_tower_rules(tower)
  return tables
