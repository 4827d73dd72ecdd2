"""`lavit train` and `lavit compile`."""

from __future__ import annotations

import argparse
import os
import time
from typing import TYPE_CHECKING

from lavit_jax.cli.options import add_cache_option, add_command, number, path_or_url

if TYPE_CHECKING:
  from lavit_jax.cli.options import Commands


def add_commands(commands: Commands) -> None:
  """Adds the commands of this module."""
  _add_train(commands)
  _add_compile(commands)


def _add_train(commands: Commands) -> None:
  parser = add_command(
    commands,
    'train',
    _train,
    'train one stage; --config.KEY=VALUE sets any value of its config',
  )
  parser.set_defaults(accepts_overrides=True)
  parser.add_argument(
    '--config', required=True, metavar='FILE.py:VARIANT', help='such as configs/tokenizer.py:tiny'
  )
  parser.add_argument(
    '--workdir',
    required=True,
    type=path_or_url,
    metavar='DIR',
    help='folder for checkpoints, logs and exports, local or gs://BUCKET/PATH; a run that is in it '
    'is resumed',
  )
  add_cache_option(parser, 'WORKDIR/compiled')
  group = parser.add_argument_group(
    'several processes', 'not needed on TPU pods, on GKE and under SLURM'
  )
  group.add_argument(
    '--coordinator',
    metavar='HOST:PORT',
    help='address at which process 0 listens (default: $JAX_COORDINATOR_ADDRESS)',
  )
  group.add_argument(
    '--processes',
    type=number(int, 1),
    metavar='N',
    help='number of processes (default: $JAX_NUM_PROCESSES)',
  )
  group.add_argument(
    '--process',
    type=number(int, 0),
    metavar='I',
    help='index of this process, from 0 (default: $JAX_PROCESS_ID)',
  )
  group.add_argument(
    '--timeout',
    type=number(int, 1),
    metavar='SECONDS',
    help='end the job when a process is silent for this long (default: 60)',
  )


def _add_compile(commands: Commands) -> None:
  parser = add_command(
    commands,
    'compile',
    _compile,
    'compile a train step, or text generation, for TPUs that are not attached, '
    'and report memory, operations and traffic',
  )
  parser.set_defaults(accepts_overrides=True)
  parser.add_argument(
    '--config', metavar='FILE.py:VARIANT', help='as for train, with --config.KEY=VALUE'
  )
  parser.add_argument(
    '--decode',
    metavar='VARIANT',
    help="compile the variant's language model: prefill of a prompt, and one decoding step",
  )
  parser.add_argument(
    '--topology', required=True, metavar='CHIP:SHAPE', help='such as v5e:16x16 or v5p:4x4x8'
  )
  parser.add_argument(
    '--slices',
    type=number(int, 1),
    default=1,
    metavar='N',
    help='number of slices of this topology (default: %(default)s)',
  )
  group = parser.add_argument_group('with --decode')
  group.add_argument(
    '--batch', type=number(int, 1), default=8, metavar='N', help='batch size (default: %(default)s)'
  )
  group.add_argument(
    '--prompt',
    type=number(int, 1),
    default=512,
    metavar='N',
    help='prompt length in tokens (default: %(default)s)',
  )
  group.add_argument(
    '--new-tokens',
    type=number(int, 1),
    default=256,
    metavar='N',
    help='number of tokens to generate (default: %(default)s)',
  )
  group.add_argument('--weights-dtype', '--weights', choices=('int8',), help='(default: bfloat16)')
  group.add_argument('--cache-dtype', '--cache', choices=('int8',), help='(default: bfloat16)')
  parser.add_argument('--json', action='store_true', help='print JSON objects instead of tables')


def _train(args: argparse.Namespace) -> None:
  began = time.monotonic()
  from lavit_jax.training.config import load_config

  config = load_config(args.config, args.overrides)
  from lavit_jax.training import distributed

  distributed.connect(args.coordinator, args.processes, args.process, args.timeout)
  from lavit_jax.training import loop  # only now: nothing of JAX may run before `connect`

  def enable_cache() -> None:
    import jax

    from lavit_jax import compilation_cache
    from lavit_jax.training.workdir import open_workdir

    # The work directory is the one folder that all processes share, and that a run which is
    # started again, maybe on another machine, is known to find.
    default = open_workdir(args.workdir) / 'compiled'
    compilation_cache.enable(args.compilation_cache, default, jax.process_index() == 0)

  with distributed.exit_together():
    loop.train(config, args.workdir, began, enable_cache)


def _compile(args: argparse.Namespace) -> None:
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # the TPUs are not attached
  from lavit_jax.errors import UserError

  if (args.config is None) == (args.decode is None):
    raise UserError(
      'give either --config FILE.py:VARIANT, for its train step, '
      'or --decode VARIANT, for its language model'
    )
  if args.decode:
    from lavit_jax.compile import generate

    workload = generate.Workload(
      args.batch, args.prompt, args.new_tokens, args.weights_dtype, args.cache_dtype
    )
    generate.run(args.decode, args.topology, workload, args.json)
    return
  from lavit_jax.training.config import load_config

  config = load_config(args.config, args.overrides)
  from lavit_jax.compile import train_step

  name = os.path.basename(args.config)
  train_step.run(config, name, args.topology, args.slices, args.json)
