import jax
import ml_dtypes
import numpy as np
import pytest

from lavit_jax.errors import UserError
from lavit_jax.weights.torch.mapping import (
  PortingError,
  from_state_dict,
  make_plan,
  to_torch,
  torch_shapes,
)
from lavit_jax.weights.torch.name_rules import TRANSFORMS, NameRule, contiguous

RULES = [
  NameRule('embed', 'embed', 'unbatch'),
  NameRule('layers.{i}.fc.weight', 'blocks/fc/kernel', 'linear'),
  NameRule('layers.{i}.fc.bias', 'blocks/fc/bias'),
  NameRule('head.weight', 'head/kernel', 'linear', optional=True),
  NameRule('other.weight', None),
]
LIKE = {
  'embed': jax.ShapeDtypeStruct((5, 4), np.float32),
  'blocks': {
    'fc': {
      'kernel': jax.ShapeDtypeStruct((3, 4, 6), np.float32),
      'bias': jax.ShapeDtypeStruct((3, 6), np.float32),
    }
  },
  'head': {'kernel': jax.ShapeDtypeStruct((4, 2), np.float32)},
}


def file(drop=(), **extra):
  """A file that fits, less some names, plus others."""
  rng = np.random.default_rng(0)
  shapes = {'embed': (1, 5, 4), 'head.weight': (2, 4)}
  for n in range(3):
    shapes |= {f'layers.{n}.fc.weight': (6, 4), f'layers.{n}.fc.bias': (6,)}
  state = {
    name: rng.normal(size=shape).astype(np.float32)
    for name, shape in shapes.items()
    if name not in drop
  }
  return state | extra


def problems(state, rules=RULES, like=LIKE):
  with pytest.raises(PortingError) as error:
    from_state_dict(rules, state, like)
  return str(error.value)


def test_both_directions():
  state = file()
  tree = from_state_dict(RULES, state, LIKE)
  assert jax.tree.map(np.shape, tree) == jax.tree.map(lambda x: x.shape, LIKE)
  assert np.array_equal(tree['blocks']['fc']['kernel'][2], state['layers.2.fc.weight'].T)
  assert np.array_equal(tree['embed'], state['embed'][0])
  back = to_torch(RULES, tree)
  assert back.keys() == state.keys() and all(np.array_equal(back[k], state[k]) for k in state)
  assert torch_shapes(RULES, LIKE) == {k: x.shape for k, x in state.items()}


SHAPES = {  # of one torch array, and of its leaf
  'copy': ((6, 4), (6, 4)),
  'linear': ((6, 4), (4, 6)),
  'conv': ((6, 4, 3, 2), (3, 2, 4, 6)),
  'conv1x1_to_linear': ((6, 4, 1, 1), (4, 6)),
  'qkv': ((6, 4), (3, 4, 2)),
  'kv': ((6, 4), (2, 4, 3)),
  'qkv_bias': ((6,), (3, 2)),
  'unbatch': ((1, 5, 4), (5, 4)),
}


@pytest.mark.parametrize('name', TRANSFORMS)
def test_transforms_are_bijections(name):
  shape, expected = SHAPES[name]
  x = np.arange(np.prod(shape)).reshape(shape)
  leaf = TRANSFORMS[name].to_flax(x)
  assert np.array_equal(TRANSFORMS[name].to_torch(leaf), x)
  assert leaf.shape == expected
  if name == 'qkv':
    assert np.array_equal(leaf[1], x[2:4].T)  # the keys' projection
  if name == 'kv':
    assert np.array_equal(leaf[1], x[3:].T)  # the values' projection


def test_a_leaf_may_stack_every_other_layer():
  rules = [NameRule('layer.{2i}.w', 'even'), NameRule('layer.{2i+1}.w', 'odd')]
  like = {name: jax.ShapeDtypeStruct((2, 3), np.float32) for name in ('even', 'odd')}
  state = {f'layer.{i}.w': np.full(3, i, np.float32) for i in range(4)}
  tree = from_state_dict(rules, state, like)
  assert tree['even'][:, 0].tolist() == [0, 2]
  assert tree['odd'][:, 0].tolist() == [1, 3]
  back = to_torch(rules, tree)
  assert back.keys() == state.keys() and all(np.array_equal(back[k], state[k]) for k in state)
  assert 'no place for layer.4.w' in problems(state | {'layer.4.w': np.zeros(3)}, rules, like)


@pytest.mark.parametrize('shape', [(), (5,), (40, 3), (3, 40, 5), (2, 3, 17, 33)])
def test_views_are_laid_out(shape):
  x = np.arange(np.prod(shape, dtype=int)).reshape(shape)
  assert contiguous(x.T).flags.c_contiguous and np.array_equal(contiguous(x.T), x.T)


def test_types_follow_the_model():
  state = {name: x.astype(ml_dtypes.bfloat16) for name, x in file().items()}
  assert {x.dtype for x in jax.tree.leaves(from_state_dict(RULES, state, LIKE))} == {
    np.dtype(np.float32)
  }


def test_optional_rows_and_names_of_other_parts():
  tree = from_state_dict(RULES, file(drop=['head.weight'], **{'other.weight': np.ones(1)}), LIKE)
  assert 'head' not in tree and 'embed' in tree
  assert 'head.weight' not in to_torch(RULES, tree)


def test_an_optional_stack_is_whole_or_absent():
  rows = [row._replace(optional=True) for row in RULES[:4]]
  assert list(from_state_dict(rows, {'embed': np.ones((1, 5, 4))}, LIKE)) == ['embed']
  message = problems(file(drop=['layers.1.fc.bias']), rows)
  assert 'missing: layers.1.fc.bias' in message
  assert 'fills no leaf at all' in problems({}, rows)


def test_every_offender_is_named_with_its_nearest():
  state = file(
    drop=['layers.1.fc.weight', 'embed'],
    **{
      'layers.1.fc.wieght': np.ones((6, 4)),
      'layers.3.fc.bias': np.ones(6),
      'head.weight': np.ones((3, 4)),
      'stranger': np.ones(1),
    },
  )
  message = problems(state).splitlines()
  assert '(6 problems)' in message[0]
  assert {line.strip() for line in message[1:]} == {
    'unmapped: no rule names layers.1.fc.wieght (nearest known: layers.1.fc.weight)',
    'unmapped: no rule names stranger',
    'unexpected: the model has no place for layers.3.fc.bias (fewer layers?)',
    'missing: embed',
    'missing: layers.1.fc.weight (nearest known: layers.1.fc.wieght)',
    'wrong shape: head.weight is [3, 4], the model expects [2, 4]',
  }
  assert issubclass(PortingError, UserError)


def test_a_stack_has_one_dtype_of_the_right_kind():
  half = {name: x.astype(np.float16) if name.endswith('bias') else x for name, x in file().items()}
  assert {path: x.dtype for path, x in make_plan(RULES, half, LIKE).leaves.items()} == {
    'embed': np.float32,
    'blocks/fc/kernel': np.float32,
    'blocks/fc/bias': np.float16,
    'head/kernel': np.float32,
  }
  assert make_plan(RULES, half, LIKE).stacked == {'blocks/fc/kernel', 'blocks/fc/bias'}
  message = problems(
    half | {'layers.1.fc.bias': np.ones(6, np.float32), 'embed': np.ones((1, 5, 4), np.int32)}
  )
  assert 'wrong dtype: layers.1.fc.bias is float32, other layers of it are float16' in message
  assert 'wrong dtype: embed is int32, the model expects float32' in message


def test_a_pattern_allows_missing_names():
  state = file(drop=['embed', 'layers.1.fc.bias'])
  with pytest.raises(PortingError, match='missing: layers.1.fc.bias') as error:
    make_plan(RULES, state, LIKE, allow_missing='embed|bias')  # of a stack only the whole
  assert 'missing: embed' not in str(error.value)
  state = {name: x for name, x in state.items() if 'bias' not in name}
  assert sorted(make_plan(RULES, state, LIKE, allow_missing='embed|bias').leaves) == [
    'blocks/fc/kernel',
    'head/kernel',
  ]


def test_leaves_are_transformed_one_by_one():
  tree = from_state_dict(
    RULES, file(), LIKE, transform_leaf=lambda path, array: (path, array.shape)
  )
  assert tree['blocks']['fc']['bias'] == ('blocks/fc/bias', (3, 6))


def test_a_leaf_that_the_model_lacks_is_unexpected():
  like = {k: v for k, v in LIKE.items() if k not in ('head', 'embed')}
  message = problems(file(), like=like)
  assert 'unexpected: the model has no place for head.weight' in message
  assert 'unexpected: embed belongs to leaf embed, which the model does not have' in message


def test_tables_are_checked_too():
  assert 'duplicate: leaf embed is claimed by embed and twin' in problems(
    file(), [*RULES, NameRule('twin', 'embed')]
  )
  like = LIKE | {'extra': LIKE['embed']}
  assert 'duplicate: embed is claimed by leaves embed and extra' in problems(
    file(), [*RULES, NameRule('embed', 'extra')], like
  )
  assert 'unmapped: no rule names leaf extra' in problems(file(), like=like)
  tree = from_state_dict(RULES, file(), LIKE)
  with pytest.raises(PortingError, match='no rule names leaf extra'):
    to_torch(RULES, tree | {'extra': np.ones(1)})
  del tree['embed']
  with pytest.raises(PortingError, match='embed belongs to leaf embed'):
    to_torch(RULES, tree)
