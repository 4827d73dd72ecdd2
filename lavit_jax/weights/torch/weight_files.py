"""Which files of a folder hold weights, and which of several editions of them is read.

diffusers and transformers write one model under several names. `STEM` is `diffusion_pytorch_model`, `model`, `pytorch_model` or
a name of LaVIT's; `VARIANT` is what `save_pretrained(variant=...)` was given, such as `fp16`, `bf16` or `non_ema`:

    STEM.safetensors                             one file
    STEM-00001-of-00002.safetensors              shards, listed in STEM.safetensors.index.json
    STEM.VARIANT.safetensors                     one file of a variant
    STEM.VARIANT-00001-of-00002.safetensors      its shards, listed in STEM.safetensors.index.VARIANT.json
    STEM-00001-of-00002.VARIANT.safetensors      its shards as older releases named them

and the same with `.bin`. The files of one variant and one format are an edition. Where several editions lie side by side,
`choose` takes one by a rule, and the caller says which.
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
WEIGHTS = (
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
RULE = 'the file without a variant first, then 32-bit before 16-bit, averaged (EMA) before non_ema, safetensors before .bin'
_SHARD = r'-\d+-of-\d+'
_VARIANT = r'\.(?P<{}>[A-Za-z0-9_-]+?)'


class Edition(NamedTuple):
  """One complete set of weights of a folder."""

  stem: str
  variant: str  # '' for the usual names
  suffix: str  # one of FORMATS
  files: tuple[pathlib.Path, ...]  # in the order of their names
  index: pathlib.Path | None
  problem: str = ''  # why it cannot be read, and the remedy

  @property
  def name(self) -> str:
    """What the edition is called in messages: its file, or its index."""
    return (self.index or self.files[0]).name


class FileName(NamedTuple):
  """A file name, taken apart."""

  variant: str
  suffix: str
  sharded: bool
  index: bool


def parse(name: str, stem: str) -> FileName | None:
  """Takes a file name apart; None if it is not a name of weights, or of an index of weights, called `stem`."""
  ends = '|'.join(map(re.escape, FORMATS))
  file = re.fullmatch(
    rf'{re.escape(stem)}(?:{_VARIANT.format("a")})?(?P<shard>{_SHARD})?(?:{_VARIANT.format("b")})?(?P<suffix>{ends})',
    name,
  )
  if file:
    return FileName(file['a'] or file['b'] or '', file['suffix'], bool(file['shard']), False)
  index = re.fullmatch(
    rf'{re.escape(stem)}(?:{_VARIANT.format("a")})?(?P<suffix>{ends})'
    rf'(?:{_VARIANT.format("b")})?\.index(?:{_VARIANT.format("c")})?\.json',
    name,
  )
  if index:
    return FileName(index['a'] or index['b'] or index['c'] or '', index['suffix'], True, True)
  return None


def editions(folder: pathlib.Path, stems: Iterable[str]) -> list[Edition]:
  """All editions of the weights that a folder holds under any of the stems, the preferred one first."""
  names = (
    sorted(file.name for file in folder.iterdir() if file.is_file() or file.is_symlink())
    if folder.is_dir()
    else []
  )
  found = []
  for order, stem in enumerate(stems):
    parsed = {name: parts for name in names if (parts := parse(name, stem))}
    for variant, suffix in sorted({(parts.variant, parts.suffix) for parts in parsed.values()}):
      mine = {name: parts for name, parts in parsed.items() if parts[:2] == (variant, suffix)}
      for edition in _of_variant(folder, stem, variant, suffix, mine):
        found.append((_rank(edition), order, edition))
  return [edition for *_, edition in sorted(found, key=lambda each: each[:2])]


def choose(
  folder: pathlib.Path, stems: Iterable[str], variant: str | None = None
) -> Edition | None:
  """The edition to read, or None if there is none.

  Args:
    folder: where the files lie.
    stems: the names that the weights may have.
    variant: an edition of this variant is taken if there is one ('' is the usual name); otherwise, and for None, `RULE` decides.

  Raises:
    UserError: the edition is not complete: its index is damaged, names a missing file, or its shards have no index.
  """
  known = editions(folder, stems)
  wanted = [edition for edition in known if edition.variant == variant]
  chosen = (wanted or known or [None])[0]
  if chosen is not None and chosen.problem:
    raise UserError(chosen.problem)
  return chosen


def is_weights(name: str) -> bool:
  """Whether a file holds, or lists, weights of some model, by its name."""
  return (
    name.endswith(WEIGHTS)
    or re.search(r'\.(safetensors|bin)\..*index.*\.json$|\.(safetensors|bin)\.index\.json$', name)
    is not None
  )


def _of_variant(
  folder: pathlib.Path, stem: str, variant: str, suffix: str, names: dict[str, FileName]
) -> list[Edition]:
  """The single file and the shards of one variant: two editions, if both are there."""
  singles = sorted(name for name, parts in names.items() if not parts.sharded)
  indexes = sorted(name for name, parts in names.items() if parts.index)
  shards = sorted(name for name, parts in names.items() if parts.sharded and not parts.index)
  found = [Edition(stem, variant, suffix, (folder / name,), None) for name in singles]
  for name in indexes:
    index = folder / name
    try:
      found.append(Edition(stem, variant, suffix, shards_of(index), index))
    except UserError as error:
      found.append(Edition(stem, variant, suffix, (), index, str(error)))
  if shards and not indexes:
    problem = f'{folder} holds shards of weights ({shards[0]}) but no index that lists them; download the checkpoint again'
    found.append(
      Edition(stem, variant, suffix, tuple(folder / name for name in shards), None, problem)
    )
  return found


def shards_of(index: pathlib.Path) -> tuple[pathlib.Path, ...]:
  """The files that an index names.

  Raises:
    UserError: the index is damaged, or a file that it names is missing.
  """
  try:
    files = sorted(
      {index.parent / name for name in json.loads(index.read_text())['weight_map'].values()}
    )
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f'{index} is damaged ({error!r}); download it again') from None
  if missing := [file.name for file in files if not file.is_file()]:
    raise UserError(
      f'{index.parent} lacks {", ".join(missing)}, which {index.name} names; download the checkpoint again'
    )
  return tuple(files)


def _rank(edition: Edition) -> tuple:
  """The key by which editions are sorted: `RULE`."""
  short = re.search(r'16|8|4', edition.variant) is not None
  return (
    edition.variant != '',
    'ema' in edition.variant and 'non' in edition.variant,
    short,
    'bf' in edition.variant,
    edition.variant,
    FORMATS.index(edition.suffix),
    edition.index is not None,
  )
