"""Sizes that are read off names and shapes, and the files of trainers with them."""

import jax
import numpy as np
import pytest
import torch
from torch_folders import assert_same, run

from lavit_jax.models import lavit
from lavit_jax.weights.store import folder
from lavit_jax.weights.torch import interface_files, interface_sizes, name_tables
from lavit_jax.weights.torch.mapping import torch_shapes
from lavit_jax.weights.torch.matching import vocabulary_shapes

CLIP_336 = dict(
  architecture='clip', image_size=336, hidden_size=1024, num_layers=24, mlp_dim=4096, patch_size=14
)
LLAMA_13B = dict(
  text_vocab_size=32003,
  hidden_size=5120,
  num_layers=40,
  num_heads=40,
  num_kv_heads=40,
  mlp_dim=13824,
)
# form -> the options of its names, the modules of a file, and the settings of the checkpoint.
PUBLISHED = {
  'llava_transformers': (
    dict(tower='vision_tower.vision_model.'),
    ['vit', 'interface', 'llama'],
    dict(
      interface=dict(name='mlp'),
      vit=CLIP_336,
      llama=dict(text_vocab_size=32064),
      chat=dict(template='vicuna'),
    ),
  ),
  'openflamingo': (
    dict(layers='transformer.blocks', every=4),
    ['interface'],
    dict(interface=dict(name='flamingo'), vit={**CLIP_336, 'image_size': 224}),
  ),
  'blip2': (
    dict(projection='opt_proj'),
    ['interface'],
    dict(interface=dict(name='qformer', llm_dim=2560)),
  ),
  'emu': ({}, ['vit', 'interface', 'llama'], dict(interface=dict(name='emu'), llama=LLAMA_13B)),
}


@pytest.mark.parametrize(
  'form',
  [
    'llava_transformers',
    'openflamingo',
    pytest.param('blip2', marks=pytest.mark.slow),
    pytest.param('emu', marks=pytest.mark.slow),
  ],
)
def test_settings_of_the_published_sizes(form):
  options, modules, settings = PUBLISHED[form]
  model = lavit.build('lavit_7b', settings=settings)
  state = {}
  tables = interface_files.form_tables(form, **options)
  shapes = name_tables.module_shapes(model, modules)
  for module, tree in shapes.items():
    if module == 'llama':
      tree = {**tree, **vocabulary_shapes(tree, model.vocabulary.text_size)}
    for name, shape in torch_shapes(tables[module], tree).items():
      state[name] = jax.ShapeDtypeStruct(shape, np.float16)
  file = interface_files.open_interface(state)
  assert (file.form, file.others) == (form, [])
  assert interface_sizes.choose_variant(file) == 'lavit_7b'
  got = interface_sizes.read_sizes(file, {}, 'lavit_7b')
  assert lavit.build('lavit_7b', settings=got).settings == model.settings


# --- OpenFlamingo and Emu ----------------------------------------------------------------------

FLAMINGO = {
  'interface': dict(name='flamingo', llm_dim=24, llm_layers=6, num_heads=1, head_dim=64, every=2),
  'vit': dict(architecture='clip', hidden_size=64, num_heads=1),
}
EMU = {
  'interface': dict(name='emu', num_layers=1, mlp_dim=12),
  'vit': dict(image_size=16, hidden_size=88, num_layers=1, num_heads=1, head_dim=88, mlp_dim=12),
  'llama': dict(
    hidden_size=128, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=128, mlp_dim=12
  ),
}


def random_state(form, settings, modules, **options):
  """Random tensors under the names of a form, without a head of the image encoder."""
  tables = interface_files.form_tables(form, **options)
  rng = np.random.default_rng(0)
  state = {}
  for module, tree in name_tables.module_shapes(
    lavit.build('tiny', settings=settings), modules
  ).items():
    for name, shape in torch_shapes(tables[module], tree).items():
      state[name] = torch.from_numpy(rng.normal(size=shape).astype(np.float32))
  return state


@pytest.mark.parametrize('form', ['openflamingo', 'emu'])
def test_files_of_a_trainer_and_back(form, tmp_path):
  if form == 'emu':
    state = random_state('emu', EMU, ['vit', 'interface', 'llama'])
    assert 'decoder.lm.stu_regress_head.weight' in state
    other = 'decoder.lm.model.layers.0.self_attn.rotary_emb.inv_freq'
  else:
    options = dict(layers='transformer.blocks', every=2)
    state = random_state('openflamingo', FLAMINGO, ['interface'], **options)
    assert 'lang_encoder.transformer.blocks.1.gated_cross_attn_layer.attn_gate' in state
    other = 'lang_encoder.transformer.wte.weight'
  state[other] = torch.ones(5, 24)
  src = tmp_path / 'checkpoint.pt'
  wrapped = {f'module.{name}': x for name, x in state.items()}
  torch.save({'model_state_dict': wrapped, 'epoch': 3}, src)
  plan = run(src, tmp_path / 'checkpoint', None, grow=False)
  assert plan.kind == form
  assert ('1 tensors of other models' in ' '.join(plan.notes)) == (form == 'openflamingo')
  settings = folder.read_settings(tmp_path / 'checkpoint')
  if form == 'openflamingo':
    assert settings['interface']['every'] == 2 and settings['interface']['llm_layers'] == 6
  else:
    assert settings['llama']['num_heads'] == 1 and settings['interface']['num_tokens'] == 16
  run(tmp_path / 'checkpoint', tmp_path / 'again', None, pickles=True)
  again = torch.load(tmp_path / 'again' / 'checkpoint.pt', weights_only=True)
  assert_same(
    {name: x.numpy() for name, x in again.items()}, {name: x.numpy() for name, x in state.items()}
  )
