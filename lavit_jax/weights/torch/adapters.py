"""Folders of adapters (models/lora.py), each module's as the library peft writes and reads it.

    folder/lavit_adapter.json    {"format": 1, "variant", "modules", "settings", "base", "metadata"}
    folder/llama/                adapter_config.json and adapter_model.safetensors
    folder/understanding/        the same, by the names of the published PyTorch files
    folder/vit/
    folder/interface/            adapter_model.safetensors: all parameters, by their paths here

A folder that peft wrote, with adapter_config.json itself, is one for `llama`.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from lavit_jax.errors import UserError
from lavit_jax.models import lora
from lavit_jax.models.lavit import LavitModules
from lavit_jax.models.lora import LORA
from lavit_jax.weights.store.arrays import flatten, unflatten
from lavit_jax.weights.store.metadata import ADAPTERS as INFO
from lavit_jax.weights.store.replacement import replace_folder
from lavit_jax.weights.torch import adapter_names, files
from lavit_jax.weights.torch.adapter_names import PREFIX, tensor_names
from lavit_jax.weights.torch.formats import read_json
from lavit_jax.weights.torch.name_rules import TRANSFORMS, NameRule, contiguous
from lavit_jax.weights.torch.name_tables import module_shapes
from lavit_jax.weights.torch.safetensors_files import SafetensorsWriter

CONFIG = 'adapter_config.json'
STEM = 'adapter_model'
FORMAT = 1
MAX_NAMES = 3  # in an error
MERGE_BY_PEFT = (
  'merge it by peft (merge_and_unload().save_pretrained(FOLDER)) and convert that folder'
)
# Fields of peft's config by which its layers compute something else than `models.lora`.
UNKNOWN_FIELDS = (
  'use_dora',
  'rank_pattern',
  'alpha_pattern',
  'layers_to_transform',
  'layer_replication',
  'trainable_token_indices',
  'target_parameters',
  'lora_bias',
  'use_qalora',
  'use_bdlora',
  'alora_invocation_tokens',
  'kasa_config',
)


class ModuleAdapter(NamedTuple):
  """What was trained of one module.

  Attributes:
    trained: its tree (models/lora.py), of NumPy arrays in their stored dtypes.
    scale: s.
    config: the content of `adapter_config.json`; {} for a module that is whole.
  """

  trained: dict[str, Any]
  scale: float
  config: dict[str, Any]


class Adapters(NamedTuple):
  """A folder of adapters.

  Attributes:
    modules: by module.
    info: the content of `lavit_adapter.json`; {} of a folder that peft wrote.
  """

  modules: dict[str, ModuleAdapter]
  info: dict[str, Any]


def is_adapter_folder(folder: str | os.PathLike) -> bool:
  """Whether a folder holds adapters."""
  return any((pathlib.Path(folder) / name).is_file() for name in (INFO, CONFIG))


# --- Writing -------------------------------------------------------------------------------------


def peft_config(
  model: LavitModules, module: str, trained: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
  """The `adapter_config.json` of a module.

  Args:
    model: the modules.
    module: its name.
    trained: its tree.
    options: further fields, such as 'r' and 'lora_alpha'.
  """
  rules = adapter_names.leaf_rules(model, module)
  kernels = [path.removesuffix(LORA) + 'kernel' for path, _ in lora.adapters(trained)]
  in_full = [path for path in _leaves(trained) if not path.endswith('bias')]
  fields = dict(
    peft_type='LORA',
    task_type='CAUSAL_LM' if module == 'llama' else None,
    inference_mode=True,
    target_modules=_short_names(kernels, rules),
    modules_to_save=_short_names(in_full, rules) or None,
    fan_in_fan_out=False,
    init_lora_weights=True,
  )
  return {**fields, **options}


def save_adapters(
  folder: str | os.PathLike, model: LavitModules, adapters: Adapters
) -> pathlib.Path:
  """Writes a folder of adapters, which replaces an earlier one.

  Raises:
    UserError: the folder has other content, or cannot be written.
  """
  with replace_folder(folder, INFO) as scratch:
    for module, adapter in adapters.modules.items():
      _save_module(scratch / module, model, module, adapter)
    info = dict(adapters.info, format=FORMAT, variant=model.variant, modules=list(adapters.modules))
    (scratch / INFO).write_text(json.dumps(info, indent=1) + '\n')
  return pathlib.Path(folder)


def _save_module(
  folder: pathlib.Path, model: LavitModules, module: str, adapter: ModuleAdapter
) -> None:
  tensors = to_tensors(model, module, adapter.trained)
  with SafetensorsWriter(folder, STEM, tensors) as writer:
    for name, array in tensors.items():
      writer.write(name, array)
  if adapter.config:
    (folder / CONFIG).write_text(json.dumps(adapter.config, indent=2, sort_keys=True) + '\n')


def to_tensors(
  model: LavitModules, module: str, trained: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  """What was trained of a module, by peft's names; a module without names by its paths."""
  rules = adapter_names.leaf_rules(model, module)
  if not rules:
    return {path: np.asarray(leaf) for path, leaf in flatten(dict(trained)).items()}
  tensors = {}
  for path, adapter in lora.adapters(trained):
    rule = rules[path.removesuffix(LORA) + 'kernel']
    a, b = np.asarray(adapter['a']), np.asarray(adapter['b'])
    for layer in range(len(a)) if rule.is_stack else (None,):
      factors = (a, b) if layer is None else (a[layer], b[layer])
      pair = adapter_names.to_peft(rule, *factors)
      for name, factor in zip(tensor_names(rule, layer), pair, strict=True):
        tensors[name] = contiguous(factor)
  for path, leaf in _leaves(trained).items():
    tensors |= _full_tensors(rules[path], np.asarray(leaf))
  return dict(sorted(tensors.items()))


def _full_tensors(rule: NameRule, leaf: np.ndarray) -> dict[str, np.ndarray]:
  """The tensors of a leaf that was trained in full."""
  tensors = {}
  for layer in range(len(leaf)) if rule.is_stack else (None,):
    name = rule.name if layer is None else rule.layer_name(layer)
    array = leaf if layer is None else leaf[layer]
    tensors[PREFIX + name] = contiguous(TRANSFORMS[rule.transform].to_torch(array))
  return tensors


def _leaves(trained: Mapping[str, Any]) -> dict[str, Any]:
  """The leaves of a trained tree that are no adapters, by path."""
  flat = flatten(dict(trained))
  return {path: leaf for path, leaf in flat.items() if f'/{LORA}/' not in f'/{path}'}


def _short_names(paths: Iterable[str], rules: Mapping[str, NameRule]) -> list[str]:
  """Of each leaf the shortest end of its layer's name that no other layer has."""
  layers = {adapter_names.layer_name(rule) for rule in rules.values()}
  short = []
  for path in paths:
    pieces = adapter_names.layer_name(rules[path]).split('.')
    for count in range(1, len(pieces) + 1):
      end = '.'.join(pieces[-count:])
      if sum(f'.{layer}'.endswith(f'.{end}') for layer in layers) == 1:
        break
    short.append(end)
  return sorted(set(short))


# --- Reading -------------------------------------------------------------------------------------


def read_info(folder: str | os.PathLike) -> dict[str, Any]:
  """The `lavit_adapter.json` of a folder; {} of one that peft wrote.

  Raises:
    UserError: the folder is no folder of adapters, or of a later version.
  """
  folder = pathlib.Path(folder)
  if not is_adapter_folder(folder):
    raise UserError(
      f'{folder} is no folder of adapters: it has neither {INFO} nor {CONFIG}; give RUN/export of '
      'a run with lora.rank, or a folder that peft wrote'
    )
  info = read_json(folder / INFO)
  if info and info.get('format') != FORMAT:
    raise UserError(f'{folder / INFO} is not of format {FORMAT}; write it again by this version')
  return info


def load_adapters(folder: str | os.PathLike, model: LavitModules) -> Adapters:
  """Reads a folder of adapters.

  Args:
    folder: one that `save_adapters` or peft wrote.
    model: the modules beside which they belong.

  Raises:
    UserError: it is none, is damaged or incomplete, is of another model, or computes something
      that is not known here.
  """
  folder = pathlib.Path(folder)
  info = read_info(folder)
  if not info:
    return Adapters({'llama': _load_module(folder, model, 'llama')}, {})
  if info['variant'] != model.variant:
    raise UserError(f'{folder} is for variant {info["variant"]!r}, not {model.variant!r}')
  modules = {}
  for module in info['modules']:
    modules[module] = _load_module(folder / module, model, module)
  return Adapters(modules, info)


def with_settings(
  settings: Mapping[str, Any], info: Mapping[str, Any]
) -> dict[str, Mapping[str, Any]]:
  """The settings of a checkpoint with those that its adapters bring.

  They are their interface and, if they trained here, the template of chats.
  """
  brought = info.get('settings', {})
  result = dict(settings)
  if 'interface' in brought:
    result['interface'] = brought['interface']
  if info:
    result.pop('chat', None)  # a template that is the variant's own is not stored
    result |= {name: fields for name, fields in brought.items() if name == 'chat'}
  return result


def base_notes(
  digest: Callable[[str], str], modules: Iterable[str], adapters: Adapters
) -> list[str]:
  """A line for each module of a checkpoint that is not the one beside which adapters trained.

  It may be the same in another dtype, so this is no error.

  Args:
    digest: of a module of the checkpoint (`store.metadata.module_digest`).
    modules: of the checkpoint.
    adapters: beside it.
  """
  notes = []
  for module, base in adapters.info.get('base', {}).items():
    if module in modules and digest(module) != base['digest']:
      notes.append(
        f'{module} has other numbers than that of {base["folder"]}, beside which the adapters '
        'trained; that is right if it is the same in another dtype'
      )
  return notes


def _load_module(folder: pathlib.Path, model: LavitModules, module: str) -> ModuleAdapter:
  tensors = {name: np.asarray(tensor) for name, tensor in files.load(folder, STEM).items()}
  if not adapter_names.leaf_rules(model, module):
    return ModuleAdapter(unflatten(tensors), 1.0, {})
  config = read_json(folder / CONFIG)
  scale = _read_scale(folder / CONFIG, config)
  return ModuleAdapter(from_tensors(model, module, tensors, str(folder)), scale, config)


def _read_scale(file: pathlib.Path, config: Mapping[str, Any]) -> float:
  if config.get('peft_type') != 'LORA' or not config.get('r') or 'lora_alpha' not in config:
    raise UserError(
      f'{file} is missing, damaged or no LoRA (peft_type {config.get("peft_type")!r}); only LoRA '
      'is known here'
    )
  for name in UNKNOWN_FIELDS:
    if config.get(name):
      raise UserError(
        f'{file} has {name}={config[name]!r}, which is not known here; {MERGE_BY_PEFT}'
      )
  return lora.adapter_scale(config['r'], config['lora_alpha'], bool(config.get('use_rslora')))


def from_tensors(
  model: LavitModules, module: str, tensors: Mapping[str, np.ndarray], source: str
) -> dict[str, Any]:
  """The trained tree of a module from tensors by peft's names; the inverse of `to_tensors`.

  Raises:
    UserError: a tensor is missing or unknown, or has another shape than the model.
  """
  rules = adapter_names.leaf_rules(model, module)
  shapes = flatten(module_shapes(model, (module,))[module])
  left = dict(tensors)
  flat: dict[str, np.ndarray] = {}
  for path, rule in rules.items():
    if path not in shapes:
      continue
    count = shapes[path].shape[0] if rule.is_stack else None
    if adapter_names.is_adaptable(rule):
      pairs = _take(left, [tensor_names(rule, layer) for layer in _layers(count)], source)
      if pairs:
        factors = [adapter_names.from_peft(rule, *pair) for pair in pairs]
        layer = path.removesuffix('kernel') + LORA
        flat[f'{layer}/a'], flat[f'{layer}/b'] = (
          _join(arrays, count) for arrays in zip(*factors, strict=True)
        )
        _check_adapter(source, path, flat[f'{layer}/a'], flat[f'{layer}/b'], shapes[path].shape)
    names = [(PREFIX + (rule.name if i is None else rule.layer_name(i)),) for i in _layers(count)]
    whole = _take(left, names, source)
    if whole:
      flat[path] = _join([TRANSFORMS[rule.transform].to_flax(x) for (x,) in whole], count)
      _check_shape(source, path, flat[path].shape, shapes[path].shape)
  if left:
    listed = ', '.join(sorted(left)[:MAX_NAMES])
    raise UserError(
      f'{source} has {len(left)} tensors that are not of {module} of variant {model.variant!r}: '
      f'{listed}'
    )
  return unflatten(flat)


def _layers(count: int | None) -> Iterable[int | None]:
  return (None,) if count is None else range(count)


def _join(arrays: Iterable[np.ndarray], count: int | None) -> np.ndarray:
  arrays = list(arrays)
  return contiguous(arrays[0]) if count is None else np.stack(arrays)


def _take(
  left: dict[str, np.ndarray], groups: list[tuple[str, ...]], source: str
) -> list[tuple[np.ndarray, ...]]:
  """Takes the tensors of all layers out of `left`; [] if there is none of them.

  Raises:
    UserError: there are some of them, but not all.
  """
  missing = [name for group in groups for name in group if name not in left]
  if len(missing) == sum(map(len, groups)):
    return []
  if missing:
    raise UserError(
      f'{source} lacks {missing[0]}: an adapter is of all layers here, or of none; {MERGE_BY_PEFT}'
    )
  return [tuple(left.pop(name) for name in group) for group in groups]


def _check_adapter(
  source: str, path: str, a: np.ndarray, b: np.ndarray, kernel: tuple[int, ...]
) -> None:
  expected_a = (*kernel[: a.ndim - 2], kernel[-2], a.shape[-1])
  expected_b = (*kernel[:-2], a.shape[-1], kernel[-1])
  _check_shape(source, f'{path} A', a.shape, expected_a)
  _check_shape(source, f'{path} B', b.shape, expected_b)


def _check_shape(source: str, name: str, found: tuple, expected: tuple) -> None:
  if tuple(found) != tuple(expected):
    raise UserError(
      f'{source}: {name} is {list(found)}, and the model wants {list(expected)}; the adapter is of '
      'another model'
    )
