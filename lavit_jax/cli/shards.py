"""The options of `lavit tokenize` and `lavit caption` for tars and Parquet files."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Mapping
from typing import Any

from lavit_jax.cli import options

FIELDS = ('image_field', 'text_field')
OPTIONS = ('shard', *FIELDS)
MAX_WAIT = 7 * 24 * 3600  # seconds that a process which is done waits for the others


def add_options(parser: argparse.ArgumentParser) -> None:
  """Adds the options that only tars and Parquet files have."""
  group = parser.add_argument_group(
    'tars and Parquet files',
    "--input 'DATA/{00000..09999}.tar' --out DIR: each process of a job computes whole files; the "
    'same command resumes an interrupted one',
  )
  group.add_argument(
    '--shard',
    type=options.shard,
    metavar='I/N',
    help='compute share I, from 0, of N shares of the files (default: the place of this process in '
    'its job, on TPU pods, on GKE, under SLURM, or by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES '
    'and JAX_PROCESS_ID)',
  )
  group.add_argument(
    '--image-field',
    metavar='NAME',
    help='extension or column of the images (default: jpg, png and so on of tars, image of '
    'Parquet)',
  )
  group.add_argument(
    '--text-field',
    metavar='NAME',
    help='extension or column of the texts, which are copied (default: txt of tars, text of '
    'Parquet)',
  )


def named(args: argparse.Namespace) -> bool:
  """Whether the command is one on tars or Parquet files.

  Raises:
    UserError: it is not, and has options or addresses that only such a command knows.
  """
  from lavit_jax.apps import batch
  from lavit_jax.errors import UserError

  if args.command not in batch.COLUMNS:
    return False
  if args.input is not None and batch.is_shards(args.input):
    return True
  for name in OPTIONS:
    if getattr(args, name) is not None:
      raise UserError(
        f'--{name.replace("_", "-")} needs --input with tars or Parquet files; leave it out'
      )
  for name in ('input', 'out'):
    value = getattr(args, name)
    if value and '://' in value:
      raise UserError(
        f'--{name} {value}: only tars, Parquet files and their results may be in a store; give '
        '--input files that end in .tar or .parquet, or a local path'
      )
  return False


def run(
  args: argparse.Namespace, settings: dict[str, Any], method_options: Mapping[str, Any]
) -> None:
  """Runs the command on this process's share of the files.

  Raises:
    UserError: options that do not go together; what the run raises.
  """
  from lavit_jax.apps import batch
  from lavit_jax.errors import UserError

  if args.out is None:
    raise UserError(f'--input {args.input} needs --out DIR, a folder for the results; name it')
  if args.inputs:
    raise UserError(f'both {args.inputs[0]!r} and --input {args.input} are given; give one of them')
  for name in ('json', 'num_return_sequences'):
    if getattr(args, name, None):
      raise UserError(
        f'--{name.replace("_", "-")} has no effect on tars and Parquet files; leave it out'
      )
  share = args.shard or _place_in_job()
  for name in FIELDS:
    if getattr(args, name) is not None:
      settings[name] = getattr(args, name)
  request = batch.ShardRequest(
    args.input,
    args.out,
    args.image_field,
    () if args.text_field is None else (args.text_field,),
    share,
  )
  work = batch.ShardRun(args.command, request, settings)
  work.run(options.load_model(args), args.seed, dict(method_options))


def _place_in_job() -> tuple[int, int]:
  """(number, count) of the processes of this job, which it joins; (0, 1) without one.

  A process that fails ends when the others have done their shares, one that is killed ends them.
  """
  from lavit_jax.training import distributed

  distributed.connect(last_timeout=MAX_WAIT)
  import jax

  if jax.process_count() > 1:
    # JAX would keep the signal to itself. What is complete is saved.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
  return jax.process_index(), jax.process_count()
