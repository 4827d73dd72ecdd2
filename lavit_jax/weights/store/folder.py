"""Our checkpoint folder: a description, and one Orbax checkpoint for each module.

    folder/config.json      {"format": 2, "variant": "tiny", "parts": {"vit": {"parameters",
                            "dtype"}}, "settings": {}, "metadata": {}}
    folder/checksums.json   {"vit": {"blocks/attn/qkv/kernel": 123, ...}} (checksums.py)
    folder/parts/vit/       Orbax; leaves by their Flax paths
    folder/tokenizer/       of a complete model: its text tokenizer, as Hugging Face writes it
    folder/torch/           of a converted model: other files of the PyTorch folder (weights/torch)

A folder appears complete or not at all: it is written under a temporary name beside its place and
renamed. (A kill between the two renames that replace an older folder leaves that one as
`.NAME.old`.)
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import operator
import os
import pathlib
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import ml_dtypes  # registers bfloat16 with numpy
import numpy as np
from numpy.typing import DTypeLike

from lavit_jax.errors import UserError
from lavit_jax.models import lavit
from lavit_jax.models import settings as checkpoint_settings
from lavit_jax.renamed_keywords import accept_old_keywords
from lavit_jax.weights.store import arrays
from lavit_jax.weights.store.arrays import ParameterSource, flatten, unflatten
from lavit_jax.weights.store.checksums import checksum
from lavit_jax.weights.store.disk import disk_full
from lavit_jax.weights.store.metadata import CHECKSUMS, CONFIG, FORMAT, read_checksums
from lavit_jax.weights.store.metadata import read_config as read_config
from lavit_jax.weights.store.metadata import read_settings as read_settings
from lavit_jax.weights.store.replacement import replace_folder
from lavit_jax.weights.torch import finite

if TYPE_CHECKING:
  from lavit_jax.weights.store.writer import ModuleWriter

TOKENIZER_FILES = (
  'tokenizer.json',
  'tokenizer.model',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
)
DTYPES = {'float32': np.float32, 'float16': np.float16, 'bfloat16': ml_dtypes.bfloat16}
Shardings = Callable[[dict[str, Any]], dict[str, Any]]


# --- Writing -------------------------------------------------------------------------------------


class FolderWriter:
  """A checkpoint folder that is being written.

  Attributes:
    path: the folder, under its temporary name.
    config: the content of its `config.json`.
    sums: {module: {path: checksum}}, of its `checksums.json`.
  """

  def __init__(self, path: pathlib.Path, variant: str, metadata: dict, settings: dict):
    self.path = path
    self.sums: dict[str, dict[str, int]] = {}
    self.config: dict[str, Any] = dict(
      format=FORMAT, variant=variant, parts={}, settings=settings, metadata=metadata
    )

  @contextlib.contextmanager
  def open_module(
    self, name: str, structs: Mapping[str, Any], stacked: Collection[str] = ()
  ) -> Iterator[ModuleWriter]:
    """Opens a writer of one module.

    Args:
      name: of the module.
      structs: path -> anything with the shape and dtype of the leaf.
      stacked: the leaves that are written by slices on axis 0.
    """
    from lavit_jax.weights.store.writer import ModuleWriter  # Orbax; reading does not need it

    with ModuleWriter(self.path / 'parts' / name, structs, stacked) as writer:
      yield writer
    self.sums[name] = writer.sums
    dtypes = {str(x.dtype) for x in structs.values()}
    self.config['parts'][name] = dict(
      parameters=sum(math.prod(x.shape) for x in structs.values()),
      dtype=dtypes.pop() if len(dtypes) == 1 else 'mixed',
    )


@contextlib.contextmanager
def open_writer(
  folder: str | os.PathLike,
  variant: str,
  metadata: dict | None = None,
  tokenizer: str | os.PathLike | None = None,
  settings: Mapping | None = None,
) -> Iterator[FolderWriter]:
  """Writes a checkpoint folder, which replaces `folder` when the block ends without an error.

  Args:
    folder: a new or empty folder, or a checkpoint, which is replaced as a whole.
    variant: the name of the model variant.
    metadata: where the parameters come from, as JSON values.
    tokenizer: a Hugging Face tokenizer folder, which is copied to `tokenizer/`.
    settings: of the checkpoint (models/settings.py); values that are the variant's own are omitted.

  Raises:
    UserError: `folder` has other content or cannot be written, or the disk is full; nothing is left
      half-written. Or a setting is unknown.
  """
  stored_settings = {}
  if settings:
    config = lavit.variant_config(variant)
    stored_settings = checkpoint_settings.validate(variant, config, settings)
  with replace_folder(folder) as scratch:
    (scratch / 'parts').mkdir()
    writer = FolderWriter(scratch, variant, metadata or {}, stored_settings)
    yield writer
    if tokenizer is not None:
      copy_tokenizer_files(pathlib.Path(tokenizer), scratch / 'tokenizer')
    (scratch / CHECKSUMS).write_text(json.dumps(writer.sums, indent=0) + '\n')
    (scratch / CONFIG).write_text(json.dumps(writer.config, indent=1) + '\n')


@accept_old_keywords(parts='params')
def save_params(
  folder: str | os.PathLike,
  variant: str,
  params: Mapping[str, Any],
  metadata: dict | None = None,
  dtype: str = 'float32',
  tokenizer: str | os.PathLike | None = None,
  settings: Mapping | None = None,
) -> pathlib.Path:
  """Writes the parameters of modules to a checkpoint folder.

  Args:
    folder: as in `open_writer`.
    variant: as in `open_writer`.
    params: {module name: parameter tree, or one bare array}.
    metadata: where the parameters come from, as JSON values.
    dtype: 'float32', 'float16' or 'bfloat16', for floating leaves.
    tokenizer: as in `open_writer`.
    settings: as in `open_writer`.

  Returns:
    The folder.

  Raises:
    UserError: as `open_writer`; or a number is too large for `dtype`.
  """
  folder = pathlib.Path(folder).resolve()  # now: the current directory may be replaced
  with open_writer(folder, variant, metadata, tokenizer, settings) as result:
    for module, tree in params.items():
      flat = {}
      for path, leaf in flatten(tree).items():
        flat[path] = _to_stored(f'{module}/{path}', leaf, dtype)
      with result.open_module(module, flat) as writer:
        for path, array in flat.items():
          writer.write(path, None, array)
  return folder


def _to_stored(name: str, leaf: Any, dtype: str) -> np.ndarray:
  """A leaf on the host, in the dtype in which it is written."""
  array = np.asarray(jax.device_get(leaf))
  if not _is_floating(array.dtype):
    return array
  return finite.convert(name, array, DTYPES[dtype], allow_nonfinite=True)


def copy_tokenizer_files(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copies the tokenizer's files from a folder; files that exist in `target` stay."""
  for name in TOKENIZER_FILES:
    if (source / name).is_file() and not (target / name).exists():
      target.mkdir(parents=True, exist_ok=True)
      shutil.copyfile(source / name, target / name)


# --- Reading -------------------------------------------------------------------------------------


def load_params(
  folder: str | os.PathLike,
  names: Iterable[str] | None = None,
  variant: str | None = None,
  shardings: Shardings | None = None,
  dtype: str | None = 'float32',
) -> dict[str, Any]:
  """Reads the parameters of modules.

  Args:
    folder: one that `save_params` or `lavit convert` wrote.
    names: of the modules; None is all of them.
    variant: the variant that the folder must have; None accepts any.
    shardings: {module: tree of ShapeDtypeStructs} -> the same tree of shardings. The leaves then go
      directly to the devices, each of which gets only its shard. None gives numpy arrays, whose
      checksums are verified.
    dtype: of floating leaves; None keeps the stored one.

  Returns:
    {module name: parameter tree}.

  Raises:
    UserError: a module is missing or damaged, or the folder has another variant.
  """
  folder = pathlib.Path(folder)
  chosen = list(read_config(folder)['parts'] if names is None else names)
  params = {}
  for name, source in open_modules(folder, chosen, variant, dtype).items():
    leaf_shardings = None
    if shardings is not None:
      leaf_shardings = shardings({name: unflatten(source.structs)})[name]
    params[name] = arrays.read_module(source, leaf_shardings)
  return params


def open_modules(
  folder: str | os.PathLike,
  names: Iterable[str],
  variant: str | None = None,
  dtype: str | None = 'float32',
) -> dict[str, ParameterSource]:
  """Opens modules; `arrays.read_module` reads one.

  Args:
    folder: as in `load_params`.
    names: of the modules.
    variant: as in `load_params`.
    dtype: as in `load_params`.

  Returns:
    {module name: source}.

  Raises:
    UserError: as `load_params`.
  """
  folder = pathlib.Path(folder).resolve()  # TensorStore accepts no '..'
  config = read_config(folder)
  if variant is not None and config['variant'] != variant:
    raise UserError(f'{folder} holds variant {config["variant"]!r}, but {variant!r} was requested')
  sources = {}
  for name in names:
    if name not in config['parts']:
      raise UserError(f'{folder} has no module {name!r}; it holds {", ".join(config["parts"])}')
    sources[name] = open_params(folder, name, dtype)
  return sources


def open_params(
  folder: str | os.PathLike, name: str, dtype: str | None = 'float32'
) -> ParameterSource:
  """Opens a module, to be read leaf by leaf or layer by layer.

  The checksum of a leaf is verified when it, or the last of its layers, has been read to the host.

  Args:
    folder: as in `load_params`.
    name: of the module.
    dtype: as in `load_params`.

  Returns:
    Its source, whose reads raise UserError as well.

  Raises:
    UserError: the module is missing or damaged.
  """
  path = pathlib.Path(folder).resolve() / 'parts' / name
  with reading_errors(path):
    sums = read_checksums(folder, name)
    stores = arrays.open_leaves(path, sums)
  structs = {}
  for leaf, store in stores.items():
    structs[leaf] = cast(jax.ShapeDtypeStruct(store.shape, store.dtype.numpy_dtype), dtype)
  layer_sums: dict[str, dict[int, int]] = {leaf: {} for leaf in stores}

  def verify(leaf: str, index: int | None, array: np.ndarray) -> None:
    if index is None:
      total = checksum(array)
    else:
      layer_sums[leaf][index] = checksum(array[None], index)
      if len(layer_sums[leaf]) < stores[leaf].shape[0]:
        return
      total = functools.reduce(operator.xor, layer_sums[leaf].values())
    if total != sums[leaf]:
      raise ValueError(f'the checksum of {leaf} is another')

  def read(
    leaf: str, index: int | None = None, sharding: jax.sharding.Sharding | None = None
  ) -> np.ndarray | jax.Array:
    with reading_errors(path):
      store = stores[leaf] if index is None else stores[leaf][index]
      leaf_dtype = structs[leaf].dtype
      if sharding is not None:
        like = jax.ShapeDtypeStruct(store.shape, leaf_dtype, sharding=sharding)
        return arrays.read_sharded(store, like)
      array = store.read().result()
      verify(leaf, index, array)
    return finite.convert(f'{path}: {leaf}', array, leaf_dtype, allow_nonfinite=True)

  return ParameterSource(structs, read)


@contextlib.contextmanager
def reading_errors(path: pathlib.Path) -> Iterator[None]:
  """Turns the errors of Orbax and TensorStore about a damaged module into UserErrors.

  Args:
    path: the folder of the module.
  """
  if not path.is_dir():
    raise UserError(f'{path} is missing; the checkpoint is incomplete')
  try:
    yield
  except (OSError, ValueError, KeyError, TypeError) as error:
    if disk_full(error):  # the error of something that is written in the same block
      raise
    reason = ' '.join(str(error).split())[:200]
    raise UserError(f'{path} is truncated or damaged ({reason}); copy or export it again') from None


def cast(struct: Any, dtype: str | None) -> jax.ShapeDtypeStruct:
  """The shape of an array, with `dtype` if its own is floating; None keeps its own."""
  target: DTypeLike = struct.dtype
  if dtype and _is_floating(struct.dtype):
    target = DTYPES[dtype]
  return jax.ShapeDtypeStruct(struct.shape, target)


def _is_floating(dtype: DTypeLike) -> bool:
  return np.dtype(dtype).kind in 'fV'  # V: the dtypes of ml_dtypes, such as bfloat16
