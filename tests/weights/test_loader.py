"""Parameters of a checkpoint, loaded lazily: the memory meanwhile, and the descriptions beside."""

import gc
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.errors import UserError
from lavit_jax.inference.pipeline import Lavit
from lavit_jax.models import lavit
from lavit_jax.models.int8 import quantize_weights
from lavit_jax.models.llama import unstack_layers
from lavit_jax.models.noise_schedule import Scheduler
from lavit_jax.weights.loader import CheckpointInfo, LazyParams, open_checkpoint
from lavit_jax.weights.store.arrays import ParameterSource, flatten
from lavit_jax.weights.store.folder import load_params, open_params
from lavit_jax.weights.torch import convert
from lavit_jax.weights.torch.api import from_torch, open_torch

TINY = pathlib.Path(lavit.__file__).parents[1] / 'assets' / 'tiny'
SCHEDULER_FILE = pathlib.Path('pixel_decoding', 'scheduler', 'scheduler_config.json')


@pytest.fixture(scope='module')
def converted(tmp_path_factory):
  folder = tmp_path_factory.mktemp('converted') / 'tiny'
  convert.plan_conversion(TINY, folder).run(lambda size: None)
  return folder


def live_bytes() -> int:
  return sum(x.nbytes for x in jax.live_arrays())


@pytest.mark.parametrize('weights_dtype', [None, 'int8'])
@pytest.mark.parametrize('mesh', [None, dict(data=1)])
def test_the_device_holds_the_result_and_one_layer(shallow_parts, weights_dtype, mesh):
  modules = lavit.build('shallow', 'bfloat16')
  flat = flatten(jax.tree.map(np.asarray, shallow_parts['llama']))
  memory = []  # at each read
  gc.collect()  # arrays of earlier tests that nothing refers to
  before = live_bytes()

  def read(path, index=None, sharding=None):
    memory.append(live_bytes() - before)
    array = (flat[path] if index is None else flat[path][index]).astype(jnp.bfloat16)
    return array if sharding is None else jax.device_put(array, sharding)

  structs = {path: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for path, x in flat.items()}
  checkpoint = CheckpointInfo(
    variant='shallow',
    tokenizer_folder=TINY / 'language_model',
    modules=frozenset({'llama'}),
    open=lambda module, dtype: ParameterSource(structs, read),
    settings={},
  )
  mesh = mesh and jax.make_mesh((1, 1, 1), ('data', 'fsdp', 'tensor'))
  loaded = LazyParams(modules, checkpoint, weights_dtype, mesh)['llama']
  result_bytes = sum(x.nbytes for x in jax.tree.leaves(loaded))
  reads = [x.shape[0] if path.startswith('layers/') else 1 for path, x in flat.items()]
  assert len(memory) == sum(reads)
  assert max(memory) <= result_bytes and live_bytes() - before == result_bytes
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), shallow_parts['llama'])
  expected = unstack_layers(params)
  if weights_dtype:
    expected = quantize_weights(expected)
  assert jax.tree.structure(loaded) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, loaded, expected)


@pytest.mark.parametrize('module', ['llama', 'unet'])
def test_layers_are_those_of_the_whole_leaf(converted, module):
  whole = flatten(load_params(converted, [module], dtype='bfloat16')[module])
  from_source = flatten(from_torch(TINY, module, variant='tiny', dtype='bfloat16'))
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  for source in (
    open_params(converted, module, 'bfloat16'),
    open_torch(TINY, module, variant='tiny', dtype='bfloat16'),
  ):
    assert source.structs.keys() == whole.keys() == from_source.keys()
    for path, x in whole.items():
      np.testing.assert_array_equal(from_source[path], x)
      assert source.structs[path].shape == x.shape and source.structs[path].dtype == x.dtype
      if path.startswith('layers/'):
        for layer in (2, 0, 3, 1):
          np.testing.assert_array_equal(source.read(path, layer), x[layer])
          np.testing.assert_array_equal(source.read(path, layer, sharding), x[layer])


def test_a_damaged_layer_is_named(converted, tmp_path):
  folder = shutil.copytree(converted, tmp_path / 'tiny')
  kernel = load_params(folder, ['llama'], dtype=None)['llama']['layers']['mlp']['up']['kernel']
  for data in (folder / 'parts' / 'llama').rglob('*/d/*'):
    content = data.read_bytes()
    position = content.find(kernel[1].tobytes())
    if position >= 0:
      flipped = bytes([content[position] ^ 1])
      data.write_bytes(content[:position] + flipped + content[position + 1 :])
  with pytest.raises(
    UserError,
    match='llama is truncated or damaged .the checksum of layers/mlp/up/kernel is another',
  ):
    Lavit.from_pretrained(folder).generate(['an owl'], num_inference_steps=1)


def test_the_longest_prompt_is_the_checkpoints(converted, shallow_folder, tmp_path):
  # From its config, from its settings, and from the variant.
  for folder in (TINY, converted, shallow_folder):
    settings = open_checkpoint(folder).settings
    assert lavit.build('tiny', settings=settings).llama.max_position_embeddings == 4096
  edited = shutil.copytree(TINY, tmp_path / 'edited')
  config_file = edited / 'language_model' / 'config.json'
  config = json.loads(config_file.read_text())
  for length in (300, 1000):
    config_file.write_text(json.dumps(config | {'max_position_embeddings': length}))
    with pytest.raises(UserError, match=f'prompt is .* tokens long; shorten it to {length - 50}'):
      Lavit.from_pretrained(edited).generate(['owl ' * 3000], num_inference_steps=1)


@pytest.mark.slow
def test_the_scheduler_is_the_checkpoints(converted, tmp_path):
  codes = [np.arange(30)]

  def images(folder):
    return Lavit.from_pretrained(folder).decode_images(codes, num_inference_steps=2)

  edited = shutil.copytree(TINY, tmp_path / 'edited')
  plain = images(edited)
  settings = dict(
    prediction_type='v_prediction',
    timestep_spacing='trailing',
    rescale_betas_zero_snr=True,
    clip_sample=True,
  )
  published = json.loads((TINY / SCHEDULER_FILE).read_text())
  (edited / SCHEDULER_FILE).write_text(json.dumps(published | settings))
  assert open_checkpoint(edited).settings == dict(scheduler=settings)
  changed = images(edited)
  assert (changed != plain).any()
  again = tmp_path / 'again'
  convert.plan_conversion(edited, again).run(lambda size: None)
  np.testing.assert_array_equal(images(again), changed)
  np.testing.assert_array_equal(images(converted), plain)
  # A folder from before there were settings.
  config = json.loads((again / 'config.json').read_text())
  assert config.pop('settings') == dict(scheduler=settings)
  (again / 'config.json').write_text(json.dumps(config))
  assert Lavit.from_pretrained(again).modules.scheduler == Scheduler(**settings)
  (edited / SCHEDULER_FILE).unlink()
  np.testing.assert_array_equal(images(edited), plain)
