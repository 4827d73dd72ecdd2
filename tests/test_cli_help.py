"""The command line by itself: what it needs to start, its help, and the names of its options."""

import ast
import pathlib
import subprocess
import sys
import time

import pytest

from lavit_jax import cli

ROOT = pathlib.Path(cli.__file__).parents[2]


def test_the_python_version(capsys):
  cli.check_python((3, 11, 0))
  cli.check_python((3, 14))
  with pytest.raises(SystemExit) as error:
    cli.check_python((3, 10, 9))
  assert error.value.code == 2
  assert capsys.readouterr().err == (
    'lavit: error: Python 3.10 is too old; make the virtual environment with Python 3.11 or newer\n'
  )


def test_an_old_python_can_parse_the_command_line():
  """So that `check_python` can report it."""
  package = ROOT / 'lavit_jax'
  for path in (package / '__init__.py', package / 'renames.py', *(package / 'cli').glob('*.py')):
    ast.parse(path.read_text(), feature_version=(3, 7))


def test_the_help_imports_no_large_library():
  code = """
import sys
from lavit_jax.cli import main
try:
  main(['--help'])
except SystemExit:
  print(sorted(sys.modules))
"""
  start = time.monotonic()
  out = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, check=True
  ).stdout
  assert time.monotonic() - start < 10  # a fifth of a second on an idle machine
  heavy = {'jax', 'torch', 'transformers', 'numpy', 'flax', 'PIL', 'ml_collections'}
  assert not heavy & set(ast.literal_eval(out.splitlines()[-1]))
  for command in (
    'train',
    'demo',
    'caption',
    'answer',
    'generate',
    'synthesize',
    'reconstruct',
    'tokenize',
    'data',
    'evaluate',
    'variants',
    'app',
  ):
    assert command in out


def test_variants_are_listed(capsys):
  assert cli.main(['variants']) == 0
  table = capsys.readouterr().out
  for expected in ('tiny', 'lavit_7b', '16384'):
    assert expected in table


SPELLINGS = {  # as in transformers and diffusers -> an older spelling, which still works
  '--num-beams': '--beams',
  '--max-new-tokens': '--max-tokens',
  '--min-new-tokens': '--min-tokens',
  '--num-return-sequences': '--samples',
  '--weights-dtype': '--weights',
  '--cache-dtype': '--cache',
}
IMAGE_SPELLINGS = {
  '--guidance-scale': '--guidance',
  '--decoder-guidance-scale': '--decoder-guidance',
  '--num-inference-steps': '--steps',
  '--negative-prompt': '--negative',
  '--init-image': '--start',
  '--guidance-rescale': '--rescale',
  '--vae-tile-size': '--tile',
}


@pytest.mark.parametrize(
  'command, spellings', [('caption', SPELLINGS), ('generate', IMAGE_SPELLINGS)]
)
def test_both_spellings_are_one_option(command, spellings):
  values = {
    '--weights-dtype': 'int8',
    '--cache-dtype': 'int8',
    '--guidance-rescale': '0.5',
    '--vae-tile-size': '64',
  }
  new, old = [command, 'x'], [command, 'x']
  for name, alias in spellings.items():
    new += [name, values.get(name, '3')]
    old += [alias, values.get(name, '3')]
  parser = cli.build_parser()
  assert vars(parser.parse_args(new)) == vars(parser.parse_args(old))
  assert vars(parser.parse_args(new)) != vars(parser.parse_args([command, 'x']))
