"""`lavit convert` of the forms of LLaVA, BLIP-2, OpenFlamingo and CLIP, both ways."""

import json

import jax
import numpy as np
import pytest
import torch
import transformers
from interface_peers import (
  CLIP,
  IDS,
  LLAMA,
  PIXELS,
  assert_same_folders,
  logits_of,
  peer_logits,
  read_images,
)
from safetensors.numpy import load_file
from torch_folders import TOKENIZER, assert_same, run, write
from torch_peers import close, randomize

from lavit_jax.apps import conversion
from lavit_jax.data.chat import TEMPLATES
from lavit_jax.errors import UserError
from lavit_jax.inference.pipeline import Lavit
from lavit_jax.models import lavit
from lavit_jax.weights.store import folder
from lavit_jax.weights.torch.convert import plan_conversion


def llava_config(**text):
  return transformers.LlavaConfig(
    vision_config=transformers.CLIPVisionConfig(**CLIP),
    text_config=transformers.LlamaConfig(**LLAMA, **text),
    image_token_index=2051,
    image_seq_length=4,
  )


@pytest.fixture(scope='module')
def llava(tmp_path_factory):
  """(the model of transformers, its folder in shards, and the checkpoint of it)."""
  peer = randomize(transformers.LlavaForConditionalGeneration(llava_config()), scale=0.2)
  where = tmp_path_factory.mktemp('llava')
  peer.save_pretrained(where / 'published', max_shard_size='300KB')
  assert len(list((where / 'published').glob('model-*.safetensors'))) > 1
  folder.copy_tokenizer_files(TOKENIZER, where / 'published')
  plan = run(where / 'published', where / 'checkpoint', None)
  assert plan.kind == 'llava_transformers'
  return peer, where / 'published', where / 'checkpoint'


def test_llava_of_transformers_and_back(llava, tmp_path):
  _, published, checkpoint = llava
  run(checkpoint, tmp_path / 'again', None)
  assert_same_folders(tmp_path / 'again', published)


def test_a_converted_llava_computes_the_same(llava):
  peer, _, checkpoint = llava
  model = lavit.build('lavit_7b', settings=folder.read_settings(checkpoint))
  assert model.llama.rope_theta == 500 and model.llama.num_kv_heads == 1
  params = folder.load_params(checkpoint)
  vectors = read_images(model, params, PIXELS)
  got = logits_of(model, params['llama'], vectors, IDS)
  close(got[..., : LLAMA['vocab_size']], peer_logits(peer, 2051, 4))


@pytest.mark.slow
def test_a_converted_llava_writes_captions(llava):
  model = Lavit.from_pretrained(llava[2])
  assert model.chat_template == TEMPLATES['vicuna']
  image = np.zeros((16, 16, 3), np.uint8)
  captions = model.caption([image], num_beams=1, min_new_tokens=1, max_new_tokens=2)
  assert len(captions) == 1 and isinstance(captions[0], str)


def llava_of_the_authors(peer, mlp):
  """The names of LLaVA's own files, without the image encoder, from those of transformers."""
  state = {name: x.detach().numpy() for name, x in peer.state_dict().items()}
  renamed = {}
  for name, x in state.items():
    if 'language_model' in name or name.startswith('lm_head'):
      renamed[name.replace('model.language_model.', 'model.')] = x
    elif 'multi_modal_projector' in name and (mlp or 'linear_1' in name):
      layer = name.split('linear_')[1]
      short = {'1': '0', '2': '2'}[layer[0]] + layer[1:] if mlp else layer[2:]
      renamed[f'model.mm_projector.{short}'] = x
  return renamed


@pytest.mark.parametrize('form', ['llava_v1', 'llava_v1.5'])
def test_llava_of_its_authors(llava, form, tmp_path):
  state = llava_of_the_authors(llava[0], form == 'llava_v1.5')
  src = tmp_path / 'published'
  write(src, 'model', {name: x.astype(np.float16) for name, x in state.items()}, 200_000)
  config = dict(LLAMA, model_type='llava', mm_hidden_size=64, mm_vision_select_layer=-2)
  (src / 'config.json').write_text(json.dumps(config))
  plan = run(src, tmp_path / 'checkpoint', None)
  assert plan.kind == form
  assert any(note.startswith('vit: the file has no image encoder') for note in plan.notes)
  run(tmp_path / 'checkpoint', tmp_path / 'again', None)
  assert_same_folders(tmp_path / 'again', src)
  settings = folder.read_settings(tmp_path / 'checkpoint')
  assert settings['llama']['rope_theta'] == 500
  assert settings['interface']['name'] == ('mlp' if form == 'llava_v1.5' else 'linear')
  assert settings['chat']['template'] == ('vicuna' if form == 'llava_v1.5' else 'llava_v1')
  config['mm_vision_select_feature'] = 'cls_patch'
  (src / 'config.json').write_text(json.dumps(config))
  with pytest.raises(UserError, match='mm_vision_select_feature="cls_patch"'):
    plan_conversion(src, tmp_path / 'other')


def test_a_projector_by_itself_as_a_pickle(llava, tmp_path, capsys):
  state = llava_of_the_authors(llava[0], True)
  state = {name: x for name, x in state.items() if 'mm_projector' in name}
  src = tmp_path / 'mm_projector.bin'
  torch.save({name: torch.from_numpy(x) for name, x in state.items()}, src)
  conversion.inspect(src)
  printed = capsys.readouterr().out
  assert 'llava_v1.5' in printed and 'interface: 4 tensors in its files, 2,160 par' in printed
  run(src, tmp_path / 'checkpoint', None)
  assert list(folder.read_config(tmp_path / 'checkpoint')['parts']) == ['interface']
  run(tmp_path / 'checkpoint', tmp_path / 'again', None, pickles=True)
  again = torch.load(tmp_path / 'again' / 'mm_projector.bin', weights_only=True)
  assert_same({name: x.numpy() for name, x in again.items()}, state)


@pytest.mark.slow
def test_the_image_encoder_of_llava_by_itself(tmp_path):
  peer = randomize(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**CLIP)))
  peer.save_pretrained(tmp_path / 'published')
  run(tmp_path / 'published', tmp_path / 'checkpoint', None)
  run(tmp_path / 'checkpoint', tmp_path / 'again', None)
  assert_same_folders(tmp_path / 'again', tmp_path / 'published')
  model = lavit.build('lavit_7b', settings=folder.read_settings(tmp_path / 'checkpoint'))
  params = folder.load_params(tmp_path / 'checkpoint')['vit']
  got = jax.jit(model.vit.apply)({'params': params}, PIXELS)
  with torch.no_grad():
    pixels = torch.from_numpy(PIXELS.transpose(0, 3, 1, 2).copy())
    close(got, peer(pixels, output_hidden_states=True).hidden_states[-1])


def test_faults_of_a_llava_are_listed(llava, tmp_path):
  state = {}
  for file in llava[1].glob('*.safetensors'):
    state |= load_file(file)
  del state['vision_tower.encoder.layers.1.mlp.fc1.bias']
  state['language_model.model.norm.weight'] = np.zeros(7, np.float32)
  state['multi_modal_projector.linear_3.weight'] = np.zeros(7, np.float32)
  write(tmp_path / 'faulty', 'model', state)
  content = json.loads((llava[1] / 'config.json').read_text())
  (tmp_path / 'faulty' / 'config.json').write_text(json.dumps(content))
  with pytest.raises(UserError) as error:
    plan_conversion(tmp_path / 'faulty', tmp_path / 'checkpoint')
  assert 'vit: missing: vision_tower.encoder.layers.1.mlp.fc1.bias' in str(error.value)
  assert 'llama: wrong shape: language_model.model.norm.weight is [7]' in str(error.value)
  content['vision_config']['hidden_act'] = 'gelu'
  (tmp_path / 'faulty' / 'config.json').write_text(json.dumps(content))
  with pytest.raises(UserError, match='hidden_act="gelu".*choose a checkpoint with quick_gelu'):
    plan_conversion(tmp_path / 'faulty', tmp_path / 'checkpoint')


# --- BLIP-2 and InstructBLIP -------------------------------------------------------------------

INSTRUCTED = pytest.param(True, marks=pytest.mark.slow)
VISION = dict(
  hidden_size=88,
  intermediate_size=20,
  num_hidden_layers=2,
  num_attention_heads=2,
  image_size=16,
  patch_size=8,
)
QFORMER = dict(
  vocab_size=30,
  hidden_size=64,
  intermediate_size=20,
  num_hidden_layers=2,
  num_attention_heads=2,
  encoder_hidden_size=88,
  max_position_embeddings=10,
)


def blip2(instructed, text):
  prefix = 'InstructBlip' if instructed else 'Blip2'
  config = getattr(transformers, f'{prefix}Config')(
    vision_config=VISION,
    qformer_config=dict(QFORMER),
    text_config=text.to_dict(),
    num_query_tokens=3,
    image_token_index=text.vocab_size - 1,
  )
  peer = getattr(transformers, f'{prefix}ForConditionalGeneration')(config)
  return clear_key_biases(randomize(peer, scale=0.2))


def clear_key_biases(peer):
  for name, x in peer.named_parameters():
    if name.endswith('qkv.bias'):
      x.data[len(x) // 3 : 2 * len(x) // 3] = 0  # EVA has none
  return peer


def opt():
  return transformers.OPTConfig(
    vocab_size=40,
    hidden_size=24,
    word_embed_proj_dim=24,
    ffn_dim=20,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=32,
  )


@pytest.mark.parametrize('instructed', [False, INSTRUCTED])
def test_blip2_of_transformers_and_back(instructed, tmp_path):
  """The language model of BLIP-2 is OPT, which travels; that of InstructBLIP is a LLaMA."""
  text = transformers.LlamaConfig(**LLAMA) if instructed else opt()
  blip2(instructed, text).save_pretrained(tmp_path / 'published')
  folder.copy_tokenizer_files(TOKENIZER, tmp_path / 'published')
  plan = run(tmp_path / 'published', tmp_path / 'checkpoint', None)
  assert plan.kind == ('instructblip_transformers' if instructed else 'blip2_transformers')
  modules = ['interface', 'vit', 'llama'] if instructed else ['interface', 'vit']
  config = folder.read_config(tmp_path / 'checkpoint')
  assert list(config['parts']) == modules
  model = lavit.build(config['variant'], settings=config['settings'])
  assert (model.interface.num_heads, model.vit.num_heads, model.tower.cut) == (2, 2, 0)
  run(tmp_path / 'checkpoint', tmp_path / 'again', None)
  assert_same_folders(tmp_path / 'again', tmp_path / 'published')
  if instructed:
    with pytest.raises(UserError, match='reads the instruction'):
      Lavit.from_pretrained(tmp_path / 'checkpoint').caption([np.zeros((16, 16, 3), np.uint8)])


def lavis_name(name):
  """A name of transformers' Blip2 in the files of LAVIS."""
  for transformers_name, lavis in (
    ('vision_model.post_layernorm', 'ln_vision'),
    ('language_projection', 'llm_proj'),
    ('attention.attention.', 'attention.self.'),
    ('qformer.layernorm', 'Qformer.bert.embeddings.LayerNorm'),
    ('qformer.embeddings.layernorm', 'Qformer.bert.embeddings.LayerNorm'),
    ('qformer.', 'Qformer.bert.'),
  ):
    name = name.replace(transformers_name, lavis)
  return name.replace('crossattention.attention.', 'crossattention.self.')


@pytest.mark.parametrize('instructed', [False, INSTRUCTED])
def test_blip2_of_its_authors(instructed, tmp_path):
  state = {}
  for name, x in blip2(instructed, transformers.LlamaConfig(**LLAMA)).state_dict().items():
    name = lavis_name(name.removeprefix('model.'))
    if not name.startswith(('vision_model', 'language_model', 'lm_head')):
      state[name] = x
  src = tmp_path / 'blip2_pretrained.pth'
  state.pop('Qformer.bert.embeddings.position_ids', None)
  torch.save({'model': state, 'config': {}}, src)
  plan = run(src, tmp_path / 'checkpoint', None)
  assert plan.kind == ('instructblip' if instructed else 'blip2')
  run(tmp_path / 'checkpoint', tmp_path / 'again', None, pickles=True)
  again = torch.load(tmp_path / 'again' / src.name, weights_only=True)
  assert list(again) == ['model']
  assert_same(
    {name: x.numpy() for name, x in again['model'].items()},
    {name: x.numpy() for name, x in state.items()},
  )
  run(tmp_path / 'again', tmp_path / 'twice', None)
  settings = folder.read_settings(tmp_path / 'checkpoint')
  assert settings['interface']['llm_dim'] == 24 and settings['vit'] == {'hidden_size': 88}
  assert folder.read_settings(tmp_path / 'twice') == settings
