"""Enough English for the name of an emoji: 'two sheep', 'an owl', 'three women with veil'."""

import functools
import re

NUMBERS = ('no', 'one', 'two', 'three', 'four')

_IRREGULAR = {
  'man': 'men',
  'woman': 'women',
  'person': 'people',
  'child': 'children',
  'foot': 'feet',
  'tooth': 'teeth',
  'mouse': 'mice',
  'leaf': 'leaves',
  'wolf': 'wolves',
  'knife': 'knives',
  'fish': 'fish',
  'blowfish': 'blowfish',
  'sheep': 'sheep',
  'potato': 'potatoes',
  'tomato': 'tomatoes',
  'mango': 'mangoes',
  'hero': 'heroes',
  'ox': 'oxen',
  'goose': 'geese',
  'snowman': 'snowmen',
  'merman': 'mermen',
  'cactus': 'cacti',
  'rhinoceros': 'rhinoceroses',
  'skis': 'skis',
  'dice': 'dice',
  'people': 'people',
  'men': 'men',
  'women': 'women',
  'children': 'children',
  'locked': 'locked',
  'unlocked': 'unlocked',
}
_SINGULAR_S = re.compile(r'(ss|us|is|as)$')
_TAIL = re.compile(  # begins at a preposition, or at a participle that acts as one
  r' (with|of|in|on|and|at|for|without|from|behind|under|over|getting|taking|facing|pointing|'
  r'pointed|tilted|holding|curving|shaking|blowing|savoring|showing|(up|down|left|right)$)(?!\w)'
)
_VOWEL_SOUND = re.compile(r'[aeio]|u(?!ni|se)|hour|8|11|18')


@functools.cache
def plural(name: str) -> str:
  """Returns the plural: 'woman with veil' -> 'women with veil'."""
  person, _, role = name.partition(' ')
  if person in ('man', 'woman', 'person') and role and not _TAIL.match(f' {role}'):
    is_participle = role.split()[0].endswith('ing')  # men golfing, but women cooks
    return f'{_IRREGULAR[person]} {role if is_participle else plural(role)}'
  head, tail = _split_tail(name)
  start, _, noun = head.rpartition(' ')
  if start != 'no' or noun in _IRREGULAR:
    noun = _plural_noun(noun)
  return f'{start} {noun}{tail}'.strip()


def _split_tail(name: str) -> tuple[str, str]:
  """Splits a name before its first preposition; the last word of the first part is inflected."""
  tail = _TAIL.search(name)
  if tail is None or tail.start() == 0:
    return name, ''
  return name[: tail.start()], name[tail.start() :]


def _plural_noun(noun: str) -> str:
  if noun in _IRREGULAR:
    return _IRREGULAR[noun]
  if noun.endswith('s') and not _SINGULAR_S.search(noun):
    return noun
  if re.search(r'[^aeiou]y$', noun):
    return noun[:-1] + 'ies'
  if re.search(r'(s|x|z|ch|sh)$', noun):
    return noun + 'es'
  if noun[-1:].isalpha():
    return noun + 's'
  return noun


@functools.cache
def indefinite(name: str) -> str:
  """Puts the indefinite article before a name; plurals ('glasses') have none."""
  if plural(name) == name and name[-1] == 's':
    return name
  if _VOWEL_SOUND.match(name) and not name.startswith('one '):
    return f'an {name}'
  return f'a {name}'


def counted(name: str, count: int) -> str:
  """Returns 'an owl' or 'two owls'."""
  return indefinite(name) if count == 1 else f'{NUMBERS[count]} {plural(name)}'


def definite(name: str, count: int) -> tuple[str, str]:
  """Returns the verb and the subject: ('is', 'the owl') or ('are', 'the owls')."""
  is_plural = count > 1 or indefinite(name) == name
  noun = name if count == 1 else plural(name)
  return ('are' if is_plural else 'is'), f'the {noun}'
