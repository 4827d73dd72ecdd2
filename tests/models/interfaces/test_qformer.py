"""The Q-Former and its first stage against transformers."""

import functools
import operator
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.models.interfaces.base import Context, VisualInterface
from lavit_jax.models.interfaces.qformer import Dropout, QFormerInterface, joint_mask
from lavit_jax.models.interfaces.qformer_losses import hard_negatives
from lavit_jax.models.interfaces.qformer_pretraining import QFormerPretraining
from lavit_jax.models.interfaces.towers import Tower
from lavit_jax.models.vit import ViT
from lavit_jax.weights.torch import names_blip2 as names
from lavit_jax.weights.torch.interface_files import open_interface
from lavit_jax.weights.torch.mapping import from_state_dict

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
from torch_peers import arrays, close, numpy_state, port, randomize  # noqa: E402

bert = pytest.importorskip('transformers.models.bert.modeling_bert')
functional = torch.nn.functional
SIZES = dict(num_queries=3, hidden_size=16, num_layers=4, num_heads=2, mlp_dim=24)
VOCAB, PAIRS, WORDS, DECODE_ID = 30, 4, 5, 29
STAGE1 = QFormerPretraining(**SIZES, vocab_size=VOCAB, output_dim=8, max_positions=10)
FEATURES = arrays((PAIRS, 6, 12))[0]
TEXT = np.random.default_rng(1).integers(1, DECODE_ID, (PAIRS, WORDS)).astype(np.int32)
MASK = np.arange(WORDS) < np.array([5, 3, 4, 2])[:, None]
TORCH_FEATURES, TORCH_TEXT = torch.from_numpy(FEATURES), torch.from_numpy(TEXT).long()
OUR_TEXT, OUR_MASK = jnp.asarray(TEXT), jnp.asarray(MASK)  # `at` needs them


def config(**qformer):
  sizes = dict(
    hidden_size=16,
    num_hidden_layers=4,
    num_attention_heads=2,
    intermediate_size=24,
    encoder_hidden_size=12,
    vocab_size=VOCAB,
    max_position_embeddings=10,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
  )
  return dict(
    vision_config=dict(
      hidden_size=12,
      intermediate_size=8,
      num_hidden_layers=1,
      num_attention_heads=2,
      image_size=16,
      patch_size=8,
      layer_norm_eps=1e-6,
    ),
    qformer_config=sizes | qformer,
    text_config=dict(
      model_type='opt',
      vocab_size=VOCAB,
      hidden_size=20,
      word_embed_proj_dim=20,
      num_hidden_layers=1,
      num_attention_heads=2,
      ffn_dim=8,
    ),
    num_query_tokens=3,
    image_text_hidden_size=8,
  )


class Stage1(torch.nn.Module):
  """transformers' retrieval model, BERT's head of words, and the temperature."""

  def __init__(self):
    super().__init__()
    settings = transformers.Blip2Config(**config(use_qformer_text_input=True))
    settings._attn_implementation = 'eager'
    self.blip = transformers.Blip2ForImageTextRetrieval(settings)
    self.blip.qformer.config._attn_implementation = 'eager'
    self.head = bert.BertLMPredictionHead(
      transformers.BertConfig(vocab_size=VOCAB, hidden_size=16, layer_norm_eps=1e-12)
    )
    self.temp = torch.nn.Parameter(torch.tensor(0.0))
    randomize(self)
    self.head.decoder.weight = self.blip.embeddings.word_embeddings.weight
    self.head.decoder.bias = self.head.bias
    with torch.no_grad():
      self.temp.fill_(0.3)  # at 0.07 the softmax of random features is almost hard

  def state(self):
    """The state dict with LAVIS's names, from what PyTorch calls its parameters here."""
    state = {}
    for name, tensor in self.named_parameters():
      state[lavis_name(name)] = tensor
    return {name: tensor for name, tensor in state.items() if not name.startswith('vision_model')}

  def norm(self, features):
    return self.blip.vision_model.post_layernorm(features)

  def run(self, features, ids=None, mask=None, causal=False, queries=True, **options):
    """Hidden states of the Q-Former; masks add -10000."""
    tokens = self.blip.query_tokens.expand(len(TEXT if ids is None else ids), -1, -1)
    count = 3 if queries else 0
    if ids is None:
      embedded = tokens
    else:
      embedded = self.blip.embeddings(input_ids=ids, query_embeds=tokens if queries else None)
    length = embedded.shape[1]
    allowed = torch.ones(len(embedded), 1, length, length)
    if mask is not None:
      allowed[..., count:] *= torch.from_numpy(mask)[:, None, None].float()
    if causal:
      for query in range(length):
        allowed[:, :, query, max(count, query + 1) :] = 0
    return self.blip.qformer(
      query_embeds=embedded,
      query_length=count,
      attention_mask=(1 - allowed) * -10000.0,
      encoder_hidden_states=features if queries else None,
      **options,
    )


def lavis_name(name):
  """The name that LAVIS has for a parameter of `Stage1`."""
  substitutions = (
    (r'^blip\.', ''),
    (r'^vision_model\.post_layernorm', 'ln_vision'),
    (r'^embeddings\.', 'Qformer.bert.embeddings.'),
    (r'^qformer\.layernorm', 'Qformer.bert.embeddings.LayerNorm'),
    (r'^qformer\.encoder', 'Qformer.bert.encoder'),
    (r'attention\.attention\.', 'attention.self.'),
    (r'^(vision|text)_projection', r'\1_proj'),
    (r'^head\.', 'Qformer.cls.predictions.'),
  )
  for pattern, replacement in substitutions:
    name = re.sub(pattern, replacement, name)
  return name


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


def test_from_pixels_to_the_language_model():
  """BLIP-2 of transformers as a whole: its image encoder, norm, Q-Former and projection."""
  peer = transformers.Blip2ForConditionalGeneration(
    transformers.Blip2Config(**config(use_qformer_text_input=False))
  )
  randomize(peer)
  state = numpy_state(peer, rename=lambda name: name.removeprefix('model.'))
  for name, array in state.items():
    if name.endswith('qkv.bias'):
      array[12:24] = 0  # a view of the peer's own memory: EVA has no bias of keys
  split = names.split_qkv_bias(state)
  vit = ViT(16, 8, 12, num_layers=1, num_heads=2, head_dim=6, mlp_dim=8, output_dim=4)
  pixels = arrays((2, 16, 16, 3))[0]
  of_tower = ('vision_model.emb', 'vision_model.enc')
  tower_state = {name: x for name, x in split.items() if name.startswith(of_tower)}
  tower_params, unused = port(names.blip2_tower_rules(), tower_state, vit, pixels)
  assert not unused
  interface = QFormerInterface(llm_dim=20, **SIZES)
  others = {
    name: x for name, x in split.items() if not name.startswith((*of_tower, 'language_model'))
  }
  params, unused = port(names.blip2_transformers_rules(), others, interface, FEATURES[:2])
  assert not unused
  features = Tower(vit, keep_cls=True).features_of_pixels(tower_params, pixels)
  tokens = jax.jit(interface.apply)({'params': params}, features)
  with torch.no_grad():
    images = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    normed = peer.vision_model(images).last_hidden_state
    queries = peer.query_tokens.expand(2, -1, -1)
    out = peer.qformer(query_embeds=queries, encoder_hidden_states=normed)
    want = peer.language_projection(out.last_hidden_state)
  close(tokens.vectors, want)


@pytest.mark.parametrize('instructed', [False, True])
def test_interfaces_of_blip2_and_instructblip(instructed):
  if instructed:
    settings = transformers.InstructBlipConfig(**config())
    peer = transformers.InstructBlipForConditionalGeneration(settings)
  else:
    settings = transformers.Blip2Config(**config(use_qformer_text_input=False))
    peer = transformers.Blip2ForConditionalGeneration(settings)
  randomize(peer)
  vocabulary = dict(vocab_size=VOCAB, max_positions=10) if instructed else {}
  interface = QFormerInterface(llm_dim=20, **SIZES, **vocabulary)
  context = Context(instruction=TEXT, instruction_mask=MASK)
  state = numpy_state(
    peer,
    drop=('language_model', 'vision_model.emb', 'vision_model.enc'),
    rename=lambda name: name.removeprefix('model.'),
  )
  rules = names.blip2_transformers_rules(instructed)
  params, unused = port(rules, state, interface, FEATURES, context)
  assert unused <= {'qformer.embeddings.position_ids'} and isinstance(interface, VisualInterface)
  tokens = jax.jit(interface.apply)({'params': params}, FEATURES, context)
  with torch.no_grad():
    features = peer.vision_model.post_layernorm(TORCH_FEATURES)
    queries = peer.query_tokens.expand(PAIRS, -1, -1)
    if instructed:
      mask = np.concatenate([np.ones((PAIRS, 3)), MASK], 1)
      out = peer.qformer(
        input_ids=TORCH_TEXT,
        attention_mask=torch.from_numpy(mask).long(),
        query_embeds=queries,
        encoder_hidden_states=features,
      )
    else:
      out = peer.qformer(query_embeds=queries, encoder_hidden_states=features)
    want = peer.language_projection(out.last_hidden_state[:, :3])
  close(tokens.vectors, want)
  assert tokens.mask.shape == (PAIRS, interface.num_vectors(6)) and tokens.mask.all()
  if instructed:
    with pytest.raises(ValueError, match='needs Context.instruction'):
      interface.apply({'params': params}, FEATURES)


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
