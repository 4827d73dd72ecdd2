"""Which files of a folder are its weights.

As diffusers and transformers name them; several editions, broken, linked, or listed and missing.
"""

import json
import os
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file
from tensors import save_tensors

from lavit_jax import cli
from lavit_jax.errors import UserError
from lavit_jax.weights.store import folder
from lavit_jax.weights.torch import convert, files, formats, weight_files
from lavit_jax.weights.torch.digests import sha256

TINY = pathlib.Path(cli.ASSETS) / 'tiny'
DECODER = TINY / 'pixel_decoding'
VAE = 'diffusion_pytorch_model'


@pytest.fixture
def stable(tmp_path):
  """A Stable Diffusion folder of tiny modules."""
  for part in ('unet', 'vae'):
    shutil.copytree(DECODER / part, tmp_path / 'src' / part)
  return tmp_path / 'src'


@pytest.mark.parametrize(
  ('name', 'variant'),
  [
    ('model.safetensors', ''),
    ('model.fp16.safetensors', 'fp16'),
    ('model-00001-of-00002.bin', ''),
    ('model.non_ema.bin', 'non_ema'),
    ('model.fp16-00001-of-00002.safetensors', 'fp16'),
    ('model-00001-of-00002.fp16.safetensors', 'fp16'),
    ('model.safetensors.index.json', ''),
    ('model.safetensors.index.fp16.json', 'fp16'),
    ('model.fp16.safetensors.index.json', 'fp16'),
    ('model.bin.index.non-ema.json', 'non-ema'),
    ('model.json', None),
    ('my_model.bin', None),
    ('model_index.json', None),
    ('tokenizer.model', None),
    ('model.onnx', None),
    ('model_ema.safetensors', None),
  ],
)
def test_names_of_weights(name, variant):
  parsed = weight_files.parse(name, 'model')
  assert (parsed.variant if parsed else None) == variant


@pytest.mark.parametrize(
  'options',
  [
    dict(variant='fp16'),
    dict(variant='fp16', max_shard_size='300KB'),
    dict(variant='non_ema'),
    dict(variant='bf16'),
    dict(max_shard_size='300KB'),
    dict(variant='fp16', safe_serialization=False),
    dict(variant='bf16', safe_serialization=False, max_shard_size='300KB'),
  ],
  ids=lambda options: '-'.join(map(str, options.values())),
)
def test_all_that_diffusers_saves_is_found(stable, options):
  diffusers = pytest.importorskip('diffusers')
  vae = diffusers.AutoencoderKL.from_pretrained(stable / 'vae')
  shutil.rmtree(stable / 'vae')
  vae.save_pretrained(stable / 'vae', **options)
  if 'max_shard_size' in options:
    assert len(list((stable / 'vae').glob('*-of-*'))) > 1
  found = {source.module: source for source in formats.detect(stable)[1]}
  state = found['vae'].state
  assert state.keys() == vae.state_dict().keys() and found['vae'].edition.variant == options.get(
    'variant', ''
  )
  for name, x in vae.state_dict().items():
    np.testing.assert_array_equal(np.asarray(state[name]), x.numpy())


@pytest.mark.parametrize('options', [{}, dict(max_shard_size='2KB')], ids=str)
def test_all_that_transformers_saves_is_found(tmp_path, options):
  transformers = pytest.importorskip('transformers')
  config = transformers.LlamaConfig(
    vocab_size=9, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
  )
  model = transformers.LlamaForCausalLM(config)
  model.save_pretrained(tmp_path, variant='fp16', **options)
  (found,) = formats.detect(tmp_path)[1]
  assert found.state.keys() == model.state_dict().keys()


def test_the_rule_among_several_editions(tmp_path):
  for variant in ('', '.fp16', '.bf16', '.fp32', '.non_ema'):
    for suffix in ('.bin', '.safetensors'):
      (tmp_path / f'{VAE}{variant}{suffix}').touch()
  order = [(edition.variant, edition.suffix) for edition in weight_files.editions(tmp_path, [VAE])]
  expected = []
  for variant in ('', 'fp32', 'fp16', 'bf16', 'non_ema'):
    expected += [(variant, '.safetensors'), (variant, '.bin')]
  assert order == expected
  assert weight_files.choose(tmp_path, [VAE], 'bf16').variant == 'bf16'
  assert weight_files.choose(tmp_path, [VAE], 'int4').variant == ''  # there is no such edition
  assert weight_files.choose(tmp_path, ['model']) is None


def test_other_editions_are_noted(stable, tmp_path, capsys):
  state = load_file(stable / 'vae' / f'{VAE}.safetensors')
  save_tensors(
    {name: x.astype(np.float16) for name, x in state.items()},
    stable / 'vae' / f'{VAE}.fp16.safetensors',
  )
  command = ['convert', '--src', str(stable), '--dst']
  assert cli.main([*command, str(tmp_path / 'a')]) == 0
  notes = ' '.join(capsys.readouterr().err.split())
  assert f'vae: {VAE}.safetensors is read, not {VAE}.fp16.safetensors beside it' in notes
  assert 'unet: diffusion' not in notes
  assert not list((tmp_path / 'a' / 'torch').rglob('*.safetensors'))
  assert cli.main([*command, str(tmp_path / 'b'), '--weights-variant', 'fp16']) == 0
  assert f'vae: {VAE}.fp16.safetensors is read' in ' '.join(capsys.readouterr().err.split())
  dtypes = {name: folder.read_config(tmp_path / name)['parts']['vae']['dtype'] for name in 'ab'}
  assert dtypes['b'] == 'float16' != dtypes['a']
  assert cli.main([*command, str(tmp_path / 'c'), '--weights-variant', 'fp8']) == 2
  assert "no weights of the variant 'fp8'" in capsys.readouterr().err


def test_a_broken_edition_is_an_error_if_it_is_chosen(stable):
  index = stable / 'vae' / f'{VAE}.safetensors.index.fp16.json'
  index.write_text(json.dumps({'weight_map': {'x': f'{VAE}.fp16-00001-of-00002.safetensors'}}))
  assert len(formats.detect(stable)[1]) == 2
  (stable / 'vae' / f'{VAE}.safetensors').unlink()
  with pytest.raises(
    UserError, match='vae lacks .*fp16-00001-of-00002.safetensors, which .*index.fp16.json names'
  ):
    formats.detect(stable)
  index.unlink()
  (stable / 'vae' / f'{VAE}.fp16-00001-of-00002.safetensors').touch()
  with pytest.raises(UserError, match='shards of weights .* but no index'):
    formats.detect(stable)


def test_a_module_without_its_weights_is_named(stable, tmp_path, capsys):
  (stable / 'model_index.json').write_text(
    json.dumps(
      {
        '_class_name': 'StableDiffusionPipeline',
        'unet': ['diffusers', 'UNet2DConditionModel'],
        'vae': ['diffusers', 'AutoencoderKL'],
        'safety_checker': [None, None],
        'text_encoder': ['transformers', 'CLIPTextModel'],
      }
    )
  )
  shutil.copytree(DECODER / 'vae', stable / 'text_encoder')  # weights of another model
  assert cli.main(['convert', '--src', str(stable), '--dst', str(tmp_path / 'a')]) == 0
  notes = ' '.join(capsys.readouterr().err.split())
  assert 'not converted, but copied as they are into torch/: 1 files' in notes
  assert f'text_encoder/{VAE}.safetensors' in notes
  weights = stable / 'unet' / f'{VAE}.safetensors'
  weights.rename(weights.with_name('diffusion_flax_model.msgpack'))
  with pytest.raises(
    UserError, match='unet holds diffusion_flax_model.msgpack, which is none of the names'
  ):
    convert.plan_conversion(stable, tmp_path / 'b')
  weights.with_name('diffusion_flax_model.msgpack').unlink()
  with pytest.raises(
    UserError, match='model_index.json lists unet, but .*unet holds no weights .*null'
  ):
    convert.plan_conversion(stable, tmp_path / 'b')
  index = json.loads((stable / 'model_index.json').read_text())
  (stable / 'model_index.json').write_text(json.dumps(index | {'unet': [None, None]}))
  assert any(
    'unet: unet/ holds no weights, so the result has no unet' in note
    for note in convert.plan_conversion(stable, tmp_path / 'b').notes
  )


def test_formats_are_recognized_by_content(tmp_path):
  """As in the cache of the Hub, under a digest with a link to it; and under wrong names."""
  torch = pytest.importorskip('torch')
  arrays = {'x.weight': np.arange(6, dtype=np.float32).reshape(2, 3)}
  blobs, snapshot = tmp_path / 'blobs', tmp_path / 'snapshots' / 'abc'
  blobs.mkdir()
  snapshot.mkdir(parents=True)
  save_tensors(arrays, blobs / ('1f' * 32))
  torch.save({name: torch.from_numpy(x) for name, x in arrays.items()}, blobs / ('2e' * 32))
  os.symlink('../../blobs/' + '1f' * 32, snapshot / 'a.safetensors')
  os.symlink('../../blobs/' + '2e' * 32, snapshot / 'b.bin')
  shutil.copy(blobs / ('1f' * 32), tmp_path / 'wrong.bin')
  shutil.copy(blobs / ('2e' * 32), tmp_path / 'wrong.safetensors')
  paths = [
    snapshot / 'a.safetensors',
    snapshot / 'b.bin',
    *blobs.iterdir(),
    tmp_path / 'wrong.bin',
    tmp_path / 'wrong.safetensors',
  ]
  for path in paths:
    np.testing.assert_array_equal(np.asarray(files.load(path)['x.weight']), arrays['x.weight'])
    assert len(sha256(path)) == 64
  (tmp_path / 'lfs.safetensors').write_text(
    'version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 4\n'
  )
  with pytest.raises(UserError, match='Git LFS pointer'):
    files.load(tmp_path / 'lfs.safetensors')


def test_a_linked_encoder_converts(tmp_path):
  blob = tmp_path / 'blobs' / 'ab12'
  blob.parent.mkdir()
  shutil.copy(TINY / 'visual_tokenizer' / 'eva_vitg_psz14.safetensors', blob)
  os.symlink(blob, tmp_path / 'eva.safetensors')
  conversion = convert.plan_conversion(tmp_path / 'eva.safetensors', tmp_path / 'checkpoint')
  conversion.run(lambda size: None)
  assert folder.read_config(tmp_path / 'checkpoint')['metadata']['source']['files'].keys() == {
    'eva.safetensors'
  }


def test_missing_descriptions_are_noted(tmp_path):
  shutil.copytree(TINY / 'pixel_decoding' / 'unet', tmp_path / 'sd' / 'unet')
  (tmp_path / 'sd' / 'unet' / 'config.json').unlink()
  notes = convert.plan_conversion(tmp_path / 'sd', tmp_path / 'checkpoint').notes
  text = "is missing, so the variant's own values are used, unchecked"
  assert f'unet: unet/config.json {text}' in notes
  assert f'unet: scheduler/scheduler_config.json {text}' in notes


def test_factors_of_the_vae_are_noted(stable, tmp_path, capsys):
  file = stable / 'vae' / 'config.json'
  file.write_text(json.dumps(json.loads(file.read_text()) | {'shift_factor': 0.5}))
  command = ['convert', '--src', str(stable), '--dst', str(tmp_path / 'checkpoint'), '--dry-run']
  assert cli.main(command) == 0
  notes = capsys.readouterr().err.splitlines()
  assert (
    'lavit: note: vae: vae/config.json sets scaling_factor=1.0, shift_factor=0.5 (the variant: 0.0)'
  ) in notes


def test_a_llama_folder_with_files_of_meta_is_recognized(tmp_path):
  (tmp_path / 'meta').mkdir()
  (tmp_path / 'meta' / 'config.json').write_text('{"model_type": "llama"}')
  (tmp_path / 'meta' / 'consolidated.00.pth').write_bytes(b'')
  with pytest.raises(UserError, match='holds consolidated.00.pth'):
    convert.plan_conversion(tmp_path / 'meta', tmp_path / 'checkpoint')
