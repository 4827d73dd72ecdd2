"""Emu's causal transformer against transformers' T5, its loss, and its generation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.models.interfaces import emu_regression
from lavit_jax.models.interfaces.base import RegressingInterface
from lavit_jax.models.interfaces.emu import EmuInterface, causal_buckets
from lavit_jax.models.llama import Llama, unroll_layers
from lavit_jax.weights.torch import names_interfaces as names

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
from torch_peers import arrays, close, numpy_state, port, randomize  # noqa: E402

t5 = pytest.importorskip('transformers.models.t5.modeling_t5')
WIDTH, HIDDEN, TOKENS = 12, 16, 5
SIZES = dict(num_tokens=TOKENS, hidden_size=8, num_layers=2, num_heads=2, head_dim=6, mlp_dim=20)


class CausalFormer(torch.nn.Module):
  """T5Stack as a decoder, whose keys and values read features of another width."""

  def __init__(self):
    super().__init__()
    config = transformers.T5Config(
      vocab_size=4,
      d_model=8,
      d_kv=6,
      d_ff=20,
      num_layers=2,
      num_heads=2,
      is_decoder=True,
      is_encoder_decoder=False,
      use_cache=False,
      dropout_rate=0.0,
    )
    config._attn_implementation = 'eager'
    self.cformer = t5.T5Stack(config)
    self.cformer.embed_tokens = None
    for block in self.cformer.block:
      cross = block.layer[1].EncDecAttention
      cross.k = torch.nn.Linear(WIDTH, 12, bias=False)
      cross.v = torch.nn.Linear(WIDTH, 12, bias=False)
    self.causal_tokens = torch.nn.Parameter(torch.zeros(1, TOKENS, 8))
    self.projection = torch.nn.Linear(8, HIDDEN)


class Emu(torch.nn.Module):
  def __init__(self):
    super().__init__()
    self.ln_visual = torch.nn.LayerNorm(WIDTH, eps=1e-6)
    self.cformer = CausalFormer()
    head = torch.nn.Linear(HIDDEN, HIDDEN, bias=False)
    self.decoder = torch.nn.ModuleDict({'lm': torch.nn.ModuleDict({'stu_regress_head': head})})

  def forward(self, features):
    former = self.cformer
    out = former.cformer(
      inputs_embeds=former.causal_tokens.expand(len(features), -1, -1),
      encoder_hidden_states=self.ln_visual(features),
      output_hidden_states=True,
    )
    return out.hidden_states, former.projection(out.last_hidden_state)


def test_every_block_and_the_vectors():
  peer = randomize(Emu())
  features = arrays((2, 7, WIDTH))[0]
  interface = EmuInterface(HIDDEN, **SIZES)
  params, unused = port(names.emu_rules(), numpy_state(peer), interface, features)
  assert not unused and isinstance(interface, RegressingInterface)
  run = jax.jit(functools.partial(interface.apply, mutable='intermediates'))
  tokens, sown = run({'params': params}, features)
  states, want = peer(torch.from_numpy(features))
  stream = sown['intermediates']['transformer']['blocks']['stream'][0]
  close(stream[0], states[1])  # transformers keeps the last one after its norm alone
  close(tokens.vectors, want)
  assert tokens.mask.shape == (2, interface.num_vectors(7))


def test_buckets_are_those_of_t5():
  position = torch.arange(200)
  relative = position[None] - position[:, None]
  want = t5.T5Attention._relative_position_bucket(
    relative, bidirectional=False, num_buckets=32, max_distance=128
  )
  np.testing.assert_array_equal(causal_buckets(200), want)


def test_pairs_of_the_regression_loss():
  """[IMG] v v [/IMG] w, a text between brackets without vectors, and [IMG] v in another segment."""
  source = np.array([[-1, 0, 1, -1, -1, -1, 4, -1, -1, -1]])
  segments = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 3, 0]])
  slots = emu_regression.regression_slots(jnp.asarray(source), jnp.asarray(segments))
  assert np.flatnonzero(slots[0]).tolist() == [0, 1, 2, 5, 6]
  # An image that ends its row or its segment: its last vector predicts nothing of another.
  cut = emu_regression.regression_slots(jnp.array([[-1, 0, 1, 2]]), jnp.array([[1, 1, 2, 2]]))
  assert np.flatnonzero(cut[0]).tolist() == [0, 2]
  predicted, inputs = arrays((1, 10, 4), (1, 10, 4))
  predicted[0, 9] = np.nan  # an empty slot

  def loss(predicted, inputs):
    total, count = emu_regression.regression_loss(predicted, inputs, slots)
    return total / count

  value, (of_predicted, of_inputs) = jax.value_and_grad(loss, (0, 1))(predicted, inputs)
  assert not np.asarray(of_inputs).any(), 'the targets are detached'
  leaf = torch.from_numpy(predicted[:, np.flatnonzero(slots[0])]).requires_grad_()
  targets = torch.from_numpy(inputs[:, np.flatnonzero(slots[0]) + 1])
  want = torch.nn.functional.mse_loss(leaf, targets)
  want.backward()
  close(value, want)
  close(of_predicted[:, np.flatnonzero(slots[0])], leaf.grad, atol=1e-6)
  assert not np.asarray(of_predicted[0, [3, 4, 7, 8, 9]]).any()


def test_generation_feeds_each_vector_back():
  """With a cache, against transformers' LLaMA that reads the whole sequence for every vector."""
  llama = Llama(
    vocab_size=20,
    hidden_size=HIDDEN,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=24,
    rms_norm_eps=1e-6,
  )
  config = transformers.LlamaConfig(
    vocab_size=20,
    hidden_size=HIDDEN,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
  )
  peer = randomize(transformers.LlamaForCausalLM(config))
  head = randomize(torch.nn.Linear(HIDDEN, HIDDEN, bias=False), seed=1)
  prompt = arrays((2, 3, HIDDEN))[0]
  positions = jnp.broadcast_to(jnp.arange(3), (2, 3))
  causal = jnp.tril(jnp.ones((3, 3), bool))[None, None]
  state = numpy_state(peer, rename='decoder.lm.{}'.format)
  params, unused = port(names.emu_llama_rules(), state, llama, prompt, positions, causal)
  assert not unused
  interface = EmuInterface(HIDDEN, **SIZES)
  head_params = {'head': {'kernel': numpy_state(head)['weight'].T}}
  unrolled, layers = unroll_layers(llama, params)

  @jax.jit
  def draw(prompt):
    cache = unrolled.init_cache(2, 3 + TOKENS)
    run = functools.partial(unrolled.apply, {'params': layers})
    slots = jnp.arange(3 + TOKENS)
    mask = jnp.broadcast_to(slots <= slots[:3, None], (2, 1, 3, 3 + TOKENS))
    hidden, cache = run(prompt, positions, mask, cache)

    def step(cache, vectors):
      here = jnp.full((2, 1), cache.length)
      mask = jnp.broadcast_to(slots <= cache.length, (2, 1, 1, len(slots)))
      hidden, cache = run(vectors[:, None], here, mask, cache)
      return cache, hidden[:, 0]

    apply_head = functools.partial(interface.apply, {'params': head_params}, method='regress')
    return emu_regression.regress(step, cache, hidden[:, -1], apply_head, TOKENS)[0]

  inputs = torch.from_numpy(prompt)
  with torch.no_grad():
    for _ in range(TOKENS):
      hidden = peer.model(inputs_embeds=inputs).last_hidden_state[:, -1:]
      inputs = torch.cat([inputs, head(hidden)], 1)
  close(draw(prompt), inputs[:, 3:])
