"""The training sprite that is nearest to an image: composed images, of which it is known."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from lavit_jax.apps.demo import neighbors
from lavit_jax.apps.demo.neighbors import Neighbor, Sprites
from lavit_jax.data.emoji import sprites
from lavit_jax.data.emoji.scenes import Composer
from lavit_jax.errors import UserError


@pytest.fixture(scope='module')
def composer():
  return Composer(sprites.load(), 'train', scene_share=0)


@pytest.fixture(scope='module')
def folder(composer, tmp_path_factory):
  """The thumbnails of all training sprites."""
  folder = tmp_path_factory.mktemp('sprites')
  metadata = composer.sprites.metadata
  names = [[metadata[i].name, metadata[i].style] for i in composer.trained_sprites]
  pixels = composer.sprites.pixels[composer.trained_sprites]
  neighbors.write_sprites(folder, pixels, names, {'noto': 'free'})
  return folder


@pytest.fixture(scope='module')
def trained(folder):
  return neighbors.read_sprites(folder)


def nearest(image, trained):
  found = neighbors.find_nearest(image, trained)
  assert found is not None
  return found


def solid(*colors):
  """Sprites of one color each."""
  pixels = np.empty((len(colors), 24, 24, 4), np.uint8)
  for sprite, color in zip(pixels, colors, strict=True):
    sprite[:] = (*color, 255)
  return Sprites(pixels, [[f'name {i}', f'style {i}'] for i in range(len(colors))])


def test_thumbnails(folder, composer, trained):
  assert len(trained.names) == len(trained.pixels) == len(composer.trained_sprites) > 48
  description = json.loads((folder / 'sprites.json').read_text())
  assert description['licences'] == {'noto': 'free'}
  for index in (0, len(trained.names) - 1):
    sprite = composer.trained_sprites[index]
    assert trained.names[index] == list(composer.sprites.metadata[sprite][2:0:-1])
    # The mean of each square of 4 x 4 pixels, 96 / 24, with the alpha that it has.
    expected = composer.sprites.pixels[sprite].astype(float).reshape(24, 4, 24, 4, 4).mean((1, 3))
    thumbnail = trained.pixels[index].astype(float)
    alpha = thumbnail[..., 3:]
    # 32 levels of 255 / 31 are half a level off, and each of three roundings by one half.
    np.testing.assert_allclose(alpha, expected[..., 3:], atol=255 / 31 / 2 + 1.5)
    opaque = expected[..., 3] > 200
    assert opaque.sum() > 50
    straight = (expected[..., :3] * 255 / expected[..., 3:].clip(1))[opaque]
    # Rounding before the division by alpha counts for up to 255 / 200 more.
    np.testing.assert_allclose(thumbnail[opaque, :3], straight, atol=255 / 31 / 2 + 2.5)


def test_an_image_of_a_training_sprite_is_found(composer, trained):
  """At all scales of training images, and on two sizes of images."""
  count = 20
  large = Composer(composer.sprites, 'train', scene_share=0, image_size=160)
  for images in (composer, large):
    hits = 0
    for index in range(count):
      example = images(5, index)
      found = nearest(example.image, trained)
      hits += composer.trained_sprites[found.index] == example.facts.objects[0].sprite
    assert hits >= 0.95 * count


@pytest.mark.parametrize('side', [16, 30, 45, 62])
def test_the_scale_does_not_matter(composer, trained, side):
  example = composer(5, 0)
  emoji = example.facts.objects[0]
  corner = (64 - side) / 2
  facts = example.facts._replace(objects=(emoji._replace(boxes=((corner, corner, side),)),))
  found = nearest(composer.draw(facts), trained)
  assert composer.trained_sprites[found.index] == emoji.sprite
  assert (found.name, found.style) == (emoji.name, facts.style)


def test_noise_does_not_matter(composer, trained):
  rng = np.random.default_rng(0)
  for index in range(8):
    example = composer(6, index)
    noise = rng.normal(0, 8, example.image.shape)
    noisy = np.clip(example.image + noise, 0, 255).astype(np.uint8)
    found = nearest(noisy, trained)
    assert composer.trained_sprites[found.index] == example.facts.objects[0].sprite


def test_a_drawing_that_is_no_sprite_is_farther(composer, trained):
  distances = [nearest(composer(5, index).image, trained).distance for index in range(10)]
  x, y = np.mgrid[:64, :64]
  stripes = np.full((64, 64, 3), 245, np.uint8)
  inside = (x > 12) & (x < 52) & (y > 12) & (y < 52)
  stripes[inside & ((x + y) // 4 % 2 == 0)] = (20, 120, 40)
  quarters = np.full((64, 64, 3), 245, np.uint8)
  quarters[12:32, 12:32] = (200, 30, 30)
  quarters[32:52, 32:52] = (30, 30, 200)
  for drawing in (stripes, quarters):
    assert nearest(drawing, trained).distance > 2 * np.median(distances)
    assert nearest(drawing, trained).distance > np.quantile(distances, 0.95)


def test_the_distance_is_the_root_of_the_mean_square():
  image = np.full((40, 40, 3), 250, np.uint8)
  image[10:34, 6:30] = (200, 10, 10)
  found = nearest(image, solid((100, 10, 10), (200, 10, 250), (200, 130, 10)))
  assert (found.index, found.name, found.style) == (0, 'name 0', 'style 0')
  assert found.distance == pytest.approx(100 / 255 / math.sqrt(3), rel=1e-6)
  assert (found.thumbnail == (100, 10, 10)).all()


def test_parts_that_the_background_hides():
  """A sprite that is half white is half as large on white; another color shows all of it."""
  both = solid((255, 255, 255), (0, 0, 255))
  both.pixels[0, :, 12:, :3] = (220, 0, 0)
  both.pixels[1, :, 12:, :3] = (255, 0, 0)
  image = np.full((64, 64, 3), 255, np.uint8)
  image[8:56, 32:56] = (220, 0, 0)
  found = nearest(image, both)
  assert (found.index, found.distance) == (0, 0)
  image[:] = (0, 200, 0)
  image[8:56, 8:32] = 255
  image[8:56, 32:56] = (220, 0, 0)
  found = nearest(image, both)
  assert (found.index, found.distance) == (0, 0)


def test_an_image_without_foreground_has_no_neighbor(trained):
  image = np.full((64, 64, 3), 90, np.uint8)
  image += np.random.default_rng(0).integers(0, 20, image.shape).astype(np.uint8)
  assert neighbors.find_nearest(image, trained) is None


def test_the_background_is_the_most_common_color_of_the_border():
  """Even if noise crosses the limits of what is counted together, and an object hides a half."""
  image = np.full((64, 64, 3), 127, np.uint8)
  image[::2] = 128
  image[:, :30] = (250, 0, 0)
  color = neighbors.background_color(image)
  np.testing.assert_allclose(color, 127.5, atol=0.5)
  left, top, side = neighbors.foreground_square(image, color)
  assert (left, top, side) == (-17, 0, 64)


def test_the_distance_in_words():
  def words(distance):
    return Neighbor(0, 'owl', 'noto', distance, np.zeros((24, 24, 3), np.uint8)).in_words()

  assert words(0.044) == 'almost the same, colors differ by 4%'
  assert words(0.13) == 'similar, colors differ by 13%'
  assert words(0.4) == 'different, colors differ by 40%'


def test_damaged_files(folder, tmp_path):
  assert neighbors.read_sprites(tmp_path) is None
  text = (folder / 'sprites.json').read_text()
  few = Image.new('RGBA', (24, 24))
  for written, png, named in (
    (text, None, 'sprites.png'),
    (text, few, 'sprites.png'),
    ('{', few, 'sprites.json'),
    ('{"side": 0, "sprites": []}', few, 'sprites.png'),
    ('{"side": 24, "sprites": [["owl"]]}', few, 'sprites.json'),
  ):
    (tmp_path / 'sprites.json').write_text(written)
    (tmp_path / 'sprites.png').unlink(missing_ok=True)
    if png is not None:
      png.save(tmp_path / 'sprites.png')
    with pytest.raises(UserError, match=f'{named} is damaged .*--make') as error:
      neighbors.read_sprites(tmp_path)
    assert '\n' not in str(error.value)
