"""'~' is expanded in all paths: options, config files, files of rows, Python."""

import argparse
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

import lavit_jax
from lavit_jax import cli
from lavit_jax.apps import batch
from lavit_jax.data import images
from lavit_jax.data.emoji import sprites
from lavit_jax.data.text import TextTokenizer
from lavit_jax.inference.pipeline import Lavit
from lavit_jax.training.config import load_config
from lavit_jax.training.parameters import split_folders
from lavit_jax.training.stages.base import ModuleNames

ASSETS = pathlib.Path(lavit_jax.__file__).parent / 'assets'
PATHS = ('DIR', 'RUN/export', 'ROWS.jsonl', 'FILE.jsonl', 'FILE.json')


@pytest.fixture
def home(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  (tmp_path / 'home').mkdir()
  (tmp_path / 'elsewhere').mkdir()
  monkeypatch.chdir(tmp_path / 'elsewhere')
  return tmp_path / 'home'


def options(parser):
  for action in parser._actions:
    if isinstance(action, argparse._SubParsersAction):
      for sub in action.choices.values():
        yield from options(sub)
    else:
      yield parser.prog, action


def test_options_with_local_paths(home):
  count = 0
  for prog, action in options(cli.build_parser()):
    if action.metavar in PATHS:
      count += 1
      assert action.type('~/x') == f'{home}/x', (prog, action.dest)
  assert count > 20


def test_config_files_and_their_folders(home):
  (home / 'config.py').write_text("""
from ml_collections import ConfigDict
def get_config(variant):
  return ConfigDict(dict(variant=variant))
""")
  assert load_config('~/config.py:tiny').variant == 'tiny'
  assert split_folders('~/a/export, b,~', ModuleNames()) == (f'{home}/a/export', 'b', str(home))


def test_checkpoints_tokenizers_and_data_sets(home):
  for name, target in (
    ('model', 'tiny'),
    ('tokenizer', 'tiny/language_model'),
    ('data', 'emoji_sample'),
  ):
    (home / name).symlink_to(ASSETS / target)
  assert Lavit.from_pretrained('~/model').modules.image_size == 64
  assert TextTokenizer.load('~/tokenizer').vocab_size == 2048
  assert sprites.find_dataset('~/data').startswith(str(home))


def test_images_and_rows(home):
  pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
  Image.fromarray(pixels).save(home / 'a.png')
  np.testing.assert_array_equal(images.read_image('~/a.png'), pixels)
  assert batch.find_images(['~']) == batch.find_images(['~/a.png']) == [f'{home}/a.png']
  inputs = batch.resolve_inputs(batch.TASKS['caption'], ['~'], None, None)
  assert (inputs.rows, inputs.many) == ([dict(image=f'{home}/a.png')], True)
  (home / 'rows.jsonl').write_text(json.dumps(dict(image='~/a.png')))
  np.testing.assert_array_equal(
    batch.load_inputs(dict(image='~/a.png'), ('image',), home / 'x', 8)['image'], pixels
  )
  assert (
    batch.load_inputs(dict(parts=['~ 5 cats', '~/a.png']), ('parts',), home, 8)['parts'][0]
    == '~ 5 cats'
  )
