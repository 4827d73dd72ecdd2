"""The language model against golden logits and transformers.

The cached steps are compared with the full forward pass.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lavit_jax.models.llama import Llama, unroll_layers, unstack_layers
from lavit_jax.models.sequence import prompt_mask, prompt_positions
from lavit_jax.weights.torch import mapping
from lavit_jax.weights.torch.names_llama import llama_rules

GOLDEN = pathlib.Path(__file__).parents[1] / 'data/golden'
TINY = Llama(
  vocab_size=97, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64
)
LAVIT_7B = Llama(
  vocab_size=48386,
  hidden_size=4096,
  num_layers=32,
  num_heads=32,
  num_kv_heads=32,
  head_dim=128,
  mlp_dim=11008,
)


@functools.partial(jax.jit, static_argnums=0)
def init(llama):
  """Parameters of the model."""
  example = (
    jnp.zeros((1, 2, llama.hidden_size)),
    jnp.zeros((1, 2), jnp.int32),
    jnp.ones((1, 1, 2, 2), bool),
  )
  return llama.init(jax.random.key(0), *example)['params']


@functools.partial(jax.jit, static_argnums=0)
def forward(llama, params, ids, mask):
  """Logits of (left-padded) ids without a cache."""
  apply = functools.partial(llama.apply, {'params': params})
  hidden, cache = apply(apply(ids, method='embed'), prompt_positions(mask), prompt_mask(mask))
  assert cache is None
  return apply(hidden, method='logits')


def test_golden_logits():
  sizes = json.loads((GOLDEN / 'language_model.json').read_text())
  golden = np.load(GOLDEN / 'language_model_io.npz')
  heads = sizes['num_attention_heads']
  llama = Llama(
    vocab_size=sizes['vocab_size'],
    hidden_size=sizes['hidden_size'],
    num_layers=sizes['num_hidden_layers'],
    num_heads=heads,
    num_kv_heads=heads,
    head_dim=sizes['hidden_size'] // heads,
    mlp_dim=sizes['intermediate_size'],
    rms_norm_eps=sizes['rms_norm_eps'],
    rope_theta=sizes['rope_theta'],
  )
  like = jax.eval_shape(lambda: init(llama))
  params = mapping.from_state_dict(
    llama_rules(), load_file(GOLDEN / 'language_model.safetensors'), like
  )
  ids = jnp.asarray(golden['forward_ids'], jnp.int32)
  logits = forward(llama, params, ids, jnp.ones(ids.shape, bool))
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, golden['forward_logits'], atol=1e-4, rtol=0)


@pytest.mark.parametrize('padding', [0, 3])
def test_matches_transformers_with_grouped_heads(padding):
  torch = pytest.importorskip('torch')
  peer = _peer(TINY).eval()
  with torch.no_grad():
    for p in peer.parameters():
      p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
  state = {name: x.numpy() for name, x in peer.state_dict().items()}
  params = mapping.from_state_dict(llama_rules(), state, jax.eval_shape(lambda: init(TINY)))
  ids = np.random.default_rng(0).integers(0, 97, (2, 12))
  mask = np.ones(ids.shape, bool)
  mask[1, :padding] = False
  with torch.no_grad():
    positions = torch.from_numpy(np.array(prompt_positions(jnp.asarray(mask))))
    expected = peer(
      torch.from_numpy(ids), attention_mask=torch.from_numpy(mask).long(), position_ids=positions
    ).logits.numpy()
  logits = forward(TINY, params, jnp.asarray(ids), jnp.asarray(mask))
  np.testing.assert_allclose(np.where(mask[..., None], logits - expected, 0), 0, atol=1e-4)
  assert expected.std() > 0.3  # not a comparison of zeros


def _peer(llama):
  """transformers' model of the same sizes."""
  transformers = pytest.importorskip('transformers')
  config = transformers.LlamaConfig(
    vocab_size=llama.vocab_size,
    hidden_size=llama.hidden_size,
    intermediate_size=llama.mlp_dim,
    num_hidden_layers=llama.num_layers,
    num_attention_heads=llama.num_heads,
    num_key_value_heads=llama.num_kv_heads,
    head_dim=llama.head_dim,
    rms_norm_eps=llama.rms_norm_eps,
    tie_word_embeddings=False,
    attn_implementation='eager',
  )
  return transformers.LlamaForCausalLM(config)


def test_cached_steps_equal_full_forward():
  """A prompt of 6 at once, then single tokens, then two together; unwritten slots are not zero."""
  ids = jax.random.randint(jax.random.key(1), (2, 12), 0, 97)
  mask = jnp.ones((2, 12), bool).at[1, :4].set(False)
  expected = forward(TINY, init(TINY), ids, mask)
  slots = 15
  step = make_step(TINY)
  positions = prompt_positions(mask)
  visible = jnp.pad(prompt_mask(mask), ((0, 0), (0, 0), (0, 0), (0, slots - 12)))
  cache = TINY.init_cache(2, slots)
  cache = cache._replace(
    layers=tuple(layer._replace(k=layer.k + 9.0, v=layer.v - 9.0) for layer in cache.layers)
  )
  logits = []
  for start, end in [(0, 6), (6, 7), (7, 8), (8, 9), (9, 10), (10, 12)]:
    part, cache = step(ids[:, start:end], positions[:, start:end], visible[:, :, start:end], cache)
    assert cache.length == end
    logits.append(part)
  difference = jnp.where(mask[..., None], jnp.concatenate(logits, 1) - expected, 0)
  np.testing.assert_allclose(difference, 0, atol=1e-5)


def make_step(llama):
  """A function (ids, positions, mask, cache) -> (logits, cache) of the unrolled model."""
  unrolled, params = unroll_layers(llama, init(llama))

  @jax.jit
  def step(ids, positions, mask, cache):
    apply = functools.partial(unrolled.apply, {'params': params})
    hidden, cache = apply(apply(ids, method='embed'), positions, mask, cache)
    return apply(hidden, method='logits'), cache

  return step


def test_appending_to_caches():
  """Written slots and heads are rounded as by NumPy, the others stay as they were."""
  k, v = np.random.default_rng(0).standard_normal((2, 1, 3, 2, 8), np.float32)  # [B, S, G, d]
  steps = np.abs(k).max(-1, keepdims=True) / 127
  rounded = dict(
    float32=k, bfloat16=k.astype(jnp.bfloat16).astype(np.float32), int8=np.rint(k / steps) * steps
  )
  for dtype, expected in rounded.items():
    cache, keys, _ = TINY.init_cache(1, 6, dtype).layers[0].append(jnp.int32(2), k, v)
    np.testing.assert_allclose(keys[:, 2:5], expected, rtol=1e-6)
    assert not keys[:, jnp.array([0, 1, 5])].any() and keys.dtype == jnp.float32
    dtypes = {x.dtype.name for x in jax.tree.leaves(cache)}
    assert dtypes == ({'int8', 'float32'} if dtype == 'int8' else {dtype})


@pytest.mark.parametrize('dtype, least, most', [('bfloat16', 1e-5, 0.02), ('int8', 1e-5, 0.06)])
def test_small_caches_lose_little(dtype, least, most):
  """The worst logit of a prompt and then single tokens, in units of their deviation.

  A float32 cache would lose less than `least`.
  """
  ids = jax.random.randint(jax.random.key(1), (2, 12), 0, 97)
  mask = jnp.ones((2, 12), bool)
  positions = prompt_positions(mask)
  visible = prompt_mask(mask)
  expected = forward(TINY, init(TINY), ids, mask)
  step = make_step(TINY)
  cache = TINY.init_cache(2, 12, dtype)
  logits = []
  for start, end in [(0, 6), *((n, n + 1) for n in range(6, 12))]:
    part, cache = step(ids[:, start:end], positions[:, start:end], visible[:, :, start:end], cache)
    logits.append(part)
  assert jax.tree.leaves(cache.layers)[0].dtype == dtype
  error = jnp.abs(jnp.concatenate(logits, 1) - expected).max() / expected.std()
  assert least < error < most


def test_unrolled_layers_are_the_scanned_ones():
  ids = jnp.arange(8)[None]
  mask = jnp.ones((1, 8), bool)
  params = init(TINY)
  expected = forward(TINY, params, ids, mask)
  size = sum(x.size for x in jax.tree.leaves(params))
  unrolled, unstacked = unroll_layers(TINY, params)
  np.testing.assert_allclose(forward(unrolled, unstacked, ids, mask), expected, atol=1e-6)
  assert jax.tree.leaves(params['layers'])  # the caller's stay complete
  unstack_layers(params)
  assert not jax.tree.leaves(params['layers'])  # nothing is in memory twice
  assert sum(x.size for x in jax.tree.leaves(unstacked)) == size
  assert jax.tree.map(jnp.shape, init(unrolled)) == jax.tree.map(jnp.shape, unstacked)
  with pytest.raises(ValueError, match='unroll'):
    TINY.apply(
      {'params': init(TINY)},
      jnp.zeros((1, 1, 32)),
      jnp.zeros((1, 1), jnp.int32),
      jnp.ones((1, 1, 1, 1), bool),
      TINY.init_cache(1, 1),
    )


def test_a_token_changes_only_later_logits():
  params = init(TINY)
  mask = jnp.ones((1, 8), bool)
  ids = jnp.arange(8)[None]
  logits = forward(TINY, params, ids, mask)
  later = forward(TINY, params, ids.at[0, 5].set(60), mask)
  np.testing.assert_array_equal(logits[:, :5], later[:, :5])
  assert jnp.abs(logits[:, 5:] - later[:, 5:]).max(-1).min() > 1e-5


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_padding_is_finite_and_harmless(dtype):
  """Padded queries see no key; they and the gradients stay finite, and change no other token."""
  llama = TINY.clone(dtype=dtype)
  params = init(TINY)
  ids = jax.random.randint(jax.random.key(2), (1, 6), 0, 97)
  padded = jnp.pad(ids, ((0, 0), (5, 0)), constant_values=2)
  mask = jnp.arange(11)[None] >= 5
  logits = forward(llama, params, padded, mask)
  assert logits.dtype == jnp.float32 and bool(jnp.isfinite(logits).all())
  gradient = jax.jit(jax.grad(lambda p: jnp.square(forward(llama, p, padded, mask)).sum()))(params)
  assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradient))
  np.testing.assert_allclose(
    logits[:, 5:],
    forward(TINY, params, ids, mask[:, 5:]),
    atol=1e-4 if dtype == jnp.float32 else 5e-2,
  )


@pytest.mark.parametrize('remat', ['full', 'save_qkv_proj', 'save_all_but_mlp_in', 'minimal'])
def test_remat_changes_no_gradient(remat):
  params = init(TINY)
  ids = jnp.arange(8)[None]

  def loss(llama, params):
    return jax.nn.logsumexp(forward(llama, params, ids, jnp.ones((1, 8), bool))).sum()

  def gradient(remat):
    return jax.jit(jax.grad(functools.partial(loss, TINY.clone(remat=remat))))(params)

  assert_close = functools.partial(np.testing.assert_allclose, atol=1e-6)
  jax.tree.map(assert_close, gradient(remat), gradient('none'))


def test_full_size():
  """LaVIT-7B's language model has 6,872,649,728 parameters, in the shapes of transformers."""
  torch = pytest.importorskip('torch')
  shapes = jax.eval_shape(lambda: init(LAVIT_7B))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 6_872_649_728
  with torch.device('meta'):
    expected = {name: tuple(p.shape) for name, p in _peer(LAVIT_7B).state_dict().items()}
  assert mapping.torch_shapes(llama_rules(), shapes) == expected
