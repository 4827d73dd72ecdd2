"""NaN in any module is an error that names it, on the command line and in Python, and the other rows of a batch are not lost."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax import cli
from lavit_jax.inference import faults
from lavit_jax.inference.faults import NotFinite
from lavit_jax.inference.pipeline import Lavit

ASSETS = pathlib.Path(cli.ASSETS)
PICTURES = [ASSETS / 'demo' / f'0{n}.png' for n in (1, 2)]
POISONED = {  # part: a leaf of it, and the tasks that its result reaches
  'vit': ('blocks/mlp/fc2/bias', ('tokenize', 'caption')),
  'tokenizer': ('merger/norm/scale', ('tokenize',)),
  'understanding': ('merger/norm/scale', ('caption', 'answer')),
  'llama': ('norm/scale', ('caption', 'answer', 'generate')),
  'decoder': ('norm/scale', ('draw',)),
  'unet': ('conv_in/bias', ('draw',)),
  'vae': ('decoder/conv_in/bias', ('draw',)),
}


@pytest.fixture(scope='module')
def whole():
  """The tiny checkpoint's parts, as Lavit holds them."""
  model = Lavit.from_pretrained(ASSETS / 'tiny')
  return {part: model.params[part] for part in (*POISONED, 'uncond_embeddings')}


def poisoned(whole, part, path):
  """A model of which one number of one leaf of a part is NaN."""
  model = Lavit.from_pretrained(ASSETS / 'tiny')
  ready = dict(whole)
  hit = []

  def spoil(keys, leaf):
    name = '/'.join(key.key for key in keys)
    if name != path:
      return leaf
    hit.append(name)
    return jnp.asarray(leaf).at[(0,) * leaf.ndim].set(jnp.nan)

  ready[part] = jax.tree_util.tree_map_with_path(spoil, whole[part])
  assert hit
  model.params._ready.update(ready)
  model.params._ready['codebook'] = {
    'quantizer': {'embedding': ready['tokenizer']['quantizer']['embedding']}
  }
  return model


TASKS = {
  'tokenize': lambda model: model.tokenize(PICTURES),
  'caption': lambda model: model.caption(PICTURES, min_new_tokens=1, max_new_tokens=4),
  'answer': lambda model: model.answer(
    PICTURES, ['What is this?'] * 2, min_new_tokens=1, max_new_tokens=4
  ),
  'reconstruct': lambda model: model.reconstruct(PICTURES, num_inference_steps=1),
  'generate': lambda model: model.generate(
    ['an owl', 'a cat'], min_new_tokens=1, max_new_tokens=4, num_inference_steps=1
  ),
  'synthesize': lambda model: model.synthesize(
    [[PICTURES[0], 'in snow'], ['an owl']],
    min_new_tokens=1,
    max_new_tokens=4,
    num_inference_steps=1,
  ),
  'draw': lambda model: model.decode_images([np.arange(4), np.arange(3)], num_inference_steps=1),
}


@pytest.mark.parametrize('part', POISONED)
def test_the_module_is_named(whole, part):
  path, tasks = POISONED[part]
  model = poisoned(whole, part, path)
  for task in tasks:
    with pytest.raises(
      NotFinite, match=rf'NaN or infinity came out of .*\({part}\) for 2 of 2 inputs'
    ) as error:
      TASKS[task](model)
    assert sorted(error.value.rows) == [0, 1] and '\n' not in str(error.value)


def test_sampled_words_too(whole):
  model = poisoned(whole, 'llama', 'norm/scale')
  with pytest.raises(NotFinite, match='llama'):
    model.caption(PICTURES[:1], do_sample=True, min_new_tokens=1, max_new_tokens=4)
  with pytest.raises(NotFinite, match='llama') as error:
    model.caption_outputs(PICTURES[:1], do_sample=True, min_new_tokens=1, max_new_tokens=4)
  assert np.isnan(error.value.results[0].score)


@pytest.mark.slow  # compiles drawing once more
def test_a_start_picture_that_the_vae_cannot_encode(whole):
  model = poisoned(whole, 'vae', 'encoder/conv_in/bias')
  model.decode_images([np.arange(4)], num_inference_steps=2)  # does not encode
  with pytest.raises(NotFinite, match='the VAE'):
    model.decode_images(
      [np.arange(4)], num_inference_steps=2, init_images=PICTURES[0], strength=0.5
    )


def test_first_is_the_earliest_of_each_row():
  x = jnp.ones((4, 3)).at[0, 1].set(jnp.nan).at[2, 0].set(jnp.inf)
  y = jnp.ones((4, 2)).at[1].set(-jnp.inf).at[2].set(jnp.nan)
  found = faults.first_fault(('vit', x), ('vae', y))
  assert found.tolist() == [faults.number('vit'), faults.number('vae'), faults.number('vit'), 0]
  assert faults.first_fault(('unet', jnp.array([True, False]))).tolist() == [
    0,
    faults.number('unet'),
  ]


def test_rows_of_several_pictures():
  with pytest.raises(NotFinite, match=r'1 of 2 inputs \(number 2\)') as error:
    faults.check(np.array([0, 0, faults.number('vit')]), rows=[0, 0, 1])
  assert list(error.value.rows) == [1]


class OneBad:
  """A model to which the picture with red 7 is NaN."""

  class model:
    image_size = 8

  def __init__(self):
    self.calls = []

  def caption(self, images, seed):
    red = [int(image[0, 0, 0]) for image in images]
    self.calls.append(red)
    faults.check(np.array([faults.number('llama') * (value == 7) for value in red]))
    return [f'{value} at {place}' for value, place in zip(red, seed.rows, strict=True)]


def test_the_sound_rows_of_a_batch_are_kept(tmp_path, monkeypatch, capsys):
  from PIL import Image

  for i in (5, 7, 9):
    Image.new('RGB', (8, 8), (i, i, i)).save(tmp_path / f'{i}.png')
  stub = OneBad()
  monkeypatch.setattr(cli, '_model', lambda args: stub)
  assert cli.main(['caption', str(tmp_path), '--json']) == 2
  said = capsys.readouterr()
  rows = [json.loads(line) for line in said.out.splitlines()]
  assert [row.get('caption') for row in rows] == ['5 at 0', None, '9 at 2']
  assert 'the language model (llama)' in rows[1]['error'] and '1 of 3 failed' in said.err
  assert stub.calls == [[5, 7, 9], [5, 9]]  # not one by one
  assert cli.main(['caption', str(tmp_path / '7.png')]) == 2
  assert 'NaN or infinity came out of the language model' in capsys.readouterr().err
