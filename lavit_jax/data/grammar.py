"""Just enough English to say 'two sheep', 'an owl' and 'three women with veil' of an emoji's name."""

import functools
import re

NUMBERS = ('no', 'one', 'two', 'three', 'four')

_IRREGULAR = {
    'man': 'men', 'woman': 'women', 'person': 'people', 'child': 'children', 'foot': 'feet', 'tooth': 'teeth', 'mouse': 'mice',
    'leaf': 'leaves', 'wolf': 'wolves', 'knife': 'knives', 'fish': 'fish', 'sheep': 'sheep', 'blowfish': 'blowfish',
    'potato': 'potatoes', 'tomato': 'tomatoes', 'mango': 'mangoes', 'hero': 'heroes', 'ox': 'oxen', 'dice': 'dice',
    'police': 'police', 'people': 'people', 'men': 'men', 'women': 'women', 'goose': 'geese', 'snowman': 'snowmen',
    'bus': 'buses', 'octopus': 'octopuses', 'cactus': 'cacti', 'hibiscus': 'hibiscuses', 'lotus': 'lotuses', 'abacus': 'abacuses',
    'skis': 'skis',
}
_SINGULAR_S = re.compile(r'(ss|us|is|as)$')
_TAIL = re.compile(r' (with|of|in|on|and|facing|getting|for|without|from|taking|pointing|up|down|left|right|over|tilted|holding) ')


@functools.cache
def plural(name: str) -> str:
    """'woman with veil' -> 'women with veil'. The last word before a preposition is the one that changes."""
    tail = _TAIL.search(name + ' ')
    head, rest = (name[:tail.start()], name[tail.start():]) if tail and tail.start() > 0 else (name, '')
    start, _, noun = head.rpartition(' ')
    if noun in _IRREGULAR:
        noun = _IRREGULAR[noun]
    elif noun.endswith('s') and not _SINGULAR_S.search(noun):
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
    if plural(name) == name:
        return name
    vowel = re.match(r'[aeio]|u(?!n[aei]|s)|8|11|18', name) and not name.startswith(('one ', 'eu'))
    return f'an {name}' if vowel else f'a {name}'


def counted(name: str, count: int) -> str:
    """'an owl', 'two owls'."""
    return indefinite(name) if count == 1 else f'{NUMBERS[count]} {plural(name)}'


def definite(name: str, count: int) -> tuple[str, str]:
    """('is', 'the owl') or ('are', 'the owls')."""
    many = count > 1 or plural(name) == name
    return ('are' if many else 'is'), f'the {name if count == 1 else plural(name)}'
