"""Loads the parameters of a checkpoint, from a folder of either kind, module by module.

A module is read when it is first used. Each leaf is checked against the variant, converted to the
compute dtype and put onto the mesh as it is read. The language model is read one layer of a leaf at
a time, because the inference programs take its layers apart (models/llama.py), and its matrices are
quantized on the way if that is requested. The device never holds more than the result and the piece
that is being read.
"""

from __future__ import annotations

import functools
import logging
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from lavit_jax import sharding
from lavit_jax.errors import UserError
from lavit_jax.models import lavit, lora
from lavit_jax.models.int8 import quantize_weight
from lavit_jax.models.noise_schedule import Scheduler
from lavit_jax.weights.store.arrays import ParameterSource, flatten, unflatten
from lavit_jax.weights.store.folder import open_params, read_config, read_settings
from lavit_jax.weights.store.metadata import check_codebook, module_digest
from lavit_jax.weights.torch import configs, finite, formats, matching, name_tables, weight_files
from lavit_jax.weights.torch.adapters import Adapters, ModuleAdapter, base_notes
from lavit_jax.weights.torch.api import open_torch

LOG = logging.getLogger(__name__)
# These modules choose codes or generate pixels; they compute in float32 whatever the compute dtype.
FLOAT32_MODULES = ('tokenizer', 'vae', 'highres_vae', 'uncond_embeddings')
# `LazyParams['codebook']` is this one leaf of the tokenizer, all that image generation needs of it.
CODEBOOK_LEAF = 'quantizer/embedding'
LAYERS = 'layers'  # the stacked layers of the language model
MAX_MISMATCHES = 3  # listed in an error


class CheckpointInfo(NamedTuple):
  """What a checkpoint folder holds, before any parameters are read.

  Attributes:
    variant: the name of the model variant.
    tokenizer_folder: the files of the text tokenizer.
    modules: the names of the modules whose parameters are there.
    open: (module, dtype=...) -> a source of its parameters.
    settings: of the checkpoint (models/settings.py).
    digest: module -> a digest of its numbers; None if the folder has none.
  """

  variant: str
  tokenizer_folder: pathlib.Path
  modules: frozenset[str]
  open: Callable[..., ParameterSource]
  settings: Mapping[str, Mapping[str, Any]]
  digest: Callable[[str], str] | None = None


def open_checkpoint(folder: str | os.PathLike, variant: str | None = None) -> CheckpointInfo:
  """Recognizes a checkpoint folder and reads its descriptions.

  Args:
    folder: one of ours (weights/store/folder.py) or a PyTorch one (weights/torch/formats.py).
    variant: the variant that it must be; None accepts any.

  Returns:
    Its description. No parameters are read.

  Raises:
    UserError: the folder is missing, damaged, or of another variant.
  """
  folder = pathlib.Path(folder)
  if formats.detect_kind(folder) == formats.LAVIT:
    checkpoint = _open_torch_folder(folder, variant)
  else:
    checkpoint = _open_own_folder(folder)
  if variant not in (None, checkpoint.variant):
    raise UserError(f'{folder} holds variant {checkpoint.variant!r}, but {variant!r} was requested')
  return checkpoint


def _open_torch_folder(folder: pathlib.Path, requested: str | None) -> CheckpointInfo:
  """Describes a folder with the layout of the published PyTorch weights."""
  variant = formats.read_json(folder / formats.EXPORT_INFO).get('variant') or requested
  if not variant:
    _, sources = formats.detect(folder)
    variant = matching.find_variant(sources)
  folders = {location.module: location.folder for location in formats.PUBLISHED}
  modules = frozenset(
    location.module
    for location in formats.PUBLISHED
    if weight_files.choose(folder / location.folder, location.stems)
  )
  return CheckpointInfo(
    variant=variant,
    tokenizer_folder=folder / folders['llama'],
    modules=modules,
    open=functools.partial(open_torch, folder, variant=variant),
    settings=configs.read_settings(folder, folders, modules, variant),
  )


def _open_own_folder(folder: pathlib.Path) -> CheckpointInfo:
  """Describes a folder that this package wrote."""
  config = read_config(folder)
  if 'tokenizer' in config['parts']:
    check_codebook(folder)
  return CheckpointInfo(
    variant=config['variant'],
    tokenizer_folder=folder / 'tokenizer',
    modules=frozenset(config['parts']),
    open=functools.partial(open_params, folder),
    settings=read_settings(folder),
    digest=functools.partial(module_digest, folder),
  )


class LazyParams:
  """The parameters of a model by module name; each module is read when it is first used.

  The name 'codebook' stands for the part of 'tokenizer' that image generation needs; it is read
  alone, and shared with 'tokenizer' once both are in use. 'llama' has a tree for each layer,
  `layers_0` and so on, in place of one stack.

  Args:
    modules: what the parameters belong to.
    checkpoint: where they are read; or {module name: tree}, whose leaves are copied.
    weights_dtype: 'int8' quantizes the matrices of the language model; None does not.
    mesh: the devices that hold the parameters (sharding.py); None is the first device.
  """

  def __init__(
    self,
    modules: lavit.LavitModules,
    checkpoint: CheckpointInfo | Mapping[str, Any],
    weights_dtype: str | None = None,
    mesh: Mesh | None = None,
  ):
    self.mesh = mesh
    self.max_length = modules.llama.longest  # tokens of a prompt and its answer together
    self._modules = modules
    self._weights_dtype = weights_dtype
    self._params: dict[str, Any] = {}
    self._adapters: dict[str, ModuleAdapter] = {}
    self._adapted: dict[str, Any] = {}  # the params of modules that have adapters
    self._digest: Callable[[str], str] | None = None
    if isinstance(checkpoint, CheckpointInfo):
      self._digest = checkpoint.digest
      self._available = checkpoint.modules
      self._open = checkpoint.open
    else:
      self._available = frozenset(checkpoint)
      self._open = functools.partial(_open_tree, checkpoint)

  @property
  def loaded(self) -> frozenset[str]:
    """The names of the modules that have been read."""
    return frozenset(self._params.keys() | self._adapted.keys())

  def use_adapters(self, adapters: Adapters | None) -> None:
    """Puts adapters beside the parameters, in place of earlier ones; None for none.

    The parameters that have been read stay where they are. A warning in the log names the modules
    that are not those beside which the adapters trained.
    """
    self._adapters = {} if adapters is None else dict(adapters.modules)
    self._adapted = {}
    if adapters is not None and self._digest is not None:
      for note in base_notes(self._digest, self._available, adapters):
        LOG.warning(note)

  def scheduler(self, prefix: str) -> Scheduler:
    """The noise schedule of a U-Net, by the prefix of its module name: '' or 'highres_'."""
    return getattr(self._modules, f'{prefix}scheduler')

  def __contains__(self, name: str) -> bool:
    """Whether the checkpoint holds a module, read or not."""
    return _module_of(name) in self._available or name in self._adapters

  def __getitem__(self, name: str) -> Any:
    """Returns the parameters of a module, and reads them if this is their first use.

    Raises:
      UserError: they are missing, damaged, or of another model.
    """
    if name not in self._adapters:
      return self._read_once(name)
    if name not in self._adapted:
      self._adapted[name] = self._adapt(name, self._adapters[name])
    return self._adapted[name]

  def _read_once(self, name: str) -> Any:
    if name not in self._params:
      self._params[name] = self._read(name)
    return self._params[name]

  def _adapt(self, name: str, adapter: ModuleAdapter) -> Any:
    """The parameters of a module with its adapter, or the module that the adapter is whole."""
    flat = {}
    for path, leaf in flatten(adapter.trained).items():
      leaf = finite.convert(f'{name}/{path}', leaf, jnp.dtype(self._dtype(name)))
      if name == 'llama' and path.startswith(f'{LAYERS}/'):
        for layer, of_layer in enumerate(leaf):
          flat[path.replace(LAYERS, f'{LAYERS}_{layer}', 1)] = of_layer
      else:
        flat[path] = leaf
    shardings = self._shardings(name, flat)
    for path, leaf in flat.items():
      placed = leaf if path not in shardings else jax.device_put(leaf, shardings[path])
      flat[path] = self._finish(name, path, placed)
    trained = unflatten(flat)
    return lora.attach(self._read_once(name), trained, adapter.scale) if adapter.config else trained

  def _read(self, name: str) -> Any:
    codebook = self._loaded_codebook(name)
    if name == 'codebook' and codebook is not None:
      return unflatten({CODEBOOK_LEAF: codebook})
    module = _module_of(name)
    source = self._open(module, dtype=self._dtype(module))
    self._check(module, source.structs)
    shardings = self._shardings(module, source.structs)
    flat = {}
    for path in (CODEBOOK_LEAF,) if name == 'codebook' else source.structs:
      if path == CODEBOOK_LEAF and codebook is not None:
        flat[path] = codebook
      elif module == 'llama' and path.startswith(f'{LAYERS}/'):
        flat.update(self._read_layers(source, path, shardings.get(path)))
      else:
        flat[path] = self._finish(module, path, source.read(path, None, shardings.get(path)))
    return unflatten(flat)

  def _loaded_codebook(self, name: str) -> jax.Array | None:
    """The codebook, if 'tokenizer' and 'codebook' share it and the other one has been read."""
    other = {'codebook': 'tokenizer', 'tokenizer': 'codebook'}.get(name)
    if other not in self._params:
      return None
    return flatten(self._params[other])[CODEBOOK_LEAF]

  def _dtype(self, module: str) -> str:
    return 'float32' if module in FLOAT32_MODULES else jnp.dtype(self._modules.vit.dtype).name

  def _shardings(self, module: str, structs: Mapping[str, Any]) -> dict[str, NamedSharding]:
    """The sharding of each leaf; {} without a mesh."""
    if self.mesh is None:
      return {}
    return flatten(sharding.shardings({module: unflatten(structs)}, self.mesh)[module])

  def _read_layers(
    self, source: ParameterSource, path: str, stack_sharding: NamedSharding | None
  ) -> Iterator[tuple[str, Any]]:
    """Reads a stacked leaf of the language model; yields (path, leaf) for each layer."""
    layer_sharding = None
    if stack_sharding is not None:
      # The axis of layers is never split, so that the sharding of a layer is that of the others.
      layer_sharding = NamedSharding(stack_sharding.mesh, PartitionSpec(*stack_sharding.spec[1:]))
    for layer in range(source.structs[path].shape[0]):
      layer_path = path.replace(LAYERS, f'{LAYERS}_{layer}', 1)
      # No name refers to the array that was read: it is freed before the next one is read.
      yield layer_path, self._finish('llama', path, source.read(path, layer, layer_sharding))

  def _finish(self, module: str, path: str, leaf: Any) -> Any:
    """Moves a leaf to the device and quantizes it where required."""
    array = leaf
    if not isinstance(leaf, jax.Array):
      # `jnp.asarray` would compile a program for each shape. A view may be of a mapped file, and
      # the device array of a CPU is the numpy array where it can be, whatever `may_alias` says.
      array = jax.device_put(leaf if leaf.flags.owndata else leaf.copy())
    if module == 'llama' and self._weights_dtype == 'int8':
      array = quantize_weight(path.rsplit('/', 1)[-1], array)
    return jax.block_until_ready(array)  # before the next leaf is read, to bound memory

  def _check(self, module: str, structs: Mapping[str, Any]) -> None:
    """Compares shapes with those of the variant; raises UserError where they differ."""
    model_structs = name_tables.module_shapes(self._modules, (module,))[module]
    expected = {path: leaf.shape for path, leaf in flatten(model_structs).items()}
    actual = {path: leaf.shape for path, leaf in structs.items()}
    optional = optional_leaves(self._modules, module)
    mismatches = []
    for path in sorted(expected.keys() | actual.keys()):
      if path not in actual and path in optional:
        continue
      if expected.get(path) != actual.get(path):
        actual_shape = actual.get(path, 'missing')
        expected_shape = expected.get(path, 'nothing')
        mismatches.append(f'{path}: {actual_shape} instead of {expected_shape}')
    if not mismatches:
      return
    listed = '; '.join(mismatches[:MAX_MISMATCHES])
    if len(mismatches) > MAX_MISMATCHES:
      listed += f' and {len(mismatches) - MAX_MISMATCHES} more'
    raise UserError(
      f'the weights of {module} are not of variant {self._modules.variant!r}, '
      f'export the checkpoint again; {listed}'
    )


def optional_leaves(model: lavit.LavitModules, module: str) -> frozenset[str]:
  """The leaves that the files of a module may lack: norm and head of the image encoder.

  No task of this package computes with them.
  """
  if module not in name_tables.TABLES:
    return frozenset()
  rules = name_tables.name_rules(model, module)[0]
  return frozenset(rule.leaf for rule in rules if rule.optional and rule.leaf)


def _module_of(name: str) -> str:
  """The module that a key of `LazyParams` belongs to."""
  return 'tokenizer' if name == 'codebook' else name


def _open_tree(trees: Mapping[str, Any], module: str, dtype: str) -> ParameterSource:
  """A source that reads from a tree in memory, which keeps its own dtypes."""
  del dtype  # the tree has the dtype that its owner chose
  flat = flatten(trees[module])

  def read(path: str, index: int | None = None, sharding: Sharding | None = None) -> jax.Array:
    leaf = jnp.asarray(flat[path])
    if index is not None:
      # Unlike leaf[index], this leaves an array on all of its devices.
      leaf = jax.lax.index_in_dim(leaf, index, keepdims=False)
    return leaf if sharding is None else jax.device_put(leaf, sharding)

  structs = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in flat.items()}
  return ParameterSource(structs, read)
