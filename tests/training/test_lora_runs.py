"""Adapters as users have them: trained, continued, merged, and beside a model that captions."""

import functools
import json
import pathlib
import shutil

import chex
import jax
import nano
import numpy as np
import pytest
from nano import rows

from lavit_jax.errors import UserError
from lavit_jax.inference.pipeline import Lavit
from lavit_jax.models import lavit
from lavit_jax.training import compatibility
from lavit_jax.training.loop import train
from lavit_jax.weights.store import folder
from lavit_jax.weights.store.metadata import module_digest
from lavit_jax.weights.torch import adapters, name_tables
from lavit_jax.weights.torch.convert import plan_conversion

nano.install()
TOKENIZER = nano.ROOT / 'lavit_jax/assets/tiny/language_model'
IMAGES = np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3), np.uint8)


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  """A whole model of random weights."""
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    mean = 1 if path[-1].key == 'scale' else 0
    return rng.normal(mean, 0.1, leaf.shape).astype(np.float32)

  shapes = name_tables.module_shapes(
    lavit.build('nano'), ['vit', 'tokenizer', 'understanding', 'llama']
  )
  params = jax.tree_util.tree_map_with_path(draw, shapes)
  path = tmp_path_factory.mktemp('base') / 'model'
  return folder.save_params(path, 'nano', params, tokenizer=TOKENIZER)


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
@pytest.mark.usefixtures('without_flops')
@pytest.mark.parametrize('dtype', ['bfloat16', 'int8'])
def test_a_narrow_base_gives_nearly_the_same_losses(base, finished, tmp_path, dtype):
  train(config(base, lora__base_dtype=dtype), tmp_path)
  narrow, wide = ([row['loss'] for row in rows(workdir)] for workdir in (tmp_path, finished))
  assert narrow != wide
  np.testing.assert_allclose(narrow, wide, rtol=0.01)


@pytest.mark.slow
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


@pytest.mark.slow
def test_beside_a_model_an_adapter_captions_as_the_merged_one(base, finished, tmp_path):
  lengths = dict(num_beams=1, min_new_tokens=4, max_new_tokens=4, seed=None)
  model = Lavit.from_pretrained(base)
  before = model.caption_outputs(IMAGES, **lengths)
  kernel = model.params['llama']['layers_0']['mlp']['down']['kernel']
  model.load_adapter(finished / 'export')
  beside = model.caption_outputs(IMAGES, **lengths)
  plan_conversion(base, tmp_path / 'merged', adapter=finished / 'export').run(lambda _: None)
  merged = Lavit.from_pretrained(tmp_path / 'merged').caption_outputs(IMAGES, **lengths)
  for one, other, plain in zip(beside, merged, before, strict=True):
    assert one.text == other.text
    assert one.score == pytest.approx(other.score, rel=1e-4)
    assert one.score != pytest.approx(plain.score, rel=1e-3)
  assert model.params['llama']['layers_0']['mlp']['down']['kernel'] is kernel
  model.unload_adapter()
  assert model.caption_outputs(IMAGES, **lengths) == before
  quantized = Lavit.from_pretrained(base, weights_dtype='int8', adapter=finished / 'export')
  scores = [output.score for output in quantized.caption_outputs(IMAGES, **lengths)]
  np.testing.assert_allclose(scores, [output.score for output in beside], rtol=0.1)


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
