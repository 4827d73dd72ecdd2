"""Recognizes the published files of other systems by their names, and splits them into modules.

    form                       modules
    llava_v1                   interface (LinearProjection); llama and tower if the file has them
    llava_v1.5                 interface (MlpProjection); llama and tower if the file has them
    llava_transformers         interface (MlpProjection), llama, tower
    openflamingo               resampler, gated: together the parameters of FlamingoInterface
    blip2_stage1               pretraining (QFormerPretraining)
    blip2                      interface (QFormerInterface)
    instructblip               interface (QFormerInterface with a vocabulary)
    blip2_retrieval            pretraining, less the head of words and the temperature; tower
    blip2_transformers         interface, tower
    instructblip_transformers  interface, tower
    emu                        interface, llama, tower

Names of no module are listed, such as those of the language models of BLIP-2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from lavit_jax.weights.torch import names_blip2, names_interfaces
from lavit_jax.weights.torch.mapping import PortingError
from lavit_jax.weights.torch.name_rules import NameRule
from lavit_jax.weights.torch.names_llama import llama_rules
from lavit_jax.weights.torch.rule_builders import nested_rules

Tables = dict[str, list[NameRule]]  # by module
WITH_QKV_BIAS = ('blip2_retrieval', 'blip2_transformers', 'instructblip_transformers')
GATE = re.compile(r'lang_encoder\.(?P<layers>.*)\.(?P<number>\d+)\.gated_cross_attn_layer\.')


class InterfaceFile(NamedTuple):
  """A file of another system.

  Attributes:
    form: see the top of this file.
    tables: by module: the rules of its names.
    states: by module: its tensors.
    others: names of no module, such as the language model of BLIP-2.
  """

  form: str
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
  form, tables = _recognize(state)
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
  present = [module for module in tables if states[module]]
  return InterfaceFile(
    form,
    {module: tables[module] for module in present},
    {module: states[module] for module in present},
    others,
  )


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


def _recognize(names: Collection[str]) -> tuple[str, Tables]:
  """The form, and the tables of its modules."""
  recognizers: tuple[Callable[[Collection[str]], tuple[str, Tables] | None], ...] = (
    _recognize_emu,
    _recognize_openflamingo,
    _recognize_lavis,
    _recognize_blip_of_transformers,
    _recognize_llava,
  )
  for recognize in recognizers:
    form_and_tables = recognize(names)
    if form_and_tables is not None:
      return form_and_tables
  raise PortingError(
    'these are not the weights of LLaVA, OpenFlamingo, BLIP-2, InstructBLIP or Emu: no name is '
    'one of theirs; names are, for example, ' + ', '.join(sorted(names)[:3])
  )


def _recognize_emu(names: Collection[str]) -> tuple[str, Tables] | None:
  if 'cformer.causal_tokens' not in names:
    return None
  tables = dict(
    interface=names_interfaces.emu_rules(),
    llama=names_interfaces.emu_llama_rules(),
    tower=names_interfaces.emu_tower_rules(),
  )
  return 'emu', tables


def _recognize_openflamingo(names: Collection[str]) -> tuple[str, Tables] | None:
  if 'perceiver.latents' not in names:
    return None
  tables = dict(resampler=names_interfaces.resampler_rules())
  gates = [match for match in map(GATE.match, names) if match]
  if gates:
    # The first gated layer stands before the last layer of the first group.
    every = 1 + min(int(match['number']) for match in gates)
    tables['gated'] = names_interfaces.gated_rules(gates[0]['layers'], every)
  return 'openflamingo', tables


def _recognize_lavis(names: Collection[str]) -> tuple[str, Tables] | None:
  if 'Qformer.bert.embeddings.LayerNorm.weight' not in names:
    return None
  if 'itm_head.weight' in names:
    return 'blip2_stage1', dict(pretraining=names_blip2.blip2_pretraining_rules())
  text = 'Qformer.bert.embeddings.word_embeddings.weight' in names
  projections = [name for name in ('opt_proj', 't5_proj', 'llm_proj') if f'{name}.weight' in names]
  if not projections:
    raise PortingError('a Q-Former without opt_proj, t5_proj or llm_proj into a language model')
  form = 'instructblip' if text else 'blip2'
  return form, dict(interface=names_blip2.blip2_rules(projections[0], text))


def _recognize_blip_of_transformers(names: Collection[str]) -> tuple[str, Tables] | None:
  if 'query_tokens' not in names:
    return None
  if 'vision_projection.weight' in names:
    tables = dict(
      pretraining=names_blip2.blip2_retrieval_rules(), tower=names_blip2.blip2_tower_rules()
    )
    return 'blip2_retrieval', tables
  if 'language_projection.weight' not in names:
    return None
  text = 'qformer.embeddings.word_embeddings.weight' in names
  tables = dict(
    interface=names_blip2.blip2_transformers_rules(text),
    tower=names_blip2.blip2_tower_rules(),
  )
  return ('instructblip_transformers' if text else 'blip2_transformers'), tables


def _recognize_llava(names: Collection[str]) -> tuple[str, Tables] | None:
  if 'model.mm_projector.weight' in names:
    tables = dict(interface=names_interfaces.llava_linear_rules())
    form = 'llava_v1'
  elif 'model.mm_projector.0.weight' in names:
    tables = dict(interface=names_interfaces.llava_mlp_rules())
    form = 'llava_v1.5'
  elif 'multi_modal_projector.linear_1.weight' in names:
    tables = dict(interface=names_interfaces.llava_transformers_rules())
    form = 'llava_transformers'
  else:
    return None
  of_language_model = 'language_model.' if form == 'llava_transformers' else ''
  tables['llama'] = nested_rules(of_language_model, '', llama_rules())
  for prefix in names_interfaces.LLAVA_TOWERS:
    if f'{prefix}embeddings.class_embedding' in names:
      tables['tower'] = names_interfaces.llava_tower_rules(prefix)
      break
  return form, tables
