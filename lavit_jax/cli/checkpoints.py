"""`lavit convert`, `inspect`, `bundle` and `variants`."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from lavit_jax.cli.options import TINY, add_command, local_path, path_or_url

if TYPE_CHECKING:
  from lavit_jax.cli.options import Commands

DTYPES = ('float32', 'float16', 'bfloat16')


def add_commands(commands: Commands) -> None:
  """Adds the commands of this module."""
  _add_convert(commands)
  parser = add_command(
    commands, 'inspect', _inspect, 'print the modules of a weights folder and their source'
  )
  parser.add_argument('folder', type=path_or_url, metavar='DIR')
  _add_bundle(commands)
  add_command(commands, 'variants', _list_variants, 'list the model sizes')


def _add_convert(commands: Commands) -> None:
  parser = add_command(
    commands,
    'convert',
    _convert,
    'convert a PyTorch folder to a lavit_jax checkpoint, or a checkpoint to a PyTorch folder',
  )
  parser.add_argument(
    '--src',
    required=True,
    type=path_or_url,
    metavar='DIR',
    help='folder or file of LaVIT, LLaMA, Stable Diffusion, SDXL, EVA-CLIP, LLaVA, BLIP-2, Emu, '
    'OpenFlamingo or CLIP; or lavit_jax checkpoint',
  )
  parser.add_argument(
    '--dst',
    required=True,
    type=path_or_url,
    metavar='DIR',
    help='folder to write, as --src of this machine or of a store: gs://BUCKET/model',
  )
  parser.add_argument(
    '--adapter',
    type=local_path,
    metavar='DIR',
    help='adapters (RUN/export with lora.rank, or a folder of peft) to merge into a lavit_jax '
    'checkpoint; the result is one, too',
  )
  parser.add_argument('--dry-run', action='store_true', help='print the plan and write nothing')
  parser.add_argument(
    '--variant', metavar='NAME', help='model size (default: the largest that fits the files)'
  )
  parser.add_argument(
    '--dtype', choices=DTYPES, help='dtype of the written weights (default: as in the source)'
  )
  parser.add_argument(
    '--allow-missing',
    default='',
    metavar='REGEX',
    help='tensors that the source may lack; the checkpoint records them',
  )
  parser.add_argument(
    '--force', action='store_true', help='replace an earlier conversion in the --dst folder'
  )
  parser.add_argument(
    '--bin',
    action='store_true',
    help='write .bin files, which the published inference code needs, instead of safetensors',
  )
  parser.add_argument(
    '--weights-variant',
    metavar='NAME',
    help='such as fp16, if the source has several (default: full precision)',
  )
  parser.add_argument(
    '--allow-nonfinite', action='store_true', help='accept NaN and infinity in the source'
  )
  parser.add_argument(
    '--keep-vocabulary',
    action='store_true',
    help='do not add the visual tokens to the embeddings of a LLaMA',
  )


def _add_bundle(commands: Commands) -> None:
  parser = add_command(
    commands, 'bundle', _bundle, 'combine the exports of the training stages into one checkpoint'
  )
  parser.add_argument(
    'exports',
    nargs='+',
    type=path_or_url,
    metavar='RUN/export',
    help='export folders; a module that is in several is taken from the last one',
  )
  parser.add_argument(
    '--tokenizer',
    type=local_path,
    default=os.path.join(TINY, 'language_model'),
    metavar='DIR',
    help='text tokenizer folder (default: %(default)s)',
  )
  parser.add_argument(
    '--dtype',
    default='bfloat16',
    choices=DTYPES,
    help='dtype of the written weights (default: %(default)s)',
  )
  parser.add_argument(
    '--out',
    type=path_or_url,
    required=True,
    metavar='DIR',
    help='folder to write; a checkpoint in it is replaced',
  )


def _convert(args: argparse.Namespace) -> None:
  from lavit_jax.apps import conversion
  from lavit_jax.weights.store import remote
  from lavit_jax.weights.torch.convert import plan_conversion

  with remote.target(args.dst, replaces=args.force) as dst:
    plan = plan_conversion(
      remote.fetch(args.src),
      dst,
      variant=args.variant,
      dtype=args.dtype,
      allow_missing=args.allow_missing,
      force=args.force,
      pickles=args.bin,
      grow=not args.keep_vocabulary,
      weights_variant=args.weights_variant,
      allow_nonfinite=args.allow_nonfinite,
      adapter=args.adapter,
    )
    conversion.run(plan, args.dry_run)


def _inspect(args: argparse.Namespace) -> None:
  from lavit_jax.apps import conversion
  from lavit_jax.weights.store import remote

  conversion.inspect(remote.fetch(args.folder))


def _bundle(args: argparse.Namespace) -> None:
  from lavit_jax.weights.store import remote
  from lavit_jax.weights.store.bundle import bundle

  exports = [remote.fetch(export) for export in args.exports]
  with remote.target(args.out) as out:
    bundle(out, exports, args.tokenizer, args.dtype)
  print(args.out)


def _list_variants(args: argparse.Namespace) -> None:
  from rich.console import Console
  from rich.table import Table

  from lavit_jax.models import lavit

  table = Table('variant', 'image size', 'patches', 'codes', 'text tokens', 'language model')
  for name in lavit.VARIANTS:
    model = lavit.build(name)
    table.add_row(
      name,
      str(model.image_size),
      str(model.num_patches),
      str(model.vocabulary.codebook_size),
      str(model.vocabulary.text_size),
      f'{model.llama.num_layers} layers of {model.llama.hidden_size}',
    )
  Console().print(table)
