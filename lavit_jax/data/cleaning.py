"""Text as it is stored -> text as a model reads it: a caption is one line, plain text keeps its lines.

| what is in the text | in a caption (`clean_caption`) | in plain text (`clean_text`) |
|---|---|---|
| HTML entities and tags | decoded; removed | kept |
| addresses (https://, www.) | removed | kept |
| line breaks, tabs, runs of spaces | one space | kept; a line ends with \\n |
| non-breaking and other wide spaces | a space | a space |
| control characters | a space | removed |
| soft hyphens, zero-width spaces, byte order and direction marks | removed, the word stays whole | the same |
| joiners (U+200C, U+200D) | kept where they shape a cluster, else removed | the same |
| variation selectors | kept | kept |
| compatibility forms (a ligature, a full-width letter) | replaced (NFKC) | kept (NFC) |
"""

from __future__ import annotations

import html
import re
import unicodedata

_TAG = re.compile(r'</?[a-z][^<>]*>', re.I)
_BREAK_HINT = re.compile(r'</?wbr\s*/?>', re.I)  # as a soft hyphen
_URL = re.compile(r'(https?://|www\.)\S+', re.I)
_FLAG = re.compile('\U0001f3f4[\U000e0020-\U000e007e]+\U000e007f')  # of England, Scotland ...: tags
_JOINERS = '\u200c\u200d'
_VISIBLE_FORMATS = frozenset(  # category Cf, but drawn: Arabic, Syriac and Kaithi number signs
  [chr(c) for c in range(0x600, 0x606)]
  + [chr(c) for c in (0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD)]
)
_EMOJI = re.compile(
  '[\u231a-\u23ff\u25fb-\u25fe\u2600-\u27bf\u2b1b-\u2b55\U0001f000-\U0001faff]|\ufe0f'
)
_VIRAMA = 9  # canonical combining class


def clean_caption(text: str) -> str:
  """A caption from the web as one plain line; <PERSON> (CC12M) becomes a person.

  Returns '' when nothing is left that says anything: neither two letters or digits, nor one
  letter of a script without case (a Chinese word may have one character), nor an emoji.
  """
  text = _BREAK_HINT.sub('', html.unescape(text))
  text = unicodedata.normalize('NFKC', text).replace('<PERSON>', 'person')
  text = _URL.sub(' ', _TAG.sub(' ', text))
  text = ' '.join(_visible(text, ' ').split())
  return text if _says_something(text) else ''


def clean_text(text: str) -> str:
  """Plain text with its lines, its addresses and all of its length; '' when it is blank."""
  text = text.replace('\r\n', '\n').replace('\r', '\n')
  text = unicodedata.normalize('NFC', text).replace('\u2028', '\n').replace('\u2029', '\n\n')
  lines = [_visible(line, '') for line in text.replace('\x85', '\n').split('\n')]
  text = '\n'.join(lines)
  return text if text.strip() else ''


def _visible(text: str, control: str) -> str:
  """`text` without what is not drawn; a control character becomes `control`."""
  if text.isascii() and text.isprintable():
    return text
  odd = [character for character in set(text) if _is_odd(character)]
  if not odd:
    return text
  flags = [range(*match.span()) for match in _FLAG.finditer(text)]

  def replace(match: re.Match) -> str:
    character, place = match[0], match.start()
    category = unicodedata.category(character)
    if category == 'Zs':
      return ' '
    if category != 'Cf':
      return control
    joins = character in _JOINERS and _joins(text, place)
    return character if joins or any(place in flag for flag in flags) else ''

  return re.sub(f'[{re.escape("".join(odd))}]', replace, text)


def _is_odd(character: str) -> bool:
  """Whether the character is not drawn, or is another space than the plain one and the tab."""
  if character in ' \t' or character in _VISIBLE_FORMATS:
    return False
  category = unicodedata.category(character)
  return category in ('Cc', 'Cf', 'Co', 'Cs', 'Zs', 'Zl', 'Zp') or _is_noncharacter(character)


def _is_noncharacter(character: str) -> bool:
  """Whether no version of Unicode will assign this code point; new emoji are assigned later."""
  code = ord(character)
  return 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE


def _joins(text: str, i: int) -> bool:
  """Whether the joiner at `i` shapes what is drawn: after a virama, or between two letters of
  a script without case (Arabic, Indic), or between two emoji. Elsewhere it is litter.
  """
  before, after = text[i - 1 : i], text[i + 1 : i + 2]
  if before and unicodedata.combining(before) == _VIRAMA:
    return True
  return _can_be_joined(before) and _can_be_joined(after)


def _can_be_joined(character: str) -> bool:
  return bool(character) and unicodedata.category(character) in ('Lo', 'Mn', 'Mc', 'So', 'Sk', 'Sm')


def _says_something(text: str) -> bool:
  if sum(character.isalnum() for character in text) >= 2:
    return True
  return any(unicodedata.category(c) == 'Lo' for c in text) or bool(_EMOJI.search(text))
