r"""Cleans stored text for the model: a caption becomes one line, plain text keeps its lines.

| what is in the text | in a caption (`clean_caption`) | in plain text (`clean_text`) |
|---|---|---|
| HTML entities and tags | decoded; removed | kept |
| addresses (https://, www.) | removed | kept |
| line breaks, tabs, runs of spaces | one space | kept; a line ends with \n |
| non-breaking and other wide spaces | a space | a space |
| control characters | a space | removed |
| soft hyphens, zero-width spaces, byte order marks, direction marks | removed | removed |
| joiners (U+200C, U+200D) | kept where they shape a cluster, else removed | the same |
| variation selectors | kept | kept |
| compatibility forms (a ligature, a full-width letter) | replaced (NFKC) | kept (NFC) |
"""

from __future__ import annotations

import html
import re
import unicodedata

_TAG = re.compile(r'</?[a-z][^<>]*>', re.I)
_BREAK_HINT = re.compile(r'</?wbr\s*/?>', re.I)  # acts like a soft hyphen
_URL = re.compile(r'(https?://|www\.)\S+', re.I)
# A flag of England, Scotland ... is a black flag with tag characters after it.
_FLAG = re.compile('\U0001f3f4[\U000e0020-\U000e007e]+\U000e007f')
_JOINERS = '\u200c\u200d'
# Characters of category Cf that are drawn: Arabic, Syriac and Kaithi number signs.
_VISIBLE_FORMATS = frozenset(
  '\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd'
)
_EMOJI = re.compile(
  '[\u231a-\u23ff\u25fb-\u25fe\u2600-\u27bf\u2b1b-\u2b55\U0001f000-\U0001faff]|\ufe0f'
)
_VIRAMA = 9  # canonical combining class


def clean_caption(text: str) -> str:
  """Cleans a caption from the web as one plain line.

  `<PERSON>` (CC12M) becomes 'person'.

  Returns:
    The caption; '' if nothing is left that has a meaning: no letter, no digit and no emoji.
  """
  text = _BREAK_HINT.sub('', html.unescape(text))
  text = unicodedata.normalize('NFKC', text).replace('<PERSON>', 'person')
  text = _URL.sub(' ', _TAG.sub(' ', text))
  text = ' '.join(_remove_invisible(text, ' ').split())
  return text if _has_meaning(text) else ''


def clean_text(text: str) -> str:
  """Cleans plain text, and keeps its lines, its addresses and all of its length.

  Returns:
    The text; '' if it is blank.
  """
  text = text.replace('\r\n', '\n').replace('\r', '\n')
  text = unicodedata.normalize('NFC', text).replace('\u2028', '\n').replace('\u2029', '\n\n')
  lines = [_remove_invisible(line, '') for line in text.replace('\x85', '\n').split('\n')]
  text = '\n'.join(lines)
  return text if text.strip() else ''


def _remove_invisible(text: str, control: str) -> str:
  """Removes characters that are not drawn; `control` replaces each control character."""
  if text.isascii() and text.isprintable():
    return text
  invisible = [character for character in set(text) if _is_invisible(character)]
  if not invisible:
    return text
  flags = [range(*match.span()) for match in _FLAG.finditer(text)]

  def replace(match: re.Match[str]) -> str:
    character = match[0]
    position = match.start()
    category = unicodedata.category(character)
    if category == 'Zs':
      return ' '
    if category != 'Cf':
      return control
    if character in _JOINERS and _joins(text, position):
      return character
    if any(position in flag for flag in flags):
      return character
    return ''

  return re.sub(f'[{re.escape("".join(invisible))}]', replace, text)


def _is_invisible(character: str) -> bool:
  """Whether the character is not drawn, or is a space other than the plain one and the tab."""
  if character in ' \t' or character in _VISIBLE_FORMATS:
    return False
  category = unicodedata.category(character)
  return category in ('Cc', 'Cf', 'Co', 'Cs', 'Zs', 'Zl', 'Zp') or _is_noncharacter(character)


def _is_noncharacter(character: str) -> bool:
  """Whether no version of Unicode will assign this code point.

  Other unassigned code points are kept: new emoji are among them.
  """
  code = ord(character)
  return 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE


def _joins(text: str, i: int) -> bool:
  """Whether the joiner at `i` changes what is drawn.

  It does after a virama, between two letters of a script without case (Arabic, Indic), and between
  two emoji.
  """
  before = text[i - 1 : i]
  after = text[i + 1 : i + 2]
  if before and unicodedata.combining(before) == _VIRAMA:
    return True
  return _can_be_joined(before) and _can_be_joined(after)


def _can_be_joined(character: str) -> bool:
  return bool(character) and unicodedata.category(character) in ('Lo', 'Mn', 'Mc', 'So', 'Sk', 'Sm')


def _has_meaning(text: str) -> bool:
  """Whether the text has a letter, a digit or an emoji."""
  return any(character.isalnum() for character in text) or bool(_EMOJI.search(text))
