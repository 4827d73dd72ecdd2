"""Config files and their overrides: right types in, one clear line out."""

import pytest

from lavit_jax.errors import UserError
from lavit_jax.training.config import load_config, split_overrides

CONFIG_FILE = """
import ml_collections
from ml_collections import config_dict

def get_config(variant='tiny'):
  if variant not in ('tiny', 'small'):
    raise ValueError(f'unknown variant {variant!r}')
  return ml_collections.ConfigDict(dict(
      variant=variant, steps=100, rate=1e-3, freeze=True,
      seed=config_dict.placeholder(int), init=None, mesh=(1, 1),
      optimizer=dict(name='adamw', betas=[0.9, 0.95])))
"""


@pytest.fixture
def config_file(tmp_path):
  path = tmp_path / 'config.py'
  path.write_text(CONFIG_FILE)
  return str(path)


@pytest.mark.parametrize(
  'key, text, value',
  [
    ('steps', '7', 7),
    ('steps', '2e3', 2000),
    ('rate', '1', 1.0),
    ('rate', '3e-4', 3e-4),
    ('freeze', 'false', False),
    ('seed', '3', 3),
    ('seed', 'none', None),
    ('init', 'runs/a', 'runs/a'),
    ('init', '[1]', [1]),
    ('mesh', '(4, 2)', (4, 2)),
    ('mesh', '[4, 2]', (4, 2)),
    ('optimizer.name', '7', '7'),
    ('optimizer.betas', '(0.5, 1)', [0.5, 1]),
    ('variant', '', ''),
  ],
)
def test_an_override_takes_the_type_of_the_value(config_file, key, text, value):
  config = load_config(config_file, [(key, text)])
  for name in key.split('.'):
    config = config[name]
  assert config == value and type(config) is type(value)


def test_the_argument_reaches_the_file_and_the_config_is_locked(config_file):
  config = load_config(config_file + ':small')
  assert config.variant == 'small' and config.is_locked and config.optimizer.is_locked


@pytest.mark.parametrize(
  'key, text, message',
  [
    ('stepz', '1', '--config.stepz: no such key; did you mean --config.steps?'),
    ('optimizer.nam', 'x', '--config.optimizer.name'),
    ('optimizer', 'x', '--config.optimizer.betas or --config.optimizer.name'),
    ('steps', '1.5', '--config.steps=1.5: give a value of type int, such as 100'),
    ('steps', 'True', 'type int'),
    ('freeze', '1', 'type bool'),
    ('rate', 'fast', 'type float'),
    ('seed', 'x', 'type int'),
  ],
)
def test_a_bad_override_names_the_option(config_file, key, text, message):
  with pytest.raises(UserError) as error:
    load_config(config_file, [(key, text)])
  assert message in str(error.value) and '\n' not in str(error.value)


def test_bad_config_files(tmp_path, config_file):
  with pytest.raises(UserError, match='no file nowhere.py'):
    load_config('nowhere.py:tiny')
  with pytest.raises(UserError, match="refuses 'huge'.*unknown variant"):
    load_config(config_file + ':huge')
  for text in ('def get_config(:', 'x = 1'):
    other = tmp_path / 'other.py'
    other.write_text(text)
    with pytest.raises(UserError, match='not a config file'):
      load_config(str(other))
  other.write_text('def get_config(): return None')
  with pytest.raises(UserError, match='takes no argument'):
    load_config(f'{other}:tiny')


def test_overrides_are_split_off():
  pairs, others = split_overrides(['--config.a=1', '--other', '--config.b.c', 'x=y', 'z'])
  assert pairs == [('a', '1'), ('b.c', 'x=y')] and others == ['--other', 'z']
  with pytest.raises(UserError, match='--config.a: give it a value'):
    split_overrides(['--config.a'])
