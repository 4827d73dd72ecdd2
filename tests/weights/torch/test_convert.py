"""Whole folders in both directions: every module at tiny size, with what folders have beside."""

import errno
import shutil
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
from torch_folders import TOKENIZER, assert_same, contents, run, whole_variant, write

from lavit_jax.errors import UserError
from lavit_jax.weights.store import folder
from lavit_jax.weights.torch import convert, formats, import_folder, name_tables
from lavit_jax.weights.torch.digests import sha256
from lavit_jax.weights.torch.mapping import PortingError
from lavit_jax.weights.torch.safetensors_files import SafetensorsWriter


@pytest.fixture(scope='module', autouse=True)
def variant():
  with whole_variant():
    yield


def test_a_whole_folder_comes_back_bit_for_bit(published, converted, tmp_path):
  conversion, checkpoint = converted
  assert conversion.direction == 'torch -> orbax'
  assert (conversion.kind, conversion.variant) == ('LaVIT', 'whole')
  assert {item.module for item in conversion.items} == set(name_tables.TABLES)
  back = run(checkpoint, tmp_path / 'exported')
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


def test_the_config_of_a_checkpoint(published, converted, states):
  _, checkpoint = converted
  config = folder.read_config(checkpoint)
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
  params = folder.load_params(checkpoint)
  merger_norm = params['tokenizer']['merger']['norm']
  overlaid_norm = params['understanding']['merger']['norm']
  in_overlay = states['understanding']['causal_encoder.norm.weight']
  np.testing.assert_array_equal(overlaid_norm['scale'], in_overlay)
  np.testing.assert_array_equal(overlaid_norm['bias'], merger_norm['bias'])  # not in the overlay
  assert not np.array_equal(overlaid_norm['scale'], merger_norm['scale'])
  tokenizer = checkpoint / 'tokenizer' / 'tokenizer.json'
  assert tokenizer.read_bytes() == (TOKENIZER / 'tokenizer.json').read_bytes()
  assert [file.name for file in checkpoint.parent.iterdir()] == ['checkpoint']


def test_pickles_on_request(published, converted, tmp_path):
  torch = pytest.importorskip('torch')
  _, checkpoint = converted
  run(checkpoint, tmp_path / 'exported', pickles=True)
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
  for module, tree in folder.load_params(checkpoint).items():
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


def test_nothing_is_overwritten_unasked(published, converted, tmp_path):
  shutil.copytree(converted[1], tmp_path / 'checkpoint')
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


def test_a_full_disk_is_named(converted, tmp_path, monkeypatch):
  _, checkpoint = converted

  def full(*_):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(SafetensorsWriter, 'write', full)
  with pytest.raises(UserError, match='cannot write .*exported: No space left on device'):
    run(checkpoint, tmp_path / 'exported')
  assert not list(tmp_path.iterdir())


def test_damage_of_the_source_is_named(converted, tmp_path):
  shutil.copytree(converted[1], tmp_path / 'checkpoint')
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
