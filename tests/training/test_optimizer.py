import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from nano import optimizer_config as options

from lavit_jax.errors import UserError
from lavit_jax.training import optimizer

PARAMS = {
  'vit': {'kernel': jnp.ones((2, 3)), 'bias': jnp.ones(3)},
  'head': {'kernel': jnp.ones((3, 2))},
}


def run(config, steps=1, hold=(), gradient=1.0):
  """The parameters after each of `steps` equal gradients."""
  tx = optimizer.make_optimizer(config, PARAMS, hold)
  params = PARAMS
  state = tx.init(PARAMS)
  seen = []
  for _ in range(steps):
    updates, state = tx.update(
      jax.tree.map(lambda x: jnp.full_like(x, gradient), params), state, params
    )
    params = optax.apply_updates(params, updates)
    seen.append(params)
  return seen, state


def test_frozen_parameters_neither_move_nor_have_moments():
  (params,), state = run(options(freeze=('^vit/',), weight_decay=0.5))
  np.testing.assert_array_equal(params['vit']['kernel'], 1)
  assert (params['head']['kernel'] < 1).all()
  sizes = [x.size for x in jax.tree.leaves(state)]
  assert sizes.count(6) == 2 and 3 not in sizes  # both moments of head/kernel, and no others


def test_no_gradient_is_computed_for_frozen_parameters():
  def loss(params):
    return sum(
      jnp.square(x).sum()
      for x in jax.tree.leaves(
        optimizer.stop_frozen_gradients(options(freeze=('kernel$',)), params)
      )
    )

  gradient = jax.grad(loss)(PARAMS)
  assert not gradient['vit']['kernel'].any() and not gradient['head']['kernel'].any()
  np.testing.assert_array_equal(gradient['vit']['bias'], 2)


def test_parameters_stop_at_their_step_in_spite_of_momentum_and_decay():
  seen, _ = run(options(weight_decay=0.5), steps=4, hold=(optimizer.Hold('^vit/', 2),))
  kernels = [float(p['vit']['kernel'][0, 0]) for p in seen]
  heads = [float(p['head']['kernel'][0, 0]) for p in seen]
  assert 1 > kernels[0] > kernels[1] == kernels[2] == kernels[3]
  assert heads[0] > heads[1] > heads[2] > heads[3]
  assert kernels[:2] == heads[:2]


def test_parameters_that_start_later():
  """They miss the updates from `start` on, and get those from `stop` on."""
  seen, _ = run(options(weight_decay=0.5), steps=4, hold=(optimizer.Hold('^vit/', 0, 2),))
  kernels = [float(p['vit']['kernel'][0, 0]) for p in seen]
  assert 1 == kernels[0] == kernels[1] > kernels[2] > kernels[3]


def test_a_run_may_go_on_with_other_holds():
  """A checkpoint made with one hold continues with two: the state is a count of updates."""
  one = (optimizer.Hold('^vit/', 2),)
  two = (*one, optimizer.Hold('^head/', 0, 3))
  states = [optimizer.make_optimizer(options(), PARAMS, hold).init(PARAMS) for hold in (one, two)]
  chex.assert_trees_all_equal(*states)


def test_stopped_parameters_do_not_count_in_the_clipping():
  both, _ = run(options(clip_norm=1.0), steps=1, gradient=1e-9)
  held, _ = run(options(clip_norm=1.0), steps=1, hold=(optimizer.Hold('^vit/', 0),), gradient=1e-9)
  np.testing.assert_array_equal(both[0]['head']['kernel'], held[0]['head']['kernel'])
  np.testing.assert_array_equal(held[0]['vit']['kernel'], 1)


def test_groups_are_clipped_apart():
  gradient = dict(
    vit=dict(kernel=jnp.full((2, 2), 3.0), bias=jnp.zeros(2)),
    head=dict(kernel=jnp.full((4, 1), 0.2)),
  )
  groups = dict(vit=dict(kernel='vit', bias='vit'), head=dict(kernel=''))
  clip = optimizer.clip_by_group(1.0, groups)
  clipped, _ = clip.update(gradient, clip.init(gradient))
  np.testing.assert_allclose(clipped['vit']['kernel'], 0.5)  # a norm of 6 becomes 1
  np.testing.assert_array_equal(clipped['head']['kernel'], gradient['head']['kernel'])  # 0.4 stays


def test_a_group_does_not_use_up_the_step_of_another():
  def heads(gradients, **changes):
    config = options(clip_norm=1.0, freeze=('bias$',), **changes)
    tx = optimizer.make_optimizer(config, PARAMS)
    params = PARAMS
    state = tx.init(PARAMS)
    for vit in gradients:
      values = dict(
        vit=dict(kernel=jnp.full((2, 3), vit), bias=jnp.zeros(3)),
        head=dict(kernel=jnp.full((3, 2), 0.1)),
      )
      updates, state = tx.update(values, state, params)
      params = optax.apply_updates(params, updates)
    return np.array(params['head']['kernel'])

  calm = heads([0.0, 0.0])
  np.testing.assert_array_equal(heads([100.0, 0.0], clip_groups=('^vit/',)), calm)
  assert np.abs(heads([100.0, 0.0]) - calm).max() > 1e-3  # Adam sees a small gradient, then a large
  with pytest.raises(UserError, match='optim.clip_groups: .* matches no parameter'):
    run(options(clip_groups=('^nothing/',)))


def test_weight_decay_is_on_kernels_only():
  (params,), _ = run(options(weight_decay=0.5), gradient=0.0)
  np.testing.assert_allclose(params['vit']['kernel'], 0.95)
  np.testing.assert_array_equal(params['vit']['bias'], 1)


def test_learning_rates_by_regex():
  (params,), _ = run(options(lr_scale=(('^vit/.*bias', 0.1), ('^vit/', 0.5))))
  step = {
    name: 1 - float(x.ravel()[0])
    for name, x in dict(
      kernel=params['vit']['kernel'], bias=params['vit']['bias'], head=params['head']['kernel']
    ).items()
  }
  assert step['kernel'] == pytest.approx(step['head'] / 2, rel=1e-4) and step[
    'bias'
  ] == pytest.approx(step['head'] / 10, rel=1e-4)


def newton_schulz(x):
  """The five iterations of Muon in float64 (Jordan 2024): nearly the nearest orthogonal matrix."""
  x = x / np.linalg.norm(x)
  for _ in range(5):
    square = x @ x.T
    x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
  return x


def test_muon_updates_the_matrices_of_each_layer_and_adam_the_rest():
  rng = np.random.default_rng(0)
  gradient = {'blocks': {'kernel': rng.normal(size=(3, 6, 8))}, 'bias': rng.normal(size=8)}
  params = jax.tree.map(jnp.zeros_like, gradient)
  config = options(muon=('^blocks/.*kernel$',), weight_decay=0.0, clip_norm=None)
  tx = optimizer.make_optimizer(config, params)
  updates, _ = tx.update(jax.tree.map(jnp.float32, gradient), tx.init(params), params)
  rate = float(optimizer.learning_rate(config.schedule)(0))
  for layer, update in zip(gradient['blocks']['kernel'], updates['blocks']['kernel'], strict=True):
    # 0.2 x the root of the larger side: the root mean square of an update is about 0.2. In float32
    # each iteration enlarges a rounding error by at most 3.4445, so five by less than 500.
    expected = -rate * 0.2 * 8**0.5 * newton_schulz(layer)
    np.testing.assert_allclose(update, expected, atol=500 * 6 * 1.2e-7 * rate)
    root_mean_square = float(np.sqrt(np.square(update).mean()))
    assert root_mean_square == pytest.approx(0.2 * rate, rel=0.3)
  np.testing.assert_allclose(updates['bias'], -rate * np.sign(gradient['bias']), rtol=1e-4)


@pytest.mark.parametrize(
  'freeze, message',
  [(('^vot/',), 'matches no parameter.*head, |vit'), (('(',), 'not a regular expression')],
)
def test_bad_regexes_are_refused(freeze, message):
  with pytest.raises(UserError, match=message):
    optimizer.make_optimizer(options(freeze=freeze), PARAMS)


def test_learning_rate_warms_up_and_comes_down():
  config = options(num_steps=20, warmup_steps=4, final_fraction=0.1)
  rate = optimizer.learning_rate(config.schedule)
  values = np.array([rate(step) for step in range(21)])
  assert (
    values[0] == 0
    and values.argmax() == 4
    and values[4] == pytest.approx(0.1)
    and values[-1] == pytest.approx(0.01)
  )
  assert (np.diff(values[4:]) < 0).all()


def test_ema_follows_fast_at_first_and_slowly_later():
  old = {'a': jnp.zeros(2)}
  new = {'a': jnp.ones(2)}
  assert optimizer.ema_update(old, new, 0.999, jnp.array(0))['a'][0] == pytest.approx(0.9)
  assert optimizer.ema_update(old, new, 0.999, jnp.array(10**6))['a'][0] == pytest.approx(
    0.001, rel=1e-3
  )


def gradient(step):
  key = jax.random.key(step)
  return jax.tree.map(lambda x: jax.random.normal(key, x.shape), PARAMS)


GRADIENTS = [gradient(step) for step in range(20)]


def follow(steps=20, **changes):
  config = options(num_steps=1000, **{'learning_rate': 1e-3, 'b2': 0.95, **changes})
  tx = optimizer.make_optimizer(config, PARAMS)
  params = PARAMS
  state = tx.init(PARAMS)
  for gradient in GRADIENTS[:steps]:
    updates, state = tx.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
  return params, state


@pytest.mark.parametrize(
  'dtypes', [('bfloat16', 'float32'), ('float32', 'bfloat16'), ('bfloat16', 'bfloat16')]
)
def test_moments_of_half_the_size(dtypes):
  """The state keeps these types, and moves like that of float32, up to 8 bits of rounding."""
  changes = dict(zip(('mu_dtype', 'nu_dtype'), dtypes))
  (exact, _) = follow()
  (params, state) = follow(**changes)
  config = options(num_steps=1000, **changes)
  for now in (optimizer.make_optimizer(config, PARAMS).init(PARAMS), state):
    named = {
      optimizer.path_name(path): str(x.dtype)
      for path, x in jax.tree_util.tree_leaves_with_path(now)
    }
    for moment, dtype in zip(('/mu/', '/nu/'), dtypes):
      assert {kind for name, kind in named.items() if moment in name} == {dtype}
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.float32.dtype}
  for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(exact)):
    moved = np.abs(want - 1)
    assert 0 < np.abs(got - want).max() < 0.01 * moved.max()


def test_the_second_moment_is_rounded_once_a_step():
  """Against the definition, in float64 but for that rounding."""
  nu = np.zeros((2, 3))
  for gradient in GRADIENTS[:5]:
    nu = np.asarray(
      jnp.asarray(
        0.95 * nu + 0.05 * np.asarray(gradient['vit']['kernel'], np.float64) ** 2, jnp.bfloat16
      ),
      np.float64,
    )
  state = follow(5, nu_dtype='bfloat16')[1]
  (moment,) = (
    x
    for path, x in jax.tree_util.tree_leaves_with_path(state)
    if optimizer.path_name(path).endswith('/nu/vit/kernel')
  )
  np.testing.assert_array_equal(np.asarray(moment, np.float64), nu)


def test_a_slow_second_moment_needs_float32():
  with pytest.raises(
    UserError, match="optim.nu_dtype='bfloat16' needs optim.b2 of at most 0.99, not 0.999"
  ):
    optimizer.make_optimizer(options(nu_dtype='bfloat16', b2=0.999), PARAMS)
