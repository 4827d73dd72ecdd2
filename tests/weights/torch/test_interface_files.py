"""Files of other systems: recognized by their names, split into modules, and written back."""

import jax
import numpy as np
import pytest

from lavit_jax.models.clip_vit import ClipViT
from lavit_jax.models.interfaces.base import Context
from lavit_jax.models.interfaces.emu import EmuInterface
from lavit_jax.models.interfaces.gated_cross_attention import GatedLayers, RowImages
from lavit_jax.models.interfaces.projections import LinearProjection, MlpProjection
from lavit_jax.models.interfaces.qformer import QFormerInterface
from lavit_jax.models.interfaces.qformer_pretraining import QFormerPretraining
from lavit_jax.models.interfaces.resampler import PerceiverResampler
from lavit_jax.models.llama import Llama
from lavit_jax.models.vit import ViT
from lavit_jax.weights.torch import interface_files, names_blip2, names_interfaces
from lavit_jax.weights.torch.mapping import PortingError, from_state_dict, to_torch, torch_shapes
from lavit_jax.weights.torch.names_llama import llama_rules
from lavit_jax.weights.torch.rule_builders import nested_rules

FLOAT, INT = np.float32, np.int32
QFORMER = dict(num_queries=2, hidden_size=8, num_layers=4, num_heads=2, mlp_dim=12)
MODULES = dict(
  linear=LinearProjection(8),
  mlp=MlpProjection(8),
  resampler=PerceiverResampler(2, num_layers=2, num_heads=2, head_dim=4, mlp_dim=12),
  gated=GatedLayers(2, 8, 2, 4, 12, every=2),
  qformer=QFormerInterface(8, **QFORMER),
  instructed=QFormerInterface(8, **QFORMER, vocab_size=9, max_positions=5),
  pretraining=QFormerPretraining(**QFORMER, vocab_size=9, output_dim=4, max_positions=5),
  emu=EmuInterface(8, 2, hidden_size=8, num_layers=2, num_heads=2, head_dim=4, mlp_dim=12),
  llama=Llama(9, 8, 2, 2, 2, 4, 12),
  clip=ClipViT(16, 8, 6, 2, 2, 8),
  eva=ViT(16, 8, 6, 2, 2, 3, 8, 4),
)


def struct(*shape, dtype=FLOAT):
  return jax.ShapeDtypeStruct(shape, dtype)


X, TEXT, PIXELS = struct(1, 3, 6), struct(1, 3, dtype=INT), struct(1, 16, 16, 3)
INPUTS = dict(
  gated=(struct(1, 3, 8), RowImages(struct(1, 1, 2, 6), TEXT)),
  instructed=(X, Context(instruction=TEXT)),
  llama=(struct(1, 3, 8), TEXT, struct(1, 1, 3, 3, dtype=np.bool_)),
  clip=(PIXELS,),
  eva=(PIXELS,),
)


def shapes(name):
  module = MODULES[name]
  if name == 'pretraining':
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (1, 2)))
    inputs, options = (X, TEXT, TEXT, keys), dict(decode_id=8)
  else:
    inputs, options = INPUTS.get(name, (X,)), {}

  def init(*inputs):
    return module.init(jax.random.key(0), *inputs, **options)['params']

  return jax.eval_shape(init, *inputs)


def rules_of_llava_llama():
  return nested_rules('language_model.', '', llama_rules())


# form -> by module: which of MODULES it is, and its rules.
FORMS = {
  'llava_v1': dict(
    interface=('linear', names_interfaces.llava_linear_rules()), llama=('llama', llama_rules())
  ),
  'llava_v1.5': dict(
    interface=('mlp', names_interfaces.llava_mlp_rules()),
    llama=('llama', llama_rules()),
    tower=('clip', names_interfaces.llava_tower_rules(names_interfaces.LLAVA_TOWERS[0])),
  ),
  'llava_transformers': dict(
    interface=('mlp', names_interfaces.llava_transformers_rules()),
    llama=('llama', rules_of_llava_llama()),
    tower=('clip', names_interfaces.llava_tower_rules('vision_tower.vision_model.')),
  ),
  'openflamingo': dict(
    resampler=('resampler', names_interfaces.resampler_rules()),
    gated=('gated', names_interfaces.gated_rules('gpt_neox.layers', 2)),
  ),
  'blip2_stage1': dict(pretraining=('pretraining', names_blip2.blip2_pretraining_rules())),
  'blip2_retrieval': dict(
    pretraining=('pretraining', names_blip2.blip2_retrieval_rules()),
    tower=('eva', names_blip2.blip2_tower_rules()),
  ),
  'blip2': dict(interface=('qformer', names_blip2.blip2_rules('t5_proj'))),
  'instructblip': dict(interface=('instructed', names_blip2.blip2_rules('llm_proj', True))),
  'blip2_transformers': dict(
    interface=('qformer', names_blip2.blip2_transformers_rules()),
    tower=('eva', names_blip2.blip2_tower_rules()),
  ),
  'instructblip_transformers': dict(
    interface=('instructed', names_blip2.blip2_transformers_rules(True)),
    tower=('eva', names_blip2.blip2_tower_rules()),
  ),
  'emu': dict(
    interface=('emu', names_interfaces.emu_rules()),
    llama=('llama', names_interfaces.emu_llama_rules()),
    tower=('eva', names_interfaces.emu_tower_rules()),
  ),
}


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('dtype', [np.float32, np.float16])
def test_files_go_through_both_ways_bit_by_bit(form, dtype):
  rng = np.random.default_rng(0)
  states = {}
  for module, (name, rules) in FORMS[form].items():
    tensors = {}
    for tensor, shape in torch_shapes(rules, shapes(name)).items():
      tensors[tensor] = rng.normal(size=shape).astype(dtype)
    states[module] = tensors
  whole = interface_files.join_interface(form, states)
  whole['lang_encoder.transformer.wte.weight'] = np.ones(3)
  opened = interface_files.open_interface(whole)
  assert opened.form == form
  assert opened.others == ['lang_encoder.transformer.wte.weight']
  assert opened.tables.keys() == states.keys()
  back = {}
  for module, (name, _) in FORMS[form].items():
    like = jax.tree.map(lambda leaf: struct(*leaf.shape, dtype=dtype), shapes(name))
    tree = from_state_dict(opened.tables[module], opened.states[module], like)
    assert jax.tree.map(np.shape, tree) == jax.tree.map(np.shape, like)
    back[module] = to_torch(opened.tables[module], tree)
  again = interface_files.join_interface(form, back)
  del whole['lang_encoder.transformer.wte.weight']
  assert again.keys() == whole.keys()
  for name, tensor in whole.items():
    assert again[name].dtype == dtype and np.array_equal(again[name], tensor), name


def test_files_of_no_known_system():
  with pytest.raises(PortingError, match='not the weights of LLaVA.*for example, a.weight'):
    interface_files.open_interface({'a.weight': np.ones(2)})
  names = {'Qformer.bert.embeddings.LayerNorm.weight': np.ones(2)}
  with pytest.raises(PortingError, match='without opt_proj, t5_proj or llm_proj'):
    interface_files.open_interface(names)
