"""Our own folder of weights: a description, and one Orbax checkpoint a part.

    folder/config.json      {"format": 2, "variant": "tiny", "parts": {"vit": {"parameters", "dtype"}}, "settings": {}, "metadata": {}}
    folder/checksums.json   {"vit": {"blocks/attn/qkv/kernel": 123, ...}}, as leaves.checksum counts them
    folder/parts/vit/       Orbax; leaves by their flax paths
    folder/tokenizer/       of a whole model: its words, as a Hugging Face tokenizer
    folder/torch/           of a converted one: what the PyTorch folder held beside the weights (convert.py)

A folder appears whole or not at all: it is written beside its place and renamed. (Between the two renames that replace an older one
a kill leaves that one as `.NAME.old`.)
"""

from __future__ import annotations

import contextlib
import functools
import json
import operator
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping

import jax
import ml_dtypes  # registers bfloat16 with numpy
import numpy as np

from lavit_jax.data.text import TextTokenizer
from lavit_jax.errors import UserError
from lavit_jax.models import lavit
from lavit_jax.models import settings as checkpoint_settings
from lavit_jax.weights.store import arrays as leaves
from lavit_jax.weights.store.arrays import flatten, unflatten
from lavit_jax.weights.torch import configs, finite, formats

FORMAT = 2
TOKENIZER_FILES = (
  'tokenizer.json',
  'tokenizer.model',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
)
DTYPES = {'float32': np.float32, 'float16': np.float16, 'bfloat16': ml_dtypes.bfloat16}


class FolderWriter:
  """A folder in the making: its parts go into `path`, side by side."""

  def __init__(self, path: pathlib.Path, variant: str, metadata: dict, settings: dict):
    self.path, self.sums = path, {}
    self.config = dict(
      format=FORMAT, variant=variant, parts={}, settings=settings, metadata=metadata
    )

  @contextlib.contextmanager
  def part(self, name: str, structs: Mapping, stacked=()) -> Iterator[leaves.Writer]:
    """A writer of one part, whose leaves are described by `structs`: path -> shape and dtype."""
    with leaves.Writer(self.path / 'parts' / name, structs, stacked) as writer:
      yield writer
    self.sums[name] = writer.sums
    dtypes = {str(x.dtype) for x in structs.values()}
    self.config['parts'][name] = dict(
      parameters=sum(int(np.prod(x.shape)) for x in structs.values()),
      dtype=dtypes.pop() if len(dtypes) == 1 else 'mixed',
    )


@contextlib.contextmanager
def open_writer(
  folder,
  variant: str,
  metadata: dict | None = None,
  tokenizer=None,
  settings: Mapping | None = None,
) -> Iterator[FolderWriter]:
  """Makes a checkpoint folder, which takes its place when the block ends well.

  Args:
    folder: where; a checkpoint or an empty folder that stands there is replaced as a whole, anything else is left alone.
    variant: the row of the variants table that the parts belong to.
    metadata: anything JSON can say about where the weights come from.
    tokenizer: a Hugging Face tokenizer folder to put beside them, as `tokenizer/`.
    settings: of the checkpoint (models/settings.py); those that are the variant's own are left out.

  Raises:
    UserError: something else stands there, the disk is full or the folder cannot be written; nothing half-written is left. Or settings
      that are not known.
  """
  settings = (
    checkpoint_settings.validate(variant, lavit.variant_config(variant), settings)
    if settings
    else {}
  )
  with replace_folder(folder) as scratch:
    (scratch / 'parts').mkdir()
    made = FolderWriter(scratch, variant, metadata or {}, settings)
    yield made
    if tokenizer is not None:
      copy_tokenizer_files(pathlib.Path(tokenizer), scratch / 'tokenizer')
    (scratch / 'checksums.json').write_text(json.dumps(made.sums, indent=0) + '\n')
    (scratch / 'config.json').write_text(json.dumps(made.config, indent=1) + '\n')


@contextlib.contextmanager
def replace_folder(folder, mark: str = 'config.json') -> Iterator[pathlib.Path]:
  """A new folder, which takes the place of `folder` when the block ends well; what a killed run left of one is cleared away.

  Raises:
    UserError: as `open_writer`; a folder that stands there is replaced if it holds the file `mark`.
  """
  folder = pathlib.Path(folder).resolve()  # of a link, what it points to
  check_destination(folder, mark)
  scratch = folder.with_name(f'.{folder.name}.partial')
  try:
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    yield scratch
    swap_folders(scratch, folder)
  except OSError as error:
    raise UserError(
      f'cannot write {folder}: {error.strerror or error}; free some space or choose another folder'
    ) from error
  except ValueError as error:  # TensorStore reports a full disk in words
    if not leaves.disk_full(error):
      raise
    raise UserError(
      f'cannot write {folder}: No space left on device; free some space or choose another folder'
    ) from error
  finally:
    shutil.rmtree(scratch, ignore_errors=True)


def save_params(
  folder,
  variant: str,
  parts: dict,
  metadata: dict | None = None,
  dtype: str = 'float32',
  tokenizer=None,
  settings: Mapping | None = None,
) -> pathlib.Path:
  """Writes the parameters of some parts of a model.

  Args:
    parts: part name -> parameter tree (or one bare array); floating leaves are stored in `dtype`.
    dtype: 'float32', 'float16' or 'bfloat16'.
    folder, variant, metadata, tokenizer, settings, and what is raised: as in `open_writer`.
  """
  folder = pathlib.Path(folder).resolve()  # now: the folder one stands in may be replaced
  with open_writer(folder, variant, metadata, tokenizer, settings) as made:
    for name, tree in parts.items():
      flat = {path: _stored(f'{name}/{path}', leaf, dtype) for path, leaf in flatten(tree).items()}
      with made.part(name, flat) as writer:
        for path, array in flat.items():
          writer.write(path, None, array)
  return folder


def read_config(folder) -> dict:
  """The folder's `config.json`; a `UserError` that names the file if it is missing or is not ours."""
  file = pathlib.Path(folder) / 'config.json'
  try:
    config = json.loads(file.read_text())
  except FileNotFoundError:
    raise UserError(f'{folder} is not a lavit_jax checkpoint: {file} is missing') from None
  except (OSError, ValueError) as error:
    raise UserError(f'{file} cannot be read ({error}); export the checkpoint again') from None
  if (
    not isinstance(config, dict)
    or config.get('format') != FORMAT
    or not config.keys() >= {'variant', 'parts', 'metadata'}
  ):
    raise UserError(f'{file} is not a lavit_jax checkpoint of format {FORMAT}')
  return config


def read_settings(folder) -> dict[str, dict]:
  """The settings of a checkpoint, {part: {field: value}}, where they are not the variant's own.

  A folder that was converted before there were settings has them in the descriptions that travelled along in `torch/`.

  Raises:
    UserError: the folder or a description is damaged, or asks for what the variant does not compute.
  """
  folder = pathlib.Path(folder)
  config = read_config(folder)
  variant = config['variant']
  if 'settings' not in config:
    places = formats.locations(config['metadata'].get('source', {}).get('kind', 'LaVIT'))
    folders = {part: place.folder for part, place in places.items()}
    return configs.read_settings(folder / 'torch', folders, config['parts'], variant)
  try:
    return checkpoint_settings.validate(variant, lavit.variant_config(variant), config['settings'])
  except UserError as error:
    raise error.within(f'{folder / "config.json"}') from None


def read_checksums(folder, name: str) -> dict[str, int]:
  """Path -> checksum of each leaf of a part."""
  file = pathlib.Path(folder) / 'checksums.json'
  try:
    return json.loads(file.read_text())[name]
  except (OSError, ValueError, KeyError) as error:
    raise UserError(
      f'{file} is missing or damaged ({error!r}); copy or export the checkpoint again'
    ) from None


def has_codebook(folder) -> bool:
  """Whether the codebook of a folder's tokenizer was trained; a run that ends before quantisation begins exports one that was not."""
  metadata = read_config(folder)['metadata']
  about = metadata.get('tokenizer', metadata)  # a bundle says it of each part
  return about.get('codebook') != 'untrained'


def check_codebook(folder) -> None:
  """Raises UserError if the codes of a folder's tokenizer mean nothing."""
  if not has_codebook(folder):
    raise UserError(
      f'{folder}: its tokenizer was never quantised, so its codes mean nothing; train it beyond tokenizer.quantize_from, or go on '
      'from it with --config.init_from'
    )


def load_params(
  folder,
  names=None,
  variant: str | None = None,
  shardings: Callable | None = None,
  dtype: str | None = 'float32',
) -> dict:
  """Reads parameter trees.

  Args:
    folder: a folder that `save_params` or `lavit convert` wrote.
    names: the parts to read; None reads all.
    variant: if given, the variant that the folder must be of.
    shardings: {part: tree of ShapeDtypeStructs} -> the same tree of shardings; the leaves then go straight onto the devices, each
      of which gets its own piece only. Without it they are numpy arrays, and their checksums are looked at.
    dtype: of the floating leaves; None keeps those of the folder.

  Returns:
    part name -> parameter tree.

  Raises:
    UserError: a part is missing or damaged, or the folder is of another variant.
  """
  folder = pathlib.Path(folder).resolve()  # TensorStore takes no '..'
  config = read_config(folder)
  if variant is not None and config['variant'] != variant:
    raise UserError(f'{folder} holds variant {config["variant"]!r}, but {variant!r} was asked for')
  parts = {}
  for name in config['parts'] if names is None else names:
    if name not in config['parts']:
      raise UserError(f'{folder} has no part {name!r}; it holds {", ".join(config["parts"])}')
    part = open_params(folder, name, dtype)
    places = {} if shardings is None else flatten(shardings({name: unflatten(part.structs)})[name])
    parts[name] = unflatten(
      {path: part.read(path, sharding=places.get(path)) for path in part.structs}
    )
  return parts


def open_params(folder, name: str, dtype: str | None = 'float32') -> leaves.ParameterSource:
  """A part of a folder, to be read a leaf or a row at a time.

  The checksum of a leaf is looked at when it, or the last of its rows, has been read to the host.

  Args:
    folder, name, dtype: as for `load_params`.

  Raises:
    UserError: it is missing or damaged; later too, as it is read.
  """
  path = pathlib.Path(folder).resolve() / 'parts' / name
  with reading_errors(path):
    sums = read_checksums(folder, name)
    arrays = leaves.open_leaves(path, sums)
  structs = {
    leaf: cast(jax.ShapeDtypeStruct(x.shape, x.dtype.numpy_dtype), dtype)
    for leaf, x in arrays.items()
  }
  seen = {leaf: {} for leaf in arrays}  # row -> checksum

  def check(leaf, row, array):
    if row is None:
      total = leaves.checksum(array)
    else:
      seen[leaf][row] = leaves.checksum(array[None], row)
      if len(seen[leaf]) < arrays[leaf].shape[0]:
        return
      total = functools.reduce(operator.xor, seen[leaf].values())
    if total != sums[leaf]:
      raise ValueError(f'the checksum of {leaf} is another')

  def read(leaf, row=None, sharding=None):
    with reading_errors(path):
      store, struct = arrays[leaf] if row is None else arrays[leaf][row], structs[leaf]
      if sharding is not None:
        return leaves.read_sharded(
          store, jax.ShapeDtypeStruct(store.shape, struct.dtype, sharding=sharding)
        )
      array = store.read().result()
      check(leaf, row, array)
    return finite.convert(f'{path}: {leaf}', array, struct.dtype, allow_nonfinite=True)

  return leaves.ParameterSource(structs, read)


@contextlib.contextmanager
def reading_errors(path: pathlib.Path):
  """Turns what Orbax and TensorStore say of a bad part into a UserError."""
  if not path.is_dir():
    raise UserError(f'{path} is missing; the checkpoint is incomplete')
  try:
    yield
  except (OSError, ValueError, KeyError, TypeError) as error:
    if leaves.disk_full(error):  # of what is written meanwhile
      raise
    raise UserError(
      f'{path} is truncated or damaged ({" ".join(str(error).split())[:200]}); copy or export it again'
    ) from None


def bundle(folder, sources, tokenizer, dtype: str = 'bfloat16') -> pathlib.Path:
  """Makes one model of what the stages exported: a folder for `Lavit.from_pretrained`.

  Args:
    folder: where; as in `save_params`.
    sources: the stages' export folders, all of one variant; of a part that several hold, the last one's is taken.
    tokenizer: the tokenizer folder of the language model.
    dtype: as in `save_params`. The settings of a part come from where the part does.

  Raises:
    UserError: a source is missing, damaged or of another variant, the tokenizer is another model's, or the folder cannot be written.
  """
  parts, about, variant = {}, {}, read_config(sources[0])['variant']
  settings = {}
  TextTokenizer.load(tokenizer, lavit.variant_config(variant)['text_vocab_size'])
  for source in sources:
    made = load_params(source, variant=variant)
    if 'tokenizer' in made:
      check_codebook(source)
    metadata = read_config(source)['metadata']
    parts |= made
    settings = {
      name: fields
      for name, fields in settings.items()
      if checkpoint_settings.GROUPS[name].module not in made
    }
    settings |= checkpoint_settings.for_modules(read_settings(source), made)
    of_part = {name: metadata.get(name, metadata) for name in made}  # a bundle says it of each part
    about |= {
      name: {key: told[key] for key in ('stage', 'steps') if key in told}
      for name, told in of_part.items()
    }
  return save_params(folder, variant, parts, about, dtype, tokenizer, settings)


def copy_tokenizer_files(src: pathlib.Path, dst: pathlib.Path) -> None:
  """Copies a tokenizer's files from among others; those that are there already stay."""
  for name in TOKENIZER_FILES:
    if (src / name).is_file() and not (dst / name).exists():
      dst.mkdir(parents=True, exist_ok=True)
      shutil.copyfile(src / name, dst / name)


def check_destination(folder: pathlib.Path, mark: str = 'config.json') -> None:
  """Raises UserError unless the folder is free, empty, or one of ours, as the file `mark` in it shows."""
  if folder.exists() and not (
    folder.is_dir() and ((folder / mark).exists() or not any(folder.iterdir()))
  ):
    raise UserError(
      f'{folder} exists and is not a checkpoint of lavit_jax; choose another folder, or remove it first'
    )
  if mark == 'config.json' and folder.exists() and any(folder.iterdir()):
    read_config(folder)  # a config.json of somebody else's is not ours to replace


def swap_folders(scratch: pathlib.Path, folder: pathlib.Path) -> None:
  """Puts the finished folder in its place; the old one goes only once the new one can stand there."""
  if folder.exists():
    old = folder.with_name(f'.{folder.name}.old')
    shutil.rmtree(old, ignore_errors=True)
    os.rename(folder, old)
    try:
      os.rename(scratch, folder)
    except OSError:
      os.rename(old, folder)
      raise
    shutil.rmtree(old)
  else:
    os.rename(scratch, folder)


def cast(struct, dtype: str | None) -> jax.ShapeDtypeStruct:
  """Of an array or a struct: the shape, and the type that it has once floating leaves are `dtype`; None keeps them."""
  return jax.ShapeDtypeStruct(
    struct.shape, DTYPES[dtype] if dtype and _floating(struct.dtype) else struct.dtype
  )


def _floating(dtype) -> bool:
  return np.dtype(dtype).kind in 'fV'


def _stored(name: str, leaf, dtype: str) -> np.ndarray:
  array = np.asarray(jax.device_get(leaf))
  return (
    finite.convert(name, array, DTYPES[dtype], allow_nonfinite=True)
    if _floating(array.dtype)
    else array
  )
