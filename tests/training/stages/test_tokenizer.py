"""Stage 1: first without quantization, then with codes."""

import functools
import re

import jax
import jax.numpy as jnp
import nano
import numpy as np
import pytest

from lavit_jax.models import lavit
from lavit_jax.models.selector import gumbel_keep
from lavit_jax.sharding import path_name
from lavit_jax.training import codebook
from lavit_jax.training.optimizer import Hold
from lavit_jax.training.stages import tokenizer as tokenizer_stage
from lavit_jax.training.stages.base import apply_module
from lavit_jax.training.stages.tokenizer import (
  choose_patches,
  commitment_error,
  count_std,
  distinct_share,
  fixed_keep,
  ratio_error,
  token_spread,
)

nano.install()
MODEL = lavit.build('nano')
PUBLISHED = dict(
  tokenizer__freeze_selector_from=-1,
  tokenizer__selector_gradient='published',
  tokenizer__commitment_weight=1.0,
  tokenizer__cross_attention_from=0,
)


@pytest.fixture(scope='module')
def tokenizer(parts):
  """(stage, params, codebook, jit'd loss and gradient); quantization begins at step 1."""
  stage = nano.run('tokenizer', tokenizer__quantize_from=1, **PUBLISHED).stage
  without, _ = codebook.take_out(parts)  # with one in init_from: another test
  loaded = {name: without[name] for name in ('vit', 'tokenizer', 'decoder')}
  params, book = nano.init_stage(stage, loaded)
  frozen = {'vit': parts['vit']}

  @functools.partial(nano.jit, static_argnums=4)
  def step(params, book, batch, key, train):
    (value, (book, metrics)), gradient = jax.value_and_grad(stage.loss, has_aux=True)(
      params, frozen, book, batch, key, train
    )
    return value, book, metrics, gradient

  return stage, params, book, step


def test_tokenizer_schedule(tokenizer, batch):
  stage, params, book, step = tokenizer
  key = jax.random.key(1)
  assert 'embedding' not in params['tokenizer']['quantizer']
  value, first, metrics, gradient = step(params, book, batch, key, True)
  first_commitment = float(metrics['commitment'])
  # Without quantization the codebook waits.
  np.testing.assert_array_equal(first.embedding, book.embedding)
  assert value == pytest.approx(float(metrics['cosine'] + 2 * metrics['ratio']), rel=1e-5)
  # Through the keep mask alone.
  assert jnp.abs(gradient['tokenizer']['selector']['fc_in']['kernel']).max() > 0
  assert jnp.abs(gradient['tokenizer']['merger']['norm']['scale']).max() > 0

  evaluated, same, _, _ = step(params, first, batch, key, False)
  np.testing.assert_array_equal(same.embedding, first.embedding)  # evaluation starts nothing
  assert evaluated == pytest.approx(float(value), rel=1e-5)

  value, second, metrics, gradient = step(params, first, batch, key, True)
  assert value == pytest.approx(
    float(metrics['cosine'] + 2 * metrics['ratio'] + metrics['commitment']), rel=1e-5
  )
  assert np.abs(second.embedding - first.embedding).max() > 0.1  # k-means
  assert metrics['commitment'] < first_commitment / 2  # of the random codes before
  assert jnp.abs(gradient['tokenizer']['quantizer']['fc1']['kernel']).max() > 0  # straight through
  value, third, _, _ = step(params, second, batch, jax.random.key(2), True)
  # A moving average, no second k-means.
  assert 0 < np.abs(third.embedding - second.embedding).max() < 0.1
  assert third.step == 3
  assert stage.hold({}) == (Hold('^tokenizer/selector/', 1),)
  np.testing.assert_array_equal(
    stage.export(params, third)['tokenizer']['quantizer']['embedding'], third.embedding
  )


def test_tokenizer_metrics_are_those_of_the_dashboard(tokenizer, batch):
  _, params, book, step = tokenizer
  metrics = step(params, book, batch, jax.random.key(1), True)[2]
  assert {
    'cosine',
    'ratio',
    'commitment',
    'code_usage',
    'perplexity',
    'dead_codes',
    'keep_ratio',
  } <= set(metrics)


def build_variation(parts, **options):
  """(stage, loss and gradient of the selector) with other options, before quantization."""
  stage = nano.run('tokenizer', tokenizer__quantize_from=9, **options).stage
  without, _ = codebook.take_out(parts)
  params, book = nano.init_stage(stage, {name: without[name] for name in ('tokenizer', 'decoder')})

  @nano.jit
  def step(params, batch, key):
    def loss(params):
      value, (_, metrics) = stage.loss(params, {'vit': parts['vit']}, book, batch, key, True)
      return value, metrics

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return value, metrics, gradient['tokenizer']['selector']['fc_in']['kernel']

  return params, step


def test_the_gradient_of_the_selector_alone_depends_on_its_option(parts, batch, monkeypatch):
  key = jax.random.key(1)
  options = dict(tokenizer__ratio_weight=0.0)
  params, published = build_variation(parts, tokenizer__selector_gradient='published', **options)
  _, counterfactual = build_variation(
    parts, tokenizer__selector_gradient='counterfactual', **options
  )
  calls = []

  def record(module, *args, method=None):
    calls.append((getattr(module, 'counterfactual', None), method))
    return apply_module(module, *args, method=method)

  monkeypatch.setattr(tokenizer_stage, 'apply_module', record)
  value, metrics, gradient = published(params, batch, key)
  assert (False, 'merge_outputs') in calls and (None, 'decode_kept') not in calls
  calls.clear()
  other_value, other_metrics, other = counterfactual(params, batch, key)
  assert (True, 'merge_outputs') in calls and (None, 'decode_kept') in calls
  assert other_value == pytest.approx(float(value), abs=1e-5)
  assert other_metrics['keep_ratio'] == metrics['keep_ratio']
  assert np.abs(other - gradient).max() > 0.01 * np.abs(gradient).max()


@pytest.mark.parametrize(
  'of, scope, expected',
  [
    ('choices', 'image', (0.25**2 + 0.25**2) / 2),
    ('choices', 'batch', 0.0),
    ('probabilities', 'image', (0.15**2 + 0.05**2) / 2),
    ('probabilities', 'batch', 0.05**2),
  ],
)
def test_the_error_of_the_ratio(of, scope, expected):
  """Of the drawn masks or of the probabilities; of each image or of the batch."""
  options = nano.run(
    'tokenizer',
    tokenizer__keep_ratio=0.5,
    tokenizer__ratio_of=of,
    tokenizer__ratio_scope=scope,
  ).options
  keep = jnp.array([[1.0, 1, 1, 0], [0, 1, 0, 0]])
  probabilities = jnp.array([[0.9, 0.8, 0.7, 0.2], [0.1, 0.9, 0.5, 0.3]])
  assert ratio_error(options, probabilities, keep) == pytest.approx(expected, abs=1e-6)


def test_kept_patches_take_in_dropped_ones_from_a_step_on(parts):
  """Until then a dropped patch changes no kept one; a tokenizer of `init_from` stays as it is."""
  stage = nano.run('tokenizer', tokenizer__cross_attention_from=3).stage
  params, book = nano.init_stage(stage, {})
  held = stage.hold({})[-1]
  assert held[1:] == (0, 3)
  names = jax.tree_util.tree_map_with_path(lambda path, _: path_name(path), params)
  assert sum(bool(re.search(held.regex, name)) for name in jax.tree.leaves(names)) == 2

  tokenizer = codebook.put_in(params, book.embedding)['tokenizer']
  keep = np.array([[1, 0, 1, 0]], np.float32)
  x = jax.random.normal(jax.random.key(0), (1, 4, MODEL.tokenizer.hidden_size))

  @nano.jit
  def change_of_kept_rows(tokenizer):
    rows = apply_module(MODEL.tokenizer, tokenizer, x, keep, method='merge')
    other = apply_module(MODEL.tokenizer, tokenizer, x.at[0, 1].multiply(-1), keep, method='merge')
    return jnp.abs((rows - other)[keep > 0.5]).max()

  # The policy's eps gives each absent key 1e-6 / N of the attention.
  assert change_of_kept_rows(tokenizer) < 1e-4
  assert change_of_kept_rows(parts['tokenizer']) > 1e-2

  loaded = {'tokenizer': parts['tokenizer'], 'decoder': parts['decoder']}
  kept, _ = nano.init_stage(stage, loaded)
  given = parts['tokenizer']['merger']['blocks']['cross_attn']['proj']['kernel']
  np.testing.assert_array_equal(
    kept['tokenizer']['merger']['blocks']['cross_attn']['proj']['kernel'], given
  )
  assert [hold.regex for hold in stage.hold(loaded)] == ['^tokenizer/selector/']
  (line, _) = stage.warnings(loaded, 4)
  assert 'goes on with its cross-attention' in line
  (line, _) = stage.warnings({}, 3)
  assert 'num_steps=3 ends before the merger takes in dropped patches' in line


def test_the_spread_of_the_count():
  """One for counts that differ as much as binomial ones, zero for equal ones."""
  p = np.full((2, 64), 0.25)
  assert count_std(p) == pytest.approx(0.0, abs=1e-6)
  p[0, :] += 0.0625
  p[1, :] -= 0.0625  # counts of 20 and 12: a deviation of 4, the binomial's is sqrt(12)
  assert count_std(p) == pytest.approx(4 / 12**0.5, rel=1e-5)


def test_the_spread_of_tokens_within_images():
  """Zero for copies, one if all images have the same tokens; dropped patches do not count."""
  copies = np.array([[[1.0, 0]] * 3, [[0, 1.0]] * 3])
  keep = np.ones((2, 3))
  assert token_spread(copies, keep) == pytest.approx(0, abs=1e-6)
  alike = np.array([[[1.0, 0], [0, 1.0], [0, 1.0]]] * 2)
  assert token_spread(alike, keep) == pytest.approx(1, rel=1e-6)
  one_differs = copies.copy()
  one_differs[0, 2] = [0, 1]
  assert token_spread(one_differs, np.array([[1.0, 1, 0], [1, 1, 1]])) == pytest.approx(0, abs=1e-6)
  # From the mean of the first image (2/3, 1/3): 2 x 2/9 + 8/9; from that of all (1/3, 2/3): 24/9.
  assert token_spread(one_differs, keep) == pytest.approx((12 / 9) / (24 / 9), rel=1e-6)


def test_the_share_of_distinct_tokens():
  """Two of three kept tokens, and one of two; the ids of dropped patches do not count."""
  ids = jnp.array([[5, 5, 0, 7], [2, 2, 9, 9]])
  keep = jnp.array([[1.0, 1, 1, 0], [1, 1, 0, 0]])
  assert distinct_share(ids, keep) == pytest.approx(3 / 5)


def test_the_choice_of_patches():
  """Shuffled, an image keeps as many patches elsewhere; fixed, each keeps the same number."""
  p = np.linspace(0.01, 0.99, 64, dtype=np.float32)
  log_probs = np.broadcast_to(np.log(np.stack([p, 1 - p], -1)), (200, 64, 2))
  key = jax.random.key(0)

  def choose(log_probs=log_probs, **options):
    changes = {f'tokenizer__{name}': value for name, value in options.items()}
    options = nano.run('tokenizer', **changes).options
    return np.asarray(nano.jit(lambda x: choose_patches(options, x, key))(log_probs))

  learned = choose(selection='learned')
  shuffled = choose(selection='shuffled')
  fixed = choose(selection='fixed')
  assert learned[:, 32:].mean() > 0.7 > 0.55 > shuffled[:, 32:].mean() > 0.45
  np.testing.assert_array_equal(fixed.sum(1), round(64 / 3))
  assert fixed[:, 32:].mean() > fixed[:, :32].mean()
  # As many as a choice by the selector: its distribution, here a mean of 32 and a deviation of 3.2.
  assert abs(shuffled.sum(1).mean() - learned.sum(1).mean()) < 1.5
  assert shuffled.sum(1).std() == pytest.approx(learned.sum(1).std(), rel=0.25)
  moved = choose(log_probs[:2], selection='shuffled')
  assert not np.array_equal(moved[0], moved[1])  # each image is shuffled on its own

  def gradient(selection):
    options = nano.run('tokenizer', tokenizer__selection=selection).options

    def total(log_probs):
      return (choose_patches(options, log_probs, key) * np.arange(64.0)).sum()

    return np.asarray(nano.jit(jax.grad(total))(log_probs))

  assert not gradient('shuffled').any()  # what is chosen is not the selector's
  assert gradient('learned').any()
  few = choose(selection='fixed', keep_ratio=0.001)
  np.testing.assert_array_equal(few.sum(1), 1)


def test_a_fixed_number_is_kept():
  p = np.array([0.2, 0.9, 0.2, 0.6, 0.2], np.float32)
  log_probs = np.broadcast_to(np.log(np.stack([p, 1 - p], -1)), (20_000, 5, 2))
  keep = np.asarray(nano.jit(lambda x: fixed_keep(x, jax.random.key(0), 2))(log_probs))
  assert set(np.unique(keep).tolist()) == {0.0, 1.0}
  np.testing.assert_array_equal(keep.sum(1), 2)
  share = keep.mean(0)
  assert share[1] > share[3] > share[::2].max()  # not always the most probable two
  np.testing.assert_allclose(share[::2], share[0], atol=0.02)
  # The gradient is that of the sampled choice, whose noise has the same key.
  weight = np.arange(15.0).reshape(3, 5)
  total = [
    nano.jit(jax.grad(lambda x, choose=choose: (choose(x) * weight).sum()))(log_probs[:3])
    for choose in (
      lambda x: fixed_keep(x, jax.random.key(1), 2),
      lambda x: gumbel_keep(x, key=jax.random.key(1)),
    )
  ]
  np.testing.assert_allclose(total[0], total[1], atol=1e-6)


def test_entropy_sharpens_the_choices_from_its_step(parts, batch):
  key = jax.random.key(1)
  options = dict(tokenizer__ratio_weight=0.0, tokenizer__entropy_weight=1.0)
  params, off = build_variation(parts, tokenizer__entropy_from=1, **options)
  _, on = build_variation(parts, tokenizer__entropy_from=0, **options)
  value, metrics, gradient = off(params, batch, key)
  other_value, other_metrics, other = on(params, batch, key)
  assert value == pytest.approx(float(metrics['cosine']), rel=1e-5)  # this is step 0
  assert other_value - value == pytest.approx(float(other_metrics['keep_entropy']), rel=1e-4)
  assert 0 < other_metrics['keep_entropy'] < np.log(2) + 1e-6
  assert np.abs(other - gradient).max() > 0


def test_commitment_does_not_choose_the_patches():
  vectors = jnp.array([[[1.0, 0.0], [0.0, 1.0], [3.0, 0.0]]])
  codes = jnp.array([[[0.0, 0.0], [0.0, 3.0], [0.0, 0.0]]])
  keep = jnp.array([[1.0, 1.0, 0.0]])
  value, gradient = jax.value_and_grad(commitment_error, argnums=(0, 2))(vectors, codes, keep)
  assert value == pytest.approx((1 + 4) / 2)
  np.testing.assert_allclose(gradient[0], [[[1.0, 0.0], [0.0, -2.0], [0.0, 0.0]]])
  np.testing.assert_array_equal(gradient[1], 0)


def test_the_merger_computes_kept_rows_alone_once_the_selector_is_frozen(parts, batch):
  """The loss of a step with all rows and of one with a bucket."""
  stage = nano.run(
    'tokenizer',
    merger_capacities=(14,),
    tokenizer__quantize_from=9,
    tokenizer__freeze_selector_from=1,
    tokenizer__selector_gradient='published',
  ).stage
  without, _ = codebook.take_out(parts)
  params, book = nano.init_stage(stage, {name: without[name] for name in ('tokenizer', 'decoder')})
  # With nearly equal scores, eps changes little.
  qkv = params['tokenizer']['merger']['blocks']['self_attn']['qkv']
  flat = {**qkv, 'kernel': qkv['kernel'].at[:, 0].multiply(0.01)}
  params['tokenizer']['merger']['blocks']['self_attn']['qkv'] = flat

  @nano.jit
  def measure(book):
    loss, (_, metrics) = stage.loss(
      params, {'vit': parts['vit']}, book, batch, jax.random.key(1), True
    )
    return loss, metrics

  trained_loss, trained = measure(book)
  frozen_loss, frozen = measure(book._replace(step=book.step + 1))
  assert (trained['tokenizer_in_bucket'], frozen['tokenizer_in_bucket']) == (0, 1)
  assert 0 < trained['keep_ratio'] == frozen['keep_ratio'] < 0.9
  np.testing.assert_allclose(frozen_loss, trained_loss, atol=1e-4)


@pytest.mark.parametrize('name', ['detokenizer', 'lm'])
def test_later_stages_count_batches_in_buckets(name, parts, batch):
  run = nano.run(name, merger_capacities=(8,))
  assert run.model.tokenizer.capacities == run.model.understanding.capacities == (8,)
  names = run.stage.modules.required
  loaded = {module: parts[module] for module in names}

  def measure(batch):
    params, state = run.stage.init(jax.random.key(0), loaded)
    frozen = {module: parts[module] for module in run.stage.modules.needs}
    return run.stage.loss(params, frozen, state, batch, jax.random.key(1), True)

  _, (_, metrics) = jax.eval_shape(measure, batch)
  counted = {metric for metric in metrics if metric.endswith('_in_bucket')}
  expected = {'tokenizer_in_bucket', 'understanding_in_bucket'}
  assert counted == (expected if name == 'lm' else {'tokenizer_in_bucket'})
