"""The options of the language model: of beam search, of sampling words, of sampling codes."""

from __future__ import annotations

import argparse

from lavit_jax.cli.options import number


def add_search_options(
  parser: argparse.ArgumentParser, num_beams: int, length_penalty: int
) -> None:
  """The options of beam search, and those of sampling in its place."""
  parser.add_argument(
    '--num-beams',
    '--beams',
    type=number(int, 1),
    metavar='N',
    help=f'number of beams of the beam search (default: {num_beams})',
  )
  parser.add_argument(
    '--length-penalty',
    type=number(float, -100, 100),
    metavar='L',
    help=f'length penalty of the beam search (default: {length_penalty})',
  )
  parser.add_argument(
    '--do-sample',
    '--sample',
    action='store_const',
    const=True,
    help='sample instead of beam search',
  )
  parser.add_argument(
    '--top-k',
    type=number(int, 1),
    metavar='K',
    help='with --do-sample: sample among the K most probable tokens (default: 50)',
  )
  parser.add_argument(
    '--temperature', type=number(float, 1e-3), metavar='T', help='with --do-sample (default: 1)'
  )


def add_generation_options(parser: argparse.ArgumentParser, sequences: str) -> None:
  """The options of the language model; `sequences` is the help of --num-return-sequences."""
  parser.add_argument(
    '--top-p',
    type=number(float, 0.001, 1),
    metavar='P',
    help='sample among the most probable tokens that together reach this probability '
    '(default: all)',
  )
  parser.add_argument(
    '--repetition-penalty',
    type=number(float, 0.01),
    metavar='R',
    help='penalty above 1 for tokens that were generated before (default: 1)',
  )
  parser.add_argument(
    '--min-new-tokens',
    '--min-tokens',
    type=number(int, 0),
    metavar='N',
    help='generate at least N tokens (default: as published)',
  )
  parser.add_argument(
    '--max-new-tokens',
    '--max-tokens',
    type=number(int, 1),
    metavar='N',
    help='generate at most N tokens (default: as published)',
  )
  parser.add_argument(
    '--num-return-sequences',
    '--samples',
    type=number(int, 1),
    metavar='N',
    help=sequences,
  )


def add_sampling_options(parser: argparse.ArgumentParser, guidance_scale: float) -> None:
  """The options for sampling visual tokens, and for an image to start from."""
  parser.add_argument(
    '--guidance-scale',
    '--guidance',
    type=number(float, 0),
    default=guidance_scale,
    metavar='G',
    help='guidance scale of the language model (default: %(default)s)',
  )
  parser.add_argument(
    '--top-k',
    type=number(int, 1),
    default=50,
    metavar='K',
    help='sample among the K most probable codes (default: %(default)s)',
  )
  parser.add_argument(
    '--temperature',
    type=number(float, 1e-3),
    default=1.0,
    metavar='T',
    help='sampling temperature (default: %(default)s)',
  )
  add_generation_options(parser, 'number of images of each prompt (default: 1)')
  parser.add_argument(
    '--negative-prompt',
    '--negative',
    default='',
    metavar='TEXT',
    help='what the images should not show',
  )
  parser.add_argument(
    '--init-image',
    '--start',
    metavar='IMAGE',
    help='start from this image instead of noise',
  )
  parser.add_argument(
    '--strength',
    type=number(float, 0.01, 1),
    default=0.8,
    metavar='S',
    help='how much to change --init-image; even 1 keeps a trace of it (default: %(default)s)',
  )
