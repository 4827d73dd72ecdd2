"""`lavit data build` and `lavit data pack`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lavit_jax.cli.options import add_command, local_path, number

if TYPE_CHECKING:
  from lavit_jax.cli.options import Commands


def add_commands(commands: Commands) -> None:
  """Adds the commands of this module."""
  parser = commands.add_parser('data', help='build or pack data sets')
  actions = parser.add_subparsers(dest='action', required=True, metavar='ACTION')
  _add_build(actions)
  _add_pack(actions)


def _add_build(actions: Commands) -> None:
  parser = add_command(
    actions, 'build', _build, 'render and write the emoji data set (needs the extra [emoji])'
  )
  parser.add_argument(
    '--data-dir',
    '--data_dir',
    required=True,
    type=local_path,
    metavar='DIR',
    help='the data set is written to DIR/emoji',
  )
  parser.add_argument(
    '--npm',
    type=local_path,
    default='',
    metavar='DIR',
    help='the folder node_modules with the art of more styles; without it the data set has three',
  )
  parser.add_argument(
    '--sample', action='store_true', help='only the two dozen concepts that are in the package'
  )


def _add_pack(actions: Commands) -> None:
  parser = add_command(
    actions,
    'pack',
    _pack,
    'convert WebDataset or img2dataset tars to ArrayRecord; the same command resumes it',
  )
  parser.add_argument(
    'sources',
    nargs='+',
    metavar='TAR',
    help="a path, a glob or braces, local or remote: 'gs://BUCKET/{00000..00999}.tar'",
  )
  parser.add_argument(
    '--out',
    type=local_path,
    required=True,
    metavar='DIR',
    help='folder to write, with one file for each tar',
  )
  parser.add_argument(
    '--workers',
    type=number(int, 1),
    default=1,
    metavar='N',
    help='number of processes (default: %(default)s)',
  )
  parser.add_argument(
    '--image',
    nargs='+',
    metavar='EXTENSION',
    help="extension of the images, if it is not a usual one: 'input.png'",
  )


def _build(args: argparse.Namespace) -> None:
  from lavit_jax.data.emoji.build import build
  from lavit_jax.errors import UserError

  try:
    print(build(args.data_dir, args.sample, args.npm))
  except (ImportError, FileNotFoundError) as error:  # the extra or an npm package is missing
    raise UserError(error) from error


def _pack(args: argparse.Namespace) -> None:
  from lavit_jax.data.array_record import write_array_records
  from lavit_jax.errors import UserError

  options = {'image': args.image} if args.image else {}
  summary = write_array_records(args.sources, args.out, args.workers, **options)
  skipped = [str(sum(summary.skipped.values()))]
  for reason, count in sorted(summary.skipped.items()):
    skipped.append(f'{reason} {count}')
  print(
    f'{summary.records} records in {args.out}; skipped: {", ".join(skipped)}; '
    f'tars done before: {summary.existing}'
  )
  if summary.failed:
    others = ', and others' if len(summary.failed) > 1 else ''
    raise UserError(
      f'{len(summary.failed)} tars are not packed: {summary.failed[0]}{others}; '
      'the same command tries them again'
    )
