"""What packing reads of an interface, and LaVIT's own interface."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from programs import compiled

from lavit_jax import sharding
from lavit_jax.errors import UserError
from lavit_jax.models import lavit
from lavit_jax.models.clip_vit import ClipViT
from lavit_jax.models.interfaces.base import Context, LayeredInterface, VisualInterface
from lavit_jax.models.interfaces.lavit import LavitInterface
from lavit_jax.models.interfaces.projections import LinearProjection
from lavit_jax.models.interfaces.variants import INTERFACES, build_interface, build_tower
from lavit_jax.models.packing import pack_pairs
from lavit_jax.models.sequence import EMBED_ID, compact, embed_sources
from lavit_jax.models.vocabulary import Vocabulary


def test_lavit_gives_the_kept_vectors_of_understanding(golden):
  module = golden.modules['understanding']
  fields = ('hidden_size', 'num_layers', 'num_heads', 'mlp_dim', 'llm_dim')
  interface = LavitInterface(*(getattr(module, name) for name in fields))
  params = golden.params['understanding']
  x = golden.features
  keep = (np.arange(x.shape[1]) % 3 > 0).astype(np.float32)
  keep = np.stack([np.roll(keep, row) for row in range(len(x))])
  like = jax.eval_shape(interface.init, jax.random.key(0), x, Context(keep))['params']
  assert jax.tree.map(np.shape, like) == jax.tree.map(np.shape, params)
  vectors, mask = compact(module.apply({'params': params}, x, keep), keep)
  tokens = interface.apply({'params': params}, x, Context(keep))
  np.testing.assert_array_equal(tokens.vectors, vectors)
  np.testing.assert_array_equal(tokens.mask, mask)
  np.testing.assert_array_equal(tokens.lengths, keep.sum(1))
  with pytest.raises(ValueError, match='LavitInterface needs Context.keep'):
    interface.apply({'params': params}, x)


def test_tokens_of_any_interface_are_packed():
  """Two images of three vectors each stand between their brackets, in order."""
  interface = LinearProjection(5)
  features = np.random.default_rng(0).standard_normal((2, 3, 4), np.float32)
  tokens, _ = compiled(interface.init_with_output)(jax.random.key(0), features)
  text = np.full((2, 2), 7, np.int32)
  ones = np.ones(2, np.int32)
  rows = compiled(pack_pairs, 'vocabulary', 'num_rows', 'row_length')(
    text,
    2 * ones,
    np.ones((2, 2), np.float32),
    0 * ones,
    np.zeros(tokens.mask.shape, np.int32),
    tokens.lengths,
    vocabulary=Vocabulary(10, 4),
    num_rows=1,
    row_length=18,
  )
  embedded = compiled(embed_sources)(np.zeros((1, 18, 5), np.float32), rows.source, tokens.vectors)
  slots = np.flatnonzero(rows.source[0] != EMBED_ID)
  assert slots.tolist() == [1, 2, 3, 9, 10, 11]
  np.testing.assert_array_equal(embedded[0, slots], tokens.vectors.reshape(6, 5))


@pytest.mark.parametrize('sizes', ['tiny', 'published'])
@pytest.mark.parametrize('name', INTERFACES)
def test_every_interface_follows_the_protocol(name, sizes):
  """By shape alone; and every large parameter is split over a mesh."""
  variant = lavit.build('lavit_7b' if sizes == 'published' else 'tiny')
  tower = build_tower(name, variant.vit)
  width = variant.vit.hidden_size
  if sizes == 'published' and name in ('linear', 'mlp', 'resampler', 'flamingo'):
    tower = build_tower(name, ClipViT(224, 14, 1024, 24, 16, 4096))
    width = 1024
  rows = tower.num_features
  llama = variant.llama
  interface = build_interface(name, sizes, llama.hidden_size, llama.num_layers, remat='full')
  assert isinstance(interface, VisualInterface)
  assert isinstance(interface, LayeredInterface) != interface.in_sequence
  features = jax.ShapeDtypeStruct((2, rows, width), np.float32)
  context = Context(
    keep=jax.ShapeDtypeStruct((2, rows), np.float32),
    instruction=jax.ShapeDtypeStruct((2, 3), np.int32),
    instruction_mask=jax.ShapeDtypeStruct((2, 3), np.bool_),
  )
  tokens, variables = jax.eval_shape(
    functools.partial(interface.init_with_output, jax.random.key(0)), features, context
  )
  n = interface.num_vectors(rows)
  expected = variant.llama.hidden_size if interface.in_sequence else width
  assert tokens.vectors.shape == (2, n, expected)
  assert tokens.mask.shape == (2, n) and tokens.mask.dtype == bool
  mesh = AbstractMesh((2, 4, 2), sharding.AXES)
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
    spec = sharding.spec(sharding.path_name(path), leaf.shape, mesh)
    if leaf.size >= sharding.LARGE:
      assert any(spec), f'{path} is whole on every device'


def test_an_unknown_interface_is_named():
  with pytest.raises(UserError, match="unknown interface 'perceiver': choose one of lavit, linear"):
    build_interface('perceiver', 'tiny', 8, 2)
