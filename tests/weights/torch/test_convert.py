"""Whole folders there and back: every part at tiny size, with the things that real folders have beside their weights."""

import errno
import json
import pathlib
import shutil
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from nano import NANO

from lavit_jax.errors import UserError
from lavit_jax.models import lavit, vit
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

WORDS = pathlib.Path(lavit.__file__).parents[1] / 'assets' / 'tiny' / 'language_model'
GOLDEN_FOLDER = pathlib.Path(__file__).parents[2] / 'data' / 'golden'
WHOLE = {  # every part that a published folder may have
  **NANO,
  'highres_decoder': dict(num_layers=1, context_dims=(16, 24), pooled_dim=20),
  'highres_unet': dict(
    block_out_channels=(8, 16),
    layers_per_block=1,
    down_block_attention=(False, True),
    transformer_layers=(1, 2),
    num_heads=(2, 2),
    cross_attention_dim=40,
    norm_num_groups=4,
    use_linear_projection=True,
    addition_time_embed_dim=8,
    pooled_dim=20,
  ),
  'highres_vae': dict(
    block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, scaling_factor=0.5
  ),
  'safety_checker': dict(
    image_size=16,
    patch_size=8,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    mlp_dim=24,
    output_dim=12,
  ),
  'uncond_rows': 3,
}
DTYPES = {'vit': np.float16, 'llama': ml_dtypes.bfloat16, 'unet': np.float16}


GOLDEN = {  # of tests/data/golden: config.json and language_model.json
  'text_vocab_size': 100,
  'unet': {**NANO['unet'], 'cross_attention_dim': 24},
  'vae': NANO['vae'],
  'uncond_rows': NANO['uncond_rows'],
  'vit': dict(
    image_size=56,
    patch_size=14,
    hidden_size=64,
    num_layers=3,
    num_heads=4,
    head_dim=16,
    mlp_dim=279,
    output_dim=32,
  ),
  'tokenizer': dict(
    hidden_size=64, num_layers=2, num_heads=4, mlp_dim=279, codebook_size=128, code_dim=8
  ),
  'decoder': dict(num_layers=2, context_dims=(24,)),
  'highres_decoder': dict(num_layers=2, context_dims=(24, 40), pooled_dim=40),
  'llama': dict(
    hidden_size=48, num_layers=3, num_heads=4, num_kv_heads=4, head_dim=12, mlp_dim=128
  ),
}
GOLDEN_FILES = {  # part: file of the published folder, its name among the golden ones
  'vit': ('visual_tokenizer/eva_vitg_psz14', 'eva_vit'),
  'tokenizer': ('visual_tokenizer/tokenizer_encoder', 'tokenizer_encoder'),
  'understanding': ('visual_tokenizer/tokenizer_encoder', 'tokenizer_encoder'),
  'decoder': ('visual_tokenizer/tokenizer_decoder', 'tokenizer_decoder'),
  'highres_decoder': ('visual_tokenizer/highres_tokenizer_decoder', 'highres_tokenizer_decoder'),
  'llama': ('language_model/model', 'language_model'),
}


@pytest.fixture(scope='module', autouse=True)
def variant():
  known = {'whole': WHOLE, 'golden': GOLDEN}
  lavit.VARIANTS.update(known)
  yield
  for name in known:
    del lavit.VARIANTS[name]


@pytest.fixture(scope='module')
def states():
  """part -> torch name -> array."""
  model, rng = lavit.build('whole'), np.random.default_rng(0)
  trees = name_tables.module_shapes(model, name_tables.TABLES)
  return {
    part: to_torch(
      name_tables.TABLES[part](model)[0],
      jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(DTYPES.get(part, np.float32)),
        name_tables.as_tree(tree),
      ),
    )
    for part, tree in trees.items()
  }


@pytest.fixture(scope='module')
def published(states, tmp_path_factory):
  """A LaVIT folder, as whole and as mixed as they come."""
  src = tmp_path_factory.mktemp('published') / 'LaVIT'
  encoder = {
    **states['tokenizer'],
    **states['understanding'],
  }  # the merger and vit_proj of this file are replaced in part
  encoder = {
    name: x + 1 if name.startswith(('causal_encoder', 'vit_proj')) else x
    for name, x in encoder.items()
  }
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
    for part in ('unet', 'vae'):
      write(
        src / f'{prefix}pixel_decoding' / part, 'diffusion_pytorch_model', states[prefix + part]
      )
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
  described = [part for part in name_tables.TABLES if part not in ('vit', 'uncond_embeddings')]
  for path, content in descriptions(model, described, model.vocabulary.size).items():
    (src / path).parent.mkdir(parents=True, exist_ok=True)
    (src / path).write_text(json.dumps(content))
  folder.copy_tokenizer_files(WORDS, src / 'language_model')
  return src


def write(where, stem, state, shard_bytes=10**9):
  with SafetensorsWriter(where, stem, state, shard_bytes) as writer:
    for name, array in state.items():
      writer.write(name, array)


def run(src, dst, variant='whole', **options):
  job = convert.plan_conversion(src, dst, variant=variant, **options)
  moved = []
  job.run(moved.append)
  assert sum(moved) > 0
  return job


def contents(where):
  """relative path of the folder -> torch name -> array, of all weights below; and the other files."""
  weights, others = {}, {}
  for file in sorted(pathlib.Path(where).rglob('*')):
    if file.suffix == '.safetensors':
      stem = file.name.split('-0')[0].removesuffix('.safetensors')
      weights.setdefault(str(file.parent.relative_to(where) / stem), {}).update(
        safetensors.numpy.load_file(file)
      )
    elif file.is_file() and not file.name.endswith('.index.json'):
      others[str(file.relative_to(where))] = (
        json.loads(file.read_text()) if file.suffix == '.json' else file.read_bytes()
      )
  return weights, others


def same(state, wanted):
  assert state.keys() == wanted.keys()
  for name, x in wanted.items():
    assert state[name].dtype == x.dtype and np.array_equal(state[name], x), name


def test_a_whole_folder_there_and_back_to_the_bit(published, tmp_path):
  job = run(published, tmp_path / 'ours', variant=None)
  assert (job.direction, job.kind, job.variant) == ('torch -> orbax', 'LaVIT', 'whole')
  assert {item.module for item in job.items} == set(name_tables.TABLES)
  back = run(tmp_path / 'ours', tmp_path / 'theirs')
  assert (back.direction, {item.module for item in back.items}) == (
    'orbax -> torch',
    set(name_tables.TABLES),
  )
  (weights, others), (wanted, beside) = contents(tmp_path / 'theirs'), contents(published)
  about = others.pop(formats.EXPORT_INFO)
  assert about['variant'] == 'whole' and others == beside
  assert weights.keys() == wanted.keys()
  for file, state in wanted.items():
    same(weights[file], state)


def test_what_our_folder_says_of_itself(published, states, tmp_path):
  run(published, tmp_path / 'ours')
  config = folder.read_config(tmp_path / 'ours')
  metadata = config['metadata']
  assert config['variant'] == 'whole' and metadata['tables']['version'] == name_tables.VERSION
  shards = sorted(published.glob('language_model/model-*'))
  assert (
    len(shards) > 1
    and {f'language_model/{file.name}' for file in shards} < metadata['source']['files'].keys()
  )
  assert (
    metadata['source']['files'][f'language_model/{shards[0].name}'] == f'sha256:{sha256(shards[0])}'
  )
  assert (
    config['parts']['vit']['dtype'] == 'float16' and config['parts']['llama']['dtype'] == 'bfloat16'
  )
  parts = folder.load_params(tmp_path / 'ours')
  merger, overlaid = parts['tokenizer']['merger'], parts['understanding']['merger']
  np.testing.assert_array_equal(
    overlaid['norm']['scale'], states['understanding']['causal_encoder.norm.weight']
  )
  np.testing.assert_array_equal(
    overlaid['norm']['bias'], merger['norm']['bias']
  )  # not in the overlay
  assert not np.array_equal(overlaid['norm']['scale'], merger['norm']['scale'])
  assert (tmp_path / 'ours' / 'tokenizer' / 'tokenizer.json').read_bytes() == (
    WORDS / 'tokenizer.json'
  ).read_bytes()
  assert sorted(file.name for file in tmp_path.iterdir()) == ['ours']


def test_pickles_on_request(published, tmp_path):
  torch = pytest.importorskip('torch')
  run(published, tmp_path / 'ours')
  run(tmp_path / 'ours', tmp_path / 'theirs', pickles=True)
  assert not list((tmp_path / 'theirs' / 'visual_tokenizer').glob('*.safetensors'))
  state = torch.load(
    tmp_path / 'theirs' / 'visual_tokenizer' / 'tokenizer_encoder.bin', weights_only=True
  )
  wanted = safetensors.numpy.load_file(
    published / 'visual_tokenizer' / 'tokenizer_encoder.safetensors'
  )
  assert state.keys() == wanted.keys() and all(
    np.array_equal(state[name].numpy(), wanted[name]) for name in wanted
  )
  bare = torch.load(
    tmp_path / 'theirs' / 'pixel_decoding' / 'uncond_embeddings.bin', weights_only=True
  )
  assert isinstance(bare, torch.Tensor) and bare.shape == (1, 3, 16)
  run(tmp_path / 'theirs', tmp_path / 'again')
  for part, tree in folder.load_params(tmp_path / 'ours').items():
    jax.tree.map(
      np.testing.assert_array_equal, folder.load_params(tmp_path / 'again', [part])[part], tree
    )


def test_types_change_on_request(published, tmp_path):
  run(published, tmp_path / 'ours', dtype='bfloat16')
  assert {part['dtype'] for part in folder.read_config(tmp_path / 'ours')['parts'].values()} == {
    'bfloat16'
  }
  run(tmp_path / 'ours', tmp_path / 'theirs', dtype='float32')
  weights, _ = contents(tmp_path / 'theirs')
  assert {x.dtype for x in weights['language_model/model'].values()} == {np.dtype(np.float32)}


def test_every_fault_of_every_part_is_told_at_once(published, tmp_path):
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
    convert.plan_conversion(broken, tmp_path / 'ours', variant='whole')
  for told in (
    "variant 'whole' do not fit (4 problems)",
    'decoder: unmapped: no rule names in_proj.wieght (nearest known: in_proj.weight)',
    'decoder: missing: in_proj.weight',
    'vae: wrong shape: encoder.conv_in.bias is [7]',
    'vae: missing: decoder.conv_in.bias',
  ):
    assert told in str(error.value), told
  with pytest.raises(PortingError, match='wrong shape'):
    convert.plan_conversion(broken, tmp_path / 'ours')  # no variant fits; the nearest is told
  (broken / 'visual_tokenizer' / 'tokenizer_decoder.safetensors').unlink()
  shutil.copy(
    published / 'pixel_decoding' / 'vae' / 'diffusion_pytorch_model.safetensors',
    broken / 'pixel_decoding' / 'vae',
  )
  del state['encoder.conv_in.bias']
  write(broken / 'pixel_decoding' / 'vae', 'diffusion_pytorch_model', state)
  run(broken, tmp_path / 'ours', allow_missing='conv_in.bias$')
  config = folder.read_config(tmp_path / 'ours')
  assert config['metadata']['allow_missing'] == 'conv_in.bias$' and 'decoder' not in config['parts']


def test_nothing_is_overwritten_unasked(published, tmp_path):
  run(published, tmp_path / 'ours')
  with pytest.raises(UserError, match='exists; choose another place, or --force'):
    convert.plan_conversion(published, tmp_path / 'ours')
  run(published, tmp_path / 'ours', force=True)
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'notes').write_text('mine')
  with pytest.raises(UserError, match='is not a checkpoint of lavit_jax'):
    run(tmp_path / 'ours', tmp_path / 'mine', force=True)
  assert (tmp_path / 'mine' / 'notes').read_text() == 'mine'
  run(tmp_path / 'ours', tmp_path / 'theirs')
  run(tmp_path / 'ours', tmp_path / 'theirs', force=True)
  with pytest.raises(UserError, match='lie within each other'):
    convert.plan_conversion(published, published / 'ours')


def test_an_interrupted_conversion_leaves_nothing_that_looks_complete(
  published, tmp_path, monkeypatch
):
  def stop(size):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    convert.plan_conversion(published, tmp_path / 'ours').run(stop)
  assert not list(tmp_path.iterdir())
  (tmp_path / '.ours.partial' / 'parts').mkdir(parents=True)  # as after a kill
  run(published, tmp_path / 'ours')
  assert [file.name for file in tmp_path.iterdir()] == ['ours']


def test_a_disk_that_forgets_is_found_out(published, tmp_path, monkeypatch):
  monkeypatch.setattr(
    import_folder.leaves, 'checksums', lambda where, paths: ((path, 1, 0) for path in paths)
  )
  with pytest.raises(UserError, match='is not on the disk as it was written'):
    run(published, tmp_path / 'ours')
  assert not (tmp_path / 'ours').exists()


def test_a_full_disk_is_called_that(published, tmp_path, monkeypatch):
  run(published, tmp_path / 'ours')

  def full(*_):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(SafetensorsWriter, 'write', full)
  with pytest.raises(UserError, match='cannot write .*theirs: No space left on device'):
    run(tmp_path / 'ours', tmp_path / 'theirs')
  assert [file.name for file in tmp_path.iterdir()] == ['ours']


def test_damage_of_the_source_is_named(published, tmp_path):
  run(published, tmp_path / 'ours')
  data = max((tmp_path / 'ours' / 'parts' / 'unet').rglob('*/d/*'), key=lambda x: x.stat().st_size)
  data.write_bytes(bytes(b ^ 1 for b in data.read_bytes()[:40_000]) + data.read_bytes()[40_000:])
  with pytest.raises(UserError, match='parts/unet is truncated or damaged'):
    run(tmp_path / 'ours', tmp_path / 'theirs')
  assert not (tmp_path / 'theirs').exists()


def test_unknown_folders_are_told(tmp_path):
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'hollow' / 'language_model').mkdir(parents=True)
  for name, fault in (
    ('empty', 'is no folder that is known'),
    ('nowhere', 'does not exist'),
    ('hollow', 'holds no weights'),
  ):
    with pytest.raises(UserError, match=fault):
      convert.plan_conversion(tmp_path / name, tmp_path / 'out')


def test_what_is_printed(published, tmp_path, capsys):
  from lavit_jax.cli import main

  arguments = ['--src', str(published), '--dst', str(tmp_path / 'ours'), '--variant', 'whole']
  assert main(['convert', *arguments, '--dry-run']) == 0
  told = capsys.readouterr().out
  assert 'torch -> orbax: LaVIT' in told and 'highres_unet' in told and not list(tmp_path.iterdir())
  assert main(['convert', *arguments]) == 0
  assert 'read back and found right' in capsys.readouterr().out
  assert main(['convert', *arguments]) == 2
  assert '--force' in capsys.readouterr().err
  assert main(['inspect', str(tmp_path / 'ours')]) == 0
  told = ' '.join(capsys.readouterr().out.split())
  assert (
    'variant whole' in told and 'merger:' in told and 'sha256:' in told and '"overlay": "' in told
  )
  assert main(['inspect', str(published)]) == 0
  assert 'LaVIT' in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- parts alone


@pytest.fixture
def llama_folder(states, tmp_path):
  """A LLaMA of the text's words only, as Hugging Face writes it."""
  words = WHOLE['text_vocab_size']
  state = {
    name: x[:words] if name in ('model.embed_tokens.weight', 'lm_head.weight') else x
    for name, x in states['llama'].items()
  }
  write(tmp_path / 'llama', 'model', state, 200_000)
  (tmp_path / 'llama' / 'config.json').write_text(
    json.dumps(dict(llama_config(lavit.build('whole').llama, words), torch_dtype='bfloat16'))
  )
  folder.copy_tokenizer_files(WORDS, tmp_path / 'llama')
  return tmp_path / 'llama'


def test_a_llama_keeps_its_words_and_gets_the_visual_ones(llama_folder, states, tmp_path):
  job = run(llama_folder, tmp_path / 'ours', variant=None)
  assert (job.kind, job.variant) == ('LLaMA', 'whole')
  tree = folder.load_params(tmp_path / 'ours')['llama']
  words, total = WHOLE['text_vocab_size'], lavit.build('whole').vocabulary.size
  assert tree['embedding'].shape == (total, 32) and tree['head'].shape == (32, total)
  assert folder.read_config(tmp_path / 'ours')['metadata']['grown'] == vocabulary_growth.RULE
  for array, name in (
    (tree['embedding'], 'model.embed_tokens.weight'),
    (tree['head'].T, 'lm_head.weight'),
  ):
    known = states['llama'][name][:words].astype(np.float32)
    np.testing.assert_array_equal(array[:words], known)
    noise = np.random.default_rng(0).standard_normal((total - words, 32), np.float32)
    np.testing.assert_allclose(
      array[words:], known.mean(0) + 0.1 * known.std(0) * noise, rtol=1e-2
    )  # rounded to bfloat16
  run(tmp_path / 'ours', tmp_path / 'theirs')
  about = json.loads((tmp_path / 'theirs' / 'config.json').read_text())
  assert about['vocab_size'] == total and (tmp_path / 'theirs' / 'tokenizer.json').is_file()


def test_a_llama_as_it_is(llama_folder, tmp_path):
  run(llama_folder, tmp_path / 'ours', variant=None, grow=False)
  assert folder.read_config(tmp_path / 'ours')['metadata']['grown'] is None
  run(tmp_path / 'ours', tmp_path / 'theirs')
  (weights, _), (wanted, _) = contents(tmp_path / 'theirs'), contents(llama_folder)
  same(weights['model'], wanted['model'])


@pytest.mark.parametrize(('kind', 'prefix'), [('Stable Diffusion', ''), ('SDXL', 'highres_')])
def test_a_diffusers_folder(states, tmp_path, kind, prefix):
  model = lavit.build('whole')
  for name, about in (
    ('unet', unet_config(getattr(model, f'{prefix}unet'))),
    ('vae', vae_config(getattr(model, f'{prefix}vae'))),
  ):
    write(tmp_path / 'sd' / name, 'diffusion_pytorch_model', states[prefix + name])
    (tmp_path / 'sd' / name / 'config.json').write_text(json.dumps(about))
  (tmp_path / 'sd' / 'model_index.json').write_text('{}')
  job = run(tmp_path / 'sd', tmp_path / 'ours', variant=None)
  assert (job.kind, [item.module for item in job.items]) == (
    kind,
    [f'{prefix}unet', f'{prefix}vae'],
  )
  run(tmp_path / 'ours', tmp_path / 'theirs')
  back, wanted = contents(tmp_path / 'theirs'), contents(tmp_path / 'sd')
  back[1].pop(formats.EXPORT_INFO)
  assert back[1] == wanted[1]
  for file, state in wanted[0].items():
    same(back[0][file], state)


def test_old_names_of_the_autoencoder_come_back(states, tmp_path):
  from lavit_jax.weights.torch.names_diffusion import vae_rules

  model = lavit.build('whole')
  tree = name_tables.module_shapes(model, ['vae'])['vae']
  old = to_torch(
    vae_rules(model.vae, old_attention=True),
    jax.tree.map(lambda x: np.full(x.shape, 0.5, np.float32), tree),
  )
  write(tmp_path / 'sd' / 'vae', 'diffusion_pytorch_model', old)
  run(tmp_path / 'sd', tmp_path / 'ours')
  assert folder.read_config(tmp_path / 'ours')['metadata']['tables']['chosen'] == {'vae': 1}
  run(tmp_path / 'ours', tmp_path / 'theirs')
  assert contents(tmp_path / 'theirs')[0]['vae/diffusion_pytorch_model'].keys() == old.keys()


def test_an_image_encoder_with_its_text_tower(states, tmp_path):
  state = {f'visual.{name}': x for name, x in states['vit'].items()} | {
    'text.token_embedding.weight': np.ones((2, 2)),
    'logit_scale': np.ones(()),
  }
  write(tmp_path, 'eva', state)
  run(tmp_path / 'eva.safetensors', tmp_path / 'ours')
  run(tmp_path / 'ours', tmp_path / 'theirs')
  same(contents(tmp_path / 'theirs')[0]['visual_tokenizer/eva_vitg_psz14'], states['vit'])


def test_what_was_trained_here_gets_its_descriptions(tmp_path):
  model, rng = lavit.build('whole'), np.random.default_rng(0)
  parts = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32),
    name_tables.module_shapes(model, name_tables.TABLES),
  )
  folder.save_params(
    tmp_path / 'ours', 'whole', parts, {'llama': {'stage': 'lm', 'steps': 7}}, tokenizer=WORDS
  )
  run(tmp_path / 'ours', tmp_path / 'theirs')
  assert (
    json.loads((tmp_path / 'theirs' / 'language_model' / 'config.json').read_text())['vocab_size']
    == model.vocabulary.size
  )
  assert (tmp_path / 'theirs' / 'language_model' / 'tokenizer.json').is_file()
  assert (
    tmp_path / 'theirs' / 'highres_pixel_decoding' / 'scheduler' / 'scheduler_config.json'
  ).is_file()
  run(tmp_path / 'theirs', tmp_path / 'again')
  jax.tree.map(np.testing.assert_array_equal, folder.load_params(tmp_path / 'again'), parts)
  assert folder.read_config(tmp_path / 'again')['metadata']['llama'] == {'stage': 'lm', 'steps': 7}


# ---------------------------------------------------------------------------------------------- other people's code reads it


def test_transformers_and_diffusers_load_our_folders(tmp_path):
  torch, diffusers, transformers = (
    pytest.importorskip(name) for name in ('torch', 'diffusers', 'transformers')
  )
  model, rng = lavit.build('whole'), np.random.default_rng(0)
  names = ('llama', 'unet', 'vae', 'highres_unet', 'highres_vae')
  parts = jax.tree.map(
    lambda x: (0.1 * rng.normal(size=x.shape)).astype(np.float32),
    name_tables.module_shapes(model, names),
  )
  folder.save_params(tmp_path / 'ours', 'whole', parts)
  run(tmp_path / 'ours', tmp_path / 'theirs')
  theirs = tmp_path / 'theirs'

  ids = rng.integers(0, model.vocabulary.size, (2, 5))
  llama = transformers.LlamaForCausalLM.from_pretrained(
    theirs / 'language_model', dtype=torch.float32
  ).eval()
  with torch.no_grad():
    wanted = llama(torch.from_numpy(ids)).logits.numpy()

  def logits(params):
    embedded = model.llama.apply({'params': params}, ids, method='embed')
    positions = np.broadcast_to(np.arange(5), ids.shape)
    hidden, _ = model.llama.apply(
      {'params': params}, embedded, positions, np.tril(np.ones((1, 1, 5, 5), bool))
    )
    return model.llama.apply({'params': params}, hidden, method='logits')

  np.testing.assert_allclose(logits(parts['llama']), wanted, atol=1e-4)
  for prefix in ('', 'highres_'):
    place, unet = theirs / f'{prefix}pixel_decoding', getattr(model, f'{prefix}unet')
    latents = rng.normal(size=(2, 8, 8, 4)).astype(np.float32)
    context = rng.normal(size=(2, 5, unet.cross_attention_dim)).astype(np.float32)
    steps, added, extra = np.array([3, 500]), None, {}
    if unet.pooled_dim is not None:
      added = (
        rng.normal(size=(2, unet.pooled_dim)).astype(np.float32),
        np.full((2, 6), 64, np.float32),
      )
      extra = dict(
        added_cond_kwargs=dict(
          text_embeds=torch.from_numpy(added[0]), time_ids=torch.from_numpy(added[1])
        )
      )
    peer = diffusers.UNet2DConditionModel.from_pretrained(place / 'unet').eval()
    with torch.no_grad():
      wanted = peer(
        torch.from_numpy(latents.transpose(0, 3, 1, 2)),
        torch.from_numpy(steps),
        torch.from_numpy(context),
        **extra,
      ).sample.numpy()
    ours = unet.apply({'params': parts[f'{prefix}unet']}, latents, steps, context, None, added)
    np.testing.assert_allclose(ours, wanted.transpose(0, 2, 3, 1), atol=1e-4)
    vae = diffusers.AutoencoderKL.from_pretrained(place / 'vae').eval()
    assert vae.config.scaling_factor == getattr(model, f'{prefix}vae').scaling_factor
    with torch.no_grad():
      wanted = vae.decode(torch.from_numpy(latents.transpose(0, 3, 1, 2))).sample.numpy()
    ours = getattr(model, f'{prefix}vae').apply(
      {'params': parts[f'{prefix}vae']}, latents, method='decode'
    )
    np.testing.assert_allclose(ours, wanted.transpose(0, 2, 3, 1), atol=1e-4)


@pytest.mark.parametrize('nested', [True, False])
def test_the_safety_checker_judges_as_theirs(tmp_path, nested):
  torch, transformers = (pytest.importorskip(name) for name in ('torch', 'transformers'))
  peers = pytest.importorskip('diffusers.pipelines.stable_diffusion.safety_checker')
  model, rng = lavit.build('whole').safety_checker, np.random.default_rng(0)
  tree = name_tables.module_shapes(lavit.build('whole'), ['safety_checker'])['safety_checker']
  params = jax.tree.map(lambda x: (0.5 * rng.normal(size=x.shape)).astype(np.float32), tree)
  images = rng.normal(size=(32, 16, 16, 3)).astype(np.float32)

  def cosines(concepts):
    off = {
      'concepts': concepts,
      'concepts_thresholds': np.zeros(17, np.float32),
      'special_thresholds': np.ones(3, np.float32),
    }
    return model.apply({'params': params | off}, images)[1]

  # Each list finds some of the pictures, but not all.
  params['special_thresholds'] = np.quantile(
    cosines(np.resize(params['special'], (17, 12)))[:, :3], 0.9, axis=0
  ).astype(np.float32)
  params['concepts_thresholds'] = np.quantile(cosines(params['concepts']), 0.98, axis=0).astype(
    np.float32
  )
  folder.save_params(tmp_path / 'ours', 'whole', {'safety_checker': params})
  run(tmp_path / 'ours', tmp_path / 'theirs')
  place = tmp_path / 'theirs' / 'pixel_decoding'
  if not nested:  # as transformers 5 writes it
    file = place / 'safety_checker' / 'model.safetensors'
    state = {
      name.replace('vision_model.vision_model.', 'vision_model.'): x
      for name, x in safetensors.numpy.load_file(file).items()
    }
    write(place / 'safety_checker', 'model', state)
    run(tmp_path / 'theirs', tmp_path / 'again')
    jax.tree.map(
      np.testing.assert_array_equal,
      folder.load_params(tmp_path / 'again')['safety_checker'],
      params,
    )

  peer = peers.StableDiffusionSafetyChecker.from_pretrained(place / 'safety_checker').eval()
  extractor = transformers.CLIPImageProcessor.from_pretrained(place / 'feature_extractor')
  assert extractor.crop_size['height'] == 16 and list(extractor.image_mean) == list(vit.MEAN)
  pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
  unsafe, scores = model.apply({'params': params}, images)
  _, found = peer(pixels, images.copy())
  with torch.no_grad():
    embedded = peer.visual_projection(peer.vision_model(pixels)[1])
    cosines = peers.cosine_distance(embedded, peer.concept_embeds).numpy()
    special = (
      peers.cosine_distance(embedded, peer.special_care_embeds).numpy()
      - params['special_thresholds']
    )
  wanted = (
    cosines - params['concepts_thresholds'] + 0.01 * (special.round(3) > 0).any(-1, keepdims=True)
  )
  np.testing.assert_allclose(scores, wanted, atol=5e-4 + 1e-4)  # ours are rounded to three places
  assert list(unsafe) == found and 4 < sum(found) < 28 and 4 < (special > 0).any(-1).sum() < 28


# ------------------------------------------------------------------------------------------------------------ from a script


def test_a_llama_from_python(llama_folder, states, tmp_path):
  torch, transformers = (pytest.importorskip(name) for name in ('torch', 'transformers'))
  total, words = lavit.build('whole').vocabulary.size, WHOLE['text_vocab_size']
  run(llama_folder, tmp_path / 'ours')
  params = from_torch(llama_folder, 'llama', variant='whole', dtype=None, grow=True)
  kept = folder.load_params(tmp_path / 'ours', ['llama'], dtype=None)[
    'llama'
  ]  # by the command, which grows too
  jax.tree.map(np.testing.assert_array_equal, params, kept)
  assert {x.dtype for x in jax.tree.leaves([params, kept])} == {np.dtype(ml_dtypes.bfloat16)}
  assert from_torch(llama_folder, 'llama', variant='whole')['embedding'].shape == (words, 32)
  place = jax.sharding.SingleDeviceSharding(jax.devices()[-1])
  placed = from_torch(
    llama_folder,
    'llama',
    variant='whole',
    dtype='float16',
    grow=True,
    shardings=lambda tree: jax.tree.map(lambda _: place, tree),
  )
  assert placed['head'].shape == (32, total) and {x.dtype for x in jax.tree.leaves(placed)} == {
    np.dtype(np.float16)
  }

  write_torch(params, tmp_path / 'theirs', 'llama', variant='whole')
  peer = transformers.LlamaForCausalLM.from_pretrained(tmp_path / 'theirs', dtype=torch.bfloat16)
  assert peer.config.vocab_size == total
  assert torch.equal(
    peer.lm_head.weight[:words].view(torch.int16),
    torch.from_numpy(states['llama']['lm_head.weight'][:words].view(np.int16)),
  )


def test_golden_files_from_python(tmp_path):
  back = {}
  for part, (_, file) in GOLDEN_FILES.items():
    params = from_torch(GOLDEN_FOLDER / f'{file}.safetensors', part, variant='golden')
    written = write_torch(params, tmp_path / f'{part}.safetensors', part, variant='golden')
    back.setdefault(file, {}).update(safetensors.numpy.load_file(written))
  for file, state in back.items():
    same(state, safetensors.numpy.load_file(GOLDEN_FOLDER / f'{file}.safetensors'))


def test_golden_files_as_a_folder(tmp_path):
  for target, file in GOLDEN_FILES.values():
    (tmp_path / 'LaVIT' / target).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(GOLDEN_FOLDER / f'{file}.safetensors', tmp_path / 'LaVIT' / f'{target}.safetensors')
  job = run(tmp_path / 'LaVIT', tmp_path / 'ours', variant=None)
  assert job.variant == 'golden' and {item.module for item in job.items} == GOLDEN_FILES.keys()
  run(tmp_path / 'ours', tmp_path / 'theirs')
  weights, _ = contents(tmp_path / 'theirs')
  assert weights.keys() == {target for target, _ in GOLDEN_FILES.values()}
  for target, file in GOLDEN_FILES.values():
    same(weights[target], safetensors.numpy.load_file(GOLDEN_FOLDER / f'{file}.safetensors'))


def test_from_python(published, states, tmp_path):
  parts = from_torch(published, variant='whole')
  run(published, tmp_path / 'ours')
  jax.tree.map(np.testing.assert_array_equal, parts, folder.load_params(tmp_path / 'ours'))
  place = jax.sharding.SingleDeviceSharding(jax.devices()[-1])
  vit = from_torch(
    published / 'visual_tokenizer' / 'eva_vitg_psz14.safetensors',
    'vit',
    variant='whole',
    shardings=lambda tree: jax.tree.map(lambda _: place, tree),
  )
  assert {x.sharding for x in jax.tree.leaves(vit)} == {place}
  jax.tree.map(np.testing.assert_array_equal, vit, parts['vit'])
  file = write_torch(vit, tmp_path / 'vit.safetensors', 'vit', variant='whole')
  same(
    safetensors.numpy.load_file(file),
    {name: x.astype(np.float32) for name, x in states['vit'].items()},
  )
  with pytest.raises(UserError, match="unknown module 'vitt'"):
    from_torch(published, 'vitt', variant='whole')


def test_bin_files_that_cannot_be_written(tmp_path, monkeypatch):
  """Told before anything is: there is no PyTorch, or it is our own folder that is made."""
  tiny = WORDS.parent
  with pytest.raises(UserError, match='leave out --bin'):
    convert.plan_conversion(tiny, tmp_path / 'ours', pickles=True)
  convert.plan_conversion(tiny, tmp_path / 'ours').run(lambda *_: None)
  convert.plan_conversion(tmp_path / 'ours', tmp_path / 'theirs', pickles=True)
  monkeypatch.setitem(sys.modules, 'torch', None)
  with pytest.raises(UserError, match='need PyTorch'):
    convert.plan_conversion(tmp_path / 'ours', tmp_path / 'theirs', pickles=True)
