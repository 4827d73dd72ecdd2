"""Decoding, crops, cleaning, and the choice of a caption."""

import io

import numpy as np
import pytest
from PIL import Image

from lavit_jax.data import transforms
from lavit_jax.data.cleaning import clean_caption
from lavit_jax.errors import UserError


def encoded(image, kind='PNG', **options) -> bytes:
  out = io.BytesIO()
  image.save(out, kind, **options)
  return out.getvalue()


def natural(width, height, seed=0):
  """Noise with the spectrum of photographs."""
  rng = np.random.default_rng(seed)
  frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(width), np.fft.fftfreq(height))) + 1 / width
  noise = np.fft.ifft2(
    np.fft.fft2(rng.normal(size=(3, height, width))) / frequency, axes=(-2, -1)
  ).real
  noise = noise / noise.std((1, 2), keepdims=True)
  noise = 0.3 * noise + noise[:1]  # the channels differ little
  return Image.fromarray(np.clip(128 + 50 * noise, 0, 255).astype(np.uint8).transpose(1, 2, 0))


def gradient(width, height):
  """Red is the column, green is the row."""
  x, y = np.meshgrid(np.arange(width), np.arange(height))
  return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


def test_the_whole_image_is_resized_to_the_square_as_published():
  image = natural(120, 90)
  expected = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC))
  np.testing.assert_array_equal(transforms.decode(encoded(image), 32), expected)


@pytest.mark.parametrize(
  'size, scaled',
  [
    ((200, 150), False),
    ((300, 255), False),
    ((300, 256), True),
    ((700, 500), True),
    ((512, 1100), True),
  ],
)
def test_scaled_decoding_hardly_differs(size, scaled):
  data = encoded(natural(*size), 'JPEG', quality=95)
  expected = np.asarray(
    Image.open(io.BytesIO(data)).resize((64, 64), Image.Resampling.BICUBIC)
  ).astype(float)
  error = np.square(transforms.decode(data, 64) - expected).mean()
  assert (error > 0) == scaled
  assert error < 255**2 / 10**3.4  # 34 dB


def test_crops():
  data = encoded(gradient(200, 100))
  center = transforms.decode(data, 100, 'center').astype(int)
  assert center[0, 0].tolist() == [50, 0, 0]
  assert center[-1, -1].tolist() == [149, 99, 0]
  corners = []
  for seed in range(40):
    image = transforms.decode(data, 50, 'random', np.random.default_rng(seed)).astype(int)
    left, top, _ = image[0, 0]
    right, bottom, _ = image[-1, -1]
    assert 0.5**0.5 * 100 - 4 < right - left < 100
    assert abs((right - left) - (bottom - top)) <= 2
    corners.append(left)
  assert min(corners) < 20 and max(corners) > 90
  same = [transforms.decode(data, 50, 'random', np.random.default_rng(1)) for _ in range(2)]
  np.testing.assert_array_equal(*same)


def test_images_of_all_kinds():
  image = gradient(60, 40)
  exif = Image.Exif()
  exif[0x0112] = 6  # a quarter turn
  turned = transforms.decode(encoded(image, 'JPEG', exif=exif), 8)
  upright = transforms.decode(encoded(image, 'JPEG'), 8)
  assert turned[0, -1, 0] < 12
  assert upright[0, -1, 0] > 48
  clear = Image.new('RGBA', (9, 9), (255, 0, 0, 0))
  assert (transforms.decode(encoded(clear), 4) == 255).all()
  for data in (
    encoded(image.convert('L'), 'JPEG'),
    encoded(image.convert('P')),
    encoded(image.convert('CMYK'), 'JPEG'),
  ):
    assert transforms.decode(data, 4).shape == (4, 4, 3)


@pytest.mark.parametrize(
  'data',
  [b'', b'no image', encoded(gradient(99, 99))[:200], encoded(gradient(99, 99), 'JPEG')[:500]],
)
def test_broken_files_are_errors(data):
  with pytest.raises(UserError):
    transforms.decode(data, 8)


@pytest.mark.parametrize(
  'text, expected',
  [
    ('  A dog\n\ton &amp; off  ', 'A dog on & off'),
    ('<b>A</b> dog<br/> runs', 'A dog runs'),
    ('a < b > c', 'a < b > c'),
    ('see https://a.b/c?d and www.e.f now', 'see and now'),
    ('<PERSON> with <PERSON>', 'person with person'),
    ('ﬁne\u200b cafe\u0301', 'fine café'),
    ('東京', '東京'),
    ('a\x00b\ufeff', 'a b'),
    ('!', ''),
    ('', ''),
    (' <br> ', ''),
    ('7', '7'),
    ('https://only.an/address', ''),
  ],
)
def test_cleaning(text, expected):
  assert clean_caption(text) == expected


def test_choose_caption():
  rng = np.random.default_rng(0)
  assert transforms.choose_caption(['', ' one thing ', '?'], rng) == 'one thing'
  assert transforms.choose_caption([], rng) == ''
  assert transforms.choose_caption(['!'], rng) == ''
  assert {transforms.choose_caption(['one', 'two', ''], rng) for _ in range(20)} == {'one', 'two'}
