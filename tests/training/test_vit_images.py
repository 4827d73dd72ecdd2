"""The ViT sees the same in training and at inference: Pillow's resize of the stored image."""

import contextlib
import json

import jax
import jax.numpy as jnp
import nano
import numpy as np
import pytest
from PIL import Image

from lavit_jax.data import images
from lavit_jax.models import lavit, vit
from lavit_jax.training import batches, train_step
from lavit_jax.training.stages import base, detokenizer, language_model, tokenizer

nano.install()
MODEL = lavit.build('nano')  # whose ViT takes 32 pixels a side


def hard_edges(width: int, height: int) -> Image.Image:
  """Blocks of 0 and 255: a cubic overshoots at edges, and Pillow clips between its passes."""
  x, y = np.meshgrid(np.arange(width), np.arange(height))
  block = (np.stack([x // 5 + y // 3, x // 2 + y // 7, x // 11 + y // 4], -1) % 2) * 255
  return Image.fromarray(block.astype(np.uint8))


class Seen(Exception):
  """Ends a loss when the ViT is called."""


@pytest.fixture
def seen_by_vit(monkeypatch):
  """seen_by_vit(stage, params, batch) -> what the loss gives to the ViT. Nothing compiles."""

  def apply(module, params, *args, **kwargs):
    if isinstance(module, vit.ViT):
      raise Seen(np.asarray(args[0]))
    out = jax.eval_shape(lambda p: module.apply({'params': p}, *args, **kwargs), params)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out)

  def run(built, parts, batch) -> np.ndarray:
    with pytest.raises(Seen) as seen:
      built.loss(parts, parts, None, batch, jax.random.key(0), True)
    return seen.value.args[0]

  for module in (base, detokenizer, language_model, tokenizer):
    monkeypatch.setattr(module, 'apply_module', apply)
  return run


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Eight images, of 90 x 70 pixels, which are shrunk, and of 20 x 24, which are enlarged."""
  folder = tmp_path_factory.mktemp('blocks')
  rows = []
  for i in range(8):
    hard_edges(*((90, 70), (20, 24))[i % 2]).rotate(90 * (i // 2)).save(folder / f'{i}.png')
    rows.append(json.dumps(dict(file_name=f'{i}.png', text=f'blocks number {i}')))
  (folder / 'metadata.jsonl').write_text('\n'.join(rows))
  return folder


@pytest.mark.parametrize(
  'name, size',
  [('detokenizer', 64), ('detokenizer', 16), ('tokenizer', 64), ('tokenizer', 32), ('lm', 16)],
)
def test_training_and_inference_show_the_vit_the_same(folder, seen_by_vit, name, size):
  source = dict(format='folder', path=str(folder))
  run = nano.run(name, data__image_size=size, data__sources=(source,), data__num_threads=0)
  parts, described = train_step.abstract_inputs(run)
  with contextlib.closing(batches.open_batches(run, 'train')) as data:
    batch = next(data)
  assert {key: (x.shape, x.dtype) for key, x in batch.items()} == {
    key: (x.shape, x.dtype) for key, x in described.items()
  }
  inference = images.read_images([folder / f'{i}.png' for i in range(8)], MODEL.image_size)
  expected = np.asarray(vit.preprocess(inference))
  for row in seen_by_vit(run.stage, parts, batch):  # in the loader's order
    assert (row == expected).all((1, 2, 3)).any()


def test_images_of_another_size_are_not_resized_on_the_device():
  with pytest.raises(ValueError, match=r'the ViT takes images of 32 x 32, not \[2, 64, 64, 3\]'):
    base.image_features(MODEL, {}, np.zeros((2, 64, 64, 3), np.uint8))
