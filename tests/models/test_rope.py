"""Rotary frequencies and scalings against transformers: alone, in a whole forward pass, and step by step with a cache."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.models import rope
from lavit_jax.models.llama import Llama, unroll
from lavit_jax.models.sequence import prompt_mask, prompt_positions
from lavit_jax.models.settings import frozen
from lavit_jax.porting import engine
from lavit_jax.porting.tables_language import llama_rows

EPS = float(np.finfo(np.float32).eps)
LENGTH, ORIGINAL = 96, 32  # tokens read, and the length that a checkpoint was first trained for
SCALINGS = {
    'theta': (1e6, None),
    'linear': (1e4, dict(rope_type='linear', factor=4.0)),
    'dynamic': (1e4, dict(rope_type='dynamic', factor=2.0)),
    'llama3': (5e5, dict(rope_type='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=ORIGINAL)),
    'yarn': (1e4, dict(rope_type='yarn', factor=4.0, original_max_position_embeddings=ORIGINAL)),
    'yarn with its options': (1e4, dict(rope_type='yarn', factor=4.0, original_max_position_embeddings=ORIGINAL, beta_fast=16, beta_slow=2,
                                        mscale=0.8, mscale_all_dim=0.5, truncate=False)),
    'yarn with a factor': (1e4, dict(rope_type='yarn', factor=4.0, original_max_position_embeddings=ORIGINAL, attention_factor=1.25)),
}


def sized(theta, scaling, head_dim=16):
  """A small language model; of dynamic scaling the longest sequence is the original one, as transformers has it."""
  longest = ORIGINAL if scaling and scaling['rope_type'] == 'dynamic' else 128
  return Llama(vocab_size=97, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=head_dim, mlp_dim=64, rope_theta=theta,
               rope_scaling=frozen(scaling), max_position_embeddings=longest)


def peer(llama):
  """transformers' model of the same sizes and settings, with weights large enough for positions to matter."""
  transformers, torch = pytest.importorskip('transformers'), pytest.importorskip('torch')
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
      vocab_size=llama.vocab_size, hidden_size=llama.hidden_size, intermediate_size=llama.mlp_dim, num_hidden_layers=llama.num_layers,
      num_attention_heads=llama.num_heads, num_key_value_heads=llama.num_kv_heads, head_dim=llama.head_dim, rms_norm_eps=llama.rms_norm_eps,
      rope_parameters={'rope_type': 'default', 'rope_theta': llama.rope_theta, **dict(llama.rope_scaling or ())},
      max_position_embeddings=llama.max_position_embeddings, tie_word_embeddings=False, attn_implementation='eager')
  model = transformers.LlamaForCausalLM(config).eval()
  with torch.no_grad():
    for name, x in model.named_parameters():
      if x.ndim == 2:
        x.normal_(0, 1.0 if 'embed' in name else 1.5 / x.shape[1] ** 0.5)
  return model


def parameters(model, llama):
  example = jnp.zeros((1, 2, llama.hidden_size)), jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 1, 2, 2), bool)
  like = jax.eval_shape(lambda: llama.init(jax.random.key(0), *example)['params'])
  return engine.from_torch(llama_rows(), {name: x.detach().numpy() for name, x in model.state_dict().items()}, like, lambda _, x: jnp.asarray(x))


def bound(llama, expected):
  """How far two float32 forward passes may be apart: an angle of `LENGTH` radians, whose frequency both rounded in a power of theta,
  turns keys and queries of every layer, and the logits with them."""
  return 4 * llama.num_layers * (math.log(llama.rope_theta) + 8) * EPS * LENGTH * np.abs(expected).max()


@pytest.mark.parametrize('name', SCALINGS)
def test_frequencies_are_those_of_transformers(name):
  """To the rounding of theta ** x in float32 (ln theta ulps and a few), a ramp's of which the factor multiplies."""
  torch = pytest.importorskip('torch')
  theta, scaling = SCALINGS[name]
  llama = sized(theta, scaling)
  rotary = peer(llama).model.rotary_emb
  positions = torch.arange(LENGTH)[None]
  cos, sin = rotary(torch.zeros(1), positions)  # of dynamic: this length
  ours = rope.Rope(theta, frozen(scaling), llama.max_position_embeddings)
  frequency = np.asarray(ours.frequency(16, jnp.arange(LENGTH)[None])).reshape(-1)
  np.testing.assert_allclose(frequency, rotary.inv_freq.numpy(), rtol=4 * EPS * (math.log(theta) + 8) * (scaling or {}).get('factor', 1))
  assert ours.magnitude == pytest.approx(rotary.attention_scaling, rel=1e-12)
  angle = np.arange(LENGTH)[:, None] * np.float64(frequency)
  np.testing.assert_allclose(np.cos(angle) * ours.magnitude, cos[0, :, :8], atol=LENGTH * EPS * 64)
  np.testing.assert_allclose(np.sin(angle) * ours.magnitude, sin[0, :, 8:], atol=LENGTH * EPS * 64)


@pytest.mark.parametrize('name', ['theta', 'linear', 'dynamic', 'llama3', 'yarn with its options'])
def test_logits_are_those_of_transformers(name):
  """All at once beyond the original length; and a prompt, then token by token, which keys and frequencies of the cache must bear."""
  torch = pytest.importorskip('torch')
  theta, scaling = SCALINGS[name]
  llama = sized(theta, scaling)
  model = peer(llama)
  params = parameters(model, llama)
  ids, mask = np.random.default_rng(0).integers(0, 97, (1, LENGTH)), jnp.ones((1, LENGTH), bool)
  with torch.no_grad():
    expected = model(torch.from_numpy(ids)).logits.numpy()
    plain = peer(sized(1e4, None))(torch.from_numpy(ids)).logits.numpy()  # the same weights
  assert np.abs(plain - expected).max() > 10 * bound(llama, expected)  # so the setting is seen

  @jax.jit
  def forward(params, ids):
    hidden, _ = llama.apply({'params': params}, llama.apply({'params': params}, ids, method='embed'), prompt_positions(mask), prompt_mask(mask))
    return llama.apply({'params': params}, hidden, method='logits')

  np.testing.assert_allclose(forward(params, ids), expected, atol=bound(llama, expected), rtol=0)
  first = 24  # of the prompt; so dynamic scaling begins in the middle of the answer
  unrolled, apart = unroll(llama, params)

  @functools.partial(jax.jit, static_argnums=2)
  def step(ids, cache, count):
    apply = functools.partial(unrolled.apply, {'params': apart})
    positions = cache.length + jnp.arange(count)[None]
    seen = jnp.arange(LENGTH)[None, None, None] <= positions[:, None, :, None]
    hidden, cache = apply(apply(ids, method='embed'), positions, seen, cache)
    return apply(hidden, method='logits'), cache

  cache, theirs = llama.init_cache(1, LENGTH), None
  start = 0
  for end in (first, *range(first + 1, 41)):
    ours, cache = step(ids[:, start:end], cache, end - start)
    with torch.no_grad():
      out = model(torch.from_numpy(ids[:, start:end]), past_key_values=theirs, use_cache=True)
    theirs = out.past_key_values
    np.testing.assert_allclose(ours, out.logits.numpy(), atol=bound(llama, expected), rtol=0)
    start = end


def test_a_cache_of_eight_bits_turns_by_the_same_frequencies():
  """A token read after a prompt: nearer to the exact answer than that is to the answer without the scaling."""
  theta, scaling = SCALINGS['llama3']
  llama, ids, mask = sized(theta, scaling), np.random.default_rng(0).integers(0, 97, (1, 64)), jnp.ones((1, 64), bool)
  params = parameters(peer(llama), llama)

  apart = unroll(llama, params)[1]

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def last(llama, cache=None):
    llama = llama.clone(scan=False)
    apply = functools.partial(llama.apply, {'params': apart})
    x = apply(jnp.asarray(ids), method='embed')
    if cache is None:
      return apply(apply(x, prompt_positions(mask), prompt_mask(mask))[0], method='logits')[:, -1]
    cache = llama.init_cache(1, 64, cache)
    _, cache = apply(x[:, :-1], prompt_positions(mask)[:, :-1], prompt_mask(mask)[:, :, :-1, :], cache)
    return apply(apply(x[:, -1:], prompt_positions(mask)[:, -1:], prompt_mask(mask)[:, :, -1:, :], cache)[0], method='logits')[:, 0]

  exact = last(llama)
  assert 0 < np.abs(last(llama, 'int8') - exact).max() < 0.5 * np.abs(last(sized(1e4, None)) - exact).max()


@pytest.mark.parametrize(('value', 'message'), [
    ('linear', 'must be an object'),
    (dict(rope_type='longrope', factor=2.0), "the type 'longrope' is not computed here; known: default, linear, dynamic, yarn, llama3"),
    (dict(rope_type='linear'), 'factor of the type linear must be a number above 0, not None'),
    (dict(rope_type='linear', factor=True), 'factor of the type linear'),
    (dict(rope_type='linear', factor=float('nan')), 'factor of the type linear'),
    (dict(rope_type='llama3', factor=8.0, low_freq_factor=4.0, high_freq_factor=4.0, original_max_position_embeddings=32), 'must be above'),
    (dict(rope_type='yarn', factor=8.0, original_max_position_embeddings=32, truncate=1), "truncate of the type yarn cannot be 1"),
])
def test_scalings_that_cannot_be_followed(value, message):
  with pytest.raises(ValueError, match=message):
    rope.check_scaling(value)


def test_scalings_are_reduced_to_what_counts():
  assert rope.check_scaling(None) is rope.check_scaling({}) is rope.check_scaling(dict(rope_type='default')) is None
  assert rope.check_scaling(dict(type='linear', factor=2, original_max_position_embeddings=64)) == dict(rope_type='linear', factor=2)
