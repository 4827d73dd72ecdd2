"""Cleaning keeps words and clusters whole, and plain text in full."""

import html
import re
import unicodedata

import pytest

from lavit_jax.data.cleaning import clean_caption, clean_text

FAMILY = '\U0001f468\u200d\U0001f469\u200d\U0001f467'
ENGLAND = '\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f'
HINDI = '\u0915\u094d\u200d\u0937'  # KA, virama, joiner, SSA
OLD_CHILLU = '\u0d05\u0d35\u0d28\u0d4d\u200d'  # Malayalam: a joiner ends the word
PERSIAN = '\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645'
HEART_ON_FIRE = '\u2764\ufe0f\u200d\U0001f525'
ASTRONAUT = '\U0001f469\U0001f3fd\u200d\U0001f680'


@pytest.mark.parametrize(
  'text, expected',
  [
    ('auto&shy;mobile', 'automobile'),
    ('auto\u00admobile', 'automobile'),
    ('auto\u200bmobile', 'automobile'),
    ('auto<wbr>mobile', 'automobile'),
    ('auto\u200dmobile and auto\u200cmobile', 'automobile and automobile'),
    ('\u202aa dog\u202c \u200eruns\u200f', 'a dog runs'),
    ('\ufeffa\u2060 dog', 'a dog'),
    ('a\u00a0dog\u2003runs\u3000far', 'a dog runs far'),
    ('a dog\x07 runs', 'a dog runs'),
  ],
)
def test_words_stay_whole(text, expected):
  assert clean_caption(text) == expected
  if '<' not in text and '&' not in text:
    assert clean_text(text) == expected


@pytest.mark.parametrize(
  'text', [FAMILY, ENGLAND, HINDI, OLD_CHILLU, PERSIAN, HEART_ON_FIRE, ASTRONAUT, '7\ufe0f\u20e3']
)
def test_clusters_stay_whole(text):
  assert clean_caption(f'{text} here') == f'{text} here'
  assert clean_caption(text) == clean_text(text) == text


@pytest.mark.parametrize(
  'text',
  [
    'a',
    'Z',
    '\u00e9',
    '\u00e9\u00e8',
    '7',
    '\u0664',
    '\u732b',
    '\u72ac\u3002',
    '\uac1c',
    '\U0001f431',
    '\u2600\ufe0f',
    '\U0001fae9',  # younger than Unicode 15
  ],
)
def test_a_single_letter_digit_or_emoji_is_a_caption(text):
  assert clean_caption(text) == text


@pytest.mark.parametrize('text', ['', '!', '...', '\u00a9', '\u200d', '\u00ad', '\u25cf', '\u0301'])
def test_marks_alone_are_no_caption(text):
  assert clean_caption(text) == ''


def by_the_rules_for_english(text):
  """Cleans captions by independent rules, which are right for English: entities, NFKC, tags,
  addresses, control characters, spaces."""
  text = unicodedata.normalize('NFKC', html.unescape(text)).replace('<PERSON>', 'person')
  text = re.sub(r'</?[a-zA-Z][^<>]*>', ' ', text)
  text = re.sub(r'(?i)(https?://|www\.)\S+', ' ', text)
  return ' '.join(re.sub(r'[\x00-\x1f\x7f]', ' ', text).split())


@pytest.mark.parametrize(
  'text',
  [
    'A dog, a cat & "two" birds (2019) - photo #3.',
    'Caf\u00e9 d\u00e9j\u00e0-vu \u2013 it\u2019s 50% off\u2026',
    'see https://a.b/c?d=e for\tmore',
    '<p>The <b>best</b> pies</p>',
    '<PERSON> at Wembley',
    'Tom &amp; Jerry\u2122',
    '\u201cHello\u201d \u2014 \u00bd price, \u00a35',
    'I <3 NY',
    'cafe\u0301 \ufb01ne',
  ],
)
def test_english_captions_follow_simple_rules(text):
  assert clean_caption(text) == by_the_rules_for_english(text) != ''


def test_plain_text_keeps_lines_and_addresses():
  text = 'Title\r\n\r\n  if a < b:\r\tsee https://a.b/c <br> &amp; \ufb01ne cafe\u0301\x00\n'
  expected = 'Title\n\n  if a < b:\n\tsee https://a.b/c <br> &amp; \ufb01ne caf\u00e9\n'
  assert clean_text(text) == expected
  assert clean_text(' \n\t\u200b\n') == ''
