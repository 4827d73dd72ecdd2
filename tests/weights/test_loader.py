"""Modules of a checkpoint load when needed; a folder lists what stands beside its weights."""

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
from lavit_jax.porting import from_torch
from lavit_jax.weights import loader
from lavit_jax.weights.loader import CheckpointInfo, LazyParams, open_checkpoint
from lavit_jax.weights.store.arrays import ParameterSource
from lavit_jax.weights.store.folder import load_params, open_params
from lavit_jax.weights.torch import convert
from lavit_jax.weights.torch.api import open_torch

TINY = pathlib.Path(lavit.__file__).parents[1] / 'assets' / 'tiny'
PUBLISHED = json.loads(
  (TINY / 'pixel_decoding' / 'scheduler' / 'scheduler_config.json').read_text()
)


@pytest.fixture(scope='module')
def ours(tmp_path_factory):
  folder = tmp_path_factory.mktemp('ours') / 'tiny'
  convert.plan_conversion(TINY, folder).run(lambda size: None)
  return folder


def live() -> int:
  return sum(x.nbytes for x in jax.live_arrays())


@pytest.mark.parametrize('weights', [None, 'int8'])
@pytest.mark.parametrize('mesh', [None, dict(data=1)])
def test_no_more_than_the_result_and_a_layer_is_on_the_device(tiny_parts, weights, mesh):
  model, most, flat = (
    lavit.build('tiny', 'bfloat16'),
    [],
    loader.flatten(jax.tree.map(np.asarray, tiny_parts['llama'])),
  )
  before = live()

  def read(path, row=None, place=None):
    most.append(live() - before)  # what there is when the next piece is asked for
    array = (flat[path] if row is None else flat[path][row]).astype(jnp.bfloat16)
    return array if place is None else jax.device_put(array, place)

  structs = {path: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for path, x in flat.items()}
  checkpoint = CheckpointInfo(
    'tiny',
    None,
    {'llama'},
    lambda part, dtype: ParameterSource(structs, read),
    lambda prefix: Scheduler(),
  )
  mesh = mesh and jax.make_mesh((1, 1, 1), ('data', 'fsdp', 'tensor'))
  found = LazyParams(model, checkpoint, weights, mesh)['llama']
  result = sum(x.nbytes for x in jax.tree.leaves(found))
  assert len(most) == sum(
    x.shape[0] if path.startswith('layers/') else 1 for path, x in flat.items()
  )
  assert max(most) <= result and live() - before == result
  want = unstack_layers(jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tiny_parts['llama']))
  want = quantize_weights(want) if weights else want
  assert jax.tree.structure(found) == jax.tree.structure(want)
  jax.tree.map(np.testing.assert_array_equal, found, want)


@pytest.mark.parametrize('name', ['llama', 'unet'])
def test_rows_are_those_of_the_whole(ours, name):
  whole = loader.flatten(load_params(ours, [name], dtype='bfloat16')[name])
  again = loader.flatten(from_torch(TINY, name, variant='tiny', dtype='bfloat16'))
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  for source in (
    open_params(ours, name, 'bfloat16'),
    open_torch(TINY, name, variant='tiny', dtype='bfloat16'),
  ):
    assert source.structs.keys() == whole.keys() == again.keys()
    for path, x in whole.items():
      np.testing.assert_array_equal(again[path], x)
      assert source.structs[path].shape == x.shape and source.structs[path].dtype == x.dtype
      if path.startswith('layers/'):
        for i in (2, 0, 3, 1):
          np.testing.assert_array_equal(source.read(path, i), x[i])
          np.testing.assert_array_equal(source.read(path, i, place), x[i])


def test_a_damaged_layer_is_named(ours, tmp_path):
  folder = shutil.copytree(ours, tmp_path / 'tiny')
  kernel = load_params(folder, ['llama'], dtype=None)['llama']['layers']['mlp']['up']['kernel']
  for data in (folder / 'parts' / 'llama').rglob('*/d/*'):
    content = data.read_bytes()
    if (at := content.find(kernel[1].tobytes())) >= 0:
      data.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
  with pytest.raises(
    UserError,
    match='llama is truncated or damaged .the checksum of layers/mlp/up/kernel is another',
  ):
    Lavit.from_pretrained(folder).generate(['an owl'], num_inference_steps=1)


def test_the_length_of_a_prompt_is_the_checkpoints(ours, tiny_folder, tmp_path):
  for folder in (TINY, ours, tiny_folder):
    found = open_checkpoint(folder, None)
    assert (
      lavit.build('tiny', settings=found.settings).llama.max_position_embeddings == 4096
    )  # said, said, and the variant's own
  theirs = tmp_path / 'theirs'
  shutil.copytree(TINY, theirs)
  config = json.loads((theirs / 'language_model' / 'config.json').read_text())
  for value, length in ((300, 300), (1000, 1000)):
    (theirs / 'language_model' / 'config.json').write_text(
      json.dumps(config | {'max_position_embeddings': value})
    )
    with pytest.raises(UserError, match=f'prompt is .* tokens long; shorten it to {length - 50}'):
      Lavit.from_pretrained(theirs).generate(['owl ' * 3000], num_inference_steps=1)


@pytest.mark.slow
def test_the_scheduler_is_the_folders(ours, tmp_path):
  theirs = shutil.copytree(TINY, tmp_path / 'theirs')
  file = theirs / 'pixel_decoding' / 'scheduler' / 'scheduler_config.json'
  codes = [np.arange(30)]
  plain = Lavit.from_pretrained(theirs).decode_images(codes, num_inference_steps=2)
  settings = dict(
    prediction_type='v_prediction',
    timestep_spacing='trailing',
    rescale_betas_zero_snr=True,
    clip_sample=True,
  )
  file.write_text(json.dumps(PUBLISHED | settings))
  assert open_checkpoint(theirs, None).settings == dict(scheduler=settings)
  other = Lavit.from_pretrained(theirs).decode_images(codes, num_inference_steps=2)
  assert (other != plain).any()
  convert.plan_conversion(theirs, tmp_path / 'other').run(lambda size: None)
  np.testing.assert_array_equal(
    Lavit.from_pretrained(tmp_path / 'other').decode_images(codes, num_inference_steps=2), other
  )
  np.testing.assert_array_equal(
    Lavit.from_pretrained(ours).decode_images(codes, num_inference_steps=2), plain
  )
  config = json.loads((tmp_path / 'other' / 'config.json').read_text())
  assert config.pop('settings') == dict(scheduler=settings)
  (tmp_path / 'other' / 'config.json').write_text(
    json.dumps(config)
  )  # as it was before there were settings
  assert Lavit.from_pretrained(tmp_path / 'other').model.scheduler == Scheduler(**settings)
  file.unlink()
  np.testing.assert_array_equal(
    Lavit.from_pretrained(theirs).decode_images(codes, num_inference_steps=2), plain
  )
