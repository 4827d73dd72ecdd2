"""The resampler and the gated layers against plain PyTorch, and inside LLaMA.

The reference follows the published facts in one pass per row and image, without packing or scans.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.models.interfaces import gated_cross_attention as gates
from lavit_jax.models.interfaces.base import LayeredInterface
from lavit_jax.models.interfaces.flamingo import FlamingoInterface
from lavit_jax.models.interfaces.resampler import PerceiverResampler, ResamplerInterface
from lavit_jax.models.llama import Llama, unroll_layers
from lavit_jax.models.sequence import prompt_mask, prompt_positions
from lavit_jax.weights.torch import names_interfaces as names

torch = pytest.importorskip('torch')
from torch_peers import arrays, close, numpy_state, port, randomize  # noqa: E402

WIDTH, HIDDEN, HEADS, HEAD_DIM, LATENTS = 12, 16, 2, 4, 3
INNER = HEADS * HEAD_DIM
RESAMPLER = dict(num_latents=LATENTS, num_layers=2, num_heads=HEADS, head_dim=HEAD_DIM, mlp_dim=48)


def linear(inputs, outputs):
  return torch.nn.Linear(inputs, outputs, bias=False)


def feed_forward(width):
  return torch.nn.Sequential(
    torch.nn.LayerNorm(width), linear(width, 4 * width), torch.nn.GELU(), linear(4 * width, width)
  )


def attend(q, k, v):
  """Heads of one row [n, h * d], scaled by d ** -0.5."""
  heads = []
  for part in range(HEADS):
    at = slice(part * HEAD_DIM, (part + 1) * HEAD_DIM)
    scores = (q[:, at] * HEAD_DIM**-0.5) @ k[:, at].T
    heads.append(scores.softmax(-1) @ v[:, at])
  return torch.cat(heads, -1)


class PeerAttention(torch.nn.Module):
  def __init__(self, width, media_width, gated):
    super().__init__()
    for name in ('norm',) if gated else ('norm_media', 'norm_latents'):
      setattr(self, name, torch.nn.LayerNorm(width))
    self.to_q, self.to_out = linear(width, INNER), linear(INNER, width)
    self.to_kv = linear(media_width, 2 * INNER)

  def forward(self, x, memory):
    k, v = self.to_kv(memory).split(INNER, -1)
    return self.to_out(attend(self.to_q(x), k, v))


class PeerResampler(torch.nn.Module):
  def __init__(self):
    super().__init__()
    self.latents = torch.nn.Parameter(torch.zeros(LATENTS, WIDTH))
    self.layers = torch.nn.ModuleList(
      torch.nn.ModuleList([PeerAttention(WIDTH, WIDTH, False), feed_forward(WIDTH)])
      for _ in range(2)
    )
    self.norm = torch.nn.LayerNorm(WIDTH)

  def forward(self, features):
    """One image [N, W] -> all hidden states [n, W]."""
    states = [self.latents]
    for attention, ff in self.layers:
      z = attention.norm_latents(states[-1])
      x = states[-1] + attention(z, torch.cat([attention.norm_media(features), z]))
      states.append(x + ff(x))
    return [*states[1:], self.norm(states[-1])]


class PeerGate(torch.nn.Module):
  def __init__(self):
    super().__init__()
    self.attn = PeerAttention(HIDDEN, WIDTH, True)
    self.attn_gate = torch.nn.Parameter(torch.zeros(1))
    self.ff = feed_forward(HIDDEN)
    self.ff_gate = torch.nn.Parameter(torch.zeros(1))

  def forward(self, x, seen):
    """One row [S, H]; for each slot, its image [n, W] or None."""
    normed = self.attn.norm(x)
    attended = []
    for slot, image in enumerate(seen):
      found = torch.zeros(HIDDEN) if image is None else self.attn(normed[slot : slot + 1], image)[0]
      attended.append(found)
    x = x + self.attn_gate.tanh() * torch.stack(attended)
    return x + self.ff_gate.tanh() * self.ff(x)


def test_resampler_block_by_block():
  peer = randomize(PeerResampler())
  features = arrays((2, 5, WIDTH))[0]
  state = numpy_state(peer, rename='perceiver.{}'.format)
  resampler = PerceiverResampler(**RESAMPLER)
  params, unused = port(names.resampler_rules(), state, resampler, features)
  assert not unused
  run = jax.jit(functools.partial(resampler.apply, mutable='intermediates'))
  vectors, sown = run({'params': params}, features)
  stream = sown['intermediates']['blocks']['stream'][0]
  for image in range(2):
    *states, last = peer(torch.from_numpy(features[image]))
    for layer in range(2):
      close(stream[layer][image], states[layer])
    close(vectors[image], last)
  interface = FlamingoInterface(HIDDEN, llm_layers=4, every=2, **RESAMPLER)
  assert isinstance(interface, LayeredInterface) and not interface.in_sequence
  tokens = jax.jit(interface.apply)({'params': {'resampler': params}}, features)
  np.testing.assert_allclose(tokens.vectors, vectors, atol=1e-6)
  assert tokens.mask.shape == (2, interface.num_vectors(5))

  into_sequence = ResamplerInterface(HIDDEN, **RESAMPLER)
  projection = randomize(torch.nn.Linear(WIDTH, HIDDEN))
  state |= numpy_state(projection, rename='model.mm_projector.{}'.format)
  params, unused = port(names.resampler_sequence_rules(), state, into_sequence, features)
  assert not unused
  found = jax.jit(into_sequence.apply)({'params': params}, features)
  close(found.vectors, projection(torch.from_numpy(np.array(vectors))))


# Two rows; row 0 has two segments, of which the first has two images and the second begins with
# text; row 1 has one image and empty slots. S is where an image starts, w is text.
STARTS = np.array([[0, 1, 0, 1, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0, 0, 0]], bool)
SEGMENTS = np.array([[1, 1, 1, 1, 1, 2, 2, 2], [3, 3, 3, 0, 0, 0, 0, 0]], np.int32)
ORDINALS = [[-1, 0, 0, 1, 1, -1, -1, 2], [0, 0, 0, -1, -1, -1, -1, -1]]
IMAGES = np.array([[0, 0, 0, 1, 1, 0, 0, 2], [3, 3, 3, 0, 0, 0, 0, 0]], np.int32)


def test_the_latest_image_of_the_own_segment():
  assert gates.latest_image(STARTS, jnp.asarray(SEGMENTS)).tolist() == ORDINALS
  padded = np.array([[0, 0, 1, 1, 1]], bool)
  starts = np.array([[0, 0, 0, 1, 0]], bool)
  assert gates.latest_image(starts, jnp.asarray(padded)).tolist() == [[-1, -1, -1, 0, 0]]


def row_images(vectors, num_images=3):
  return gates.gather_images(jnp.asarray(vectors), IMAGES, jnp.asarray(ORDINALS), num_images)


def test_images_beyond_the_capacity_are_counted():
  vectors = arrays((4, LATENTS, WIDTH))[0]
  images = row_images(vectors)
  np.testing.assert_array_equal(images.vectors[0], vectors[:3])
  np.testing.assert_array_equal(
    images.vectors[1],
    np.stack([vectors[3], 0 * vectors[0]] * 2)[:3] * np.array([1, 0, 0])[:, None, None],
  )
  few = row_images(vectors, 2)
  assert few.ordinal[0].tolist() == [-1, 0, 0, 1, 1, -1, -1, -1]
  assert gates.count_unseen(jnp.asarray(ORDINALS), 2) == 1
  assert gates.count_unseen(jnp.asarray(ORDINALS), 3) == 0


def test_gated_layers_see_the_latest_image_alone():
  peer = torch.nn.ModuleDict({'1': PeerGate(), '3': PeerGate()})
  randomize(peer)
  x, vectors = arrays((2, 8, HIDDEN), (4, LATENTS, WIDTH))
  gated = gates.GatedLayers(2, HIDDEN, HEADS, HEAD_DIM, 4 * HIDDEN, every=2)
  prefix = 'lang_encoder.model.layers.'
  state = {}
  for name, array in numpy_state(peer).items():
    layer, _, rest = name.partition('.')
    state[f'{prefix}{layer}.gated_cross_attn_layer.{rest}'] = array
  images = row_images(vectors)
  params, unused = port(names.gated_rules('model.layers', 2), state, gated, x, images)
  assert not unused

  def total(params, x, vectors):
    out, sown = gated.apply({'params': params}, x, row_images(vectors), mutable='intermediates')
    return (out**2).sum(), sown['intermediates']['blocks']['stream'][0]

  run = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))
  gradients, stream = run(params, x, vectors)
  torch_x = torch.from_numpy(x).requires_grad_()
  torch_vectors = torch.from_numpy(vectors).requires_grad_()
  outputs = []
  for row in range(2):
    seen = [
      torch_vectors[image] if ordinal >= 0 else None
      for image, ordinal in zip(IMAGES[row], ORDINALS[row], strict=True)
    ]
    hidden = torch_x[row]
    for number, gate in enumerate(peer.values()):
      hidden = gate(hidden, seen)
      close(stream[number][row], hidden)
    outputs.append(hidden)
  (torch.stack(outputs) ** 2).sum().backward()
  close(gradients[1], torch_x.grad, atol=1e-3)  # of a sum of 256 squares
  close(gradients[2], torch_vectors.grad, atol=1e-3)
  close(gradients[0]['blocks']['attn_gate'][0], peer['1'].attn_gate.grad, atol=1e-3)


LLAMA = Llama(
  vocab_size=20,
  hidden_size=HIDDEN,
  num_layers=4,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  mlp_dim=24,
)


@pytest.fixture(scope='module')
def language_model():
  """Parameters of LLaMA, embeddings of two prompts, positions, and the mask of tokens."""
  rng = np.random.default_rng(0)
  embeddings = rng.standard_normal((2, 6, HIDDEN), np.float32)
  present = np.array([[0, 1, 1, 1, 1, 1], [1] * 6], bool)
  positions = prompt_positions(jnp.asarray(present))
  mask = prompt_mask(jnp.asarray(present))
  like = jax.eval_shape(LLAMA.init, jax.random.key(0), embeddings, positions, mask)['params']
  params = jax.tree.map(
    lambda leaf: rng.normal(0, leaf.shape[-2] ** -0.5 if leaf.ndim > 1 else 1, leaf.shape).astype(
      np.float32
    ),
    like,
  )
  return params, embeddings, positions, mask, present


def prompt_images(present):
  vectors = jnp.asarray(arrays((2, 1, LATENTS, WIDTH))[0])
  starts = np.array([[0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]], bool)
  return gates.RowImages(vectors, gates.latest_image(starts, jnp.asarray(present)))


@pytest.mark.parametrize('every', [1, 2])
def test_the_language_model_begins_unchanged_and_decodes_alike(language_model, every):
  params, embeddings, positions, mask, present = language_model
  images = prompt_images(present)
  gated = gates.GatedLayers(4 // every, HIDDEN, HEADS, HEAD_DIM, 4 * HIDDEN, every)
  fresh = jax.jit(gated.init)(jax.random.key(0), embeddings, images)['params']

  @jax.jit
  def run(gated_params):
    extra = gated.extra_layers(gated_params, images)
    return LLAMA.apply({'params': params}, embeddings, positions, mask, extra=extra)[0]

  plain, _ = jax.jit(LLAMA.apply)({'params': params}, embeddings, positions, mask)
  # The gates are exactly 0; only the order of XLA's sums may differ.
  logits = np.asarray(plain) @ params['head']
  assert np.abs(logits).max() > 1
  np.testing.assert_allclose(np.asarray(run(fresh)) @ params['head'], logits, rtol=0, atol=1e-5)

  opened = jax.tree.map(lambda leaf: leaf, fresh)
  opened['blocks']['attn_gate'] = jnp.full_like(fresh['blocks']['attn_gate'], 0.5)
  opened['blocks']['ff_gate'] = jnp.full_like(fresh['blocks']['ff_gate'], 0.5)
  changed = run(opened)
  assert np.abs(changed - plain).max() > 0.1

  unrolled, layers = unroll_layers(LLAMA, params)

  @jax.jit
  def decode():
    """Four tokens at once, then one by one."""
    cache = unrolled.init_cache(2, 6)
    extra = gated.extra_layers(opened, images).unrolled()
    hidden = []
    for start, stop in ((0, 4), (4, 5), (5, 6)):
      part = slice(start, stop)
      now = dataclasses.replace(extra, slots=extra.slots[:, part])
      part_mask = jnp.pad(mask[:, :, part, :stop], ((0, 0), (0, 0), (0, 0), (0, 6 - stop)))
      out, cache = unrolled.apply(
        {'params': layers}, embeddings[:, part], positions[:, part], part_mask, cache, now
      )
      hidden.append(out)
    return jnp.concatenate(hidden, 1)

  np.testing.assert_allclose(
    np.where(present[..., None], decode(), 0), np.where(present[..., None], changed, 0), atol=1e-4
  )


def test_layers_that_do_not_divide(language_model):
  params, embeddings, positions, mask, present = language_model
  gated = gates.GatedLayers(3, HIDDEN, HEADS, HEAD_DIM, 4 * HIDDEN, every=1)
  images = prompt_images(present)
  like = jax.eval_shape(gated.init, jax.random.key(0), embeddings, images)['params']

  def run(gated_params):
    extra = gated.extra_layers(gated_params, images)
    return LLAMA.apply({'params': params}, embeddings, positions, mask, extra=extra)

  with pytest.raises(ValueError, match='3 extra layers before every 1 layers do not fit 4'):
    jax.eval_shape(run, like)
