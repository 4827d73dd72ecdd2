"""Reads the descriptions in a checkpoint folder (folder.py): its config, settings and checksums."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import xxhash

from lavit_jax.errors import UserError
from lavit_jax.models import lavit
from lavit_jax.models import settings as checkpoint_settings
from lavit_jax.weights.torch import configs, formats

FORMAT = 2
CONFIG = 'config.json'
CHECKSUMS = 'checksums.json'
ADAPTERS = 'lavit_adapter.json'  # of a folder of adapters (weights/torch/adapters.py)
REQUIRED_KEYS = frozenset({'variant', 'parts', 'metadata'})


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
  """Reads the `config.json` of a folder.

  Raises:
    UserError: it is missing or damaged, or another program's; the message names the file.
  """
  file = pathlib.Path(folder) / CONFIG
  try:
    config = json.loads(file.read_text())
  except FileNotFoundError:
    if (file.parent / ADAPTERS).is_file():
      raise UserError(
        f'{folder} holds adapters, and not the weights beside which they belong; merge them: lavit '
        f'convert --src WEIGHTS --adapter {folder} --dst FOLDER'
      ) from None
    raise UserError(f'{folder} is not a lavit_jax checkpoint: {file} is missing') from None
  except (OSError, ValueError) as error:
    raise UserError(f'{file} cannot be read ({error}); export the checkpoint again') from None
  valid = isinstance(config, dict) and config.get('format') == FORMAT
  if not valid or not config.keys() >= REQUIRED_KEYS:
    raise UserError(f'{file} is not a lavit_jax checkpoint of format {FORMAT}')
  return config


def read_settings(folder: str | os.PathLike) -> dict[str, dict]:
  """Reads the settings of a checkpoint (models/settings.py).

  A folder that was converted before there were settings has them in the descriptions that were
  copied to `torch/`.

  Returns:
    {group: {field: value}} of the values that differ from the variant's own.

  Raises:
    UserError: the folder or a description is damaged, or asks for what the variant does not
      compute.
  """
  folder = pathlib.Path(folder)
  config = read_config(folder)
  variant = config['variant']
  if 'settings' not in config:
    kind = config['metadata'].get('source', {}).get('kind', formats.LAVIT)
    locations = formats.locations(kind)
    folders = {module: location.folder for module, location in locations.items()}
    return configs.read_settings(folder / 'torch', folders, config['parts'], variant)
  try:
    return checkpoint_settings.validate(variant, lavit.variant_config(variant), config['settings'])
  except UserError as error:
    raise error.within(str(folder / CONFIG)) from None


def read_checksums(folder: str | os.PathLike, module: str) -> dict[str, int]:
  """Reads {path: checksum} of the leaves of a module (checksums.py).

  Raises:
    UserError: the file is missing or damaged.
  """
  file = pathlib.Path(folder) / CHECKSUMS
  try:
    return json.loads(file.read_text())[module]
  except (OSError, ValueError, KeyError) as error:
    raise UserError(
      f'{file} is missing or damaged ({error!r}); copy or export the checkpoint again'
    ) from None


def module_digest(folder: str | os.PathLike, module: str) -> str:
  """A digest of the numbers of a module as they are stored, by its checksums.

  Raises:
    UserError: as `read_checksums`.
  """
  text = json.dumps(read_checksums(folder, module), sort_keys=True)
  return xxhash.xxh3_128_hexdigest(text.encode())


def has_codebook(folder: str | os.PathLike) -> bool:
  """Whether the codebook of a folder's tokenizer is trained.

  A run that ends before it starts to quantize exports an untrained one.
  """
  metadata = read_config(folder)['metadata']
  # A bundle has the metadata of each module under its name.
  return metadata.get('tokenizer', metadata).get('codebook') != 'untrained'


def check_codebook(folder: str | os.PathLike) -> None:
  """Checks that the codes of a folder's tokenizer have a meaning.

  Raises:
    UserError: its codebook is untrained.
  """
  if not has_codebook(folder):
    raise UserError(
      f'{folder}: its tokenizer was never quantized, so its codes mean nothing; train it beyond '
      'tokenizer.quantize_from, or continue from it with --config.init_from'
    )
