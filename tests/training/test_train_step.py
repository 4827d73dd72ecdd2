"""One step: the same in any number of pieces, without updates that are not finite, averaged."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import nano
import numpy as np
import pytest

from lavit_jax import sharding
from lavit_jax.models import lavit
from lavit_jax.models.initialization import init_params
from lavit_jax.training import codebook, optimizer
from lavit_jax.training.optimizer import Hold
from lavit_jax.training.stages.base import Mean, ModuleNames, Stage, Sum
from lavit_jax.training.train_step import (
  averaged,
  loss_and_metrics,
  make_init,
  make_train_step,
  numbers,
)

nano.install()
MESH = sharding.make_mesh(dict(data=-1, fsdp=1, tensor=1), jax.devices()[:1])


def steps(run, parts, frozen, batches):
  """The states and metrics after each batch."""
  init, tx = make_init(run, parts)
  seen = []
  with jax.set_mesh(MESH):
    state = nano.jit(init)(jax.random.key(run.seed), parts)
    step = make_train_step(run, tx, sharding.shardings(state, MESH))
    step = step.lower(state, frozen, batches[0]).compile(compiler_options=nano.QUICK_OPTIONS)
    for batch in batches:
      state, values = step(jax.tree.map(jnp.copy, state), frozen, batch)
      seen.append((jax.device_get(state), jax.device_get(values)))
  return seen


def of_one_weight(loss, **changes):
  """A run whose stage has this loss, of one vector."""

  def init(key, loaded):
    return dict(w=jnp.ones(3)), jnp.zeros([])

  run = nano.run('autoencoder', MESH, **changes)
  return dataclasses.replace(run, stage=Stage(ModuleNames(), init, loss, None))


PLAIN = dict(
  optim__clip_norm=None, optim__ema_decay=0.0, optim__warmup_steps=0, optim__weight_decay=0.0
)


def test_pieces_count_by_the_weights_of_their_means():
  """Against numpy in float64: texts of very different length, the mean over all tokens."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(8, 3))
  weight = np.array([1.0, 30, 2, 0, 0, 5, 1, 9])

  def loss(params, frozen, state, batch, key, train):
    error = batch['x'] @ params['w']
    total = Mean((batch['weight'] * error**2).sum(), batch['weight'].sum())
    values = dict(
      loss=total,
      overflow=Sum(jnp.float32(len(error))),
      error=Mean((batch['weight'] * error).sum(), batch['weight'].sum()),
    )
    return total.total / jnp.maximum(total.weight, 1e-6), (state, values)

  batch = dict(x=x.astype(np.float32), weight=weight.astype(np.float32))
  error = x @ np.ones(3)
  expected = (weight * error**2).sum() / weight.sum()
  gradient = (2 * weight * error) @ x / weight.sum()
  for pieces in (1, 2, 4, 8):  # of eight, two pieces have no weight at all
    run = of_one_weight(loss, accumulate=pieces, **PLAIN)
    ((_, values),) = steps(run, {}, {}, [batch])
    # Bound: sums of 8 terms in float32, a few roundings each.
    np.testing.assert_allclose(values['loss'], expected, rtol=1e-5)
    np.testing.assert_allclose(values['grad_norm'], np.linalg.norm(gradient), rtol=1e-5)
    np.testing.assert_allclose(values['error'], (weight * error).sum() / weight.sum(), rtol=1e-5)
    assert values['overflow'] == 8 and values['nonfinite'] == 0


@pytest.mark.parametrize(
  'name',
  [
    pytest.param('lm', marks=pytest.mark.slow),
    pytest.param('detokenizer', marks=pytest.mark.slow),
    pytest.param('autoencoder', marks=pytest.mark.slow),
  ],
)
def test_a_stage_has_one_loss_and_gradient_for_any_accumulate(name):
  """Randomness depends on the row in the batch, so pieces choose the same patches and noise."""
  model = lavit.build('nano')
  parts = nano.jit(lambda key: init_params(model, key))(jax.random.key(5))
  rng = np.random.default_rng(0)
  length = np.array([1, 30, 2, 25, 40, 3, 3, 9], np.int32)
  text = rng.integers(3, 2048, (8, 48)).astype(np.int32)
  weight = (np.arange(49) < length[:, None] + 1).astype(np.float32)
  batch = dict(
    image=rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8),
    text=text,
    text_length=length,
    text_weight=weight,
    kind=np.array([0, 1, 2, 0, 1, 0, 1, 2], np.int32),
  )
  results = []
  evaluated = []
  for pieces in (1, 4):
    run = nano.run(name, MESH, accumulate=pieces)
    frozen = {name: parts[name] for name in run.stage.modules.needs}
    ((state, values),) = steps(run, parts, frozen, [batch])
    results.append(values)
    with jax.set_mesh(MESH):
      measure = nano.jit(loss_and_metrics(run))
      params, _ = averaged(run.stage, state)
      evaluated.append(measure(params, frozen, state.state, batch, jax.random.key(3)))
  for one, four in (results, evaluated):
    assert one.keys() == four.keys() and (name != 'lm' or one['overflow'] == 0)
    for key in one:
      if not key.startswith(('psnr', 'latent_std')):  # no means over examples
        np.testing.assert_allclose(one[key], four[key], rtol=2e-4, err_msg=key)


def test_an_update_that_is_not_finite_is_skipped():
  """Nothing moves, moments and averages included, and the next batch trains as usual."""

  def loss(params, frozen, state, batch, key, train):
    return (batch['x'] * params['w']).sum() ** 2, (state + batch['x'].sum(), {})

  fine = dict(x=np.ones(3, np.float32))
  lost = dict(x=np.full(3, np.nan, np.float32))
  too_large = dict(x=np.full(3, 3e38, np.float32))
  run = of_one_weight(loss, **PLAIN | dict(optim__ema_decay=0.5))
  (one, _), (two, nan), (three, inf), (four, _) = steps(run, {}, {}, [fine, lost, too_large, fine])
  assert (nan['nonfinite'], inf['nonfinite']) == (1, 1)
  for skipped in (two, three):
    chex.assert_trees_all_equal(skipped._replace(step=one.step), one)
  assert (two.step, three.step, four.step) == (2, 3, 4) and not np.array_equal(
    four.params['w'], one.params['w']
  )


def test_no_parameter_ever_overflows():
  def loss(params, frozen, state, batch, key, train):
    return params['w'].sum(), (state, {})

  run = of_one_weight(loss, **PLAIN)
  schedule = dataclasses.replace(run.optimizer.schedule, learning_rate=1e30)
  optim = dataclasses.replace(run.optimizer, schedule=schedule, lr_scale=(('w', 1e30),))
  run = dataclasses.replace(run, optimizer=optim)  # 1e60, refused of a config
  ((state, values),) = steps(run, {}, {}, [dict(x=np.zeros(8, np.float32))])
  assert values['nonfinite'] == 1 and np.isfinite(state.params['w']).all()


@pytest.fixture(scope='module')
def tokenizer():
  """(parts, frozen, batches) for the tokenizer's stage."""
  parts = nano.jit(lambda key: init_params(lavit.build('nano'), key))(jax.random.key(5))
  rng = np.random.default_rng(1)
  batches = [dict(image=rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)) for _ in range(6)]
  return parts, {'vit': parts['vit']}, batches


def run_tokenizer(tokenizer, loaded, count, **changes):
  parts, frozen, batches = tokenizer
  run = nano.run('tokenizer', MESH, tokenizer__freeze_selector_from=-1, **changes)
  return run.stage, steps(run, frozen | loaded, frozen, batches[:count])


@pytest.mark.slow
def test_an_offered_codebook_goes_on(tokenizer):
  """No k-means: codes that were not chosen stay, the others move by 1% towards their tokens."""
  parts = tokenizer[0]
  loaded = {name: parts[name] for name in ('tokenizer', 'decoder')}
  stage, ((state, _),) = run_tokenizer(tokenizer, loaded, 1, tokenizer__quantize_from=2)
  before = np.asarray(parts['tokenizer']['quantizer']['embedding'])
  after = state.state.embedding
  assert state.state.started and stage.export_metadata(state.state) == dict(codebook='trained')
  assert (np.linalg.norm(after - before, axis=1) < 0.03).all() and (after != before).any()
  # Quantization has begun, and so the selector stops.
  assert stage.hold(loaded) == (Hold('^tokenizer/selector/', 0),)
  same = state.params['tokenizer']['selector']['fc_in']['kernel']
  np.testing.assert_array_equal(same, parts['tokenizer']['selector']['fc_in']['kernel'])


@pytest.mark.slow
def test_a_codebook_that_was_never_trained_is_begun_by_kmeans(tokenizer):
  without, _ = codebook.take_out({name: tokenizer[0][name] for name in ('tokenizer', 'decoder')})
  stage, seen = run_tokenizer(tokenizer, without, 3, tokenizer__quantize_from=2)
  assert [bool(state.state.started) for state, _ in seen] == [False, False, True]
  assert stage.export_metadata(seen[0][0].state) == dict(codebook='untrained')
  assert stage.hold(without) == (Hold('^tokenizer/selector/', 2),)


@pytest.mark.slow
def test_averaged_weights_have_the_average_of_their_codebook(tokenizer):
  """Against the recursion in numpy, which restarts at k-means and for codes that were moved."""
  stage, seen = run_tokenizer(
    tokenizer,
    {},
    6,
    tokenizer__quantize_from=1,
    tokenizer__revive_after=2,
    optim__ema_decay=0.9,
    tokenizer__decay=0.5,
    optim__learning_rate=0.05,
  )
  average = None
  restarted = 0
  for step, (state, _) in enumerate(seen):
    book = state.state
    if step <= 1:
      average = book.embedding.astype(np.float64)
      continue
    decay = min(0.9, (1 + step) / (10 + step))
    average = average + (1 - decay) * (book.embedding - average)
    average /= np.linalg.norm(average, axis=1, keepdims=True)
    moved = (book.idle > 0) & (book.idle % 2 == 0)
    restarted += moved.sum()
    average = np.where(moved[:, None], book.embedding, average)
  state = seen[-1][0]
  params, book = averaged(stage, state)
  assert restarted and np.abs(average - state.state.embedding).max() > 1e-3
  np.testing.assert_allclose(book.embedding, average, atol=1e-5)
  exported = stage.export(params, book)['tokenizer']['quantizer']['embedding']
  np.testing.assert_array_equal(exported, book.embedding)
  assert (
    'embedding' not in params['tokenizer']['quantizer']
    and 'embedding' not in state.params['tokenizer']['quantizer']
  )


def test_numbers_of_nothing_are_nan():
  assert np.isnan(numbers(dict(a=Mean(jnp.zeros([]), jnp.zeros([]))))['a'])
  assert optimizer.ema_update({}, {}, 0.9, 0) == {}


def test_averages_of_pieces_are_those_of_the_whole():
  """Evaluation goes through in as many pieces as training, and tells the same."""
  x = jax.random.normal(jax.random.key(0), (8, 3))

  def loss(params, frozen, state, batch, key, train):
    assert len(batch['x']) == 2  # never more at once
    value = jnp.square(batch['x'] @ params['w'] - 1).mean()
    return value, (state, dict(overflow=Sum(jnp.float32(len(batch['x']))), mean=batch['x'].mean()))

  def init(key, loaded):
    return dict(w=jnp.ones((3, 2))), jnp.zeros([])

  stage = Stage(ModuleNames(), init, loss, None)
  mesh = sharding.make_mesh(dict(data=-1, fsdp=1, tensor=1), jax.devices()[:1])
  run = dataclasses.replace(nano.run('autoencoder', mesh, accumulate=4), stage=stage)
  with jax.set_mesh(mesh):
    values = loss_and_metrics(run)(dict(w=jnp.ones((3, 2))), {}, {}, {'x': x}, jax.random.key(0))
  assert values['loss'] == pytest.approx(float(jnp.square(x.sum(1) - 1).mean()), rel=1e-5)
  assert values['overflow'] == 8 and values['mean'] == pytest.approx(float(x.mean()), abs=1e-6)
