"""Every option of every config has a range, and values outside of it are refused in one line."""

import itertools
import math
import pathlib

import numpy as np
import pytest

from lavit_jax.errors import UserError
from lavit_jax.training import options, run_config
from lavit_jax.training.config import config_leaves, load_config

ROOT = pathlib.Path(__file__).parents[2]
LARGE_STAGES = ('tokenizer', 'detokenizer', 'lm', 'qformer')
CONFIGS = [
  ('encoder', 'tiny'),
  ('autoencoder', 'tiny'),
  *itertools.product(LARGE_STAGES, ('tiny', 'small', 'lavit_7b')),
]


def make_config(stage, variant='tiny', **changes):
  config = load_config(f'{ROOT}/configs/{stage}.py:{variant}')
  with config.unlocked(), config.ignore_type():
    for key, value in changes.items():
      node = config
      *parents, name = key.split('__')
      for parent in parents:
        node = node[parent]
      with node.ignore_type():
        node[name] = value
  return config


def test_every_option_of_every_config_has_a_row_and_no_row_is_without_one():
  keys = set()
  for stage, variant in CONFIGS:
    config = make_config(stage, variant)
    run_config.check_values(config)  # and the values are in range
    keys |= {key for key, _ in config_leaves(config)}
  assert keys == set(options.OPTIONS)


NUMBERS = [key for key, row in options.OPTIONS.items() if isinstance(row, options.Number)]


@pytest.mark.parametrize(
  'value', [math.nan, math.inf, -math.inf, True, '1', (1,), np.bool_(True), -1e9]
)
def test_values_that_no_number_may_have(value):
  for key in NUMBERS:
    with pytest.raises(UserError, match=rf'^{key}=.* must be (a number|an integer) '):
      options.check_values({key: value})


def test_one_option_alone_may_be_none():
  for key in options.OPTIONS:
    if key == 'optim.clip_norm':
      options.check_values({key: None})
      continue
    with pytest.raises(UserError, match=f'^{key}=None ') as error:
      options.check_values({key: None})
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'stage, changes, message',
  [
    (
      'encoder',
      dict(optim__learning_rate=-1.0),
      'optim.learning_rate=-1.0 must be a number above 0 and at most 1',
    ),
    ('encoder', dict(optim__learning_rate=-1e-3), 'optim.learning_rate=-0.001 must be'),
    ('encoder', dict(optim__learning_rate=0.0), 'optim.learning_rate=0.0 must be'),
    (
      'encoder',
      dict(optim__clip_norm=0.0),
      'optim.clip_norm=0.0 must be a number above 0 .*, or None',
    ),
    ('encoder', dict(optim__weight_decay=-1.0), 'optim.weight_decay=-1.0 must be'),
    (
      'encoder',
      dict(optim__warmup_steps=-5),
      'optim.warmup_steps=-5 must be an integer of at least 0',
    ),
    ('encoder', dict(optim__final_fraction=7.0), 'optim.final_fraction=7.0 must be .* at most 1'),
    ('encoder', dict(optim__b2=1.0), 'optim.b2=1.0 must be .* below 1'),
    ('encoder', dict(optim__b2=2.0), 'optim.b2=2.0 must be'),
    ('encoder', dict(optim__b1=1.0), 'optim.b1=1.0 must be'),
    ('encoder', dict(optim__ema_decay=-1.0), 'optim.ema_decay=-1.0 must be'),
    ('encoder', dict(optim__ema_decay=1.0), 'optim.ema_decay=1.0 must be'),
    (
      'encoder',
      dict(optim__freeze=('[',)),
      r"optim.freeze=.* has '\[', which is not a regular expression",
    ),
    ('encoder', dict(optim__freeze='vit'), 'optim.freeze=.vit. must be a list'),
    ('lm', dict(merger_capacities=(176, 112)), 'merger_capacities=.* must list ascending integers'),
    ('lm', dict(merger_capacities=(0, 112)), 'merger_capacities=.* must list ascending integers'),
    ('lm', dict(merger_capacities=112), 'merger_capacities=112 must list ascending integers'),
    ('encoder', dict(optim__freeze=(5,)), 'optim.freeze=.5,. must be a list'),
    ('encoder', dict(optim__lr_scale=('vit',)), 'optim.lr_scale=.* must be a list of pairs'),
    (
      'encoder',
      dict(optim__lr_scale=(('vit', -1.0),)),
      'has the factor -1.0 for .vit., which must be',
    ),
    ('encoder', dict(optim__lr_scale=(('(', 1.0),)), 'is not a regular expression'),
    (
      'encoder',
      dict(optim__schedule='linear'),
      "optim.schedule='linear' is unknown; choose cosine or constant or rewarm",
    ),
    ('encoder', dict(optim__schedule='rewarm'), 'needs optim.rewarm_from, .* .now 0.'),
    ('tokenizer', dict(tokenizer__keep_ratio=3.0), 'tokenizer.keep_ratio=3.0 must be'),
    ('tokenizer', dict(tokenizer__decay=1.5), 'tokenizer.decay=1.5 must be'),
    ('tokenizer', dict(data__max_skipped=-1.0), 'data.max_skipped=-1.0 must be'),
    ('tokenizer', dict(seed=-1), 'seed=-1 must be'),
    ('tokenizer', dict(seed=1.0), 'seed=1.0 must be an integer'),
    ('tokenizer', dict(batch_size=True), 'batch_size=True must be an integer'),
    ('tokenizer', dict(skip_damaged=1), 'skip_damaged=1 must be true or false'),
    ('tokenizer', dict(mesh__data=0), 'mesh.data=0 must be an integer of at least 1, or -1'),
    ('tokenizer', dict(data__sources=5), 'data.sources=5 must be a list of sources'),
    ('tokenizer', dict(profile='9:3'), 'profile=.9:3. must give the first and the last step'),
    ('tokenizer', dict(dtype='float16'), "dtype='float16' is unknown; choose float32 or bfloat16"),
    (
      'detokenizer',
      dict(detokenizer__drop_condition=1.5),
      'detokenizer.drop_condition=1.5 must be',
    ),
    ('lm', dict(data__shares__draw=-0.5), 'data.shares.draw=-0.5 must be'),
    ('lm', {'data__question_weights__what': 0.0}, 'data.question_weights.what=0.0 must be'),
    ('lm', dict(lm__max_overflow=2.0), 'lm.max_overflow=2.0 must be'),
  ],
)
def test_impossible_values_are_refused(stage, changes, message):
  with pytest.raises(UserError, match=message) as error:
    run_config.check_values(make_config(stage, **changes))
  assert '\n' not in str(error.value) and 'lower optim.learning_rate' not in str(error.value)


def test_numpys_numbers_are_numbers_and_a_misspelt_config_option_is_named():
  options.check_values({'optim.learning_rate': np.float64(0.1), 'batch_size': np.int64(4)})
  with pytest.raises(
    UserError, match='optim.learning_rat is not a config option; did you mean optim.learning_rate'
  ):
    options.check_values({'optim.learning_rat': 0.1})


def test_none_on_the_command_line():
  """Of a text it is none, of a list no row, and of a number a mistake."""
  read = load_config(
    f'{ROOT}/configs/tokenizer.py:tiny', [('init_from', 'None'), ('data.sources', 'None')]
  )
  assert read.init_from == '' and read.data.sources == ()
  off = load_config(f'{ROOT}/configs/tokenizer.py:tiny', [('optim.clip_norm', 'None')])
  run_config.check_values(off)
  for key in ('batch_size', 'seed', 'mesh.data', 'checkpoint_every'):
    with pytest.raises(UserError, match=f'^{key}=None must be an integer'):
      run_config.check_values(load_config(f'{ROOT}/configs/tokenizer.py:tiny', [(key, 'None')]))


@pytest.mark.parametrize(
  'options_of_source, message',
  [
    (dict(text=5), 'data.sources.0. has text 5'),
    (dict(weight=True), 'weight must be a number above 0 .now True'),
    (dict(weight=math.nan), 'weight must be a number'),
    (dict(weight=math.inf), 'weight must be a number'),
    (dict(format='tars', window=True), 'window an integer'),
    (dict(path=None), 'has path None'),
  ],
)
def test_options_of_sources(options_of_source, message, tmp_path):
  from lavit_jax.data import loader

  source = dict(format='folder', path=str(tmp_path)) | options_of_source  # nothing is there yet
  with pytest.raises(UserError, match=message):
    with run_config.name_data_errors():
      loader.batches('images', batch_size=2, sources=(source,))
