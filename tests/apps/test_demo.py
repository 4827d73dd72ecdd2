"""The demo's inputs and page, with a stub for the model; `slow` runs the tiny checkpoint."""

import base64
import html.parser
import io
import json
import math
import pathlib
import re
import shutil
import time
import types

import numpy as np
import pytest
from PIL import Image

import lavit_jax
from lavit_jax.apps import demo, page
from lavit_jax.apps.demo import neighbors, runner
from lavit_jax.data.emoji import scenes, sprites
from lavit_jax.data.emoji.dataset import LICENCES
from lavit_jax.data.emoji.scenes import Composer
from lavit_jax.errors import UserError
from lavit_jax.inference.outputs import PatchSelection, TextOutput, VisualTokens
from lavit_jax.inference.pipeline import Lavit
from lavit_jax.visualization import probability_colors

ASSETS = pathlib.Path(lavit_jax.__file__).parent / 'assets'


class Stub:
  """A model with known answers, by which the page is checked."""

  modules = types.SimpleNamespace(image_size=64, num_patches=64, variant='stub')

  def tokenize(self, images, seed):
    keep = np.zeros((len(images), 64), bool)
    keep[:, :21] = True
    return VisualTokens([np.arange(21)] * len(images), keep, keep.sum(-1))

  def select_patches(self, images):
    """A patch is as probable as it is far from the image's corner; more ink keeps more."""
    patches = np.abs(images.astype(float) - images[:, :1, :1]).max(-1)
    patches = patches.reshape(-1, 8, 8, 8, 8).mean((2, 4)).reshape(-1, 64)
    keep = patches > 20
    self.selected = PatchSelection((patches / 255).astype(np.float32), keep, keep.sum(-1))
    return self.selected

  def caption_outputs(self, images, seed, length_penalty):
    assert length_penalty == 1
    texts = [f'<caption {i}>' for i in range(len(images))]
    return [TextOutput(text, np.arange(3), math.log(0.61)) for text in texts]

  def answer_outputs(self, images, questions, seed, length_penalty):
    assert len(images) == len(questions)
    assert length_penalty == 0
    texts = [f'answer {i}' for i in range(len(images))]
    return [TextOutput(text, np.arange(2), math.log(0.37**2)) for text in texts]

  def sample_codes(self, prompts, guidance_scale, seed):
    self.prompts = getattr(self, 'prompts', []) + prompts
    return [np.arange(5)] * len(prompts)

  def decode_images(self, codes, num_inference_steps, seed):
    images = np.full((len(codes), 64, 64, 3), 99, np.uint8)
    if len(codes[0]) == 5:  # generated ones; the second remains plain
      images[0, 16:48, 16:48] = (200, 30, 30)
      images[2:, 16:48, 16:48] = (30, 30, 200)
    return images


@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
  folder = tmp_path_factory.mktemp('inputs')
  demo.make_inputs('embedded', folder)
  return folder


def test_inputs_are_held_out_and_complete(inputs):
  manifest = demo.read_manifest(inputs)
  sizes = {key: len(entries) for key, entries in manifest.items()}
  assert sizes == {'pictures': 8, 'texts': 4, 'mixed': 4, 'series': 2}
  in_series = manifest['series'][0]['images'] + manifest['series'][1]['images']
  for row in manifest['pictures'] + manifest['texts'] + in_series:
    assert Image.open(inputs / row['file']).size == (64, 64)
  kinds = {tuple(part.endswith('.png') for part in parts) for parts in manifest['mixed']}
  assert kinds == {(True, False), (True, True)}
  again = demo.make_inputs('embedded', inputs).read_text()
  assert again == json.dumps(manifest, indent=1, ensure_ascii=False) + '\n'


def test_series_show_more_and_more_of_a_held_out_emoji(inputs):
  composer = Composer(sprites.load(), 'heldout')
  heldout = {(sprite.name, sprite.style) for sprite in composer.sprites.metadata}
  for index in composer.trained_sprites:
    sprite = composer.sprites.metadata[index]
    if not scenes._has_heldout_background(sprite.group):
      heldout.discard((sprite.name, sprite.style))
  series = demo.read_manifest(inputs)['series']
  for entry in series:
    assert tuple(re.fullmatch('(.*), (.*) style', entry['text']).groups()) in heldout
    shares = {}
    for row in entry['images']:
      image = np.asarray(Image.open(inputs / row['file'])).astype(int)
      shares[row['label']] = (np.abs(image - image[0, 0]).max(-1) > 8).mean()
    assert shares['plain background'] == 0
    assert 0 < shares['one, small'] < shares['one'] < shares['two'] < shares['four']
    assert shares['one'] < shares['one, large']
    assert shares['two'] == pytest.approx(2 * shares['one'], rel=0.01)
    assert shares['four'] == pytest.approx(4 * shares['one'], rel=0.01)
  assert series[0]['text'] != series[1]['text']


def test_all_training_sprites_are_among_the_inputs(inputs):
  composer = Composer(sprites.load(), 'train')
  expected = set()
  for index in composer.trained_sprites:
    sprite = composer.sprites.metadata[index]
    expected.add((sprite.name, sprite.style))
  written = neighbors.read_sprites(inputs)
  assert {tuple(names) for names in written.names} == expected
  licences = json.loads((inputs / 'sprites.json').read_text())['licences']
  assert set(licences) == {style for _, style in expected}
  assert 'CC BY-SA 4.0' in licences['openmoji']
  assert 'Permission is hereby granted' in LICENCES['fluent']  # MIT asks for the notice itself


def images_of(text):
  """The images of a page, in order; it needs no other file."""
  images = []

  class Reader(html.parser.HTMLParser):
    def handle_starttag(self, tag, attrs):
      assert not {'href', 'link', 'script'} & {tag, *dict(attrs)}
      if tag == 'img':
        kind, data = dict(attrs)['src'].split(',')
        assert kind == 'data:image/png;base64'
        images.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))))

  Reader().feed(text)
  return images


def test_the_page_holds_everything(inputs, tmp_path, capsys):
  stub = Stub()
  text = demo.run(stub, inputs, tmp_path / 'new' / 'out').read_text()
  assert [p.name for p in (tmp_path / 'new' / 'out').iterdir()] == ['index.html']
  scale, *images = images_of(text)
  assert scale.shape == (1, 128, 3)
  # The generated image of the second text is plain, and has no neighbor.
  assert len(images) == 8 * 4 + 2 * 6 * 2 + (4 * 3 - 1) + 2 * 3 + 2 * 4
  assert {image.shape for image in images} == {(64, 64, 3)}
  heat_maps = probability_colors(stub.selected.probabilities[:8], 64)
  np.testing.assert_array_equal(images[1:32:4], heat_maps)
  manifest = demo.read_manifest(inputs)
  for expected in ('&lt;caption 7&gt;', 'answer 7', '21 tokens', '5 tokens'):
    assert expected in text
  assert text.count('61% sure; true: ') == 8
  assert text.count('37% sure; true: ') == 8
  counts = [f'<small>{count} tokens</small>' for count in stub.selected.counts[8:]]
  captions = re.findall(r'<small>\d+ tokens</small>', text)
  assert [caption for caption in captions if '>21 ' not in caption] == counts
  assert counts[0] == '<small>0 tokens</small>'
  assert len(re.findall(r' style: [a-z ]+, colors differ by \d+%', text)) == 7
  assert text.count('none, for the generated image is plain') == 1
  for row in manifest['pictures']:
    assert html.escape(row['caption']) in text
    assert html.escape(row['question']) in text
  expected = [[row['text']] for row in manifest['texts']] + manifest['mixed']
  for parts, names in zip(stub.prompts, expected, strict=True):
    assert [str(part).rpartition('/')[2] for part in parts] == names
  assert 'reconstruct' in capsys.readouterr().out


def test_the_neighbor_of_a_generated_image_is_on_the_page(inputs, tmp_path):
  """A training sprite, generated as it is, is found by name."""
  composer = Composer(sprites.load(), 'train', scene_share=0)
  example = composer(0, 0)

  class Memory(Stub):
    def decode_images(self, codes, num_inference_steps, seed):
      return np.stack([example.image] * len(codes))

  text = demo.run(Memory(), inputs, tmp_path).read_text()
  name = f'{example.facts.objects[0].name}, {example.facts.style} style: almost the same'
  assert text.count(name) == 8


def test_older_inputs_have_neither_series_nor_sprites(inputs, tmp_path):
  folder = tmp_path / 'inputs'
  shutil.copytree(inputs, folder)
  for name in ('sprites.png', 'sprites.json'):
    (folder / name).unlink()
  manifest = json.loads((folder / 'manifest.json').read_text())
  del manifest['series']
  (folder / 'manifest.json').write_text(json.dumps(manifest))
  text = demo.run(Stub(), folder, tmp_path / 'out').read_text()
  assert len(images_of(text)) == 1 + 8 * 4 + 4 * 2 + 2 * 2 + 2 * 3
  assert 'nearest' not in text
  assert 'number of tokens depends' not in text


def test_the_mean_probability_of_a_token():
  """Of tokens with probabilities 1/2, 1/4 and 1/8, it is 1/4, whatever ranked the beams."""
  log_probability = math.log(1 / 2) + math.log(1 / 4) + math.log(1 / 8)
  for length_penalty in (0, 1, 2.5):
    output = TextOutput('', np.arange(3), log_probability / 3**length_penalty)
    assert runner.mean_probability(output, length_penalty) == pytest.approx(1 / 4)


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
    '{"pictures": [], "texts": [], "mixed": [], "series": [{"text": "owl"}]}',
    '{"pictures": [], "texts": [], "mixed": [], "series": ["owl"]}',
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
