"""Tensors under other names: wrapped, prefixed, tied; files of other projects; long lists."""

import argparse
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tensors import save_tensors

from lavit_jax import cli
from lavit_jax.errors import UserError
from lavit_jax.inference.pipeline import Lavit
from lavit_jax.porting import from_torch
from lavit_jax.weights.store import folder
from lavit_jax.weights.torch import convert
from lavit_jax.weights.torch import files as torch_files
from lavit_jax.weights.torch.mapping import PortingError

ASSETS = pathlib.Path(cli.ASSETS)
TINY = ASSETS / 'tiny'
EVA = TINY / 'visual_tokenizer' / 'eva_vitg_psz14.safetensors'
LLAMA = dict(
  vocab_size=2048,
  hidden_size=160,
  intermediate_size=432,
  num_hidden_layers=4,
  num_attention_heads=5,
  num_key_value_heads=5,
  head_dim=32,
  rms_norm_eps=1e-5,
  rope_theta=1e4,
  max_position_embeddings=2048,
)


def assert_same(tree, other):
  jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.mark.parametrize(
  'prefix',
  [
    'module.',
    '_orig_mod.',
    'module._orig_mod.',
    'visual.',
    'visual.trunk.',
    'model.visual.',
    'visual_encoder.',
    '_orig_mod.visual.trunk.',
  ],
)
def test_prefixes_of_the_encoder(tmp_path, prefix):
  state = load_file(EVA)
  text = (
    {'text.token_embedding.weight': np.ones((2, 2)), 'logit_scale': np.ones(())}
    if 'visual' in prefix
    else {}
  )
  save_tensors(
    {**{prefix + name: x for name, x in state.items()}, **text}, tmp_path / 'eva.safetensors'
  )
  conversion = convert.plan_conversion(tmp_path / 'eva.safetensors', tmp_path / 'checkpoint')
  assert [item.tensors for item in conversion.items] == [
    len(state)
  ] and conversion.variant == 'tiny'
  others = [note for note in conversion.notes if '2 tensors of another model' in note]
  assert len(others) == (1 if text else 0)
  assert all('logit_scale' in note for note in others)
  assert_same(
    from_torch(tmp_path / 'eva.safetensors', 'vit', variant='tiny'),
    from_torch(EVA, 'vit', variant='tiny'),
  )


@pytest.mark.parametrize(
  'keys', [('model',), ('module',), ('state_dict',), ('state_dict', 'model')]
)
def test_checkpoints_of_training_scripts(tmp_path, keys):
  torch = pytest.importorskip('torch')
  content = {
    f'module.{name}': torch.from_numpy(x.astype(np.float32)) for name, x in load_file(EVA).items()
  }
  for key in keys:
    content = {
      'epoch': 3,
      'args': argparse.Namespace(lr=0.1),
      key: content,
      'optimizer': {'state': {}},
    }
  torch.save(content, tmp_path / 'eva.pth')
  assert_same(
    from_torch(tmp_path / 'eva.pth', 'vit', variant='tiny'), from_torch(EVA, 'vit', variant='tiny')
  )


def test_a_pickle_without_a_model_says_what_it_holds(tmp_path):
  torch = pytest.importorskip('torch')
  torch.save({'epoch': 3, 'net': {'x': torch.ones(2)}}, tmp_path / 'run.pth')
  with pytest.raises(
    UserError, match="'epoch' is a int .2 of 2 entries are not tensors.; save the state_dict"
  ):
    torch_files.load(tmp_path / 'run.pth')


def test_two_tensors_of_one_name(tmp_path):
  save_tensors(
    {'module.cls_token': np.ones(2), 'cls_token': np.zeros(2)}, tmp_path / 'eva.safetensors'
  )
  with pytest.raises(UserError, match='two tensors that are cls_token'):
    convert.plan_conversion(tmp_path / 'eva.safetensors', tmp_path / 'checkpoint')


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('model.diffusion_model.input_blocks.0.0.weight', 'StableDiffusionPipeline.from_single_file'),
    ('first_stage_model.encoder.down.0.block.0.conv1.weight', 'AutoencoderKL.from_single_file'),
    ('decoder.up.0.block.0.conv1.weight', 'AutoencoderKL.from_single_file'),
    ('layers.0.attention.wq.weight', 'convert_llama_weights_to_hf'),
    ('visual.transformer.resblocks.0.attn.in_proj_weight', 'EVA-CLIP'),
    ('base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight', 'merge_and_unload'),
    ('model.layers.0.self_attn.q_proj.qweight', 'quantized'),
  ],
)
def test_files_of_other_projects(tmp_path, name, message):
  save_tensors({name: np.ones((2, 2), np.float32)}, tmp_path / 'x.safetensors')
  with pytest.raises(UserError, match=message) as error:
    convert.plan_conversion(tmp_path / 'x.safetensors', tmp_path / 'checkpoint')
  assert '\n' not in str(error.value) and 'x.safetensors' in str(error.value)


def test_folders_of_other_projects(tmp_path):
  for name, file, message in (
    ('meta', 'consolidated.00.pth', 'convert_llama_weights_to_hf'),
    ('lora', 'adapter_config.json', 'merge_and_unload'),
    ('one', 'v1-5-pruned.ckpt', 'give the file itself'),
  ):
    (tmp_path / name).mkdir()
    (tmp_path / name / file).write_bytes(b'{}')
    with pytest.raises(UserError, match=message):
      convert.plan_conversion(tmp_path / name, tmp_path / 'checkpoint')


def test_a_long_list_is_cut(tmp_path):
  save_tensors(
    {f'strange.{i}.weight': x for i, x in enumerate(load_file(EVA).values())},
    tmp_path / 'eva.safetensors',
  )
  with pytest.raises(PortingError) as error:
    convert.plan_conversion(tmp_path / 'eva.safetensors', tmp_path / 'checkpoint', variant='tiny')
  lines = str(error.value).splitlines()
  strange = sum('strange' in problem and 'unmapped' in problem for problem in error.value.problems)
  assert strange == len(load_file(EVA)) and len(lines) < 20 and len(str(error.value)) < 3000
  assert f'  vit: unmapped: and {strange - 6} more' in lines


def make_llama(where, **over):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA | over))
  model.save_pretrained(where)
  return model


def run(src, dst, **options):
  conversion = convert.plan_conversion(src, dst, **options)
  conversion.run(lambda size: None)
  return conversion


def test_tied_embeddings(tmp_path):
  model = make_llama(tmp_path / 'src', tie_word_embeddings=True)
  files = load_file(tmp_path / 'src' / 'model.safetensors')
  assert 'lm_head.weight' not in files
  conversion = run(tmp_path / 'src', tmp_path / 'checkpoint', variant='tiny')
  assert any('lm_head.weight is not in the files' in note for note in conversion.notes)
  llama = folder.load_params(tmp_path / 'checkpoint')['llama']
  np.testing.assert_array_equal(llama['head'][:, :2048], model.lm_head.weight.detach().numpy().T)
  np.testing.assert_array_equal(llama['head'], llama['embedding'].T)  # the new rows too
  run(tmp_path / 'checkpoint', tmp_path / 'back')
  again = load_file(tmp_path / 'back' / 'model.safetensors')
  assert again.keys() == files.keys()
  run(tmp_path / 'src', tmp_path / 'text', variant='tiny', grow=False)
  run(tmp_path / 'text', tmp_path / 'text-back')
  again = load_file(tmp_path / 'text-back' / 'model.safetensors')
  assert again.keys() == files.keys() and all(
    np.array_equal(again[name], x) for name, x in files.items()
  )
  config = tmp_path / 'src' / 'config.json'
  config.write_text(json.dumps(json.loads(config.read_text()) | {'tie_word_embeddings': False}))
  with pytest.raises(PortingError, match='missing: lm_head.weight'):
    convert.plan_conversion(tmp_path / 'src', tmp_path / 'untied', variant='tiny')


def test_an_unsupported_vocabulary_names_the_supported_ones(tmp_path):
  make_llama(tmp_path / 'src', vocab_size=2049)
  with pytest.raises(
    PortingError, match='the vocabulary has 2049; supported are 2048 .* and 3074 '
  ):
    convert.plan_conversion(tmp_path / 'src', tmp_path / 'checkpoint', variant='tiny')


def test_one_layer_of_another_type(tmp_path):
  state = load_file(EVA)
  name = 'blocks.1.mlp.fc1.weight'
  state[name] = state[name].astype(np.float32) + np.float32(1e-6)
  save_tensors(state, tmp_path / 'eva.safetensors')
  with pytest.raises(
    PortingError,
    match=r'wrong dtype: blocks.*mlp.fc1.weight is .*, other layers of it are .*--dtype float32',
  ):
    convert.plan_conversion(tmp_path / 'eva.safetensors', tmp_path / 'checkpoint')
  run(tmp_path / 'eva.safetensors', tmp_path / 'checkpoint', dtype='float32')
  kernel = folder.load_params(tmp_path / 'checkpoint')['vit']['blocks']['mlp']['fc1']['kernel']
  np.testing.assert_array_equal(kernel[1], state[name].T)
  np.testing.assert_array_equal(kernel[0], state['blocks.0.mlp.fc1.weight'].astype(np.float32).T)
  assert_same(
    from_torch(tmp_path / 'eva.safetensors', 'vit', variant='tiny')['blocks']['mlp']['fc1'][
      'kernel'
    ],
    kernel,
  )


@pytest.mark.slow  # compiles captioning
def test_an_encoder_without_norm_and_head_captions(tmp_path):
  shutil.copytree(TINY, tmp_path / 'src')
  file = tmp_path / 'src' / 'visual_tokenizer' / 'eva_vitg_psz14.safetensors'
  save_tensors(
    {name: x for name, x in load_file(file).items() if not name.startswith(('norm.', 'head.'))},
    file,
  )
  run(tmp_path / 'src', tmp_path / 'checkpoint')
  image = ASSETS / 'demo' / '01.png'
  assert Lavit.from_pretrained(tmp_path / 'checkpoint').caption([image]) == Lavit.from_pretrained(
    TINY
  ).caption([image])


def test_an_encoder_without_norm_and_head_opens(tmp_path):
  save_tensors(
    {name: x for name, x in load_file(EVA).items() if not name.startswith(('norm.', 'head.'))},
    tmp_path / 'eva.safetensors',
  )
  run(tmp_path / 'eva.safetensors', tmp_path / 'checkpoint')
  assert 'head' not in Lavit.from_pretrained(tmp_path / 'checkpoint').params['vit']
  save_tensors(
    {name: x for name, x in load_file(EVA).items() if not name.startswith('blocks.0.norm1')},
    tmp_path / 'less.safetensors',
  )
  with pytest.raises(PortingError, match='missing: blocks.0.norm1'):
    convert.plan_conversion(tmp_path / 'less.safetensors', tmp_path / 'checkpoint2')
