"""Our own folder of weights: `config.json` and one safetensors file a part, leaves named by their flax paths.

    folder/tokenizer/               of a whole model: its words, as a Hugging Face tokenizer
    folder/config.json              {"format": 1, "variant": "tiny", "parts": {"vit": {"file", "parameters", "dtype"}}, "metadata": {}}
    folder/vit.safetensors          'blocks/attn/qkv/kernel' ...

A folder appears whole or not at all: it is written beside its place and renamed. (Between the two renames that replace an older one
a kill leaves that one as `.NAME.old`.)
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import tempfile

import flax.traverse_util
import jax
import ml_dtypes  # registers bfloat16 with numpy
import numpy as np
import safetensors
import safetensors.numpy

from lavit_jax.data.text import TextTokenizer
from lavit_jax.errors import UserError
from lavit_jax.models import lavit

FORMAT = 1
DTYPES = {'float32': np.float32, 'float16': np.float16, 'bfloat16': ml_dtypes.bfloat16}


def save_parts(folder, variant: str, parts: dict, metadata: dict | None = None, dtype: str = 'float32',
               tokenizer=None) -> pathlib.Path:
  """Writes the parameters of some parts of a model.

  Args:
    folder: where; a checkpoint or an empty folder that stands there is replaced as a whole, anything else is left alone.
    variant: the row of the variants table that the parts belong to.
    parts: part name -> parameter tree (or one bare array); floating leaves are stored in `dtype`.
    metadata: anything JSON can say about where the weights come from.
    dtype: 'float32', 'float16' or 'bfloat16'.
    tokenizer: a Hugging Face tokenizer folder to put beside them, as `tokenizer/`.
  Raises:
    UserError: something else stands there, the disk is full or the folder cannot be written; nothing half-written is left.
  """
  folder = pathlib.Path(folder).resolve()  # of a link, what it points to
  if folder.exists() and not (folder.is_dir() and ((folder / 'config.json').exists() or not any(folder.iterdir()))):
    raise UserError(f'{folder} exists and is not a checkpoint; choose another folder, or remove it first')
  if folder.exists() and any(folder.iterdir()):
    read_config(folder)  # a config.json of somebody else's is not ours to replace
  scratch = None
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = pathlib.Path(tempfile.mkdtemp(prefix=f'.{folder.name}.', dir=folder.parent))
    os.chmod(scratch, 0o755)  # both libraries write what only its owner may read; a published folder is not private
    config = dict(format=FORMAT, variant=variant, parts={}, metadata=metadata or {})
    for name, tree in parts.items():
      flat = {key: _stored(leaf, dtype) for key, leaf in _flatten(tree).items()}
      safetensors.numpy.save_file(flat, scratch / f'{name}.safetensors')
      os.chmod(scratch / f'{name}.safetensors', 0o644)
      config['parts'][name] = dict(file=f'{name}.safetensors', parameters=sum(x.size for x in flat.values()), dtype=dtype)
    if tokenizer is not None:
      shutil.copytree(tokenizer, scratch / 'tokenizer')
    (scratch / 'config.json').write_text(json.dumps(config, indent=1) + '\n')
    _swap(scratch, folder)
  except (OSError, safetensors.SafetensorError) as error:  # safetensors wraps what the system says
    fault = getattr(error, 'strerror', None) or error
    raise UserError(f'cannot write {folder}: {fault}; free some space or choose another folder') from error
  finally:
    if scratch is not None:
      shutil.rmtree(scratch, ignore_errors=True)
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
  if not isinstance(config, dict) or config.get('format') != FORMAT or not config.keys() >= {'variant', 'parts', 'metadata'}:
    raise UserError(f'{file} is not a lavit_jax checkpoint of format {FORMAT}')
  return config


def load_parts(folder, names=None, variant: str | None = None) -> dict:
  """Reads parameter trees, as float32 numpy arrays.

  Args:
    folder: a folder that `save_parts` wrote.
    names: the parts to read; None reads all.
    variant: if given, the variant that the folder must be of.
  Returns:
    part name -> parameter tree.
  Raises:
    UserError: a part is missing or damaged, or the folder is of another variant.
  """
  folder = pathlib.Path(folder)
  config = read_config(folder)
  if variant is not None and config['variant'] != variant:
    raise UserError(f'{folder} holds variant {config["variant"]!r}, but {variant!r} was asked for')
  parts = {}
  for name in config['parts'] if names is None else names:
    if name not in config['parts']:
      raise UserError(f'{folder} has no part {name!r}; it holds {", ".join(config["parts"])}')
    file = folder / f'{name}.safetensors'
    try:
      flat = safetensors.numpy.load_file(file)
    except FileNotFoundError:
      raise UserError(f'{file} is missing; the checkpoint is incomplete') from None
    except (OSError, ValueError, safetensors.SafetensorError) as error:
      raise UserError(f'{file} is truncated or damaged ({error}); copy or export it again') from None
    parts[name] = _unflatten({key: np.asarray(x, np.float32) for key, x in flat.items()})
  return parts


def bundle(folder, sources, tokenizer, dtype: str = 'bfloat16') -> pathlib.Path:
  """Makes one model of what the stages exported: a folder for `Lavit.from_pretrained`.

  Args:
    folder: where; as in `save_parts`.
    sources: the stages' export folders, all of one variant; of a part that several hold, the last one's is taken.
    tokenizer: the tokenizer folder of the language model.
    dtype: as in `save_parts`.
  Raises:
    UserError: a source is missing, damaged or of another variant, the tokenizer is another model's, or the folder cannot be written.
  """
  parts, about, variant = {}, {}, read_config(sources[0])['variant']
  TextTokenizer.load(tokenizer, lavit.row(variant)['text_vocab_size'])
  for source in sources:
    made = load_parts(source, variant=variant)
    metadata = read_config(source)['metadata']
    parts |= made
    about |= {name: {key: metadata[key] for key in ('stage', 'steps') if key in metadata} for name in made}
  return save_parts(folder, variant, parts, about, dtype, tokenizer)


def _flatten(tree) -> dict:
  """A nested dict by '/'-joined paths; a bare array goes by the name 'value'."""
  return flax.traverse_util.flatten_dict(tree, sep='/') if isinstance(tree, dict) else {'value': tree}


def _unflatten(flat: dict):
  return flat['value'] if list(flat) == ['value'] else flax.traverse_util.unflatten_dict(flat, sep='/')


def _stored(leaf, dtype: str) -> np.ndarray:
  array = np.asarray(jax.device_get(leaf))
  return np.ascontiguousarray(array.astype(DTYPES[dtype]) if array.dtype.kind in 'fV' else array)


def _swap(scratch: pathlib.Path, folder: pathlib.Path) -> None:
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
