"""A config becomes a run once: typed, frozen, and checked."""

import dataclasses
import json

import nano
import numpy as np
import pytest

from lavit_jax.errors import UserError
from lavit_jax.models import lavit
from lavit_jax.training.config import config_leaves, load_config
from lavit_jax.training.run import resolve, resolve_abstract
from lavit_jax.training.stages import LanguageModelOptions

nano.install()

COMMON_OPTIONS = {
  key
  for key, _ in config_leaves(load_config(f'{nano.ROOT}/configs/tokenizer.py:tiny'))
  if not key.startswith('tokenizer.')
}
OPTIONS_WITH_DEFAULTS = {
  'data.augment',
  'data.crop',
  'data.heldout',
  'data.max_skipped',
  'data.num_threads',
  'data.scene_share',
  'data.shards',
  'data.source',
  'data.sources',
  'merger_capacities',
  'optim.clip_groups',
  'optim.ema_decay',
  'optim.max_nonfinite',
  'optim.muon',
  'optim.rewarm_from',
  'optim.schedule',
}


def test_a_run_has_the_values_of_its_config(tmp_path):
  config = nano.config('autoencoder', batch_size=8, seed=7, optim__b2=0.9, eval_every=3)
  run = resolve(config, tmp_path)
  assert run.stage_name == 'autoencoder' and run.variant == 'nano' and run.seed == 7
  assert run.optimizer.b2 == 0.9 and run.optimizer.schedule.num_steps == config.num_steps
  assert run.intervals.eval_every == 3 and run.data.image_size == 32
  assert run.share.index == 0 and run.share.count == 1
  np.testing.assert_array_equal(run.share.rows, np.arange(8))
  assert run.config == json.loads(config.to_json_best_effort())
  with pytest.raises(dataclasses.FrozenInstanceError):
    run.seed = 8


def test_a_run_does_not_follow_its_config():
  config = nano.config('lm')
  run = resolve_abstract(config)
  shares = dict(run.data.shares)
  with config.unlocked():
    config.batch_size = 16
    config.optim.b1 = 0.5
    config.data.shares.caption = 0.0
  assert run.batch_size == 8 and run.optimizer.b1 == 0.9
  assert run.data.shares == shares and shares['caption'] > 0


def test_the_model_is_built_once(tmp_path, monkeypatch):
  calls = []
  build = lavit.build

  def counted(*args, **kwargs):
    calls.append(args)
    return build(*args, **kwargs)

  monkeypatch.setattr(lavit, 'build', counted)
  resolve(nano.config('autoencoder'), tmp_path)
  assert calls == [('nano', 'float32', 'none', {}, ())]


@pytest.mark.parametrize(
  'stage, section, option',
  [('lm', 'lm', 'num_rows'), ('tokenizer', 'tokenizer', 'keep_ratio')],
)
def test_a_config_that_lacks_an_option_of_its_stage_is_refused(stage, section, option):
  config = nano.config(stage)
  with config.unlocked():
    del config[section][option]
  with pytest.raises(UserError, match=f'the config has no {section}.{option}; compare it with'):
    resolve_abstract(config)


def without(key):
  """The config of a stage without an option or section."""
  config = nano.config('tokenizer')
  section, _, name = key.rpartition('.')
  with config.unlocked():
    del (config[section] if section else config)[name]
  return config


@pytest.mark.parametrize(
  'key', sorted({*COMMON_OPTIONS, 'mesh', 'data', 'optim'} - OPTIONS_WITH_DEFAULTS)
)
def test_a_config_that_lacks_a_common_option_is_refused(key):
  with pytest.raises(
    UserError, match=rf'^the config has no {key}; compare it with the files in configs/$'
  ):
    resolve_abstract(without(key))


@pytest.mark.parametrize('key', sorted(OPTIONS_WITH_DEFAULTS))
def test_a_common_option_with_a_default_may_be_left_out(key):
  assert resolve_abstract(without(key)).stage_name == 'tokenizer'


def test_options_that_earlier_configs_lack_have_defaults():
  config = nano.config('lm')
  with config.unlocked():
    for option in ('schedule', 'rewarm_from', 'max_nonfinite'):
      del config.optim[option]
    del config.lm['max_overflow']
  run = resolve_abstract(config)
  assert run.optimizer.schedule.schedule == 'cosine' and run.optimizer.max_nonfinite == 10
  assert isinstance(run.options, LanguageModelOptions) and run.options.max_overflow == 1.0


def test_the_loader_makes_images_for_the_vit_only_where_it_needs_them():
  assert nano.run('tokenizer').vit_size is None
  assert nano.run('tokenizer', data__image_size=64).vit_size == 32
  assert nano.run('autoencoder', data__image_size=64).vit_size is None


def test_tokens_per_step():
  assert nano.run('tokenizer').tokens_per_step == 8 * 16
  assert nano.run('lm').tokens_per_step == 8 * 128
  published = resolve_abstract(load_config(f'{nano.ROOT}/configs/tokenizer.py:lavit_7b'))
  assert published.tokens_per_step == 2048 * 256
