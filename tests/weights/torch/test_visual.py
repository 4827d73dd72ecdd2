"""The published visual files at full size, by shape only; and golden ones that lack something."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lavit_jax.models.lavit import build
from lavit_jax.weights.torch import names_visual
from lavit_jax.weights.torch.mapping import PortingError, from_state_dict, torch_shapes

DATA = pathlib.Path(__file__).parents[2] / 'data'
FILES = {
  name.split('/')[1]: shapes
  for name, shapes in json.loads((DATA / 'lavit_state_dict_shapes.json').read_text()).items()
}


def like(module, *shapes):
  """The parameter tree of a module as structs; inputs by shape."""
  inputs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
  return jax.eval_shape(module.init, jax.random.key(0), *inputs)['params']


@pytest.fixture(scope='module')
def full_size():
  """By module: name rules and full-size parameter tree."""
  model = build('lavit_7b')
  x = ((1, 256, 1408), jnp.float32)
  keep = ((1, 256), jnp.float32)
  codes = ((1, 256, 32), jnp.float32)
  mask = ((1, 256), jnp.bool_)
  return {
    'vit': (names_visual.vit_rules(), like(model.vit, ((1, 224, 224, 3), jnp.float32))),
    'tokenizer': (names_visual.tokenizer_rules(), like(model.tokenizer, x)),
    'understanding': (names_visual.understanding_rules(), like(model.understanding, x, keep)),
    'decoder': (names_visual.decoder_rules(1), like(model.decoder, codes, mask)),
    'highres_decoder': (names_visual.decoder_rules(2), like(model.highres_decoder, codes, mask)),
  }


@pytest.mark.parametrize(
  ('file', 'modules', 'millions'),
  [
    ('eva_vitg_psz14.bin', ['vit'], 1012.6),
    ('tokenizer_encoder.bin', ['tokenizer', 'understanding'], 409.8),
    ('tokenizer_decoder.bin', ['decoder'], 404.1),
    ('highres_tokenizer_decoder.bin', ['highres_decoder'], 414.0),
  ],
)
def test_full_size_names_and_shapes(full_size, file, modules, millions):
  """Every published name is a leaf and every leaf a published name, of the same shape."""
  shapes = {}
  for module in modules:
    shapes |= torch_shapes(*full_size[module])
  published = {name: tuple(shape) for name, shape in FILES[file].items()}
  assert shapes == published
  assert round(sum(map(np.prod, shapes.values())) / 1e6, 1) == millions


def test_the_encoder_file_may_lack_tensors_of_another_module(golden):
  """`tokenizer_encoder` without vit_proj is a whole tokenizer, and no `understanding`."""
  state = load_file(DATA / 'golden' / 'tokenizer_encoder.safetensors')
  visual = {name: state.pop(name) for name in ('vit_proj.weight', 'vit_proj.bias')}
  from_state_dict(names_visual.tokenizer_rules(), state, golden.params['tokenizer'])
  with pytest.raises(PortingError, match=r'(?s)missing: vit_proj.weight.*missing: vit_proj.bias'):
    from_state_dict(names_visual.understanding_rules(), state, golden.params['understanding'])
  visual['causal_encoder.norm.bias'] = np.full(64, 3.0)  # the overlay of stage 2
  tree = from_state_dict(
    names_visual.understanding_rules(), state | visual, golden.params['understanding']
  )
  assert (tree['merger']['norm']['bias'] == 3).all() and 'vit_proj' in tree


def test_vit_without_its_head_still_gives_features(golden):
  state = load_file(DATA / 'golden' / 'eva_vit.safetensors')
  headless = {name: x for name, x in state.items() if not name.startswith(('norm.', 'head.'))}
  tree = from_state_dict(names_visual.vit_rules(), headless, golden.params['vit'])
  assert not {'norm', 'head'} & tree.keys()
  features = golden.modules['vit'].apply(
    {'params': tree}, golden.io['images'].transpose(0, 2, 3, 1)
  )
  np.testing.assert_allclose(features, golden.io['vit_features'], atol=1e-4)
