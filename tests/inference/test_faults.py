"""NaN in a module is an error that names it; the other rows of a batch keep their results."""

import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lavit_jax import cli
from lavit_jax.inference import faults
from lavit_jax.inference.faults import NotFinite
from lavit_jax.inference.pipeline import Lavit

ASSETS = pathlib.Path(cli.ASSETS)
IMAGES = [ASSETS / 'demo' / f'0{n}.png' for n in (1, 2)]
POISONED = {  # module: a leaf of it, and the tasks that use its result
  'vit': ('blocks/mlp/fc2/bias', ('tokenize', 'select', 'caption')),
  'tokenizer': ('merger/norm/scale', ('tokenize',)),
  'understanding': ('merger/norm/scale', ('caption', 'answer')),
  'llama': ('norm/scale', ('caption', 'answer', 'generate')),
  'decoder': ('norm/scale', ('decode',)),
  'unet': ('conv_in/bias', ('decode',)),
  'vae': ('decoder/conv_in/bias', ('decode',)),
}


@pytest.fixture(scope='module')
def params():
  """The parameters of the tiny checkpoint, as Lavit loads them."""
  model = Lavit.from_pretrained(ASSETS / 'tiny')
  return {module: model.params[module] for module in (*POISONED, 'uncond_embeddings')}


def poisoned_model(params, module, path):
  """A model with one NaN in one leaf of a module."""
  model = Lavit.from_pretrained(ASSETS / 'tiny')
  poisoned = dict(params)
  paths = []

  def poison(keys, leaf):
    name = '/'.join(key.key for key in keys)
    if name != path:
      return leaf
    paths.append(name)
    return jnp.asarray(leaf).at[(0,) * leaf.ndim].set(jnp.nan)

  poisoned[module] = jax.tree_util.tree_map_with_path(poison, params[module])
  assert paths
  model.params._params.update(poisoned)
  return model


TASKS = {
  'tokenize': lambda model: model.tokenize(IMAGES),
  'select': lambda model: model.select_patches(IMAGES),
  'caption': lambda model: model.caption(IMAGES, min_new_tokens=1, max_new_tokens=4),
  'answer': lambda model: model.answer(
    IMAGES, ['What is this?'] * 2, min_new_tokens=1, max_new_tokens=4
  ),
  'reconstruct': lambda model: model.reconstruct(IMAGES, num_inference_steps=1),
  'generate': lambda model: model.generate(
    ['an owl', 'a cat'], min_new_tokens=1, max_new_tokens=4, num_inference_steps=1
  ),
  'synthesize': lambda model: model.synthesize(
    [[IMAGES[0], 'in snow'], ['an owl']],
    min_new_tokens=1,
    max_new_tokens=4,
    num_inference_steps=1,
  ),
  'decode': lambda model: model.decode_images([np.arange(4), np.arange(3)], num_inference_steps=1),
}


@pytest.mark.parametrize('module', POISONED)
def test_the_module_is_named(params, module):
  path, tasks = POISONED[module]
  model = poisoned_model(params, module, path)
  for task in tasks:
    with pytest.raises(
      NotFinite, match=rf'NaN or infinity came out of .*\({module}\) for 2 of 2 inputs'
    ) as error:
      TASKS[task](model)
    assert sorted(error.value.rows) == [0, 1]
    assert '\n' not in str(error.value)


def test_sampled_text(params):
  model = poisoned_model(params, 'llama', 'norm/scale')
  with pytest.raises(NotFinite, match='llama'):
    model.caption(IMAGES[:1], do_sample=True, min_new_tokens=1, max_new_tokens=4)
  with pytest.raises(NotFinite, match='llama') as error:
    model.caption_outputs(IMAGES[:1], do_sample=True, min_new_tokens=1, max_new_tokens=4)
  assert np.isnan(error.value.results[0].score)


@pytest.mark.slow  # compiles another decoding program
def test_an_initial_image_that_the_vae_cannot_encode(params):
  model = poisoned_model(params, 'vae', 'encoder/conv_in/bias')
  model.decode_images([np.arange(4)], num_inference_steps=2)  # does not encode
  with pytest.raises(NotFinite, match='the VAE'):
    model.decode_images([np.arange(4)], num_inference_steps=2, init_images=IMAGES[0], strength=0.5)


def test_the_first_fault_of_each_row():
  x = jnp.ones((4, 3)).at[0, 1].set(jnp.nan).at[2, 0].set(jnp.inf)
  y = jnp.ones((4, 2)).at[1].set(-jnp.inf).at[2].set(jnp.nan)
  fault = faults.first_fault(('vit', x), ('vae', y))
  vit = faults.number('vit')
  assert fault.tolist() == [vit, faults.number('vae'), vit, 0]
  fault = faults.first_fault(('unet', jnp.array([True, False])))
  assert fault.tolist() == [0, faults.number('unet')]


def test_rows_with_several_images():
  with pytest.raises(NotFinite, match=r'1 of 2 inputs \(number 2\)') as error:
    faults.check(np.array([0, 0, faults.number('vit')]), rows=[0, 0, 1])
  assert list(error.value.rows) == [1]


class OneBad:
  """A model that computes NaN for the image with red 7."""

  modules = types.SimpleNamespace(image_size=8)

  def __init__(self):
    self.calls = []

  def caption(self, images, seed):
    red = [int(image[0, 0, 0]) for image in images]
    self.calls.append(red)
    llama = faults.number('llama')
    faults.check(np.array([llama if value == 7 else 0 for value in red]))
    return [f'{value} at {index}' for value, index in zip(red, seed.rows, strict=True)]


def test_the_other_rows_of_a_batch_are_kept(tmp_path, monkeypatch, capsys):
  for i in (5, 7, 9):
    Image.new('RGB', (8, 8), (i, i, i)).save(tmp_path / f'{i}.png')
  stub = OneBad()
  monkeypatch.setattr(cli.options, 'load_model', lambda args: stub)
  assert cli.main(['caption', str(tmp_path), '--json']) == 2
  printed = capsys.readouterr()
  rows = [json.loads(line) for line in printed.out.splitlines()]
  assert [row.get('caption') for row in rows] == ['5 at 0', None, '9 at 2']
  assert 'the language model (llama)' in rows[1]['error']
  assert '1 of 3 failed' in printed.err
  assert stub.calls == [[5, 7, 9], [5, 9]]  # not one by one
  assert cli.main(['caption', str(tmp_path / '7.png')]) == 2
  assert 'NaN or infinity came out of the language model' in capsys.readouterr().err
