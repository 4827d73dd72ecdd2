"""`lavit demo`, `lavit app`, `lavit serve` and `lavit evaluate`."""

from __future__ import annotations

import argparse
import os
import pathlib
from typing import TYPE_CHECKING

from lavit_jax.cli import options
from lavit_jax.cli.options import add_command, local_path, number

if TYPE_CHECKING:
  from lavit_jax.cli.options import Commands

BENCHMARKS = (
  'coco',
  'nocaps',
  'flickr30k',
  'vqav2',
  'okvqa',
  'gqa',
  'vizwiz',
  'own',
  'geneval',
  'coco-fid',
)
BENCHMARK_OPTIONS = ('protocol', 'data', 'images', 'inception', 'clip', 'shard', 'limit')
EMOJI_OPTIONS = ('count', 'drawn')
DEMO = os.path.relpath(os.path.join(options.ASSETS, 'demo'))


def add_commands(commands: Commands) -> None:
  """Adds the commands of this module."""
  _add_demo(commands)
  _add_app(commands)
  _add_serve(commands)
  _add_evaluate(commands)


def _add_demo(commands: Commands) -> None:
  parser = add_command(
    commands,
    'demo',
    _demo,
    'caption, answer, generate and reconstruct with the tiny checkpoint, into one HTML page',
  )
  options.add_model_options(parser)
  options.add_seed_option(parser)
  parser.add_argument(
    '--inputs',
    type=local_path,
    default=DEMO,
    metavar='DIR',
    help='folder of images with their manifest.json (default: %(default)s)',
  )
  parser.add_argument(
    '--out',
    type=local_path,
    default='demo_out',
    metavar='DIR',
    help='folder for index.html (default: %(default)s)',
  )


def _add_app(commands: Commands) -> None:
  parser = add_command(commands, 'app', _app, 'serve a web page for trying all tasks')
  options.add_model_options(parser)
  _add_address_options(parser, 7860)


def _add_serve(commands: Commands) -> None:
  parser = add_command(
    commands, 'serve', _serve, "answer HTTP requests in the shapes of OpenAI's client"
  )
  options.add_model_options(parser)
  _add_address_options(parser, 8000, lowest=0, note=', 0 chooses a free one')
  integers = (
    ('--slots', 16, 'texts that are generated at once'),
    ('--max-prompt-tokens', 512, 'most tokens of a prompt'),
    ('--max-new-tokens', 128, 'most new tokens of a text'),
    ('--max-queue', 128, 'requests that may wait; more are refused with status 429'),
    ('--max-body', 20, 'MiB of the body of a request'),
    ('--max-pixels', 40, 'million pixels of an image'),
    ('--timeout', 120, 'seconds after which a request is cut off'),
  )
  for name, default, text in integers:
    parser.add_argument(
      name,
      type=number(int, 1),
      default=default,
      metavar='N',
      help=f'{text} (default: %(default)s)',
    )


def _add_address_options(
  parser: argparse.ArgumentParser, port: int, lowest: int = 1, note: str = ''
) -> None:
  parser.add_argument(
    '--host',
    default='127.0.0.1',
    help='address to listen on; 0.0.0.0 accepts other machines (default: %(default)s)',
  )
  parser.add_argument(
    '--port',
    type=number(int, lowest, 65535),
    default=port,
    help=f'(default: %(default)s{note})',
  )


def _add_evaluate(commands: Commands) -> None:
  parser = add_command(
    commands,
    'evaluate',
    _evaluate,
    'measure a checkpoint on a published benchmark, or on the held-out splits of composed emoji',
  )
  options.add_model_options(parser)
  options.add_seed_option(parser)
  parser.add_argument(
    '--out',
    type=local_path,
    metavar='PATH',
    help='with --benchmark: folder for results, with which the same command resumes (default: '
    'NAME-PROTOCOL); with --source: JSON file of the report (default: report.json)',
  )
  group = parser.add_argument_group('published benchmarks')
  group.add_argument(
    '--benchmark',
    choices=BENCHMARKS,
    help='needs --data and, except for geneval, --images; own: your questions.jsonl',
  )
  group.add_argument(
    '--protocol',
    choices=('lavit', 'standard'),
    help='lavit: as the authors of the paper ran it; standard: the official metric, with the '
    'prompts of lmms-eval (default: lavit, for geneval standard)',
  )
  group.add_argument(
    '--data', type=local_path, metavar='DIR', help='folder of the official annotation files'
  )
  group.add_argument('--images', type=local_path, metavar='DIR', help='folder of the images')
  group.add_argument(
    '--inception',
    type=local_path,
    metavar='FILE',
    help='with coco-fid: Inception-v3 weights of pytorch-fid or torch-fidelity',
  )
  group.add_argument(
    '--clip',
    type=local_path,
    metavar='DIR',
    help='with coco-fid: a CLIPModel of transformers, for the CLIP score and the best image',
  )
  group.add_argument(
    '--shard',
    type=options.shard,
    metavar='I/N',
    help='compute share I, from 0, of N shares that several processes compute into one --out '
    '(default: 0/1)',
  )
  group.add_argument(
    '--limit', type=number(int, 1), metavar='N', help='the first N records alone (default: all)'
  )
  group = parser.add_argument_group('composed emoji')
  group.add_argument(
    '--source', type=local_path, metavar='DIR', help='data set that `lavit data build` wrote'
  )
  group.add_argument(
    '--count',
    type=number(int, 2),
    metavar='N',
    help='number of examples of each split (default: 512)',
  )
  group.add_argument(
    '--drawn',
    type=number(int, 1),
    metavar='N',
    help='number of texts of each split to generate images from (default: 256)',
  )


def _demo(args: argparse.Namespace) -> None:
  from lavit_jax.apps import demo

  demo.run(options.load_model(args), args.inputs, args.out, seed=args.seed)


def _app(args: argparse.Namespace) -> None:
  from lavit_jax.errors import UserError

  try:
    from lavit_jax.apps.web import serve
  except ImportError as error:
    if (error.name or '').split('.')[0] != 'gradio':
      raise
    raise UserError(
      "the page needs Gradio; pip install -e '.[app]' -c launch/constraints.txt"
    ) from None
  serve(options.load_model(args), args.host, args.port)


def _serve(args: argparse.Namespace) -> None:
  from lavit_jax.errors import UserError

  try:
    from lavit_jax.apps.serve import serve
    from lavit_jax.apps.serve.api import Limits
  except ImportError as error:
    if (error.name or '').split('.')[0].startswith('lavit_jax'):
      raise
    raise UserError(
      f"the server needs {error.name}; pip install -e '.[serve]' -c launch/constraints.txt"
    ) from None
  serve(
    options.load_model(args),
    args.folder,
    args.host,
    args.port,
    num_slots=args.slots,
    prompt_tokens=args.max_prompt_tokens,
    new_tokens=args.max_new_tokens,
    max_queue=args.max_queue,
    limits=Limits(
      body_bytes=args.max_body * 2**20, pixels=args.max_pixels * 10**6, seconds=args.timeout
    ),
  )


def _evaluate(args: argparse.Namespace) -> None:
  from lavit_jax.errors import UserError

  if (args.benchmark is None) == (args.source is None):
    raise UserError(
      'give either --benchmark NAME, for a published one, or --source DIR, for composed emoji'
    )
  kind = 'benchmark' if args.benchmark else 'source'
  for name in EMOJI_OPTIONS if args.benchmark else BENCHMARK_OPTIONS:
    if getattr(args, name) is not None:
      raise UserError(f'--{name} has no effect with --{kind}; leave it out')
  if args.benchmark:
    _run_benchmark(args)
    return
  from lavit_jax.evaluation import report

  model = options.load_model(args)
  report.evaluate(
    model,
    args.source,
    args.count or 512,
    args.out or 'report.json',
    drawn=args.drawn or 256,
    seed=args.seed,
  )


def _run_benchmark(args: argparse.Namespace) -> None:
  from lavit_jax.apps import benchmarks
  from lavit_jax.errors import UserError
  from lavit_jax.weights.store import remote

  benchmark = benchmarks.BENCHMARKS[args.benchmark]
  for name in ('data', 'images') if benchmark.images else ('data',):
    if getattr(args, name) is None:
      raise UserError(f'--benchmark {args.benchmark} needs --{name} DIR; name the folder')
  if args.images and not benchmark.images:
    raise UserError(f'--images has no effect with --benchmark {args.benchmark}; leave it out')
  for name in ('inception', 'clip'):
    if getattr(args, name) is not None and args.benchmark != 'coco-fid':
      raise UserError(f'--{name} has no effect with --benchmark {args.benchmark}; leave it out')
  protocol = args.protocol or next(iter(benchmark.protocols))
  if protocol not in benchmark.protocols:
    raise UserError(
      f'--benchmark {args.benchmark} has no protocol {protocol!r}; give --protocol standard'
    )
  request = benchmarks.Request(
    benchmark=args.benchmark,
    protocol=protocol,
    data=pathlib.Path(args.data),
    images=pathlib.Path(args.images or ''),
    out=pathlib.Path(args.out or f'{args.benchmark}-{protocol}'),
    share=args.shard or (0, 1),
    limit=args.limit,
    inception=pathlib.Path(args.inception) if args.inception else None,
    clip=pathlib.Path(args.clip) if args.clip else None,
  )
  args.folder = remote.fetch(args.folder)  # its digest is in the report
  model_options = {}
  for name in ('weights_dtype', 'cache_dtype'):
    if getattr(args, name) is not None:
      model_options[name] = getattr(args, name)
  if benchmark.task == 'generate':
    model_options['safety_checker'] = args.safety_checker
  benchmarks.run_benchmark(
    lambda: options.load_model(args), args.folder, request, args.seed, model_options
  )
