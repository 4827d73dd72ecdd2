"""Decoding, crops, text cleaning, the choice of a caption."""

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
  noise = 0.3 * noise + noise[:1]  # colours hardly differ
  return Image.fromarray(np.clip(128 + 50 * noise, 0, 255).astype(np.uint8).transpose(1, 2, 0))


def gradient(width, height):
  """Red tells the column, green the row."""
  x, y = np.meshgrid(np.arange(width), np.arange(height))
  return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


def test_the_whole_picture_straight_to_the_square_as_published():
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
  assert (error > 0) == scaled and error < 255**2 / 10**3.4  # 34 dB


def test_crops():
  data = encoded(gradient(200, 100))
  center = transforms.decode(data, 100, 'center').astype(int)
  assert center[0, 0].tolist() == [50, 0, 0] and center[-1, -1].tolist() == [149, 99, 0]
  corners = []
  for seed in range(40):
    picture = transforms.decode(data, 50, 'random', np.random.default_rng(seed)).astype(int)
    (left, top, _), (right, bottom, _) = picture[0, 0], picture[-1, -1]
    assert 0.5**0.5 * 100 - 4 < right - left < 100 and abs((right - left) - (bottom - top)) <= 2
    corners.append(left)
  assert min(corners) < 20 and max(corners) > 90
  same = [transforms.decode(data, 50, 'random', np.random.default_rng(1)) for _ in range(2)]
  np.testing.assert_array_equal(*same)


def test_pictures_of_all_kinds():
  image, turned = gradient(60, 40), Image.Exif()
  turned[0x0112] = 6  # a quarter turn
  assert (
    transforms.decode(encoded(image, 'JPEG', exif=turned), 8)[0, -1, 0]
    < 12
    < 48
    < transforms.decode(encoded(image, 'JPEG'), 8)[0, -1, 0]
  )
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
  [b'', b'no picture', encoded(gradient(99, 99))[:200], encoded(gradient(99, 99), 'JPEG')[:500]],
)
def test_what_is_no_picture(data):
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


def test_choice():
  rng = np.random.default_rng(0)
  assert (
    transforms.choose_caption(['', ' one thing ', '?'], rng) == 'one thing'
    and transforms.choose_caption([], rng) == transforms.choose_caption(['!'], rng) == ''
  )
  assert {transforms.choose_caption(['one', 'two', ''], rng) for _ in range(20)} == {'one', 'two'}
