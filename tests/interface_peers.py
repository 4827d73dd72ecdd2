"""Small folders of other systems, and what they compute, for the tests of their conversion."""

import jax
import numpy as np
import torch
from torch_folders import assert_same, contents

PIXELS = np.random.default_rng(1).normal(size=(2, 16, 16, 3)).astype(np.float32)
IDS = np.array([[1, 5, 9, 4], [1, 7, 3, 2]])
CLIP = dict(
  hidden_size=64,
  intermediate_size=24,
  num_hidden_layers=2,
  num_attention_heads=2,
  image_size=16,
  patch_size=8,
  projection_dim=4,
)
LLAMA = dict(
  vocab_size=2052,
  hidden_size=24,
  intermediate_size=20,
  num_hidden_layers=2,
  num_attention_heads=2,
  num_key_value_heads=1,
  rope_theta=500.0,
)


def assert_same_folders(again, published):
  weights, others = contents(again)
  want, want_others = contents(published)
  others.pop('lavit_jax.json')
  assert weights.keys() == want.keys() and others == want_others
  for stem, state in want.items():
    assert_same(weights[stem], state)


def read_images(model, params, pixels):
  """Normalized pixels -> vectors of the language model."""

  @jax.jit
  def program(params):
    features = model.tower.features_of_pixels(params['vit'], pixels)
    return model.interface.apply({'params': params['interface']}, features).vectors

  return program(params)


def logits_of(model, params, vectors, ids):
  """Logits with the vectors before the words."""

  @jax.jit
  def program(params, vectors):
    llama = model.llama.clone(vocab_size=len(params['embedding']))
    words = llama.apply({'params': params}, ids, method='embed')
    hidden = jax.numpy.concatenate([vectors, words], 1)
    length = hidden.shape[1]
    positions = jax.numpy.broadcast_to(jax.numpy.arange(length), hidden.shape[:2])
    mask = jax.numpy.tril(jax.numpy.ones((length, length), bool))[None, None]
    out, _ = llama.apply({'params': params}, hidden, positions, mask)
    return llama.apply({'params': params}, out, method='logits')

  return program(params, vectors)


def peer_logits(peer, image_id, num_vectors):
  ids = np.concatenate([np.full((2, num_vectors), image_id), IDS], 1)
  images = torch.from_numpy(PIXELS.transpose(0, 3, 1, 2).copy())
  with torch.no_grad():
    return peer(input_ids=torch.from_numpy(ids), pixel_values=images).logits
