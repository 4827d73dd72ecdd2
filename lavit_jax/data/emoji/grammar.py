"""Just enough English to say 'two sheep', 'an owl' and 'three women with veil' of an emoji's name."""

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
_TAIL = re.compile(
  r' (with|of|in|on|and|at|for|without|from|behind|under|over|getting|taking|facing|pointing|pointed|tilted|holding|curving|'
  r'shaking|blowing|savoring|showing|(up|down|left|right)$)(?!\w)'
)


@functools.cache
def plural(name: str) -> str:
  """'woman with veil' -> 'women with veil'. The last word before a preposition is the one that changes."""
  who, _, what = name.partition(' ')
  if who in ('man', 'woman', 'person') and what and not _TAIL.match(f' {what}'):
    return f'{_IRREGULAR[who]} {what if what.split()[0].endswith("ing") else plural(what)}'  # men golfing, women cooks
  tail = _TAIL.search(name)
  head, rest = (
    (name[: tail.start()], name[tail.start() :]) if tail and tail.start() > 0 else (name, '')
  )
  start, _, noun = head.rpartition(' ')
  if noun in _IRREGULAR:
    noun = _IRREGULAR[noun]
  elif start == 'no' or noun.endswith('s') and not _SINGULAR_S.search(noun):
    pass
  elif re.search(r'[^aeiou]y$', noun):
    noun = noun[:-1] + 'ies'
  elif re.search(r'(s|x|z|ch|sh)$', noun):
    noun += 'es'
  elif noun[-1:].isalpha():
    noun += 's'
  return f'{start} {noun}{rest}'.strip()


@functools.cache
def indefinite(name: str) -> str:
  """'owl' -> 'an owl'; plurals ('glasses') stay without an article."""
  if plural(name) == name and name[-1] == 's':
    return name
  vowel = re.match(r'[aeio]|u(?!ni|se)|hour|8|11|18', name) and not name.startswith('one ')
  return f'an {name}' if vowel else f'a {name}'


def counted(name: str, count: int) -> str:
  """'an owl', 'two owls'."""
  return indefinite(name) if count == 1 else f'{NUMBERS[count]} {plural(name)}'


def definite(name: str, count: int) -> tuple[str, str]:
  """('is', 'the owl') or ('are', 'the owls')."""
  many = count > 1 or indefinite(name) == name
  return ('are' if many else 'is'), f'the {name if count == 1 else plural(name)}'
