"""Whole folders in both directions: every module at tiny size, with what real folders have beside.

The folders are also read by transformers and diffusers, and by the functions for scripts.
"""

import errno
import json
import shutil
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from torch_folders import DTYPES, TOKENIZER, WHOLE, assert_same, contents, run, write

from lavit_jax.errors import UserError
from lavit_jax.models import lavit
from lavit_jax.porting import from_torch
from lavit_jax.porting import to_torch as write_torch
from lavit_jax.weights.store import folder
from lavit_jax.weights.torch import (
  convert,
  formats,
  import_folder,
  name_tables,
  vocabulary_growth,
)
from lavit_jax.weights.torch.descriptions import (
  descriptions,
  llama_config,
  unet_config,
  vae_config,
)
from lavit_jax.weights.torch.digests import sha256
from lavit_jax.weights.torch.mapping import PortingError, to_torch
from lavit_jax.weights.torch.safetensors_files import SafetensorsWriter


@pytest.fixture(scope='module', autouse=True)
def variant():
  lavit.VARIANTS['whole'] = WHOLE
  yield
  del lavit.VARIANTS['whole']


@pytest.fixture(scope='module')
def states():
  """By module and torch name: an array."""
  model = lavit.build('whole')
  rng = np.random.default_rng(0)
  arrays = {}
  for module, tree in name_tables.module_shapes(model, name_tables.TABLES).items():
    dtype = DTYPES.get(module, np.float32)
    params = jax.tree.map(
      lambda x, dtype=dtype: rng.normal(size=x.shape).astype(dtype), name_tables.as_tree(tree)
    )
    arrays[module] = to_torch(name_tables.TABLES[module](model)[0], params)
  return arrays


@pytest.fixture(scope='module')
def published(states, tmp_path_factory):
  """A LaVIT folder with all modules, an overlay, shards, several dtypes and computed tensors."""
  src = tmp_path_factory.mktemp('published') / 'LaVIT'
  encoder = {**states['tokenizer'], **states['understanding']}
  for name in encoder:  # the overlay replaces all of these but one
    if name.startswith(('causal_encoder', 'vit_proj')):
      encoder[name] = encoder[name] + 1
  visual = {
    name: x for name, x in states['understanding'].items() if name != 'causal_encoder.norm.bias'
  }
  llama = {
    **states['llama'],
    'model.layers.0.self_attn.rotary_emb.inv_freq': np.linspace(0, 1, 8, dtype=np.float32),
  }
  write(src / 'visual_tokenizer', 'eva_vitg_psz14', states['vit'])
  write(src / 'visual_tokenizer', 'tokenizer_encoder', encoder)
  write(src / 'visual_tokenizer', 'tokenizer_decoder', states['decoder'])
  write(src / 'visual_tokenizer', 'highres_tokenizer_decoder', states['highres_decoder'])
  write(src / 'language_model', 'model', llama, 200_000)
  write(src / 'language_model', 'visual_weight', visual)
  for prefix in ('', 'highres_'):
    for module in ('unet', 'vae'):
      where = src / f'{prefix}pixel_decoding' / module
      write(where, 'diffusion_pytorch_model', states[prefix + module])
  write(src / 'pixel_decoding', 'uncond_embeddings', states['uncond_embeddings'])
  write(
    src / 'pixel_decoding' / 'safety_checker',
    'model',
    {
      **states['safety_checker'],
      'vision_model.vision_model.embeddings.position_ids': np.arange(5)[None],
    },
  )
  model = lavit.build('whole')
  described = [name for name in name_tables.TABLES if name not in ('vit', 'uncond_embeddings')]
  for path, content in descriptions(model, described, model.vocabulary.size).items():
    (src / path).parent.mkdir(parents=True, exist_ok=True)
    (src / path).write_text(json.dumps(content))
  folder.copy_tokenizer_files(TOKENIZER, src / 'language_model')
  return src


def test_a_whole_folder_comes_back_bit_for_bit(published, tmp_path):
  conversion = run(published, tmp_path / 'checkpoint', variant=None)
  assert conversion.direction == 'torch -> orbax'
  assert (conversion.kind, conversion.variant) == ('LaVIT', 'whole')
  assert {item.module for item in conversion.items} == set(name_tables.TABLES)
  back = run(tmp_path / 'checkpoint', tmp_path / 'exported')
  assert back.direction == 'orbax -> torch'
  assert {item.module for item in back.items} == set(name_tables.TABLES)
  expected, expected_others = contents(published)
  weights, others = contents(tmp_path / 'exported')
  export_info = others.pop(formats.EXPORT_INFO)
  assert export_info['variant'] == 'whole'
  assert others == expected_others
  assert weights.keys() == expected.keys()
  for file, state in expected.items():
    assert_same(weights[file], state)


def test_the_config_of_a_checkpoint(published, states, tmp_path):
  run(published, tmp_path / 'checkpoint')
  config = folder.read_config(tmp_path / 'checkpoint')
  metadata = config['metadata']
  assert config['variant'] == 'whole'
  assert metadata['tables']['version'] == name_tables.VERSION
  shards = sorted(published.glob('language_model/model-*'))
  assert len(shards) > 1
  files = metadata['source']['files']
  assert {f'language_model/{file.name}' for file in shards} < files.keys()
  assert files[f'language_model/{shards[0].name}'] == f'sha256:{sha256(shards[0])}'
  assert config['parts']['vit']['dtype'] == 'float16'
  assert config['parts']['llama']['dtype'] == 'bfloat16'
  params = folder.load_params(tmp_path / 'checkpoint')
  merger_norm = params['tokenizer']['merger']['norm']
  overlaid_norm = params['understanding']['merger']['norm']
  in_overlay = states['understanding']['causal_encoder.norm.weight']
  np.testing.assert_array_equal(overlaid_norm['scale'], in_overlay)
  np.testing.assert_array_equal(overlaid_norm['bias'], merger_norm['bias'])  # not in the overlay
  assert not np.array_equal(overlaid_norm['scale'], merger_norm['scale'])
  tokenizer = tmp_path / 'checkpoint' / 'tokenizer' / 'tokenizer.json'
  assert tokenizer.read_bytes() == (TOKENIZER / 'tokenizer.json').read_bytes()
  assert sorted(file.name for file in tmp_path.iterdir()) == ['checkpoint']


def test_pickles_on_request(published, tmp_path):
  torch = pytest.importorskip('torch')
  run(published, tmp_path / 'checkpoint')
  run(tmp_path / 'checkpoint', tmp_path / 'exported', pickles=True)
  assert not list((tmp_path / 'exported' / 'visual_tokenizer').glob('*.safetensors'))
  state = torch.load(
    tmp_path / 'exported' / 'visual_tokenizer' / 'tokenizer_encoder.bin', weights_only=True
  )
  expected = safetensors.numpy.load_file(
    published / 'visual_tokenizer' / 'tokenizer_encoder.safetensors'
  )
  assert state.keys() == expected.keys() and all(
    np.array_equal(state[name].numpy(), expected[name]) for name in expected
  )
  bare = torch.load(
    tmp_path / 'exported' / 'pixel_decoding' / 'uncond_embeddings.bin', weights_only=True
  )
  assert isinstance(bare, torch.Tensor) and bare.shape == (1, 3, 16)
  run(tmp_path / 'exported', tmp_path / 'again')
  for module, tree in folder.load_params(tmp_path / 'checkpoint').items():
    again = folder.load_params(tmp_path / 'again', [module])[module]
    jax.tree.map(np.testing.assert_array_equal, again, tree)


def test_types_change_on_request(published, tmp_path):
  run(published, tmp_path / 'checkpoint', dtype='bfloat16')
  modules = folder.read_config(tmp_path / 'checkpoint')['parts']
  assert {module['dtype'] for module in modules.values()} == {'bfloat16'}
  run(tmp_path / 'checkpoint', tmp_path / 'exported', dtype='float32')
  weights, _ = contents(tmp_path / 'exported')
  assert {x.dtype for x in weights['language_model/model'].values()} == {np.dtype(np.float32)}


def test_all_faults_of_all_modules_are_listed_at_once(published, tmp_path):
  broken = tmp_path / 'broken'
  shutil.copytree(published, broken)
  state = safetensors.numpy.load_file(broken / 'visual_tokenizer' / 'tokenizer_decoder.safetensors')
  state['in_proj.wieght'] = state.pop('in_proj.weight')
  write(broken / 'visual_tokenizer', 'tokenizer_decoder', state)
  state = safetensors.numpy.load_file(
    broken / 'pixel_decoding' / 'vae' / 'diffusion_pytorch_model.safetensors'
  )
  state['encoder.conv_in.bias'] = state['encoder.conv_in.bias'][:-1]
  del state['decoder.conv_in.bias']
  write(broken / 'pixel_decoding' / 'vae', 'diffusion_pytorch_model', state)
  with pytest.raises(PortingError) as error:
    convert.plan_conversion(broken, tmp_path / 'checkpoint', variant='whole')
  for line in (
    "variant 'whole' do not fit (4 problems)",
    'decoder: unmapped: no rule names in_proj.wieght (nearest known: in_proj.weight)',
    'decoder: missing: in_proj.weight',
    'vae: wrong shape: encoder.conv_in.bias is [7]',
    'vae: missing: decoder.conv_in.bias',
  ):
    assert line in str(error.value), line
  with pytest.raises(PortingError, match='wrong shape'):
    convert.plan_conversion(broken, tmp_path / 'checkpoint')  # no variant fits
  (broken / 'visual_tokenizer' / 'tokenizer_decoder.safetensors').unlink()
  shutil.copy(
    published / 'pixel_decoding' / 'vae' / 'diffusion_pytorch_model.safetensors',
    broken / 'pixel_decoding' / 'vae',
  )
  del state['encoder.conv_in.bias']
  write(broken / 'pixel_decoding' / 'vae', 'diffusion_pytorch_model', state)
  run(broken, tmp_path / 'checkpoint', allow_missing='conv_in.bias$')
  config = folder.read_config(tmp_path / 'checkpoint')
  assert config['metadata']['allow_missing'] == 'conv_in.bias$'
  assert 'decoder' not in config['parts']


def test_nothing_is_overwritten_unasked(published, tmp_path):
  run(published, tmp_path / 'checkpoint')
  with pytest.raises(UserError, match='exists; choose another place, or --force'):
    convert.plan_conversion(published, tmp_path / 'checkpoint')
  run(published, tmp_path / 'checkpoint', force=True)
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'notes').write_text('mine')
  with pytest.raises(UserError, match='is not a checkpoint of lavit_jax'):
    run(tmp_path / 'checkpoint', tmp_path / 'mine', force=True)
  assert (tmp_path / 'mine' / 'notes').read_text() == 'mine'
  run(tmp_path / 'checkpoint', tmp_path / 'exported')
  run(tmp_path / 'checkpoint', tmp_path / 'exported', force=True)
  with pytest.raises(UserError, match='lie within each other'):
    convert.plan_conversion(published, published / 'checkpoint')


def test_an_interrupted_conversion_leaves_nothing_that_looks_complete(
  published, tmp_path, monkeypatch
):
  def stop(size):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    convert.plan_conversion(published, tmp_path / 'checkpoint').run(stop)
  assert not list(tmp_path.iterdir())
  (tmp_path / '.checkpoint.partial' / 'parts').mkdir(parents=True)  # as after a kill
  run(published, tmp_path / 'checkpoint')
  assert [file.name for file in tmp_path.iterdir()] == ['checkpoint']


def test_a_faulty_disk_is_detected(published, tmp_path, monkeypatch):
  monkeypatch.setattr(
    import_folder, 'checksums', lambda folder, paths: ((path, 1, 0) for path in paths)
  )
  with pytest.raises(UserError, match='is not on the disk as it was written'):
    run(published, tmp_path / 'checkpoint')
  assert not (tmp_path / 'checkpoint').exists()


def test_a_full_disk_is_named(published, tmp_path, monkeypatch):
  run(published, tmp_path / 'checkpoint')

  def full(*_):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(SafetensorsWriter, 'write', full)
  with pytest.raises(UserError, match='cannot write .*exported: No space left on device'):
    run(tmp_path / 'checkpoint', tmp_path / 'exported')
  assert [file.name for file in tmp_path.iterdir()] == ['checkpoint']


def test_damage_of_the_source_is_named(published, tmp_path):
  run(published, tmp_path / 'checkpoint')
  data = max(
    (tmp_path / 'checkpoint' / 'parts' / 'unet').rglob('*/d/*'), key=lambda x: x.stat().st_size
  )
  data.write_bytes(bytes(b ^ 1 for b in data.read_bytes()[:40_000]) + data.read_bytes()[40_000:])
  with pytest.raises(UserError, match='parts/unet is truncated or damaged'):
    run(tmp_path / 'checkpoint', tmp_path / 'exported')
  assert not (tmp_path / 'exported').exists()


def test_unknown_folders_are_refused(tmp_path):
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'hollow' / 'language_model').mkdir(parents=True)
  for name, fault in (
    ('empty', 'is not a known folder'),
    ('nowhere', 'does not exist'),
    ('hollow', 'holds no weights'),
  ):
    with pytest.raises(UserError, match=fault):
      convert.plan_conversion(tmp_path / name, tmp_path / 'out')


def test_what_is_printed(published, tmp_path, capsys):
  from lavit_jax.cli import main

  arguments = ['--src', str(published), '--dst', str(tmp_path / 'checkpoint'), '--variant', 'whole']
  assert main(['convert', *arguments, '--dry-run']) == 0
  output = capsys.readouterr().out
  assert 'torch -> orbax: LaVIT' in output
  assert 'highres_unet' in output
  assert not list(tmp_path.iterdir())
  assert main(['convert', *arguments]) == 0
  assert 'read back and found right' in capsys.readouterr().out
  assert main(['convert', *arguments]) == 2
  assert '--force' in capsys.readouterr().err
  assert main(['inspect', str(tmp_path / 'checkpoint')]) == 0
  output = ' '.join(capsys.readouterr().out.split())
  for text in ('variant whole', 'merger:', 'sha256:', '"overlay": "'):
    assert text in output
  assert main(['inspect', str(published)]) == 0
  assert 'LaVIT' in capsys.readouterr().out


# --- Single modules --------------------------------------------------------------------------


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


# --- From a script ---------------------------------------------------------------------------


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


def test_from_python(published, states, tmp_path):
  params = from_torch(published, variant='whole')
  run(published, tmp_path / 'checkpoint')
  jax.tree.map(np.testing.assert_array_equal, params, folder.load_params(tmp_path / 'checkpoint'))
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


def test_bin_files_that_cannot_be_written(tmp_path, monkeypatch):
  """Refused before anything is written: PyTorch is missing, or a checkpoint is the result."""
  tiny = TOKENIZER.parent
  with pytest.raises(UserError, match='leave out --bin'):
    convert.plan_conversion(tiny, tmp_path / 'checkpoint', pickles=True)
  convert.plan_conversion(tiny, tmp_path / 'checkpoint').run(lambda *_: None)
  convert.plan_conversion(tmp_path / 'checkpoint', tmp_path / 'exported', pickles=True)
  monkeypatch.setitem(sys.modules, 'torch', None)
  with pytest.raises(UserError, match='need PyTorch'):
    convert.plan_conversion(tmp_path / 'checkpoint', tmp_path / 'exported', pickles=True)
