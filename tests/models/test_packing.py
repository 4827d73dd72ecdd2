"""Packing against plain Python, and its losses against those of single pairs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.models.llama import Llama
from lavit_jax.models.packing import IMAGE_ID, pack_pairs, segment_mask
from lavit_jax.models.sequence import embed_sources
from lavit_jax.models.vocabulary import Vocabulary

VOCABULARY = Vocabulary(text_size=50, codebook_size=30)
BATCH = 9
TEXT = 6
VISUAL = 8
IMAGES = 3


def batch(seed):
  """Random pairs of all kinds, some without a word."""
  r = np.random.default_rng(seed)
  return dict(
    text=r.integers(3, 50, (BATCH, TEXT)),
    text_length=r.integers(0, TEXT + 1, BATCH),
    text_weight=r.random((BATCH, TEXT), np.float32).round(2),
    kind=r.integers(0, 3, BATCH),
    codes=r.integers(0, 30, (BATCH, VISUAL)),
    visual_length=r.integers(1, VISUAL + 1, BATCH),
  )


def cut_batch(seed):
  """`batch` with some texts cut: no token with a weight follows them."""
  pairs = batch(seed)
  r = np.random.default_rng(seed + 100)
  next_weight = np.where(r.random(BATCH) < 0.5, 0.0, 1.0)
  weight = np.concatenate([pairs['text_weight'], np.zeros((BATCH, 1), np.float32)], axis=1)
  np.put_along_axis(weight, pairs['text_length'][:, None], next_weight[:, None], axis=1)
  return {**pairs, 'text_weight': weight}


def chat_batch(seed):
  """`batch` with chats, of up to three images where the text says so, and other pairs."""
  pairs = batch(seed)
  r = np.random.default_rng(seed + 200)
  pairs['kind'] = r.integers(0, 4, BATCH)
  pairs['text'] = np.where(
    (pairs['kind'] == 3)[:, None] & (r.random((BATCH, TEXT)) < 0.4), IMAGE_ID, pairs['text']
  )
  pairs['text'] = np.where(np.cumsum(pairs['text'] == IMAGE_ID, axis=1) > IMAGES, 7, pairs['text'])
  pairs['codes'] = r.integers(0, 30, (BATCH, IMAGES, VISUAL))
  pairs['visual_length'] = r.integers(1, VISUAL + 1, (BATCH, IMAGES))
  return pairs


def chat_tokens(pairs, b, image_loss):
  """`pair_tokens` of a chat: text with images in it."""
  tokens = []
  images = 0
  num_words = pairs['text_length'][b]
  for i, weight in zip(pairs['text'][b, :num_words], pairs['text_weight'][b, :num_words]):
    if i != IMAGE_ID:
      tokens.append((int(i), -1, float(weight)))
      continue
    tokens.append((50, -1, float(weight)))
    first = (b * IMAGES + images) * VISUAL
    for j, c in enumerate(pairs['codes'][b, images, : pairs['visual_length'][b, images]]):
      tokens.append((52 + int(c), first + j, float(image_loss)))
    tokens.append((51, -1, float(image_loss)))
    images += 1
  begin = [] if tokens and tokens[0][0] == 50 else [(1, -1, 0.0)]
  last_weight = float(pairs['text_weight'][b, max(num_words - 1, 0)])
  return begin + tokens + [(2, -1, last_weight)]


def pair_tokens(pairs, b, image_loss, draw_features):
  """The tokens (id, source, weight) of pair b, in plain Python."""
  if pairs['kind'][b] == 3:
    return chat_tokens(pairs, b, image_loss)
  codes, lengths = pairs['codes'], pairs['visual_length']
  first = b * VISUAL
  if codes.ndim == 3:
    codes, lengths = codes[:, 0], lengths[:, 0]
    first *= IMAGES
  num_words = pairs['text_length'][b]
  kind = pairs['kind'][b]
  text = []
  for i, weight in zip(pairs['text'][b, :num_words], pairs['text_weight'][b, :num_words]):
    text.append((int(i), -1, float(weight)))
  image_weight = float(not draw_features) if kind == 1 else float(image_loss)
  has_next_weight = pairs['text_weight'].shape[1] > TEXT
  next_index = num_words if has_next_weight else max(num_words - 1, 0)
  next_weight = float(pairs['text_weight'][b, next_index])
  start_weight = image_weight * (next_weight if has_next_weight and kind == 1 else 1)
  is_feature = kind == 0 or draw_features
  image = [(50, -1, start_weight)]
  for i, c in enumerate(codes[b, : lengths[b]]):
    image.append((52 + int(c), first + i if is_feature else -1, image_weight))
  image.append((51, -1, image_weight))
  begin = [(1, -1, 0.0)]
  end = [(2, -1, image_weight if kind == 1 else next_weight)]
  return [image + text, text + image, begin + text][kind] + end


def reference(pairs, num_rows, row_length, image_loss, max_images, draw_features):
  """The packing of `pack_pairs` in plain Python.

  Returns rows of (id, source, position, segment, target, weight), and the overflow.
  """
  rows = [[] for _ in range(num_rows)]
  images = [0] * num_rows
  overflow = 0
  for b in range(BATCH):
    tokens = pair_tokens(pairs, b, image_loss, draw_features)
    following = [*tokens[1:], (0, -1, 0.0)]
    has_image = sum(token[0] == 50 for token in tokens)
    fits = [len(row) + len(tokens) <= row_length for row in rows]
    if max_images is not None:
      fits = [fit and n + has_image <= max_images for fit, n in zip(fits, images)]
    if not any(fits):
      overflow += 1
      continue
    images[fits.index(True)] += has_image
    row = rows[fits.index(True)]
    for position, (token, target) in enumerate(zip(tokens, following)):
      row.append((token[0], token[1], position, b + 1, target[0], target[2]))
  empty = (0, -1, 0, 0, 0, 0.0)
  return [row + [empty] * (row_length - len(row)) for row in rows], overflow


@functools.cache
def packer(num_rows, row_length, image_loss=False, max_images=None, draw_features=False):
  """`pack_pairs` for these sizes, which compiles once for all tests."""
  return jax.jit(
    functools.partial(
      pack_pairs,
      vocabulary=VOCABULARY,
      num_rows=num_rows,
      row_length=row_length,
      image_loss=image_loss,
      max_images=max_images,
      draw_features=draw_features,
    )
  )


@pytest.mark.parametrize('draw', [batch, cut_batch])
@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize(
  'num_rows, row_length, options',
  [
    (9, 17, (False, None, False)),
    (4, 25, (True, None, False)),
    (2, 16, (False, None, False)),
    (9, 34, (False, 1, False)),
    (9, 17, (False, None, True)),
  ],
)
def test_pack_equals_plain_python(seed, num_rows, row_length, options, draw):
  pairs = draw(seed)
  packed = packer(num_rows, row_length, *options)(**pairs)
  rows, overflow = reference(pairs, num_rows, row_length, *options)
  for field, expected in zip(packed, np.moveaxis(np.array(rows), -1, 0)):
    np.testing.assert_array_equal(field, expected.astype(field.dtype))
  assert packed.overflow == overflow
  assert overflow == 0 or num_rows < 9  # a row for each pair is always enough ...
  assert overflow > 0 or num_rows > 2  # ... and two short rows never are
  segments = np.array(rows)[..., 3]
  np.testing.assert_allclose(packed.used, (segments > 0).mean(), atol=1e-6)


@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize('options', [(True, None, False), (False, 3, False)])
def test_chats_are_packed_with_all_else(seed, options):
  """The images of a chat stand in its text, in order; those that it does not name do not count."""
  pairs = chat_batch(seed)
  packed = packer(9, TEXT + IMAGES * (VISUAL + 1) + 2, *options)(**pairs)
  rows, overflow = reference(pairs, 9, packed.ids.shape[1], *options)
  for field, expected in zip(packed, np.moveaxis(np.array(rows), -1, 0)):
    np.testing.assert_array_equal(field, expected.astype(field.dtype))
  assert packed.overflow == overflow == 0


def test_packed_losses_equal_those_of_each_pair_alone():
  llama = Llama(
    VOCABULARY.size,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    mlp_dim=48,
  )
  example = jnp.zeros((1, 2, 32)), jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 1, 2, 2), bool)
  params = jax.jit(llama.init)(jax.random.key(0), *example)
  params['params']['embedding'] *= 50.0  # to the scale of the features
  features = jax.random.normal(jax.random.key(1), (BATCH, VISUAL, 32))
  pairs = batch(3)

  @jax.jit
  def losses(packed, features):
    embeddings = embed_sources(
      llama.apply(params, packed.ids, method='embed'), packed.source, features
    )
    hidden, _ = llama.apply(params, embeddings, packed.positions, segment_mask(packed.segments))
    log_probs = jax.nn.log_softmax(llama.apply(params, hidden, method='logits'))
    return -jnp.take_along_axis(log_probs, packed.targets[..., None], -1)[..., 0]

  packed = packer(4, 34, True)(**pairs)
  together = losses(packed, features)
  assert packed.overflow == 0
  assert any(len(set(np.asarray(row)) - {0}) > 1 for row in packed.segments)  # rows are shared
  pack_one = packer(1, 17, True)
  for b in range(BATCH):
    alone = pack_one(**{k: v[b : b + 1] for k, v in pairs.items()})
    expected = losses(alone, features[b : b + 1])[alone.segments > 0]
    np.testing.assert_allclose(together[packed.segments == b + 1], expected, atol=1e-5)


def test_gradient_reaches_only_the_features_of_image_to_text():
  pairs = batch(0)
  packed = packer(9, 17)(**pairs)
  text = jnp.ones(packed.ids.shape + (4,))
  gradient = jax.grad(lambda f: embed_sources(text, packed.source, f).sum())(
    jnp.ones((BATCH, VISUAL, 4))
  )
  used = (pairs['kind'] == 0)[:, None] & (np.arange(VISUAL) < pairs['visual_length'][:, None])
  np.testing.assert_array_equal(gradient, np.broadcast_to(used[..., None], gradient.shape))


def test_the_mask_matches_its_picture():
  """Queries down, keys across; an x where a query sees a key."""
  lines = ('x....', 'xx...', '..x..', '..xx.', '....x')
  expected = np.array([list(line) for line in lines]) == 'x'
  segments = jnp.array([[1, 1, 2, 2, 0]])
  np.testing.assert_array_equal(segment_mask(segments)[0, 0], expected)
