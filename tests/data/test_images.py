"""Every kind of image is read as RGB; every kind of broken image is named."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from lavit_jax.data import images
from lavit_jax.errors import UserError

RED = (200, 40, 30)


def encode(image, kind='PNG', **kwargs):
  buffer = io.BytesIO()
  image.save(buffer, kind, **kwargs)
  return buffer.getvalue()


def solid(mode='RGB', color=RED, size=(9, 7)):
  return Image.new(mode, size, color)


@pytest.mark.parametrize(
  'data, expected',
  [
    (encode(solid()), RED),
    (encode(solid(size=(1, 1))), RED),
    (encode(solid().quantize(4)), RED),
    (encode(solid('L', 77)), (77,) * 3),
    (encode(solid('1', 1)), (255,) * 3),
    (encode(solid('RGBA', RED + (255,))), RED),
    (encode(solid('RGBA', RED + (0,))), (255,) * 3),
    (encode(solid('RGBA', (0, 0, 0, 51))), (204,) * 3),
    (encode(solid('LA', (0, 0))), (255,) * 3),
    (encode(solid('P', 0), transparency=0), (255,) * 3),
    (encode(solid(), transparency=RED), (255,) * 3),
    (encode(Image.fromarray(np.full((7, 9), 257 * 120, np.uint16))), (120,) * 3),
    (encode(Image.fromarray(np.full((7, 9), 257 * 120, np.int32)), 'TIFF'), (120,) * 3),
    (encode(Image.fromarray(np.full((7, 9), 0.2, np.float32)), 'TIFF'), (51,) * 3),
  ],
  ids=(
    'rgb 1x1 palette gray bit alpha clear half gray-clear palette-clear rgb-clear 16bit 32bit float'
  ).split(),
)
def test_every_mode_reads_as_rgb(data, expected):
  image = images.read_image(data)
  assert image.dtype == np.uint8 and image.shape[-1] == 3
  np.testing.assert_array_equal(image, np.broadcast_to(np.uint8(expected), image.shape))


RAMP = np.arange(35, dtype=np.float64).reshape(5, 7) / 34


@pytest.mark.parametrize(
  'source, expected',
  [
    (
      (RAMP * 255).astype(np.float32).round(),
      (RAMP * 255).round(),
    ),  # whole numbers in a float file
    (RAMP.astype(np.float32), (RAMP * 255).round()),
    ((RAMP * 65535).astype(np.float32).round(), (RAMP * 255).round()),  # was white from 255 on
    ((RAMP * 65535).round().astype(np.int32), (RAMP * 255).round()),
    ((RAMP * 65535).round().astype('>u2'), (RAMP * 255).round()),
    ((RAMP * 200).round().astype('>u2'), (RAMP * 200 / 257).round()),  # dark, and still of 16 bits
    ((RAMP * 200).round().astype('<u2'), (RAMP * 200 / 257).round()),
  ],
  ids='float255 float1 float65535 int32 big-endian big-endian-dark little-endian-dark'.split(),
)
def test_deep_images_are_scaled_not_clipped(source, expected):
  modes = {'f': 'F', 'i': 'I', 'u': 'I;16B' if source.dtype.byteorder == '>' else 'I;16'}
  image = Image.frombytes(modes[source.dtype.kind], source.shape[::-1], source.tobytes())
  pixels = images.read_image(image)
  np.testing.assert_allclose(pixels[..., 0].astype(float), expected, atol=1)  # rounded twice
  assert (pixels == pixels[..., :1]).all()
  np.testing.assert_array_equal(images.read_image(encode(image, 'TIFF')), pixels)


@pytest.mark.parametrize(
  'source, message',
  [
    (RAMP * 3.7, 'fractions from 0 to 3.7'),
    (RAMP - 0.5, 'from -0.5 to 0.5'),
    (RAMP * 1e6, 'from 0 to 1e.06'),
    (RAMP * np.nan, 'from nan'),
    ((RAMP * 70000).astype(np.int32), 'to 70000'),
    ((RAMP * 9 - 3).astype(np.int32), 'from -3'),
  ],
)
def test_numbers_without_a_white_are_refused(tmp_path, source, message):
  source = source if source.dtype == np.int32 else source.astype(np.float32)
  Image.fromarray(source).save(tmp_path / 'deep.tif')
  with pytest.raises(UserError, match=message) as error:
    images.read_image(tmp_path / 'deep.tif')
  assert 'deep.tif' in str(error.value)
  assert 'scale' in str(error.value)
  assert 'damaged' not in str(error.value)


def test_premultiplied_and_palette_alpha_lie_on_white():
  palette = Image.new('PA', (3, 2), (5, 0))
  palette.putpalette([90] * 768)
  for clear in (
    Image.new('LA', (3, 2), (90, 0)).convert('La'),
    Image.new('RGBA', (3, 2), RED + (0,)).convert('RGBa'),
    palette,
  ):
    assert (images.read_image(clear) == 255).all(), clear.mode


@pytest.mark.parametrize('kind', ['JPEG', 'TIFF'])
def test_cmyk_is_near_its_rgb(kind):
  image = images.read_image(encode(solid().convert('CMYK'), kind))
  assert image.shape == (7, 9, 3)
  assert np.abs(image - np.array(RED, float)).max() < 8


def test_exif_turns_the_image():
  exif = Image.Exif()
  exif[0x0112] = 6  # rotate by 90 degrees to show
  assert images.read_image(encode(solid(), 'JPEG', exif=exif)).shape == (9, 7, 3)


def test_sources_agree(tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 3), np.uint8)
  path = tmp_path / 'image.png'
  Image.fromarray(pixels).save(path)
  for source in (
    path,
    str(path),
    path.read_bytes(),
    Image.open(path),
    pixels,
    pixels.astype(np.uint16) * 257,
    pixels / np.float32(255),
  ):
    np.testing.assert_array_equal(images.read_image(source), pixels)
  np.testing.assert_array_equal(images.read_image(pixels[..., 0])[..., 1], pixels[..., 0])


def test_batches_are_square_and_bicubic():
  pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 20, 3), np.uint8)
  batch = images.read_images(pixels, 16)
  expected = Image.fromarray(pixels[1]).resize((16, 16), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(batch[1], np.asarray(expected))
  assert images.read_images(pixels[0], 16).shape == (1, 16, 16, 3)
  assert images.read_images([], 16).shape == (0, 16, 16, 3)
  assert images.read_images([pixels[0]] * 2, (16, 24)).shape == (2, 16, 24, 3)
  np.testing.assert_array_equal(images.resize(batch[0], 16), batch[0])


def huge_png():
  """A few bytes whose header says 100,000 x 100,000 pixels."""

  def chunk(kind, data):
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

  header = struct.pack('>IIBBBBB', 100_000, 100_000, 8, 2, 0, 0, 0)
  return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', b'') + chunk(b'IEND', b'')


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))


@pytest.mark.parametrize(
  'data, message',
  [
    (b'', 'empty'),
    (b'this is text', 'not an image'),
    (encode(NOISE, 'JPEG')[:-900], 'truncated'),
    (encode(NOISE)[:-900], 'truncated'),
    (encode(NOISE, 'JPEG')[:30], 'not an image'),
    (huge_png(), 'too large'),
    (encode(solid(size=(10_001, 10_000), mode='1', color=0)), 'too large'),
  ],
  ids=['empty', 'text', 'jpeg', 'png', 'header', 'bomb', 'huge'],
)
def test_broken_files_are_named_in_one_line(tmp_path, data, message):
  path = tmp_path / 'broken.jpg'
  path.write_bytes(data)
  with pytest.raises(UserError, match=message) as error:
    images.read_image(path)
  assert str(path) in str(error.value)
  assert '\n' not in str(error.value)
  with pytest.raises(UserError, match='image 1: .*' + message):
    images.read_images([solid(), data], 8)


@pytest.mark.parametrize(
  'source, message',
  [
    ('nowhere/cat.png', 'nowhere/cat.png: no such file'),
    ('.', 'a folder'),
    (np.zeros((4, 4, 2), np.uint8), 'shape'),
    (np.zeros((0, 4, 3), np.uint8), 'no pixels'),
    (np.zeros((4, 4, 3), np.int64), 'int64'),
    (np.full((4, 4, 3), 200.0), 'outside'),
    (np.full((4, 4, 3), np.nan), 'outside'),
  ],
)
def test_other_bad_sources(source, message):
  with pytest.raises(UserError, match=message):
    images.read_image(source)


def test_a_url_of_a_local_file(tmp_path):
  (tmp_path / 'a cat.png').write_bytes(encode(Image.new('RGB', (3, 2), (9, 8, 7))))
  assert images.read_image((tmp_path / 'a cat.png').as_uri()).tolist() == [[[9, 8, 7]] * 3] * 2
  with pytest.raises(UserError, match='/no cat.png: no such file'):
    images.read_image((tmp_path / 'no cat.png').as_uri())
