"""Option types, and the options that several commands share."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from lavit_jax.inference.pipeline import Lavit

  Commands = argparse._SubParsersAction[Any]

ASSETS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'assets')
CACHE_FOLDER = '$XDG_CACHE_HOME/lavit_jax/compiled or ~/.cache/lavit_jax/compiled'
TINY = os.path.relpath(os.path.join(ASSETS, 'tiny'))


def number(
  kind: type[int] | type[float], low: float, high: float = math.inf
) -> Callable[[str], float]:
  """The type of an option: an int or a float from `low` to `high`."""
  noun = 'an integer' if kind is int else 'a number'
  limits = f'from {low:g} to {high:g}' if high < math.inf else f'from {low:g} up'

  def parse(text: str) -> float:
    try:
      value = kind(text)
    except ValueError:
      value = math.nan
    if not low <= value <= high:  # also true of NaN
      raise argparse.ArgumentTypeError(f'{text!r} is not {noun} {limits}')
    return value

  return parse


def local_path(text: str) -> str:
  """The type of an option: a path of this machine, with '~' expanded.

  A shell does not expand '~' in --folder=~/x. A URL such as gs://BUCKET/run is refused: as a path
  it would become the folder ./gs:/BUCKET/run.
  """
  if '://' in text:
    raise argparse.ArgumentTypeError(
      f'{text!r} is not a local path; mount the bucket (gcsfuse), '
      'or use a disk that all machines share'
    )
  from lavit_jax.local_paths import expand_home

  return expand_home(text)


def path_or_url(text: str) -> str:
  """The type of an option: a path with '~' expanded, or a URL of a store."""
  return text if '://' in text else local_path(text)


def shard(text: str) -> tuple[int, int]:
  """The type of an option: I/N as (I, N), with I from 0 to N - 1."""
  number, _, count = text.partition('/')
  if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
    raise argparse.ArgumentTypeError(f'{text!r} is not I/N with I from 0 to N - 1, such as 0/4')
  return int(number), int(count)


def image_size(text: str) -> list[int]:
  """The type of an option: HEIGHTxWIDTH as [height, width]."""
  sides = text.lower().split('x')
  if len(sides) != 2 or not all(side.isdigit() for side in sides):
    raise argparse.ArgumentTypeError(f'{text!r} is not HEIGHTxWIDTH, such as 1024x1024')
  return [int(side) for side in sides]


def add_command(
  commands: Commands, name: str, run: Callable[[argparse.Namespace], None], text: str
) -> argparse.ArgumentParser:
  """Adds a command. `run` gets the parsed options; `text` is its line in the help."""
  description = text[0].upper() + text[1:] + '.'
  parser = commands.add_parser(name, help=text, description=description, allow_abbrev=False)
  parser.set_defaults(run=run)
  return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
  """Adds the options that `load_model` reads."""
  parser.add_argument(
    '--folder',
    type=path_or_url,
    default=TINY,
    metavar='DIR',
    help='checkpoint folder, local or in a store such as gs:// (default: %(default)s)',
  )
  parser.add_argument(
    '--adapter',
    type=path_or_url,
    metavar='DIR',
    help='adapters beside the weights: RUN/export of a run with lora.rank, or a folder of peft',
  )
  parser.add_argument(
    '--dtype',
    choices=('float32', 'bfloat16'),
    help='compute dtype (default: bfloat16 on accelerators, float32 on CPUs)',
  )
  parser.add_argument(
    '--weights-dtype',
    '--weights',
    choices=('int8',),
    help='dtype of the language model weights in memory (default: as stored)',
  )
  parser.add_argument(
    '--cache-dtype',
    '--cache',
    choices=('bfloat16', 'int8'),
    help='dtype of the key-value cache (default: the compute dtype)',
  )
  parser.add_argument(
    '--tensor',
    type=number(int, 1),
    default=1,
    metavar='N',
    help='number of devices to split the model over (default: %(default)s)',
  )
  parser.add_argument(
    '--no-safety-checker',
    dest='safety_checker',
    action='store_false',
    help='skip the safety check of generated images',
  )
  add_cache_option(parser)


def add_cache_option(parser: argparse.ArgumentParser, folder: str = CACHE_FOLDER) -> None:
  """Adds --compilation-cache; `folder` is the default in the help."""
  parser.add_argument(
    '--compilation-cache',
    type=local_path,
    metavar='DIR|off',
    help='folder for compiled programs, which the next start reads instead of compiling; at most '
    '2 GiB stay there; off: none (default: $LAVIT_COMPILATION_CACHE, else '
    f'$JAX_COMPILATION_CACHE_DIR, else {folder})',
  )


def add_seed_option(parser: argparse.ArgumentParser) -> None:
  """Adds --seed."""
  parser.add_argument(
    '--seed',
    default=0,
    type=number(int, 0, 2**32 - 1),
    help='random seed (default: %(default)s)',
  )


def load_model(args: argparse.Namespace) -> Lavit:
  """Opens the checkpoint that the options of `add_model_options` describe."""
  from lavit_jax import compilation_cache
  from lavit_jax.inference.pipeline import Lavit

  compilation_cache.enable(args.compilation_cache)
  mesh = {'tensor': args.tensor} if args.tensor > 1 else None
  return Lavit.from_pretrained(
    args.folder,
    mesh=mesh,
    dtype=args.dtype,
    weights_dtype=args.weights_dtype,
    cache_dtype=args.cache_dtype,
    safety_checker=args.safety_checker,
    adapter=args.adapter,
  )
