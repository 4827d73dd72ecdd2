"""Training and inference read the same files in the same way, and refuse the same files."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from lavit_jax.data import array_record, images, transforms
from lavit_jax.errors import UserError

RNG = np.random.default_rng(0)
PIXELS = np.repeat(np.repeat(RNG.integers(0, 256, (6, 9, 3), np.uint8), 8, 0), 8, 1)


def encode(image, kind='PNG', **options) -> bytes:
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


def with_size(jpeg: bytes, width: int, height: int) -> bytes:
  """Returns a JPEG whose header has another size."""
  position = jpeg.index(b'\xff\xc0') + 5
  return jpeg[:position] + struct.pack('>HH', height, width) + jpeg[position + 4 :]


def with_alpha(mode: str) -> Image.Image:
  alpha = np.linspace(0, 255, PIXELS[..., 0].size).astype(np.uint8).reshape(PIXELS.shape[:2])
  image = Image.fromarray(PIXELS).convert(mode[:-1])
  image.putalpha(Image.fromarray(alpha))
  return image


def turned(orientation: int, kind: str = 'PNG') -> bytes:
  exif = Image.Exif()
  exif[0x0112] = orientation
  options = dict(quality=95) if kind == 'JPEG' else {}
  return encode(Image.fromarray(PIXELS), kind, exif=exif, **options)


XMP = (
  b'<x:xmpmeta xmlns:x="adobe:ns:meta/">'
  b'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
  b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
  b'</rdf:RDF></x:xmpmeta>'
)
RGB = Image.fromarray(PIXELS)
FRAMES = [Image.fromarray(np.roll(PIXELS, i, 2)).quantize(16) for i in range(3)]
KINDS = {
  'rgb': encode(RGB),
  'jpeg': encode(RGB, 'JPEG', quality=95),
  'gray jpeg': encode(RGB.convert('L'), 'JPEG'),
  'cmyk jpeg': encode(RGB.convert('CMYK'), 'JPEG'),
  'palette': encode(RGB.quantize(16)),
  'clear palette': encode(RGB.quantize(16), transparency=3),
  'rgba': encode(with_alpha('RGBA')),
  'la': encode(with_alpha('LA')),
  'clear color': encode(RGB, transparency=tuple(PIXELS[0, 0].tolist())),
  'webp': encode(with_alpha('RGBA'), 'WEBP', lossless=True),
  'gif': encode(FRAMES[0], 'GIF', save_all=True, append_images=FRAMES[1:]),
  'apng': encode(RGB, save_all=True, append_images=[RGB.rotate(180)]),
  'bit': encode(RGB.convert('1')),
  '16 bit': encode(Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)),
  'turned png': turned(6),
  'upright jpeg': turned(1, 'JPEG'),
  'turned jpeg': turned(8, 'JPEG'),
  'xmp jpeg': encode(RGB, 'JPEG', quality=95, xmp=XMP),
}


@pytest.mark.parametrize('kind', KINDS)
def test_training_and_inference_read_the_same_image(kind):
  side = 40
  whole = images.read_image(KINDS[kind])
  expected = np.asarray(Image.fromarray(whole).resize((side, side), Image.Resampling.BICUBIC))
  np.testing.assert_array_equal(images.read_images(KINDS[kind], side)[0], expected)
  np.testing.assert_array_equal(transforms.decode(KINDS[kind], side), expected)


def test_the_first_frame_and_the_right_side_up():
  first = np.asarray(FRAMES[0].convert('RGB'))
  np.testing.assert_array_equal(images.read_image(KINDS['gif']), first)
  np.testing.assert_array_equal(images.read_image(KINDS['apng']), PIXELS)
  for kind, turns in (
    ('turned png', -1),
    ('turned jpeg', 1),
    ('xmp jpeg', -1),
    ('upright jpeg', 0),
  ):
    upright = np.rot90(PIXELS, turns)
    found = transforms.decode(KINDS[kind], 24).astype(float)
    expected = np.asarray(
      Image.fromarray(upright).resize((24, 24), Image.Resampling.BICUBIC)
    ).astype(float)
    assert np.abs(found - expected).mean() < np.abs(found - expected[::-1, ::-1]).mean() / 3, kind


JPEG = encode(RGB, 'JPEG', quality=95)
REFUSED = {
  'above the limit': (with_size(JPEG, 10_000, 8_001), 'too large'),
  '100 megapixels': (with_size(JPEG, 12_000, 9_000), 'too large'),
  'a bomb': (with_size(JPEG, 60_000, 60_000), 'too large'),
  'empty': (b'', 'empty'),
  'text': (b'text', 'not an image'),
  'cut jpeg': (JPEG[:-300], 'truncated|damaged'),
  'cut png': (encode(RGB)[:-100], 'truncated|damaged'),
}


@pytest.mark.parametrize('kind', REFUSED)
def test_training_inference_and_packing_refuse_the_same(kind):
  data, message = REFUSED[kind]
  with pytest.raises(UserError, match=message):
    images.read_image(data)
  for crop in ('none', 'random'):
    with pytest.raises(UserError, match=message):
      transforms.decode(data, 8, crop, np.random.default_rng(0))
  assert not array_record._can_decode(data)


def test_the_limit_itself_is_accepted_by_both(monkeypatch):
  monkeypatch.setattr(images, 'MAX_PIXELS', PIXELS.shape[0] * PIXELS.shape[1])
  assert images.read_image(JPEG).shape == PIXELS.shape
  assert transforms.decode(JPEG, 8).shape == (8, 8, 3)
  monkeypatch.setattr(images, 'MAX_PIXELS', PIXELS.shape[0] * PIXELS.shape[1] - 1)
  for read in (images.read_image, lambda data: transforms.decode(data, 8)):
    with pytest.raises(UserError, match='72 x 48 is too large'):
      read(JPEG)
