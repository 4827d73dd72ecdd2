"""Decoding against transformers' `generate` on a random LLaMA, over a grid of options."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.inference import sampling
from lavit_jax.inference.beam_search import beam_search
from lavit_jax.inference.decode import generate
from lavit_jax.models.llama import Llama, unroll_layers
from lavit_jax.models.sequence import embed_prompts
from lavit_jax.weights.torch import mapping
from lavit_jax.weights.torch.names_llama import llama_rules

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

LLAMA = Llama(
  vocab_size=60, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48
)
EOS = 44
NEW = 12  # most new tokens


@pytest.fixture(scope='module')
def both():
  """Parameters, transformers' model, and seven left-padded prompts as embeddings and mask.

  The logits spread so far that no two scores are equal.
  """
  config = transformers.LlamaConfig(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
  )
  torch.manual_seed(0)
  peer = transformers.LlamaForCausalLM(config).eval()
  with torch.no_grad():
    for p in peer.parameters():
      p += 0.25 * torch.randn(p.shape)
  embeddings = jnp.zeros((1, 2, 32))
  positions = jnp.zeros((1, 2), jnp.int32)
  example = (embeddings, positions, jnp.ones((1, 1, 2, 2), bool))
  like = jax.eval_shape(LLAMA.init, jax.random.key(0), *example)['params']
  state = {name: tensor.numpy() for name, tensor in peer.state_dict().items()}
  params = mapping.from_state_dict(llama_rules(), state, like)
  params = unroll_layers(LLAMA, jax.device_put(params))[1]
  rng = np.random.default_rng(1)
  prompts = [[rng.integers(3, 60, rng.integers(1, 9))] for _ in range(7)]
  embeddings, mask, _ = embed_prompts(
    prompts, lambda ids: LLAMA.apply({'params': params}, ids, method='embed'), multiple=8
  )
  return params, peer, embeddings, mask


def peer_generate(peer, embeddings, mask, **settings):
  with torch.no_grad():
    return peer.generate(
      inputs_embeds=torch.from_numpy(np.array(embeddings)),
      attention_mask=torch.from_numpy(np.array(mask)).long(),
      max_new_tokens=NEW,
      eos_token_id=EOS,
      pad_token_id=2,
      do_sample=False,
      return_dict_in_generate=True,
      output_scores=True,
      **settings,
    )


def assert_same(out, sequences):
  assert sequences.shape[1] > 3
  np.testing.assert_array_equal(out.ids[:, : sequences.shape[1]], sequences)
  assert (out.ids[:, sequences.shape[1] :] == 2).all()


@pytest.mark.parametrize('minimum', [0, 5])
def test_greedy(both, minimum):
  params, peer, *prompts = both
  out = generate(LLAMA, params, *prompts, max_new_tokens=NEW, min_new_tokens=minimum, eos_id=EOS)
  assert_same(out, peer_generate(peer, *prompts, min_new_tokens=minimum).sequences.numpy())
  assert (out.lengths < NEW).any()


def unpadded(embeddings, mask):
  """The last three slots of the prompts that fill them.

  For embeddings without ids, transformers subtracts the padding from the new tokens that its
  penalty counts.
  """
  full = mask[:, -3:].all(1)
  return embeddings[:, -3:][full], mask[:, -3:][full]


def test_greedy_with_a_repetition_penalty(both):
  params, peer, *prompts = both
  prompts = unpadded(*prompts)
  ids = {}
  for penalty in (1.0, 1.3, 0.8):
    out = generate(
      LLAMA, params, *prompts, max_new_tokens=NEW, eos_id=EOS, repetition_penalty=penalty
    )
    assert_same(out, peer_generate(peer, *prompts, repetition_penalty=penalty).sequences.numpy())
    ids[penalty] = np.asarray(out.ids)
  assert (ids[1.3] != ids[1.0]).any()
  assert (ids[0.8] != ids[1.0]).any()


@pytest.mark.parametrize(
  'num_beams, early_stopping', [*itertools.product((2, 3, 5), (False, True, 'never'))]
)
def test_beams(both, num_beams, early_stopping):
  params, peer, *prompts = both
  settings = dict(num_beams=num_beams, early_stopping=early_stopping)
  ids = []
  for length_penalty in (0.0, 1.0, 2.0, -1.0):
    out = beam_search(
      LLAMA,
      params,
      *prompts,
      max_new_tokens=NEW,
      eos_id=EOS,
      length_penalty=length_penalty,
      **settings,
    )
    expected = peer_generate(peer, *prompts, length_penalty=length_penalty, **settings)
    assert_same(out, expected.sequences.numpy())
    # rtol: with a negative penalty a score is a sum times a length
    np.testing.assert_allclose(out.scores, expected.sequences_scores.numpy(), rtol=1e-5, atol=1e-4)
    ids.append(np.asarray(out.ids))
  assert any((other != ids[0]).any() for other in ids)  # the penalty matters


def test_the_best_beams(both):
  params, peer, *prompts = both
  out = beam_search(
    LLAMA, params, *prompts, num_beams=4, num_return_sequences=3, max_new_tokens=NEW, eos_id=EOS
  )
  expected = peer_generate(peer, *prompts, num_beams=4, num_return_sequences=3)
  assert_same(out, expected.sequences.numpy())
  np.testing.assert_allclose(out.scores, expected.sequences_scores.numpy(), atol=1e-4)
  assert (np.diff(out.scores.reshape(7, 3)) < 0).all()


def test_beams_with_a_repetition_penalty(both):
  params, peer, *prompts = both
  prompts = unpadded(*prompts)
  plain, out = (
    beam_search(
      LLAMA,
      params,
      *prompts,
      num_beams=3,
      max_new_tokens=NEW,
      eos_id=EOS,
      repetition_penalty=penalty,
    )
    for penalty in (None, 1.5)
  )
  assert_same(
    out, peer_generate(peer, *prompts, num_beams=3, repetition_penalty=1.5).sequences.numpy()
  )
  assert (out.ids != plain.ids).any()


@pytest.mark.parametrize(
  'temperature, top_k, top_p, penalty',
  [
    (1.0, 0, 0.9, 1.0),
    (0.7, 50, 1.0, 1.3),
    (1.5, 200, 0.6, 1.2),
    (0.3, 5, 0.95, 0.7),
    (1.0, 1, 0.5, 1.0),
    (1.0, 999, 0.01, 2.0),
  ],
)
def test_distributions(temperature, top_k, top_p, penalty):
  """The filters equal the processors of transformers, in their order, after some used ids."""
  rng = np.random.default_rng(0)
  logits = 4 * rng.standard_normal((5, 700), np.float32)
  used = rng.integers(0, 700, (5, 30))
  chain = [
    transformers.RepetitionPenaltyLogitsProcessor(penalty),
    transformers.TemperatureLogitsWarper(temperature),
  ]
  chain += [transformers.TopKLogitsWarper(top_k)] if top_k else []
  chain += [transformers.TopPLogitsWarper(top_p)]
  expected = torch.from_numpy(logits)
  for processor in chain:
    expected = processor(torch.from_numpy(used), expected)
  expected = expected.softmax(-1).numpy()
  is_used = jnp.zeros(logits.shape, bool).at[jnp.arange(5)[:, None], used].set(True)
  penalized = sampling.penalize(logits, is_used, penalty)
  probs = np.asarray(
    jax.nn.softmax(sampling.filter_logits(penalized, temperature, top_k or None, top_p))
  )
  # Logits / temperature reach 50, where float32 rounds by 4e-6: exponentials are as far off.
  np.testing.assert_allclose(probs, expected, atol=2e-5, rtol=0)
  np.testing.assert_array_equal(probs > 0, expected > 0)
