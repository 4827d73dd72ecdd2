"""The tasks on images and texts: caption, answer, generate, synthesize, reconstruct, tokenize."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from lavit_jax.cli import generation_options, options, shards
from lavit_jax.cli.options import add_command, image_size, local_path, number, path_or_url

if TYPE_CHECKING:
  from lavit_jax.cli.options import Commands

IMAGE_ROW = '{"image": "cat.png"}'
# Every result depends on these; result files record them.
MODEL_OPTIONS = (
  'folder',
  'adapter',
  'dtype',
  'weights_dtype',
  'cache_dtype',
  'safety_checker',
  'seed',
)
# The other options, apart from these, are arguments of the model's method.
COMMAND_OPTIONS = (
  'command',
  'run',
  'inputs',
  'input',
  'out',
  'json',
  'tensor',
  'compilation_cache',
  *shards.OPTIONS,
)
# Options under another name in result files, which have older names: a run must be resumable.
RECORDED_NAMES = {
  'cache_dtype': 'cache',
  'check_answerable': 'judge',
  'decoder_guidance_scale': 'decoder_guidance',
  'do_sample': 'sample',
  'guidance_rescale': 'rescale',
  'guidance_scale': 'guidance',
  'init_image': 'start',
  'max_new_tokens': 'max_tokens',
  'min_new_tokens': 'min_tokens',
  'negative_prompt': 'negative',
  'num_beams': 'beams',
  'num_inference_steps': 'steps',
  'num_return_sequences': 'samples',
  'vae_tile_size': 'tile',
  'weights_dtype': 'weights',
}
# Options whose keyword of the model's method has another name.
KEYWORDS = {'init_image': 'init_images'}


def add_commands(commands: Commands) -> None:
  """Adds the commands of this module."""
  _add_caption(commands)
  _add_answer(commands)
  _add_generate(commands)
  _add_synthesize(commands)
  parser = _add_task(commands, 'reconstruct', 'reconstruct images from their visual tokens alone')
  _add_inputs(parser, 'IMAGE|DIR', IMAGE_ROW)
  _add_image_outputs(parser)
  parser = _add_task(commands, 'tokenize', 'print the visual tokens of images')
  _add_inputs(parser, 'IMAGE|DIR', IMAGE_ROW, or_shards=True)
  _add_text_outputs(parser, or_shards=True)
  shards.add_options(parser)


def _add_caption(commands: Commands) -> None:
  parser = _add_task(commands, 'caption', 'describe images')
  _add_inputs(parser, 'IMAGE|DIR', IMAGE_ROW, or_shards=True)
  _add_text_outputs(parser, or_shards=True)
  shards.add_options(parser)
  generation_options.add_search_options(parser, num_beams=2, length_penalty=1)
  generation_options.add_generation_options(
    parser, 'number of captions of each image, from other patches and samples (default: 1)'
  )
  parser.add_argument('--prompt', metavar='TEXT', help='start of the captions (default: none)')


def _add_answer(commands: Commands) -> None:
  parser = _add_task(commands, 'answer', 'answer questions about an image or a folder of images')
  _add_inputs(parser, 'IMAGE|DIR QUESTION', '{"image": "cat.png", "question": "What is this?"}')
  _add_text_outputs(parser)
  generation_options.add_search_options(parser, num_beams=5, length_penalty=0)
  generation_options.add_generation_options(
    parser, 'number of answers to each question, from other patches and samples (default: 1)'
  )
  parser.add_argument(
    '--check-answerable',
    '--judge',
    action='store_const',
    const=True,
    help="first ask whether the image has the answer, and if not answer 'unanswerable'",
  )


def _add_generate(commands: Commands) -> None:
  parser = _add_task(commands, 'generate', 'generate an image from each text')
  _add_inputs(parser, 'TEXT', '{"prompt": "a cat"}')
  _add_image_outputs(parser)
  generation_options.add_sampling_options(parser, guidance_scale=4.0)


def _add_synthesize(commands: Commands) -> None:
  parser = _add_task(
    commands,
    'synthesize',
    'generate one image from images and texts in any order, or one with each image of a folder',
  )
  _add_inputs(parser, 'IMAGE|DIR|TEXT', '{"parts": ["cat.png", "on a red background"]}')
  _add_image_outputs(parser)
  generation_options.add_sampling_options(parser, guidance_scale=5.0)


def _add_task(commands: Commands, name: str, text: str) -> argparse.ArgumentParser:
  parser = add_command(commands, name, _run_task, text)
  options.add_model_options(parser)
  options.add_seed_option(parser)
  return parser


def _add_inputs(
  parser: argparse.ArgumentParser, metavar: str, row: str, or_shards: bool = False
) -> None:
  parser.add_argument('inputs', nargs='*', metavar=metavar)
  text = f'read a row from each line: {row}; image paths are relative to this file'
  parser.add_argument(
    '--input',
    type=path_or_url if or_shards else local_path,
    metavar='ROWS.jsonl|PATTERN' if or_shards else 'ROWS.jsonl',
    help=f'{text}; or tars or Parquet files, see below' if or_shards else text,
  )
  parser.add_argument('--json', action='store_true', help='print each result as a JSON object')


def _add_text_outputs(parser: argparse.ArgumentParser, or_shards: bool = False) -> None:
  parser.add_argument(
    '--most-probable',
    dest='seed',
    action='store_const',
    const=None,
    help='keep the most probable patches instead of sampling which patches become tokens',
  )
  text = 'append each result as a line; the same command resumes an interrupted run'
  parser.add_argument(
    '--out',
    type=path_or_url if or_shards else local_path,
    metavar='FILE.jsonl|DIR' if or_shards else 'FILE.jsonl',
    help=f'{text}; of tars or Parquet files, a folder' if or_shards else text,
  )


def _add_image_outputs(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    '--out',
    type=local_path,
    default='drawn',
    metavar='DIR',
    help='folder for the PNG files (default: %(default)s); for several images, a folder or '
    '--input, it also gets manifest.jsonl, with which the same command resumes',
  )
  parser.add_argument(
    '--size',
    type=image_size,
    metavar='HxW',
    help='a size of SDXL, such as 1024x1024 (default: the square of Stable Diffusion)',
  )
  parser.add_argument(
    '--num-inference-steps',
    '--steps',
    type=number(int, 1, 999),
    metavar='N',
    help='number of denoising steps (default: 50, with SDXL 25)',
  )
  parser.add_argument(
    '--decoder-guidance-scale',
    '--decoder-guidance',
    type=number(float, 0),
    metavar='G',
    help="guidance scale of the U-Net (default: 5, with SDXL 7, with Emu's vectors 7.5)",
  )
  parser.add_argument(
    '--sampler',
    choices=('ddim', 'euler', 'dpm++2m', 'pndm'),
    default='ddim',
    help='diffusion sampler (default: %(default)s)',
  )
  parser.add_argument(
    '--guidance-rescale',
    '--rescale',
    type=number(float, 0, 1),
    default=0.0,
    metavar='R',
    help='share of rescaled guidance (default: %(default)s)',
  )
  parser.add_argument(
    '--vae-tile-size',
    '--tile',
    type=number(int, 64),
    metavar='PIXELS',
    help='decode in tiles of this size, to save memory (default: above a megapixel)',
  )


def _run_task(args: argparse.Namespace) -> None:
  from lavit_jax.apps import batch

  if shards.named(args):
    method_options = _method_options(args)
    _check_seed(args, 1)
    shards.run(args, _recorded_settings(args, method_options), method_options)
    return
  task = batch.TASKS[args.command]
  inputs = batch.resolve_inputs(task, args.inputs, args.input, args.out)
  method_options = _method_options(args)
  settings = _recorded_settings(args, method_options)
  copies = method_options.pop('num_return_sequences', 1)
  _check_seed(args, copies)
  rows = []
  for row in inputs.rows:
    rows += [row] * copies  # each copy has a seed of its own, by its index
  results_path = args.out
  image_folder = None
  if 'file' in task.outputs:
    results_path = os.path.join(args.out, 'manifest.jsonl') if inputs.many else None
    image_folder = args.out
  results = None
  if results_path:  # checked before the model is loaded
    results = batch.ResultsFile(results_path, task.outputs, settings)
  batch.run_batch(
    task,
    options.load_model(args),
    inputs._replace(rows=rows),
    args.seed,
    {KEYWORDS.get(name, name): value for name, value in method_options.items()},
    as_json=args.json,
    results=results,
    image_folder=image_folder,
  )


def _method_options(args: argparse.Namespace) -> dict[str, Any]:
  """The options with a value that are arguments of the model's method."""
  method_options = {}
  for name, value in vars(args).items():
    if name not in COMMAND_OPTIONS and name not in MODEL_OPTIONS and value is not None:
      method_options[name] = value
  return method_options


def _recorded_settings(args: argparse.Namespace, method_options: dict[str, Any]) -> dict[str, Any]:
  """What a result depends on besides its row, under the names of result files."""
  from lavit_jax.local_paths import expand_home

  settings = {RECORDED_NAMES.get(name, name): value for name, value in method_options.items()}
  settings['command'] = args.command
  for name in MODEL_OPTIONS:
    if getattr(args, name) is not None:
      settings[RECORDED_NAMES.get(name, name)] = getattr(args, name)
  for name in ('folder', 'adapter', 'start'):  # the same folder may be spelled in several ways
    if name in settings and '://' not in settings[name]:
      settings[name] = os.path.realpath(expand_home(settings[name]))
  return settings


def _check_seed(args: argparse.Namespace, copies: int) -> None:
  """Refuses --most-probable, which leaves no seed, with options that need one."""
  if args.seed is not None:
    return
  option = None
  if getattr(args, 'do_sample', None):
    option = '--do-sample'
  elif copies > 1:
    option = f'--num-return-sequences {copies}'
  if option:
    from lavit_jax.errors import UserError

    raise UserError(f'{option} needs a random seed, and --most-probable has none; leave one out')
