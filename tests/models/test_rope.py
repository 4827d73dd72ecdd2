"""Rotary positions of every scaling against transformers.

Frequencies, rotated vectors, and a whole model beyond its first length.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.models.int8 import dequantize
from lavit_jax.models.llama import Llama, unroll_layers
from lavit_jax.models.rope import Rope, check_scaling, frequencies, rotary
from lavit_jax.models.sequence import prompt_mask, prompt_positions
from lavit_jax.models.settings import freeze
from lavit_jax.weights.torch import mapping
from lavit_jax.weights.torch.names_llama import llama_rules

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

EPS = np.finfo(np.float32).eps
WIDTH = 64
HEADS = 4
HEAD_DIM = 16
FIRST = 16  # the length before scaling
LLAMA3 = dict(
  rope_type='llama3',
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=FIRST,
)
YARN = dict(rope_type='yarn', factor=4.0, original_max_position_embeddings=FIRST)
SCALINGS = {  # name: (theta, scaling)
  'theta': (1e6, None),
  'linear': (1e4, dict(rope_type='linear', factor=4.0)),
  'dynamic': (1e4, dict(rope_type='dynamic', factor=4.0)),
  'llama3': (5e5, LLAMA3),
  'yarn': (1e4, YARN),
  'yarn, all options': (
    1e4,
    YARN | dict(beta_fast=4, beta_slow=1, mscale=0.5, mscale_all_dim=1.5, truncate=False),
  ),
  'yarn, truncate null': (1e4, YARN | dict(truncate=None)),
  'yarn, magnitude': (1e4, YARN | dict(attention_factor=0.7)),
}
every_scaling = pytest.mark.parametrize('name', SCALINGS)


def make_rope(name: str) -> Rope:
  theta, scaling = SCALINGS[name]
  return Rope(theta, freeze(check_scaling(scaling)), FIRST)


def config(name: str):
  """transformers' LlamaConfig."""
  theta, scaling = SCALINGS[name]
  return transformers.LlamaConfig(
    vocab_size=50,
    hidden_size=WIDTH,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=HEADS,
    num_key_value_heads=2,
    head_dim=HEAD_DIM,
    rms_norm_eps=1e-6,
    max_position_embeddings=FIRST,
    rope_parameters=dict(scaling or dict(rope_type='default'), rope_theta=theta),
    tie_word_embeddings=False,
    attn_implementation='eager',
  )


def test_rotary_turns_pairs_and_depends_only_on_differences():
  x = np.random.default_rng(0).normal(size=(1, 3, 2, 8)).astype(np.float32)
  positions = np.array([[0, 1, 7]])
  pairs = x[..., :4] + 1j * x[..., 4:]
  turned = pairs * np.exp(1j * positions[..., None, None] * 100.0 ** (-np.arange(4) / 4))
  np.testing.assert_allclose(
    rotary(x, positions, frequencies(8, 100.0)),
    np.concatenate([turned.real, turned.imag], -1),
    atol=1e-5,
  )
  q = x[:, :1, :1]
  k = x[:, 1:2, :1]

  def product(q_position, k_position):
    rotated_q = rotary(q, np.array([[q_position]]), frequencies(8))
    rotated_k = rotary(k, np.array([[k_position]]), frequencies(8))
    return (rotated_q * rotated_k).sum()

  np.testing.assert_allclose(product(5, 2), product(105, 102), atol=1e-4)


@every_scaling
@pytest.mark.parametrize('length', [FIRST // 2, 40 * FIRST])
def test_rotations_match_transformers(name, length):
  from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

  x = np.random.default_rng(0).standard_normal((1, length, HEADS, HEAD_DIM), np.float32)
  positions = np.arange(length)[None]
  peer = LlamaRotaryEmbedding(config(name))
  cos, sin = peer(torch.from_numpy(x), torch.from_numpy(positions))
  expected, _ = apply_rotary_pos_emb(
    torch.from_numpy(x), torch.from_numpy(x), cos, sin, unsqueeze_dim=2
  )

  rope = make_rope(name)
  frequency = np.asarray(rope.frequency(HEAD_DIM, jnp.asarray(positions))).reshape(-1)
  # Either side rounds the power, the quotient and the ramp: some ulps, and of the base's exponent
  # log(theta) < 14 times as many.
  np.testing.assert_allclose(frequency, peer.inv_freq.numpy(), rtol=16 * EPS)
  turned = rotary(
    x, jnp.asarray(positions), rope.frequency(HEAD_DIM, jnp.asarray(positions)), rope.magnitude
  )
  # An angle is off by its own rounding and the frequency's, and moves the pair by that much of its
  # norm.
  angle = positions[0, :, None] * frequency
  norm = rope.magnitude * np.hypot(x[0, ..., : HEAD_DIM // 2], x[0, ..., HEAD_DIM // 2 :])
  bound = norm * (18 * EPS * angle + 8 * EPS)[:, None]
  assert (np.abs(turned - expected.numpy())[0] <= np.tile(bound, 2)).all()


@functools.cache
def weights():
  """Weights of transformers' model, so large that attention depends on the positions."""
  torch.manual_seed(0)
  state = transformers.LlamaForCausalLM(config('theta')).state_dict()
  return {
    key: torch.randn(x.shape) * (1.5 / x.shape[-1] ** 0.5 if x.ndim == 2 else 1)
    for key, x in state.items()
  }


def model(name: str) -> tuple[Llama, dict]:
  theta, scaling = SCALINGS[name]
  llama = Llama(
    vocab_size=50,
    hidden_size=WIDTH,
    num_layers=2,
    num_heads=HEADS,
    num_kv_heads=2,
    head_dim=HEAD_DIM,
    mlp_dim=96,
    rms_norm_eps=1e-6,
    rope_theta=theta,
    rope_scaling=freeze(check_scaling(scaling)),
    max_position_embeddings=FIRST,
    scan=False,
  )
  example = jnp.zeros((1, 2, WIDTH)), jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 1, 2, 2), bool)
  stacked = jax.eval_shape(llama.clone(scan=True).init, jax.random.key(0), *example)['params']
  state = {key: x.numpy() for key, x in weights().items()}
  params = jax.device_put(mapping.from_state_dict(llama_rules(), state, stacked))
  return unroll_layers(llama, params)


PROMPT = 10  # tokens, within FIRST
TOTAL = 40  # tokens, far beyond it
IDS = np.random.default_rng(0).integers(0, 50, (1, TOTAL))


@functools.cache
def logits_by_pieces(name: str, cache_dtype: str, pieces: tuple):
  """The logits of IDS, written to a cache in pieces, and the cache."""
  llama, params = model(name)
  mask = jnp.ones((1, TOTAL), bool)
  positions = prompt_positions(mask)
  visible = prompt_mask(mask)

  @jax.jit
  def step(ids, positions, visible, cache):
    apply = functools.partial(llama.apply, {'params': params})
    hidden, cache = apply(apply(ids, method='embed'), positions, visible, cache)
    return apply(hidden, method='logits'), cache

  cache = llama.init_cache(1, TOTAL, cache_dtype)
  logits = []
  for start, end in pieces:
    part, cache = step(
      jnp.asarray(IDS[:, start:end]), positions[:, start:end], visible[:, :, start:end], cache
    )
    logits.append(np.asarray(part))
  return np.concatenate(logits, 1), cache


def peer_logits(name: str, pieces) -> np.ndarray:
  """The logits of transformers, in the same pieces."""
  peer = transformers.LlamaForCausalLM(config(name)).eval()
  peer.load_state_dict(weights())
  cache = transformers.DynamicCache()
  logits = []
  for start, end in pieces:
    with torch.no_grad():
      out = peer(
        torch.from_numpy(IDS[:, start:end]),
        past_key_values=cache,
        use_cache=True,
        position_ids=torch.arange(start, end)[None],
      )
    logits.append(out.logits.numpy())
  return np.concatenate(logits, 1)


WHOLE = ((0, TOTAL),)
ONE_BY_ONE = ((0, PROMPT), *((i, i + 1) for i in range(PROMPT, TOTAL)))
# Angles of at most TOTAL are off by 18 eps of themselves; the rest of a layer rounds sums of at
# most 96 terms. Two layers and a head multiply that by their gains, here below 100.
RELATIVE = 100 * (18 * TOTAL + 96) * EPS


@pytest.mark.parametrize(
  'name, pieces',
  [
    ('theta', WHOLE),
    ('linear', WHOLE),
    ('llama3', WHOLE),
    ('dynamic', WHOLE),
    ('yarn, magnitude', ONE_BY_ONE),
    ('dynamic', ONE_BY_ONE),
  ],
)
def test_logits_beyond_the_first_length(name, pieces):
  expected = peer_logits(name, pieces)
  logits, _ = logits_by_pieces(name, 'float32', pieces)
  assert np.abs(logits - expected).max() < RELATIVE * expected.std()
  other, _ = logits_by_pieces('linear' if name == 'theta' else 'theta', 'float32', WHOLE)
  assert np.abs(other - expected).max() > 10 * RELATIVE * expected.std()  # another scaling fails


@pytest.mark.parametrize('name', ['dynamic', 'yarn, magnitude'])
def test_int8_cache_has_the_same_keys(name):
  """Keys of the first layer, whose input has no error, are within half a step of its 127."""
  _, exact = logits_by_pieces(name, 'float32', ONE_BY_ONE)
  _, small = logits_by_pieces(name, 'int8', ONE_BY_ONE)
  keys = np.asarray(exact.layers[0].k)
  step = np.abs(keys).max(-1, keepdims=True) / 127
  difference = np.abs(np.asarray(dequantize(small.layers[0].k, jnp.float32)) - keys)
  assert (difference <= step * (0.5 + 254 * EPS)).all()


@pytest.mark.parametrize(
  'scaling, named',
  [
    ({'rope_type': 'longrope'}, 'longrope'),
    ({'rope_type': 'linear'}, 'factor'),
    ({'rope_type': 'linear', 'factor': 0}, 'factor'),
    (LLAMA3 | {'high_freq_factor': 1.0}, 'high_freq_factor'),
    ('linear', 'object'),
    (YARN | {'beta_fast': 'x'}, 'beta_fast'),
  ],
)
def test_an_invalid_scaling_is_an_error_that_names_it(scaling, named):
  with pytest.raises(ValueError, match=named):
    check_scaling(scaling)
