"""Single modules in both directions, and the functions for scripts.

What is exported is also read by transformers.
"""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from torch_folders import TOKENIZER, WHOLE, assert_same, contents, run, whole_variant, write

from lavit_jax.errors import UserError
from lavit_jax.models import lavit
from lavit_jax.porting import from_torch
from lavit_jax.porting import to_torch as write_torch
from lavit_jax.weights.store import folder
from lavit_jax.weights.torch import formats, name_tables, vocabulary_growth
from lavit_jax.weights.torch.descriptions import llama_config, unet_config, vae_config
from lavit_jax.weights.torch.mapping import to_torch


@pytest.fixture(scope='module', autouse=True)
def variant():
  with whole_variant():
    yield


@pytest.fixture
def llama_folder(states, tmp_path):
  """A LLaMA with the text's vocabulary only, as Hugging Face writes it."""
  text_size = WHOLE['text_vocab_size']
  state = {
    name: x[:text_size] if name in ('model.embed_tokens.weight', 'lm_head.weight') else x
    for name, x in states['llama'].items()
  }
  write(tmp_path / 'llama', 'model', state, 200_000)
  config = llama_config(lavit.build('whole').llama, text_size) | dict(torch_dtype='bfloat16')
  (tmp_path / 'llama' / 'config.json').write_text(json.dumps(config))
  folder.copy_tokenizer_files(TOKENIZER, tmp_path / 'llama')
  return tmp_path / 'llama'


def test_a_llama_keeps_its_vocabulary_and_gets_the_visual_tokens(llama_folder, states, tmp_path):
  conversion = run(llama_folder, tmp_path / 'checkpoint', variant=None)
  assert (conversion.kind, conversion.variant) == ('LLaMA', 'whole')
  tree = folder.load_params(tmp_path / 'checkpoint')['llama']
  text_size = WHOLE['text_vocab_size']
  total = lavit.build('whole').vocabulary.size
  assert tree['embedding'].shape == (total, 32) and tree['head'].shape == (32, total)
  assert folder.read_config(tmp_path / 'checkpoint')['metadata']['grown'] == vocabulary_growth.RULE
  for array, name in (
    (tree['embedding'], 'model.embed_tokens.weight'),
    (tree['head'].T, 'lm_head.weight'),
  ):
    text_rows = states['llama'][name][:text_size].astype(np.float32)
    np.testing.assert_array_equal(array[:text_size], text_rows)
    noise = np.random.default_rng(0).standard_normal((total - text_size, 32), np.float32)
    new_rows = text_rows.mean(0) + 0.1 * text_rows.std(0) * noise
    np.testing.assert_allclose(array[text_size:], new_rows, rtol=1e-2)  # rounded to bfloat16
  run(tmp_path / 'checkpoint', tmp_path / 'exported')
  config = json.loads((tmp_path / 'exported' / 'config.json').read_text())
  assert config['vocab_size'] == total
  assert (tmp_path / 'exported' / 'tokenizer.json').is_file()


def test_a_llama_as_it_is(llama_folder, tmp_path):
  run(llama_folder, tmp_path / 'checkpoint', variant=None, grow=False)
  assert folder.read_config(tmp_path / 'checkpoint')['metadata']['grown'] is None
  run(tmp_path / 'checkpoint', tmp_path / 'exported')
  weights, _ = contents(tmp_path / 'exported')
  expected, _ = contents(llama_folder)
  assert_same(weights['model'], expected['model'])


@pytest.mark.parametrize(('kind', 'prefix'), [('Stable Diffusion', ''), ('SDXL', 'highres_')])
def test_a_diffusers_folder(states, tmp_path, kind, prefix):
  model = lavit.build('whole')
  for name, description in (
    ('unet', unet_config(getattr(model, f'{prefix}unet'))),
    ('vae', vae_config(getattr(model, f'{prefix}vae'))),
  ):
    write(tmp_path / 'sd' / name, 'diffusion_pytorch_model', states[prefix + name])
    (tmp_path / 'sd' / name / 'config.json').write_text(json.dumps(description))
  (tmp_path / 'sd' / 'model_index.json').write_text('{}')
  conversion = run(tmp_path / 'sd', tmp_path / 'checkpoint', variant=None)
  assert conversion.kind == kind
  assert [item.module for item in conversion.items] == [f'{prefix}unet', f'{prefix}vae']
  run(tmp_path / 'checkpoint', tmp_path / 'exported')
  expected, expected_others = contents(tmp_path / 'sd')
  weights, others = contents(tmp_path / 'exported')
  others.pop(formats.EXPORT_INFO)
  assert others == expected_others
  for file, state in expected.items():
    assert_same(weights[file], state)


def test_old_names_of_the_autoencoder_come_back(states, tmp_path):
  from lavit_jax.weights.torch.names_diffusion import vae_rules

  model = lavit.build('whole')
  tree = name_tables.module_shapes(model, ['vae'])['vae']
  old = to_torch(
    vae_rules(model.vae, old_attention=True),
    jax.tree.map(lambda x: np.full(x.shape, 0.5, np.float32), tree),
  )
  write(tmp_path / 'sd' / 'vae', 'diffusion_pytorch_model', old)
  run(tmp_path / 'sd', tmp_path / 'checkpoint')
  assert folder.read_config(tmp_path / 'checkpoint')['metadata']['tables']['chosen'] == {'vae': 1}
  run(tmp_path / 'checkpoint', tmp_path / 'exported')
  assert contents(tmp_path / 'exported')[0]['vae/diffusion_pytorch_model'].keys() == old.keys()


def test_an_image_encoder_with_its_text_tower(states, tmp_path):
  state = {f'visual.{name}': x for name, x in states['vit'].items()} | {
    'text.token_embedding.weight': np.ones((2, 2)),
    'logit_scale': np.ones(()),
  }
  write(tmp_path, 'eva', state)
  run(tmp_path / 'eva.safetensors', tmp_path / 'checkpoint')
  run(tmp_path / 'checkpoint', tmp_path / 'exported')
  assert_same(contents(tmp_path / 'exported')[0]['visual_tokenizer/eva_vitg_psz14'], states['vit'])


def test_what_was_trained_here_gets_its_descriptions(tmp_path):
  model = lavit.build('whole')
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32),
    name_tables.module_shapes(model, name_tables.TABLES),
  )
  metadata = {'llama': {'stage': 'lm', 'steps': 7}}
  folder.save_params(tmp_path / 'checkpoint', 'whole', params, metadata, tokenizer=TOKENIZER)
  exported = tmp_path / 'exported'
  run(tmp_path / 'checkpoint', exported)
  config = json.loads((exported / 'language_model' / 'config.json').read_text())
  assert config['vocab_size'] == model.vocabulary.size
  assert (exported / 'language_model' / 'tokenizer.json').is_file()
  scheduler = exported / 'highres_pixel_decoding' / 'scheduler' / 'scheduler_config.json'
  assert scheduler.is_file()
  run(tmp_path / 'exported', tmp_path / 'again')
  jax.tree.map(np.testing.assert_array_equal, folder.load_params(tmp_path / 'again'), params)
  assert folder.read_config(tmp_path / 'again')['metadata']['llama'] == {'stage': 'lm', 'steps': 7}


def test_a_llama_from_python(llama_folder, states, tmp_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  total = lavit.build('whole').vocabulary.size
  text_size = WHOLE['text_vocab_size']
  run(llama_folder, tmp_path / 'checkpoint')  # which grows the vocabulary too
  params = from_torch(llama_folder, 'llama', variant='whole', dtype=None, grow=True)
  converted = folder.load_params(tmp_path / 'checkpoint', ['llama'], dtype=None)['llama']
  jax.tree.map(np.testing.assert_array_equal, params, converted)
  assert {x.dtype for x in jax.tree.leaves([params, converted])} == {np.dtype(ml_dtypes.bfloat16)}
  text_only = from_torch(llama_folder, 'llama', variant='whole')
  assert text_only['embedding'].shape == (text_size, 32)
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[-1])
  on_device = from_torch(
    llama_folder,
    'llama',
    variant='whole',
    dtype='float16',
    grow=True,
    shardings=lambda tree: jax.tree.map(lambda _: sharding, tree),
  )
  assert on_device['head'].shape == (32, total)
  assert {x.dtype for x in jax.tree.leaves(on_device)} == {np.dtype(np.float16)}

  write_torch(params, tmp_path / 'exported', 'llama', variant='whole')
  llama = transformers.LlamaForCausalLM.from_pretrained(tmp_path / 'exported', dtype=torch.bfloat16)
  assert llama.config.vocab_size == total
  head = states['llama']['lm_head.weight'][:text_size]
  assert torch.equal(
    llama.lm_head.weight[:text_size].view(torch.int16), torch.from_numpy(head.view(np.int16))
  )


def test_from_python(published, converted, states, tmp_path):
  params = from_torch(published, variant='whole')
  jax.tree.map(np.testing.assert_array_equal, params, folder.load_params(converted[1]))
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[-1])
  vit = from_torch(
    published / 'visual_tokenizer' / 'eva_vitg_psz14.safetensors',
    'vit',
    variant='whole',
    shardings=lambda tree: jax.tree.map(lambda _: sharding, tree),
  )
  assert {x.sharding for x in jax.tree.leaves(vit)} == {sharding}
  jax.tree.map(np.testing.assert_array_equal, vit, params['vit'])
  file = write_torch(vit, tmp_path / 'vit.safetensors', 'vit', variant='whole')
  assert_same(
    safetensors.numpy.load_file(file),
    {name: x.astype(np.float32) for name, x in states['vit'].items()},
  )
  with pytest.raises(UserError, match="unknown module 'vitt'"):
    from_torch(published, 'vitt', variant='whole')
