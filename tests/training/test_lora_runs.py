"""Adapters as users have them: trained, continued, merged, and beside a model that captions."""

import functools
import json
import pathlib
import shutil

import chex
import jax
import jax.numpy as jnp
import nano
import numpy as np
import pytest
from nano import rows
from programs import compiled

from lavit_jax import sharding
from lavit_jax.errors import UserError
from lavit_jax.inference.pipeline import Lavit
from lavit_jax.models import lavit
from lavit_jax.models.int8 import Int8, dequantize
from lavit_jax.models.llama import unroll_layers
from lavit_jax.training import compatibility
from lavit_jax.training.loop import train
from lavit_jax.training.lora import BaseWeights, read_base
from lavit_jax.weights.store import folder
from lavit_jax.weights.store.metadata import module_digest
from lavit_jax.weights.torch import adapters
from lavit_jax.weights.torch.adapters import Adapters, ModuleAdapter
from lavit_jax.weights.torch.convert import plan_conversion

nano.install()
IMAGES = np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3), np.uint8)


def config(base, **changes):
  options = dict(
    frozen=str(base),
    lora__rank=2,
    lora__dropout=0.1,
    lora__modules_to_save=('embed_tokens',),
    optim__learning_rate=0.05,
    optim__warmup_steps=0,
    checkpoint_every=1,
    num_steps=2,
  )
  return nano.config('lm', **{**options, **changes})


@pytest.fixture(scope='module')
def finished(base, tmp_path_factory):
  """The workdir of a run."""
  workdir = tmp_path_factory.mktemp('run')
  with pytest.MonkeyPatch.context() as patch:
    from lavit_jax.training import flops

    patch.setattr(flops, 'step_flops', lambda run: flops.StepFlops(1.0))
    train(config(base), workdir)
  return workdir


@pytest.mark.slow
def test_a_run_trains_and_saves_adapters_alone(base, finished):
  losses = [row['loss'] for row in rows(finished)]
  assert len(losses) == 2 and np.isfinite(losses).all()
  export = finished / 'export'
  sizes = {
    file.relative_to(export).as_posix(): file.stat().st_size for file in export.rglob('*.s*')
  }
  assert sizes.keys() == {
    f'{name}/adapter_model.safetensors' for name in ('llama', 'understanding')
  }
  info = json.loads((export / 'lavit_adapter.json').read_text())
  assert (info['variant'], info['metadata']['steps']) == ('nano', 2)
  assert info['base']['llama']['folder'] == str(base)
  found = adapters.load_adapters(export, lavit.build('nano'))
  digest = functools.partial(module_digest, base)
  modules = ['llama', 'vit', 'tokenizer']
  assert not adapters.base_notes(digest, modules, found)
  (note,) = adapters.base_notes(lambda module: digest('llama'), modules[:2], found)
  assert note.startswith('vit has other numbers')
  trained = jax.tree.leaves({name: adapter.trained for name, adapter in found.modules.items()})
  metadata = json.loads((finished / 'checkpoints/2/config/metadata').read_text())
  saved = [name for name in metadata['digests'] if name.startswith('params/')]
  assert len(saved) == len(trained)
  assert all(np.abs(leaf).max() > 0 for leaf in trained)  # B began as zeros


@pytest.mark.slow
@pytest.mark.usefixtures('without_flops')
def test_continued_from_the_middle_it_ends_as_the_whole_run(base, finished, tmp_path):
  shutil.copytree(finished / 'checkpoints' / '1', tmp_path / 'checkpoints' / '1')
  train(config(base), tmp_path)
  model = lavit.build('nano')
  exports = [adapters.load_adapters(workdir / 'export', model) for workdir in (finished, tmp_path)]
  chex.assert_trees_all_equal(*(found.modules['llama'].trained for found in exports))
  assert rows(tmp_path) == rows(finished)[1:]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures('without_flops')
@pytest.mark.parametrize('dtype', ['bfloat16', 'int8'])
def test_a_narrow_base_gives_nearly_the_same_losses(base, finished, tmp_path, dtype):
  train(config(base, lora__base_dtype=dtype), tmp_path)
  narrow, wide = ([row['loss'] for row in rows(workdir)] for workdir in (tmp_path, finished))
  assert narrow != wide
  np.testing.assert_allclose(narrow, wide, rtol=0.01)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_pieces_of_a_batch_and_a_mesh_train_as_well(base, tmp_path):
  mesh = dict(mesh__data=2, mesh__fsdp=2, mesh__tensor=2, lora__dropout=0.0, checkpoint_every=0)
  options = dict(
    frozen=str(base), lora__rank=2, optim__learning_rate=0.05, optim__warmup_steps=0, num_steps=2
  )
  runs = {}
  for name, devices, changes in (
    ('one', 1, dict(lora__dropout=0.0)),
    ('mesh', 8, mesh),
    ('pieces', 1, dict(accumulate=2)),
  ):
    nano.finish(nano.launch('lm', tmp_path / name, devices, **options, **changes))
    runs[name] = [row['loss'] for row in rows(tmp_path / name)]
  np.testing.assert_allclose(runs['mesh'], runs['one'], rtol=1e-4)
  np.testing.assert_allclose(runs['pieces'], runs['one'], rtol=1e-4)


@pytest.fixture(scope='module')
def adapter(base, tmp_path_factory):
  """A folder of random adapters, with a head that was trained in full."""
  stage = nano.run('lm', lora__rank=2, lora__modules_to_save=('lm_head',)).stage
  params, _ = jax.eval_shape(stage.init, jax.random.key(0), folder.load_params(base))
  rng = np.random.default_rng(2)
  params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), params)
  config = dict(peft_type='LORA', r=2, lora_alpha=3.0)
  modules = {name: ModuleAdapter(tree, 1.5, config) for name, tree in params.items()}
  path = tmp_path_factory.mktemp('adapter') / 'adapter'
  return adapters.save_adapters(path, lavit.build('nano'), Adapters(modules, {}))


@pytest.fixture(scope='module')
def merged(base, adapter, tmp_path_factory):
  """The folder of the model with the adapters in its kernels."""
  path = tmp_path_factory.mktemp('merged') / 'model'
  plan_conversion(base, path, adapter=adapter).run(lambda _: None)
  return path


def test_beside_each_layer_an_adapter_computes_as_merged(base, adapter, merged):
  model = Lavit.from_pretrained(base, adapter=adapter)
  llama, _ = unroll_layers(model.modules.llama, {})
  rng = np.random.default_rng(3)
  x = rng.standard_normal((1, 4, 32), np.float32)
  positions, mask = np.arange(4)[None], np.tril(np.ones((1, 1, 4, 4), bool))

  @compiled
  def run(params):
    hidden, _ = llama.apply({'params': params}, x, positions, mask)
    return llama.apply({'params': params}, hidden, method='logits')

  outputs = [
    run(params['llama']) for params in (model.params, Lavit.from_pretrained(merged).params)
  ]
  np.testing.assert_allclose(*outputs, rtol=0, atol=1e-4)
  model.unload_adapter()
  assert np.abs(run(model.params['llama']) - outputs[0]).max() > 0.1


@pytest.mark.slow
def test_beside_a_model_an_adapter_captions_as_the_merged_one(base, adapter, merged):
  lengths = dict(num_beams=1, min_new_tokens=3, max_new_tokens=3, seed=None)
  model = Lavit.from_pretrained(base)
  before = model.caption_outputs(IMAGES, **lengths)
  kernel = model.params['llama']['layers_0']['mlp']['down']['kernel']
  model.load_adapter(adapter)
  beside = model.caption_outputs(IMAGES, **lengths)
  together = Lavit.from_pretrained(merged).caption_outputs(IMAGES, **lengths)
  for one, other, plain in zip(beside, together, before, strict=True):
    assert one.text == other.text
    assert one.score == pytest.approx(other.score, rel=1e-4)
    assert one.score != pytest.approx(plain.score, rel=1e-3)
  assert model.params['llama']['layers_0']['mlp']['down']['kernel'] is kernel
  model.unload_adapter()
  assert model.params['llama']['layers_0']['mlp']['down'].keys() == {'kernel'}


def test_beside_int8_weights_adapters_stay_floats_and_heads_are_quantized(base, adapter):
  llama = Lavit.from_pretrained(base, weights_dtype='int8', adapter=adapter).params['llama']
  layer = llama['layers_1']['mlp']['down']
  assert isinstance(layer['kernel'], Int8) and layer['lora'].a.shape == (64, 2)
  assert isinstance(llama['head'], Int8)
  stored = adapters.load_adapters(adapter, lavit.build('nano')).modules['llama'].trained
  np.testing.assert_array_equal(layer['lora'].a, stored['layers']['mlp']['down']['lora']['a'][1])
  np.testing.assert_allclose(
    dequantize(llama['head'], np.float32), stored['head'].T, atol=0.3 * 5 / 127
  )


@pytest.mark.parametrize('dtype', ['bfloat16', 'int8'])
def test_weights_beside_adapters_are_held_narrow(base, dtype):
  mesh = sharding.make_mesh(dict(data=1, fsdp=1, tensor=1))
  held = read_base(BaseWeights(dtype, (('llama', 'head'),)), str(base), 'llama', mesh)
  stored = folder.load_params(base)['llama']
  found, kernel = held['layers']['mlp']['up']['kernel'], stored['layers']['mlp']['up']['kernel']
  if dtype == 'int8':
    assert found.values.dtype == np.int8
    found = np.swapaxes(dequantize(found, np.float32), -1, -2)
  largest = np.abs(kernel).max()
  np.testing.assert_allclose(found.astype(np.float32), kernel, rtol=0, atol=largest / 127)
  assert held['embedding'].dtype == jnp.bfloat16
  np.testing.assert_array_equal(held['head'], stored['head'])  # it trains itself
  np.testing.assert_array_equal(held['norm']['scale'], stored['norm']['scale'])


def test_what_cannot_be_is_refused_in_one_line(base, tmp_path):
  with pytest.raises(
    UserError, match='is no folder of adapters: it has neither lavit_adapter.json'
  ):
    Lavit.from_pretrained(base, adapter=tmp_path)
  part = {name: tree for name, tree in folder.load_params(base).items() if name != 'llama'}
  folder.save_params(tmp_path / 'part', 'nano', part)
  with pytest.raises(UserError, match='stage lm needs llama: name the folders'):
    train(config(tmp_path / 'part'), tmp_path / 'run')


def test_another_scale_does_not_continue_a_run():
  metadata = {'config': {'lora': dict(rank=2, alpha=16.0, rslora=False)}}
  check = functools.partial(compatibility.check_scale, pathlib.Path('run/checkpoints/2'), metadata)
  check({'lora': dict(rank=2, alpha=16.0, rslora=False, dropout=0.5)})
  check({})  # an earlier config
  with pytest.raises(UserError, match=r'lora.alpha=16.0, .* has 8.0, .* --config.lora.alpha=16.0'):
    check({'lora': dict(rank=2, alpha=8.0, rslora=False)})
