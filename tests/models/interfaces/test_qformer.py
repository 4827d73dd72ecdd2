"""The Q-Former and its first stage against transformers."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.models.interfaces.qformer import Dropout, joint_mask
from lavit_jax.models.interfaces.qformer_losses import hard_negatives
from lavit_jax.models.interfaces.qformer_pretraining import QFormerPretraining
from lavit_jax.weights.torch import names_blip2 as names
from lavit_jax.weights.torch.interface_files import open_interface
from lavit_jax.weights.torch.mapping import from_state_dict

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')
from qformer_peers import (  # noqa: E402
  DECODE_ID,
  FEATURES,
  MASK,
  OUR_MASK,
  OUR_TEXT,
  PAIRS,
  SIZES,
  TEXT,
  TORCH_FEATURES,
  TORCH_TEXT,
  VOCAB,
  Stage1,
)
from torch_peers import arrays, close, numpy_state, port  # noqa: E402

functional = torch.nn.functional
STAGE1 = QFormerPretraining(**SIZES, vocab_size=VOCAB, output_dim=8, max_positions=10)


def inputs():
  keys = jax.vmap(lambda row: jax.random.split(row))(jax.random.split(jax.random.key(3), PAIRS))
  return FEATURES, OUR_TEXT, OUR_MASK, keys


@pytest.fixture(scope='module')
def stage1():
  """The peer, the parameters, and the tree of their shapes."""
  peer = Stage1()
  state = {name: tensor.detach().numpy() for name, tensor in peer.state().items()}
  params, unused = port(
    names.blip2_pretraining_rules(), state, STAGE1, *inputs(), decode_id=DECODE_ID
  )
  assert not unused
  return peer, jax.device_put(params)


def apply(params, *args, method=None, **options):
  """One program: operation by operation would compile hundreds."""
  run = functools.partial(STAGE1.apply, method=method, **options)
  return jax.jit(run)({'params': params}, *args)


def test_every_layer_with_queries_and_text(stage1):
  peer, params = stage1
  features = peer.norm(TORCH_FEATURES)
  for causal in (False, True):

    def read(module, *texts, causal=causal):
      return module.qformer(*texts, causal=causal)

    run = jax.jit(
      functools.partial(
        STAGE1.apply,
        method=read,
        mutable='intermediates',
      )
    )
    out, state = run({'params': params}, features.detach().numpy(), TEXT, MASK)
    want = peer.run(features, TORCH_TEXT, MASK, causal, output_hidden_states=True)
    pairs = state['intermediates']['qformer']['pairs']
    for layer in range(4):
      got = pairs[('cross_layer', 'plain_layer')[layer % 2]]['stream'][0][layer // 2]
      # Nobody reads the hidden states of padding, but they agree too.
      close(got, want.hidden_states[layer + 1])
    close(jnp.concatenate([out.queries, out.text], 1), want.last_hidden_state)


def test_queries_alone_and_text_alone(stage1):
  peer, params = stage1
  features = peer.norm(TORCH_FEATURES)
  found = apply(
    params, features.detach().numpy(), method=lambda module, x: module.qformer(x).queries
  )
  close(found, peer.run(features).last_hidden_state)
  text = apply(params, TEXT, MASK, method=lambda module, *x: module.qformer.encode_text(*x))
  want = peer.run(None, TORCH_TEXT, MASK, queries=False).last_hidden_state
  close(text, want)


def test_retrieval_model_of_transformers(stage1):
  """Both heads, as transformers itself computes them from pixels."""
  peer, params = stage1
  blip = peer.blip.eval()
  pixels = torch.from_numpy(arrays((PAIRS, 3, 16, 16))[0])
  with torch.no_grad():
    normed = blip.vision_model(pixels).last_hidden_state
    mask = torch.from_numpy(MASK).long()
    contrast = blip(pixels, TORCH_TEXT, mask)
    match = blip(pixels, TORCH_TEXT, mask, use_image_text_matching_head=True)

  def heads(module, features):
    images = module.project_images(module.qformer(features).queries)
    texts = module.project_texts(TEXT, MASK)
    return images, texts, module.matching_logits(features, TEXT, MASK)

  images, texts, matching = apply(params, normed.numpy(), method=heads)
  close(images, contrast.image_embeds)
  close(texts, contrast.text_embeds)
  close(matching, match.logits_per_image)


def test_the_file_of_the_retrieval_model(stage1):
  """It gives what the file of LAVIS gives, less the head of words and the temperature."""
  peer, params = stage1
  state = {name: array.copy() for name, array in numpy_state(peer.blip).items()}
  for name, array in state.items():
    if name.endswith('qkv.bias'):
      array[12:24] = 0  # EVA has no bias of keys
  opened = open_interface(state)
  assert opened.form == 'blip2_retrieval'
  assert set(opened.others) <= {'embeddings.position_ids'}
  tree = from_state_dict(opened.tables['pretraining'], opened.states['pretraining'], params)
  absent = {'word_fc', 'word_norm', 'word_bias', 'temperature'}
  assert tree.keys() == params.keys() - absent
  kept = {name: leaf for name, leaf in params.items() if name not in absent}
  jax.tree.map(np.testing.assert_array_equal, tree, kept)


def peer_losses(peer, other_image, other_text):
  features = peer.norm(TORCH_FEATURES)
  blip = peer.blip
  images = functional.normalize(
    blip.vision_projection(peer.run(features).last_hidden_state), dim=-1
  )
  text = peer.run(None, TORCH_TEXT, MASK, queries=False).last_hidden_state[:, 0]
  texts = functional.normalize(blip.text_projection(text), dim=-1)
  to_text = torch.matmul(images.unsqueeze(1), texts.unsqueeze(-1)).squeeze(-1).amax(-1) / peer.temp
  to_image = torch.matmul(texts[:, None, None], images.transpose(1, 2)).squeeze(2).amax(-1)
  own = torch.arange(PAIRS)
  smoothed = functools.partial(functional.cross_entropy, label_smoothing=0.1)
  contrastive = (smoothed(to_text, own) + smoothed(to_image / peer.temp, own)) / 2

  seen = torch.cat([features, features[other_image], features])
  ids = torch.cat([TORCH_TEXT, TORCH_TEXT, TORCH_TEXT[other_text]])
  masks = np.concatenate([MASK, MASK, MASK[other_text]])
  queries = peer.run(seen, ids, masks).last_hidden_state[:, :3]
  labels = torch.tensor([1] * PAIRS + [0] * 2 * PAIRS)
  matching = functional.cross_entropy(blip.itm_head(queries).mean(1), labels)

  caption = TORCH_TEXT.clone()
  caption[:, 0] = DECODE_ID
  hidden = peer.run(features, caption, MASK, causal=True).last_hidden_state[:, 3:]
  labels = caption.masked_fill(~torch.from_numpy(MASK), -100)[:, 1:]
  captioning = smoothed(peer.head(hidden)[:, :-1].reshape(-1, VOCAB), labels.reshape(-1))
  return contrastive, matching, captioning


def test_the_three_losses_and_their_gradients(stage1):
  peer, params = stage1
  *_, keys = inputs()

  @jax.jit
  def losses_and_gradients(params):
    def losses(params):
      found = STAGE1.apply({'params': params}, *inputs(), decode_id=DECODE_ID)
      return jnp.stack([found.contrastive, found.matching, found.captioning])

    values, pull = jax.vjp(losses, params)
    return values, jax.vmap(pull)(jnp.eye(3))[0]

  def negatives(module):
    images = module.project_images(module.qformer(module.ln_vision(FEATURES)).queries)
    similar = jnp.einsum('iqp,tp->itq', images, module.project_texts(TEXT, MASK)).max(-1)
    other_image = hard_negatives(similar.T, module.temperature, keys[:, 1])
    return other_image, hard_negatives(similar, module.temperature, keys[:, 0])

  other_image, other_text = map(np.array, apply(params, method=negatives))

  values, gradients = losses_and_gradients(params)
  wanted = peer_losses(peer, other_image, other_text)
  rules = names.blip2_pretraining_rules()
  for number, want in enumerate(wanted):
    close(values[number], want)
    gradient = jax.tree.map(operator.itemgetter(number), gradients)
    peer.zero_grad(set_to_none=True)
    want.backward(retain_graph=True)
    grads = {}
    for name, tensor in peer.state().items():
      grads[name] = (torch.zeros_like(tensor) if tensor.grad is None else tensor.grad).numpy()
    expected = from_state_dict(rules, grads, gradient)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected)) > 0.05
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4), gradient, expected
    )


def test_negatives_are_others_and_drawn_by_similarity():
  cosines = jnp.asarray(arrays((4, 4))[0])
  keys = jax.random.split(jax.random.key(0), (20000, 4))
  draws = jax.jit(jax.vmap(lambda k: hard_negatives(cosines, jnp.asarray(0.5), k)))(keys)
  counts = np.stack([(np.asarray(draws) == column).mean(0) for column in range(4)], 1)
  weights = np.asarray(jax.nn.softmax(cosines / 0.5)) + 1e-4
  np.fill_diagonal(weights, 0)
  assert (np.diag(counts) == 0).all()
  # Five standard deviations of a share of 20,000 draws.
  bound = 5 * 0.5 / 20000**0.5
  np.testing.assert_allclose(counts, weights / weights.sum(1, keepdims=True), atol=bound)


def test_the_causal_mask_is_the_one_drawn():
  mask = joint_mask(2, np.array([[True, True, False]]), causal=True)
  drawn = ['xx...', 'xx...', 'xxx..', 'xxxx.', 'xxxx.']
  assert [''.join('x' if seen else '.' for seen in row) for row in mask[0, 0]] == drawn


def test_dropout_needs_a_key(stage1):
  _, params = stage1

  @jax.jit
  def drop(keys):
    encode = functools.partial(STAGE1.apply, {'params': params}, FEATURES, TEXT, MASK)
    run = functools.partial(encode, method=lambda module, *x, key: module.qformer(*x, key=key).text)
    return jax.vmap(lambda key: run(key=key))(keys)

  key = jax.random.key(0)
  first, again, other = drop(jnp.stack([key, key, jax.random.key(1)]))
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - other).max() > 0.1


def test_dropout_keeps_the_mean():
  kept = Dropout(0.25, jax.random.key(0))(jnp.ones(100_000))
  np.testing.assert_allclose(np.unique(kept), [0, 4 / 3], rtol=1e-6)
  # Five standard deviations of the mean of as many draws.
  assert abs(kept.mean() - 1) < 5 * (1 / 3 / 100_000) ** 0.5
  np.testing.assert_array_equal(Dropout(0.25, None)(kept), kept)
