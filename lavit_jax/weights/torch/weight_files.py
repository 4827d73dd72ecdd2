"""Which files of a folder hold weights, and which of several editions of them is read.

diffusers and transformers write one model under several names. `STEM` is `diffusion_pytorch_model`,
`model`, `pytorch_model` or a name of LaVIT's; `VARIANT` is the argument of
`save_pretrained(variant=...)`, such as `fp16`, `bf16` or `non_ema`:

    STEM.safetensors                          one file
    STEM-00001-of-00002.safetensors           shards, listed in STEM.safetensors.index.json
    STEM.VARIANT.safetensors                  one file of a variant
    STEM.VARIANT-00001-of-00002.safetensors   its shards, in STEM.safetensors.index.VARIANT.json
    STEM-00001-of-00002.VARIANT.safetensors   its shards as older releases named them

and the same with `.bin`. The files of one variant and one format are an edition. Where a folder has
several, `choose` follows a rule, and a note of the conversion names the one that is read.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterable
from typing import NamedTuple

from lavit_jax.errors import UserError

STEMS = ('diffusion_pytorch_model', 'model', 'pytorch_model')  # of diffusers and transformers
FORMATS = ('.safetensors', '.bin')  # in this order, if both hold the same edition
WEIGHT_SUFFIXES = (  # of any framework
  '.safetensors',
  '.bin',
  '.pt',
  '.pth',
  '.ckpt',
  '.msgpack',
  '.h5',
  '.onnx',
  '.pb',
  '.gguf',
  '.ggml',
  '.flashpack',
  '.npz',
)
RULE = (
  'the file without a variant first, then 32-bit before 16-bit, averaged (EMA) before non_ema, '
  'safetensors before .bin'
)


# --- Names -----------------------------------------------------------------------------------


class FileName(NamedTuple):
  """The parts of a file name.

  Attributes:
    variant: '' for the usual names.
    suffix: one of `FORMATS`.
    sharded: whether it is a shard, or an index.
    index: whether it lists shards.
  """

  variant: str
  suffix: str
  sharded: bool
  index: bool


def parse(name: str, stem: str) -> FileName | None:
  """The parts of the name of a weight file or of an index with this stem; None for other names."""
  stem = re.escape(stem)
  suffix = '(?P<suffix>' + '|'.join(re.escape(suffix) for suffix in FORMATS) + ')'
  shard = r'(?P<shard>-\d+-of-\d+)?'
  before, between, after = (rf'(?:\.(?P<{group}>[A-Za-z0-9_-]+?))?' for group in 'abc')
  file = re.fullmatch(f'{stem}{before}{shard}{between}{suffix}', name)
  if file:
    variant = file['a'] or file['b'] or ''
    return FileName(variant, file['suffix'], sharded=bool(file['shard']), index=False)
  index = re.fullmatch(rf'{stem}{before}{suffix}{between}\.index{after}\.json', name)
  if index:
    variant = index['a'] or index['b'] or index['c'] or ''
    return FileName(variant, index['suffix'], sharded=True, index=True)
  return None


def is_weights(name: str) -> bool:
  """Whether a file of this name holds, or lists, weights of any model."""
  is_index = re.search(
    r'\.(safetensors|bin)\..*index.*\.json$|\.(safetensors|bin)\.index\.json$', name
  )
  return name.endswith(WEIGHT_SUFFIXES) or is_index is not None


# --- Editions --------------------------------------------------------------------------------


class Edition(NamedTuple):
  """One complete set of weights of a folder.

  Attributes:
    stem: of its file names.
    variant: '' for the usual names.
    suffix: one of `FORMATS`.
    files: in the order of their names.
    index: the file that lists the shards, if they are shards.
    problem: why it cannot be read, and the remedy; '' if it can.
  """

  stem: str
  variant: str
  suffix: str
  files: tuple[pathlib.Path, ...]
  index: pathlib.Path | None
  problem: str = ''

  @property
  def name(self) -> str:
    """Its file, or its index, for messages."""
    return (self.index or self.files[0]).name


def choose(
  folder: pathlib.Path, stems: Iterable[str], variant: str | None = None
) -> Edition | None:
  """The edition to read, or None if there is none.

  Args:
    folder: where the files are.
    stems: the stems that they may have.
    variant: an edition of this variant is chosen if there is one ('' is the usual name); otherwise,
      and for None, `RULE` decides.

  Raises:
    UserError: the edition is not complete: its index is damaged, names a missing file, or its
      shards have no index.
  """
  available = editions(folder, stems)
  if not available:
    return None
  of_variant = [edition for edition in available if edition.variant == variant]
  chosen = (of_variant or available)[0]
  if chosen.problem:
    raise UserError(chosen.problem)
  return chosen


def editions(folder: pathlib.Path, stems: Iterable[str]) -> list[Edition]:
  """All editions of the weights that a folder holds under any of the stems, by `RULE`."""
  if not folder.is_dir():
    return []
  names = sorted(file.name for file in folder.iterdir() if file.is_file() or file.is_symlink())
  found = []
  for stem in stems:
    groups: dict[tuple[str, str], dict[str, FileName]] = {}
    for name in names:
      parsed = parse(name, stem)
      if parsed is not None:
        groups.setdefault((parsed.variant, parsed.suffix), {})[name] = parsed
    for (variant, suffix), files in sorted(groups.items()):
      found += _editions_of_variant(folder, stem, variant, suffix, files)
  return sorted(found, key=_rank)  # stable: among equals the order of the stems


def shards_of(index: pathlib.Path) -> tuple[pathlib.Path, ...]:
  """The files that an index lists.

  Raises:
    UserError: the index is damaged, or a file that it names is missing.
  """
  try:
    weight_map = json.loads(index.read_text())['weight_map']
    files = sorted({index.parent / name for name in weight_map.values()})
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f'{index} is damaged ({error!r}); download it again') from None
  missing = [file.name for file in files if not file.is_file()]
  if missing:
    raise UserError(
      f'{index.parent} lacks {", ".join(missing)}, which {index.name} names; '
      'download the checkpoint again'
    )
  return tuple(files)


def _editions_of_variant(
  folder: pathlib.Path, stem: str, variant: str, suffix: str, names: dict[str, FileName]
) -> list[Edition]:
  """The single file and the shards of one variant: two editions, if both are there."""
  singles = sorted(name for name, parsed in names.items() if not parsed.sharded)
  indexes = sorted(name for name, parsed in names.items() if parsed.index)
  shards = sorted(name for name, parsed in names.items() if parsed.sharded and not parsed.index)
  found = [Edition(stem, variant, suffix, (folder / name,), None) for name in singles]
  for name in indexes:
    index = folder / name
    try:
      found.append(Edition(stem, variant, suffix, shards_of(index), index))
    except UserError as error:
      found.append(Edition(stem, variant, suffix, (), index, str(error)))
  if shards and not indexes:
    problem = (
      f'{folder} holds shards of weights ({shards[0]}) but no index that lists them; '
      'download the checkpoint again'
    )
    files = tuple(folder / name for name in shards)
    found.append(Edition(stem, variant, suffix, files, None, problem))
  return found


def _rank(edition: Edition) -> tuple[bool, bool, bool, bool, str, int, bool]:
  """The sort key of `RULE`."""
  variant = edition.variant
  is_non_ema = 'ema' in variant and 'non' in variant
  is_short = re.search(r'16|8|4', variant) is not None  # fewer than 32 bits
  return (
    variant != '',
    is_non_ema,
    is_short,
    'bf' in variant,
    variant,
    FORMATS.index(edition.suffix),
    edition.index is not None,
  )
