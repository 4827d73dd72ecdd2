"""The merger against the golden case; the kept rows in a bucket against all rows."""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.models import lavit
from lavit_jax.models.attention import policy_attention, policy_attention_with_effect
from lavit_jax.models.merger import Merger, fill_bucket


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_golden_merger_at_every_block(golden, run):
  apply = functools.partial(
    golden.modules['tokenizer'].apply, method='merge', mutable=['intermediates']
  )
  variables = {'params': golden.params['tokenizer']}
  merged, sown = jax.jit(apply)(variables, golden.features, golden.io['keep_mask'])
  intermediates = sown['intermediates']['merger']
  (vision,) = intermediates['vision']
  (streams,) = intermediates['blocks']['stream']
  np.testing.assert_allclose(vision, golden.io['ln_vision'], atol=1e-4, rtol=0)
  assert streams.shape == golden.io['merger_blocks'].shape
  np.testing.assert_allclose(streams, golden.io['merger_blocks'], atol=1e-4, rtol=0)
  np.testing.assert_allclose(merged, golden.io['merged'], atol=1e-4, rtol=0)
  plain = run('tokenizer', golden.features, golden.io['keep_mask'], method='merge')
  np.testing.assert_allclose(plain, merged, atol=1e-6)


def test_golden_understanding(golden, run):
  features = run('understanding', golden.features, golden.io['keep_mask'])
  np.testing.assert_allclose(features, golden.io['llm_features'], atol=1e-4, rtol=0)


def test_merger_sees_dropped_patches_anywhere_but_kept_ones_only_before(golden, run):
  x = np.array(golden.features[:1])
  keep = np.ones((1, 16), np.float32)
  keep[0, [3, 11]] = 0
  base = run('tokenizer', x, keep, method='merge')

  def change(patch):
    other = x.copy()
    other[0, patch] += normal(64)
    return np.abs(run('tokenizer', other, keep, method='merge') - base)[0].max(-1)

  later_kept = change(8)
  assert later_kept[[0, 1, 2, 4, 5, 6, 7]].max() < 1e-5 and later_kept[8:11].min() > 1e-3
  assert change(11).min() > 1e-4  # a dropped one reaches all, also those before it


# --- The kept rows in a bucket -------------------------------------------------------------------

PATCHES = 16
KEEPS = {
  'none': np.zeros(PATCHES),
  'one': np.eye(PATCHES)[5],
  'some': np.arange(PATCHES) % 3 == 1,
  'all but one': np.arange(PATCHES) != 4,
  'all': np.ones(PATCHES),
}
BUCKETED = dict(zip(KEEPS, (1, 1, 1, 0, 0), strict=True))


def scale_queries(params, factor):
  """Scores of the self-attention times a factor: small ones leave little to eps."""
  params = jax.device_put(params)
  kernel = params['blocks']['self_attn']['qkv']['kernel']
  params['blocks']['self_attn']['qkv']['kernel'] = kernel.at[:, 0].multiply(factor)
  return params


@pytest.fixture(scope='module')
def compare(golden):
  """compare(params, x, keep, dtype, selector_trains): by all rows and in a bucket.

  Each is ((rows, in_bucket), gradients by params, x and keep).
  """
  base = golden.modules['tokenizer']

  @functools.cache
  def compiled(capacities, dtype):
    merger = Merger(base.hidden_size, base.num_layers, base.num_heads, base.mlp_dim, dtype)
    merger = merger.clone(capacities=capacities)

    def loss(params, x, keep, selector_trains):
      merged = merger.apply({'params': params}, x, keep, selector_trains, method='merge')
      rows = merged.rows.astype(jnp.float32) * jax.lax.stop_gradient(keep)[..., None]
      return (rows * normal(*rows.shape, seed=1)).sum(), merged._replace(rows=rows)

    def run(*inputs):
      (_, merged), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*inputs)
      return merged, gradients

    return jax.jit(run)

  def compare(params, x, keep, dtype=jnp.float32, selector_trains=False):
    keep = jnp.asarray(keep, jnp.float32)
    return [compiled(sizes, dtype)(params, x, keep, selector_trains) for sizes in ((), (8,))]

  return compare


def global_norm(tree, other=None):
  """Of a tree, or of its difference to another one, in float64."""
  leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
  others = [0.0] * len(leaves) if other is None else jax.tree.leaves(other)
  squares = 0.0
  for leaf, subtracted in zip(leaves, others, strict=True):
    squares += np.square(leaf - np.asarray(subtracted, np.float64)).sum()
  return squares**0.5


@pytest.mark.parametrize('name', KEEPS)
def test_kept_rows_in_a_bucket_are_those_among_all_rows(golden, compare, name):
  params = scale_queries(golden.params['tokenizer']['merger'], 0.1)
  keep = np.broadcast_to(KEEPS[name], (3, PATCHES))
  x = golden.features[:3]
  (rows, no), (params_grad, x_grad, _) = compare(params, x, keep)[0]
  (bucket_rows, in_bucket), (bucket_params_grad, bucket_x_grad, _) = compare(params, x, keep)[1]
  assert (no, in_bucket) == (0, BUCKETED[name])
  np.testing.assert_allclose(bucket_rows, rows, atol=1e-4, rtol=0)
  gradients = (params_grad, x_grad)
  difference = global_norm((bucket_params_grad, bucket_x_grad), gradients)
  assert difference <= 1e-4 * global_norm(gradients)
  assert (global_norm(gradients) > 0) == (name != 'none')

  # In bfloat16, a bucket rounds no worse.
  half = [compare(params, x, keep, jnp.bfloat16)[i] for i in range(2)]
  assert half[1][0].in_bucket == BUCKETED[name]
  errors = [global_norm(merged.rows, rows) for merged, _ in half]
  assert errors[1] <= 2 * errors[0]
  errors = [global_norm(tuple(g[:2]), gradients) for _, g in half]
  assert errors[1] <= 2 * errors[0]


def test_a_batch_takes_the_smallest_bucket_with_room_for_each_image(golden, compare):
  """With room for sampled patches: 7 of 8 slots, and 11 of 12."""
  base = golden.modules['tokenizer']
  merger = Merger(base.hidden_size, base.num_layers, base.num_heads, base.mlp_dim)
  params = scale_queries(golden.params['tokenizer']['merger'], 0.1)
  merge = jax.jit(functools.partial(merger.clone(capacities=(8, 12)).apply, method='merge'))
  for most, expected in ((7, 1), (8, 1), (11, 1), (12, 0)):
    keep = np.float32([np.arange(PATCHES) < most, KEEPS['one'], KEEPS['some']])
    (all_rows, _), _ = compare(params, golden.features[:3], keep)[0]
    rows, in_bucket = merge({'params': params}, golden.features[:3], keep)
    assert in_bucket == expected
    np.testing.assert_allclose(rows * keep[..., None], all_rows, atol=1e-4, rtol=0)


def test_all_rows_are_computed_where_eps_counts(golden, compare):
  """Large scores: what eps adds to a row whose own score is small depends on dropped rows."""
  params = scale_queries(golden.params['tokenizer']['merger'], 40)
  keep = np.stack([KEEPS['one'], KEEPS['some'], KEEPS['some']])
  ((rows, _), gradients), ((other, in_bucket), other_gradients) = compare(
    params, golden.features[:3], keep
  )
  assert in_bucket == 0
  np.testing.assert_allclose(other, rows, atol=1e-5)
  assert global_norm(other_gradients, gradients) <= 1e-5 * global_norm(gradients)


def test_a_bucket_is_rejected_above_the_largest_effect(golden, compare):
  """The larger the scores, the more eps counts; the limit decides, not only what is infinite."""
  keep = np.broadcast_to(KEEPS['some'], (3, PATCHES)).astype(np.float32)
  base = golden.modules['tokenizer']
  merger = Merger(base.hidden_size, base.num_layers, base.num_heads, base.mlp_dim)

  @jax.jit
  def effect_of_epsilon(params):
    bound = merger.bind({'params': params})
    return bound.merge_bucket(golden.features[:3], keep, capacity=8)[1]

  effects = []
  for factor in (0.1, 2, 4, 6, 8, 12):
    params = scale_queries(golden.params['tokenizer']['merger'], factor)
    effects.append(float(effect_of_epsilon(params)))
    (_, ((_, in_bucket), _)) = compare(params, golden.features[:3], keep)
    assert in_bucket == (effects[-1] <= 1e-5)
  assert min(effects) < 5e-6  # far from the limit, so that rounding does not decide
  assert any(2e-5 < effect < 1 for effect in effects)


def test_what_is_not_a_number_stays_visible(golden, compare):
  params = scale_queries(golden.params['tokenizer']['merger'], 0.1)
  x = golden.features[:3].copy()
  x[1, 1] = np.nan
  keep = np.broadcast_to(KEEPS['some'], (3, PATCHES))
  ((rows, _), _), ((other, in_bucket), _) = compare(params, x, keep)
  assert in_bucket == 0 and np.isnan(other[1]).any()
  np.testing.assert_array_equal(np.isnan(other), np.isnan(rows))


def test_a_selector_that_trains_gets_the_gradient_of_all_rows(golden, compare):
  params = scale_queries(golden.params['tokenizer']['merger'], 0.1)
  keep = np.broadcast_to(KEEPS['some'], (3, PATCHES))
  for trains in (True, False):
    (_, (_, _, expected)), ((_, in_bucket), (_, _, gradient)) = compare(
      params, golden.features[:3], keep, selector_trains=trains
    )
    assert in_bucket == (not trains)
    np.testing.assert_allclose(gradient, expected * trains, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('remat', ['full', 'minimal'])
def test_buckets_with_remat_and_under_vmap(golden, compare, remat):
  base = golden.modules['tokenizer']
  merger = Merger(base.hidden_size, base.num_layers, base.num_heads, base.mlp_dim, remat=remat)
  merger = merger.clone(capacities=(8,))
  params = scale_queries(golden.params['tokenizer']['merger'], 0.1)
  keep = np.float32([KEEPS['one'], KEEPS['some'], KEEPS['all']])
  x = golden.features[:3]

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def run(x):
    rows = jax.vmap(lambda x, keep: merger.apply({'params': params}, x[None], keep[None])[0])(
      x, keep
    )
    return (rows * keep[..., None] * normal(*rows.shape, seed=1)).sum(), rows * keep[..., None]

  gradient, rows = run(x)
  (expected, _), (_, expected_gradient, _) = compare(params, x, keep)[0]
  np.testing.assert_allclose(rows, expected, atol=1e-4)
  assert global_norm(gradient, expected_gradient) <= 1e-4 * global_norm(expected_gradient)


def test_a_bucket_has_the_kept_patches_and_evenly_spaced_dropped_ones():
  rng = np.random.default_rng(0)
  fill = jax.jit(jax.vmap(functools.partial(fill_bucket, capacity=9)))
  keep = np.stack([rng.permutation(PATCHES) < count for count in range(10)])
  for kept, slots, members in zip(keep, *fill(keep), strict=True):
    assert sorted(set(members.tolist())) == members.tolist() and len(members) == 9
    assert set(np.flatnonzero(kept)) <= set(members.tolist())
    for slot, patch in enumerate(members):
      assert slots[patch] == slot
    dropped = np.flatnonzero(~kept).tolist()
    ranks = np.array([dropped.index(patch) for patch in members.tolist() if not kept[patch]])
    if len(ranks) > 1:
      assert np.ptp(np.diff(ranks)) <= 1


def test_the_effect_of_eps_is_the_change_without_it(monkeypatch):
  """Against float64; a key with three shares is as good as three equal keys with one each."""
  q, k, v = (normal(2, 5, 3, 4, seed=n) for n in range(3))
  policy = np.float32(np.random.default_rng(0).random((2, 1, 5, 5)) < 0.5)
  policy = np.maximum(policy, np.eye(5, dtype=np.float32))
  monkeypatch.setattr('lavit_jax.models.attention.POLICY_EPSILON', 1e-2)
  result, effect = policy_attention_with_effect(q, k, v, policy)

  scores = np.einsum('bqhd,bkhd->bhqk', q.astype(float), k) / 2
  weights = np.exp(scores - scores.max(-1, keepdims=True)) * policy
  total = weights.sum(-1, keepdims=True)
  with_eps = np.einsum('bhqk,bkhd->bqhd', (weights + 1e-2 / 5) / (total + 1e-2), v)
  without = np.einsum('bhqk,bkhd->bqhd', weights / total, v)
  norm = functools.partial(np.linalg.norm, axis=-1)
  expected = norm((with_eps - without).reshape(2, 5, -1)) / norm(with_eps.reshape(2, 5, -1))
  np.testing.assert_allclose(result, with_eps, atol=1e-5)
  np.testing.assert_allclose(effect, expected, rtol=1e-3)

  # Where eps outweighs the keys that count, nothing is below a limit.
  _, effect = policy_attention_with_effect(q, k, v, 0 * policy)
  assert not (effect <= 1e30).any()

  repeated = [np.concatenate([a, a[:, -1:], a[:, -1:]], 1) for a in (k, v)]
  wide = np.concatenate([policy, 0 * policy[..., :2]], -1)
  shares = np.broadcast_to(np.float32([1, 1, 1, 1, 3]) / 7, (2, 5))
  short, _ = policy_attention_with_effect(q, k, v, policy, key_shares=jnp.asarray(shares))
  np.testing.assert_allclose(short, policy_attention(q, *repeated, wide), atol=1e-6)


EIGHT_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from lavit_jax import sharding
from lavit_jax.models.merger import Merger
from lavit_jax.models.quantizer import nearest_code

merger = Merger(32, 2, 2, 64, capacities=(8,))
rng = np.random.default_rng(0)
x = rng.normal(size=(8, 64, 32)).astype(np.float32)
keep = np.float32(np.arange(64) % 16 == np.arange(8)[:, None] % 4)
params = jax.eval_shape(merger.init, jax.random.key(0), x, keep)['params']
params = jax.tree.map(lambda a: rng.normal(0, 0.1, a.shape).astype(np.float32), params)

@jax.jit
def tokenize(params, x, keep):
  merged = merger.apply({'params': params}, x, keep, method='merge')
  return merged, nearest_code(x, x[0])

(one, in_bucket), ids = tokenize(params, x, keep)
mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
with jax.set_mesh(mesh):
  batch = sharding.put_batch(dict(x=x, keep=keep), mesh, sharding.process_share(mesh, 8))
  placed = jax.device_put(params, sharding.shardings(params, mesh))
  merged, many_ids = tokenize(placed, batch['x'], batch['keep'])
assert float(in_bucket) == float(merged.in_bucket) == 1
assert [a.addressable_shards[0].data.shape[0] for a in (merged.rows, many_ids)] == [2, 2]
np.testing.assert_allclose(merged.rows, one, atol=1e-4)
np.testing.assert_array_equal(many_ids, ids)
assert (ids[0] == np.arange(64)).all()
print('equal')
"""


def test_a_bucket_on_eight_devices_is_that_on_one():
  """And so are the nearest codes, of which each device computes those of its own tokens."""
  env = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count=8',
    'PYTHONPATH': str(pathlib.Path(lavit.__file__).parents[2]),
  }
  done = subprocess.run(
    [sys.executable, '-c', EIGHT_DEVICES], env=env, capture_output=True, text=True
  )
  assert done.returncode == 0 and 'equal' in done.stdout, done.stderr[-3000:]
