"""The configs at every variant: they load, the stage builds, regexes match parameters."""

import itertools
import pathlib
import re

import jax
import numpy as np
import pytest

from lavit_jax import sharding
from lavit_jax.data import loader, paths
from lavit_jax.errors import UserError
from lavit_jax.models import lavit
from lavit_jax.training.config import load_config
from lavit_jax.training.run import resolve_abstract
from lavit_jax.training.train_step import make_init
from lavit_jax.weights.torch import name_tables

ROOT = pathlib.Path(__file__).parents[2]
VARIANTS = [variant for variant in lavit.VARIANTS if variant != 'nano']
CONFIGS = [
  ('encoder', 'tiny'),
  ('autoencoder', 'tiny'),
  *itertools.product(('tokenizer', 'detokenizer', 'lm', 'qformer'), VARIANTS),
]


@pytest.mark.parametrize('stage, variant', CONFIGS)
def test_config(stage, variant):
  config = load_config(f'{ROOT}/configs/{stage}.py:{variant}')
  assert (config.stage, config.variant, config.is_locked) == (stage, variant, True)
  text = (ROOT / 'configs' / f'{stage}.py').read_text()
  assert f'lavit train --config configs/{stage}.py:tiny --workdir' in text
  assert len(text.splitlines()) < 65
  mesh = jax.sharding.AbstractMesh((1, 16, 1), sharding.AXES)
  run = resolve_abstract(config, mesh if variant != 'tiny' else None)
  loaded = name_tables.module_shapes(lavit.build(variant), run.stage.modules.required)
  init, _ = make_init(run, loaded)  # raises if a regex of the config names nothing
  state = jax.eval_shape(init, jax.random.key(0), loaded)
  sharding.shardings(state, mesh)  # raises for a large leaf without a rule


@pytest.mark.parametrize('stage', ['tokenizer', 'detokenizer', 'lm', 'qformer'])
def test_values_of_the_large_variant_have_a_source(stage):
  """Or are our choice; the line says which."""
  text = (ROOT / 'configs' / f'{stage}.py').read_text()
  lines = [
    line
    for line in text[text.index("'lavit_7b': dict(") :].splitlines()
    if re.search(r'^    .*\w=(?!dict\($)', line)
  ]
  assert len(lines) > 15
  source = r'our choice|paper, section|BLIP-2, section|published code|specification, \w+'
  assert not [line for line in lines if not re.search(rf'# .*({source}|above|stage 1b)', line)]


def test_published_sizes():
  config = load_config(f'{ROOT}/configs/tokenizer.py:lavit_7b')
  assert (config.batch_size, config.num_steps) == (2048, 50_000)
  assert (
    config.tokenizer.keep_ratio == pytest.approx(1 / 3)
    and config.tokenizer.ratio_weight == 2
    and config.tokenizer.decay == 0.99
  )
  assert load_config(f'{ROOT}/configs/detokenizer.py:lavit_7b').num_steps == 20_000


def test_published_pairs():
  """Specification, Training: 93 M captions, 100 M images to draw, and text; each is seen once."""
  config = load_config(f'{ROOT}/configs/lm.py:lavit_7b')
  millions = dict.fromkeys(('caption', 'draw', 'text'), 0.0)
  for source in config.data.sources:
    millions[source['use']] += source['weight']
  assert millions['caption'] == pytest.approx(93)
  assert millions['draw'] == 100 and millions['text'] > 0
  assert (
    ' '.join(source['path'].split('/')[3] for source in config.data.sources)
    == 'cc3m cc12m sbu blip-capfilt laion-aesthetics redpajama'
  )
  examples = config.num_steps * config.batch_size
  assert examples == pytest.approx(1e6 * sum(millions.values()), rel=1e-3)
  assert len(millions) == 3  # no source has another use
  np.testing.assert_allclose(
    loader.task_shares(config.data.shares, config.data.sources), np.array([93, 100, 21]) / 214
  )
  images = [
    load_config(f'{ROOT}/configs/{stage}.py:lavit_7b').data.sources
    for stage in ('tokenizer', 'detokenizer')
  ]
  assert images[0] == images[1] and len(images[0]) == 1 and 'laion400m' in images[0][0]['path']


@pytest.mark.parametrize('stage', ['tokenizer', 'detokenizer', 'lm', 'qformer'])
@pytest.mark.parametrize('variant', ['small', 'lavit_7b'])
def test_a_large_pods_hosts_all_have_something_held_out(stage, variant):
  """64 of them; and nothing of it is trained on."""
  data = load_config(f'{ROOT}/configs/{stage}.py:{variant}').data
  trained = set()
  for source in data.sources:
    trained |= set(paths.expand_braces(source['path']))
  for source in data.heldout:
    files = paths.expand_braces(source['path'])
    assert len(files) >= 256 and not trained & set(files)


@pytest.mark.parametrize('stage', ['tokenizer', 'detokenizer', 'lm', 'qformer'])
@pytest.mark.parametrize('variant, devices', [('small', 8), ('small', 64), ('lavit_7b', 256)])
def test_configs_fit_one_machine_or_a_pod(stage, variant, devices):
  config = load_config(f'{ROOT}/configs/{stage}.py:{variant}')
  data, rest = divmod(devices, config.mesh.fsdp)
  assert not rest
  mesh = jax.sharding.AbstractMesh((data, config.mesh.fsdp, 1), sharding.AXES)
  resolve_abstract(config, mesh)


def test_over_two_slices_the_language_models_batch_goes_in_four_pieces():
  config = load_config(f'{ROOT}/configs/lm.py:lavit_7b')
  mesh = jax.sharding.AbstractMesh((4, 128, 1), sharding.AXES)
  with pytest.raises(
    UserError,
    match='batch_size=34816 must be a multiple of the 8 x 512 pieces that the mesh makes of it; '
    'accumulate=4 would do',
  ):
    resolve_abstract(config, mesh)
  with config.unlocked():
    config.accumulate = 4
  resolve_abstract(config, mesh)


def test_packed_rows_hold_the_pairs_of_their_step():
  for variant in ('tiny', 'small', 'lavit_7b'):
    config = load_config(f'{ROOT}/configs/lm.py:{variant}')
    expected_tokens = config.batch_size * config.lm.mean_length
    num_slots = config.lm.num_rows * config.lm.row_length
    assert 0.8 < expected_tokens / num_slots < 0.95


@pytest.mark.parametrize(
  'stage', ['encoder', 'autoencoder', 'tokenizer', 'detokenizer', 'lm', 'qformer']
)
def test_unknown_variant_names_the_nearest(stage):
  with pytest.raises(UserError, match='tinny.*did you mean .tiny'):
    load_config(f'{ROOT}/configs/{stage}.py:tinny')


@pytest.mark.parametrize('stage', ['encoder', 'autoencoder'])
def test_large_foundations_are_ported(stage):
  with pytest.raises(UserError, match='lavit_7b.*are ported'):
    load_config(f'{ROOT}/configs/{stage}.py:lavit_7b')
