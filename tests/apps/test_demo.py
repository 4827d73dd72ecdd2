"""The demo's inputs and page, with a stub for the model; `slow` runs the tiny checkpoint."""

import base64
import html.parser
import io
import json
import pathlib
import time
import types

import numpy as np
import pytest
from PIL import Image

import lavit_jax
from lavit_jax.apps import demo, page
from lavit_jax.errors import UserError
from lavit_jax.inference.outputs import VisualTokens
from lavit_jax.inference.pipeline import Lavit

ASSETS = pathlib.Path(lavit_jax.__file__).parent / 'assets'


class Stub:
  """A model with known answers, by which the page is checked."""

  modules = types.SimpleNamespace(image_size=64, num_patches=64, variant='stub')

  def tokenize(self, images, seed):
    keep = np.zeros((len(images), 64), bool)
    keep[:, :21] = True
    return VisualTokens([np.arange(21)] * len(images), keep, keep.sum(-1))

  def caption(self, images, seed):
    return [f'<caption {i}>' for i in range(len(images))]

  def answer(self, images, questions, seed):
    assert len(images) == len(questions)
    return [f'answer {i}' for i in range(len(images))]

  def sample_codes(self, prompts, guidance_scale, seed):
    self.prompts = getattr(self, 'prompts', []) + prompts
    return [np.arange(5)] * len(prompts)

  def decode_images(self, codes, num_inference_steps, seed):
    return np.full((len(codes), 64, 64, 3), 99, np.uint8)


@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
  folder = tmp_path_factory.mktemp('inputs')
  demo.make_inputs('embedded', folder)
  return folder


def test_inputs_are_held_out_and_complete(inputs):
  manifest = demo.read_manifest(inputs)
  sizes = {key: len(entries) for key, entries in manifest.items()}
  assert sizes == {'pictures': 8, 'texts': 4, 'mixed': 4}
  for row in manifest['pictures'] + manifest['texts']:
    assert Image.open(inputs / row['file']).size == (64, 64)
  kinds = {tuple(part.endswith('.png') for part in parts) for parts in manifest['mixed']}
  assert kinds == {(True, False), (True, True)}
  again = demo.make_inputs('embedded', inputs).read_text()
  assert again == json.dumps(manifest, indent=1, ensure_ascii=False) + '\n'


def test_the_page_holds_everything(inputs, tmp_path, capsys):
  stub = Stub()
  text = demo.run(stub, inputs, tmp_path / 'new' / 'out').read_text()
  assert [p.name for p in (tmp_path / 'new' / 'out').iterdir()] == ['index.html']
  images = []

  class Reader(html.parser.HTMLParser):
    def handle_starttag(self, tag, attrs):
      assert not {'href', 'link', 'script'} & {tag, *dict(attrs)}
      if tag == 'img':
        kind, data = dict(attrs)['src'].split(',')
        assert kind == 'data:image/png;base64'
        images.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))))

  Reader().feed(text)
  assert len(images) == 8 * 3 + 4 * 2 + 2 * 2 + 2 * 3
  assert {image.shape for image in images} == {(64, 64, 3)}
  manifest = demo.read_manifest(inputs)
  for expected in ('&lt;caption 7&gt;', 'answer 7', '21 tokens', '5 tokens'):
    assert expected in text
  for row in manifest['pictures']:
    assert html.escape(row['caption']) in text
    assert html.escape(row['question']) in text
  expected = [[row['text']] for row in manifest['texts']] + manifest['mixed']
  for parts, names in zip(stub.prompts, expected, strict=True):
    assert [str(part).rpartition('/')[2] for part in parts] == names
  assert 'reconstruct' in capsys.readouterr().out


def test_dropped_patches_are_bleached():
  image = np.full((64, 64, 3), 50, np.uint8)
  keep = np.zeros(64, bool)
  keep[9] = True
  shown = page.show_kept_patches(image, keep)
  assert (shown[8:16, 8:16] == 50).all()
  assert (shown == 50).sum() == 64 * 3
  assert shown.min() == 50
  assert shown.max() > 230


def test_bad_inputs(tmp_path, inputs):
  with pytest.raises(UserError, match='manifest.json is missing'):
    demo.run(Stub(), tmp_path, tmp_path)
  for text in (
    '{',
    '{}',
    '[]',
    '{"pictures": [{}], "texts": [], "mixed": []}',
    '{"pictures": [], "texts": [], "mixed": [5]}',
  ):
    (tmp_path / 'manifest.json').write_text(text)
    with pytest.raises(UserError, match='manifest.json is damaged'):
      demo.run(Stub(), tmp_path, tmp_path)
  (tmp_path / 'manifest.json').write_text((inputs / 'manifest.json').read_text())
  with pytest.raises(UserError, match='00.png: no such file'):
    demo.run(Stub(), tmp_path, tmp_path)
  assert not (tmp_path / 'index.html').exists()


@pytest.mark.slow
def test_the_demo_of_the_repository(tmp_path):
  start = time.monotonic()
  page = demo.run(Lavit.from_pretrained(ASSETS / 'tiny'), ASSETS / 'demo', tmp_path)
  assert page.stat().st_size > 50_000
  assert time.monotonic() - start < 120  # 60 s on two idle cores
