"""Conversations and questions as training data, against templates that are written out here."""

import collections
import itertools
import json

import numpy as np
import pytest
import tokenizers
from numbered_images import FOLDER, batches, image_file, number, write_folder

from lavit_jax.data import chat
from lavit_jax.data.chat import ASSISTANT, SYSTEM, TEMPLATES, USER, Message
from lavit_jax.data.row_workers import SkipCounter
from lavit_jax.errors import UserError
from lavit_jax.models.packing import CHAT, IMAGE_ID
from lavit_jax.models.settings import CHAT_TEMPLATES

TOKENIZER = tokenizers.Tokenizer.from_file(f'{FOLDER}/tokenizer.json')
END = 2
VICUNA = (
  'A chat between a curious user and an artificial intelligence assistant. The assistant gives '
  "helpful, detailed, and polite answers to the user's questions."
)
LLAVA_V1 = (
  'A chat between a curious human and an artificial intelligence assistant. The assistant gives '
  "helpful, detailed, and polite answers to the human's questions."
)


def turn(speaker, text):
  return {'from': speaker, 'value': text}


TWO_TURNS = [
  turn('human', '<image>\nWhat is this?'),
  turn('gpt', 'a red apple'),
  turn('human', 'Where is it?'),
  turn('gpt', 'at the left'),
]
INTERLEAVED = [
  turn('human', 'Compare <image> with <image>, please.'),
  turn('gpt', 'both are red'),
]
TEXT_ONLY = [turn('system', 'Be brief.'), turn('human', 'Say cat.'), turn('gpt', 'cat')]


def ids(text):
  """The ids of a whole string by the library `tokenizers`."""
  return TOKENIZER.encode(text, add_special_tokens=False).ids


def expected(*parts):
  """(ids, indices that are learned) of strings, IMAGE_ID, and of [strings] that are learned.

  A string is split in two, without the space between them, where its learned part begins.
  """
  tokens, learned = [], []
  for part in parts:
    new = [part] if part in (IMAGE_ID, END) else ids(part[0] if isinstance(part, list) else part)
    if isinstance(part, list) or part == END:
      learned += range(len(tokens), len(tokens) + len(new))
    tokens += new
  return tokens, learned


WRITTEN = {  # (template, conversation) -> what a row has; the last </s> is added when it is packed
  ('lavit', 'two turns'): [
    IMAGE_ID,
    'Question: What is this? Answer:',
    ['a red apple'],
    END,
    'Question: Where is it? Answer:',
    ['at the left'],
  ],
  ('lavit', 'interleaved'): [
    'Question: Compare',
    IMAGE_ID,
    'with',
    IMAGE_ID,
    ', please. Answer:',
    ['both are red'],
  ],
  ('lavit', 'text'): ['Be brief.', 'Question: Say cat. Answer:', ['cat']],
  **{
    (name, 'two turns'): [
      f'{system} USER: ',
      IMAGE_ID,
      '\nWhat is this? ASSISTANT:',
      ['a red apple'],
      END,
      'USER: Where is it? ASSISTANT:',
      ['at the left'],
    ]
    for name, system in (('vicuna', VICUNA), ('llava_v1', LLAVA_V1))
  },
  ('vicuna', 'text'): ['Be brief. USER: Say cat. ASSISTANT:', ['cat']],
  ('plain', 'two turns'): [
    IMAGE_ID,
    'What is this?',
    ['a red apple'],
    END,
    'Where is it?',
    ['at the left'],
  ],
}
CONVERSATIONS = {
  'two turns': {'image': '3.png', 'conversations': TWO_TURNS},
  'interleaved': {'image': ['5.png', '4.png'], 'conversations': INTERLEAVED},
  'text': {'conversations': TEXT_ONLY},
}


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
  folder = tmp_path_factory.mktemp('pictures')
  for i in range(8):
    (folder / f'{i}.png').write_bytes(image_file(i))
  return folder


def chats(pictures, name, records, **options):
  """A source of conversations."""
  text = json.dumps(records)
  if name.endswith('.jsonl'):
    text = '\n'.join(map(json.dumps, records))
  (pictures / name).write_text(text)
  return dict(format='folder', path=str(pictures), captions=name, use='chat') | options


def rows(source, count, **options):
  """The first rows of a source in its order."""
  options = dict(batch_size=1, split='heldout', num_threads=0, text_length=120) | options
  iterator = batches(sources=(source,), heldout=(source,), **options)
  return [{name: array[0] for name, array in next(iterator).items()} for _ in range(count)]


@pytest.mark.parametrize('template, name', WRITTEN)
def test_tokens_and_loss_are_those_of_the_template(pictures, template, name):
  source = chats(pictures, 'one.json', [CONVERSATIONS[name]])
  (row,) = rows(source, 1, chat_template=template, max_images=2)
  tokens, learned = expected(*WRITTEN[template, name])
  length = row['text_length']
  assert row['text'][:length].tolist() == tokens
  assert np.flatnonzero(row['text_weight']).tolist() == [*learned, length]  # the last: </s>
  assert row['kind'] == CHAT
  images = CONVERSATIONS[name].get('image', [])
  images = [images] if isinstance(images, str) else images
  shown = [f'{number(image)}.png' for image in row['image'][: len(images)]]
  assert shown == images and not row['image'][len(images) :].any()


def test_templates_are_those_of_checkpoints():
  assert tuple(TEMPLATES) == CHAT_TEMPLATES


def test_lists_lines_and_the_form_of_openai_are_read_alike(pictures):
  records = [
    {'id': 0, 'image': '1.png', 'conversations': TWO_TURNS},
    {'id': 1, 'conversations': TEXT_ONLY},
    # an image that no turn marks stands before the first question
    {'image': ['2.png'], 'conversations': [turn('human', 'What?'), turn('gpt', 'x')]},
  ]
  messages = []
  roles = {'human': 'user', 'gpt': 'assistant', 'system': 'system'}
  for record in records:
    turns = [{'role': roles[t['from']], 'content': t['value']} for t in record['conversations']]
    messages.append({'image': record.get('image'), 'messages': turns})
  read = [
    rows(chats(pictures, 'a.json', records), 3),
    rows(chats(pictures, 'a.jsonl', records), 3),
    rows(chats(pictures, 'm.jsonl', messages, text='messages'), 3),
  ]
  for others in read[1:]:
    for row, other in zip(read[0], others, strict=True):
      for name, array in row.items():
        np.testing.assert_array_equal(array, other[name])
  assert read[0][2]['text'][0] == IMAGE_ID and number(read[0][2]['image']) == 2


def test_what_a_row_has_no_room_for_is_skipped_and_counted(pictures, caplog):
  long = [turn('human', 'What is this? ' * 30), turn('gpt', 'x')]
  answer_first = [turn('gpt', 'hello'), *TWO_TURNS]
  records = [
    {'image': ['1.png', '2.png'], 'conversations': INTERLEAVED},
    {'image': '1.png', 'conversations': long},
    {'image': '1.png', 'conversations': INTERLEAVED},
    {'image': 'none.png', 'conversations': TWO_TURNS},
    {'image': '1.png', 'conversations': TWO_TURNS[:1] + [turn('gpt', ' ')] + TEXT_ONLY[1:]},
    {'image': '6.png', 'conversations': TWO_TURNS},
    {'image': '7.png', 'conversations': answer_first},
  ]
  skipped = SkipCounter()
  source = chats(pictures, 'bad.json', records)
  whole, first = rows(source, 2, max_skipped=1.0, skipped=skipped, text_length=25)
  assert number(whole['image']) == 6 and number(first['image']) == 7
  assert skipped.reasons == {
    'too many images': 1,
    'long conversation': 1,
    'unmatched images': 1,
    'no image': 1,
    'no answer': 1,
    'cut conversation': 1,
  }
  assert 'record 1 (its first turn has more than data.text_length=25 tokens)' in caplog.text
  assert 'bad.json, record 0 (2, with data.max_images=1)' in caplog.text
  assert 'bad.json, record 2 (1 images, 2 <image>)' in caplog.text
  # as many turns as there is room for: an answer without a question, and the first question
  tokens, _ = expected(['hello'], END, IMAGE_ID, 'Question: What is this? Answer:', ['a red apple'])
  assert first['text'][: first['text_length']].tolist() == tokens


def test_a_row_can_have_several_images_beside_rows_with_one(pictures, tmp_path):
  pairs = write_folder(tmp_path) | {'use': 'draw'}
  source = chats(pictures, 'two.json', [CONVERSATIONS['interleaved']])
  iterator = batches(source, pairs, batch_size=8, max_images=2, text_length=60)
  batch = next(iterator)
  assert batch['image'].shape == (8, 2, 8, 8, 3)
  for kind, images in zip(batch['kind'], batch['image'], strict=True):
    if kind == CHAT:
      assert [number(image) for image in images] == [5, 4]
    else:
      number(images[0])
      assert not images[1].any()
  assert set(batch['kind']) == {1, CHAT}


def test_goes_on_where_it_stopped_with_any_number_of_processes(pictures):
  records = [
    {'image': f'{i}.png', 'conversations': [turn('human', f'What {i}?'), turn('gpt', f'{i}')]}
    for i in range(8)
  ]
  source = chats(pictures, 'eight.jsonl', records)
  options = dict(sources=(source,), shards=4, text_length=30, num_threads=0)
  whole = batches(batch_size=4, **options)
  parts = [batches(batch_size=2, shard_index=i, shard_count=2, **options) for i in range(2)]
  for step in range(5):
    if step == 3:
      for index in range(2):
        state = json.loads(json.dumps(parts[index].get_state()))
        parts[index] = batches(batch_size=2, shard_index=index, shard_count=2, **options)
        parts[index].set_state(state)
    batch = next(whole)
    halves = [next(part) for part in parts]
    for name, array in batch.items():
      np.testing.assert_array_equal(array, np.concatenate([half[name] for half in halves]))


# ------------------------------------------------------------------------------------- questions


def test_questions_with_one_answer_and_with_several(pictures):
  (pictures / 'questions.jsonl').write_text(
    '\n'.join(
      json.dumps({'image': f'{i}.png', 'question': 'How many?', 'answer': answer})
      for i, answer in enumerate(['two', ['one', 'one', 'three', '']])
    )
  )
  source = dict(format='folder', path=str(pictures), captions='questions.jsonl', use='answer')
  read = rows(source, 200, text_length=30)
  tokens, _ = expected(IMAGE_ID, 'Question: How many? Answer:', ['two'])
  assert read[0]['text'][: read[0]['text_length']].tolist() == tokens
  counts = collections.Counter(
    TOKENIZER.decode(row['text'][: row['text_length']][-1:].tolist()) for row in read[1::2]
  )
  assert counts.keys() == {'one', 'three'} and 50 < counts['one'] < 85  # as often as it was given


def test_official_files_of_vqa(pictures):
  questions = [
    {'image_id': 9, 'question': 'How many?', 'question_id': 90},
    {'image_id': 25, 'question': 'Why?', 'question_id': 250},
  ]
  annotations = [
    {'question_id': 250, 'image_id': 25, 'answers': [{'answer': 'rain', 'answer_id': 1}]},
    {
      'question_id': 90,
      'image_id': 9,
      'answers': [{'answer': 'two'}],
      'multiple_choice_answer': '',
    },
  ]
  for i in (9, 25):
    (pictures / f'COCO_train2014_{i:012d}.jpg').write_bytes(image_file(i))
  text = json.dumps({'data_subtype': 'train2014', 'questions': questions})
  (pictures / 'q.json').write_text(text)
  (pictures / 'a.json').write_text(json.dumps({'annotations': annotations}))
  source = dict(format='folder', path=str(pictures), captions='q.json', use='answer')
  first, second = rows(source | {'annotations': 'a.json'}, 2, text_length=30)
  assert [number(first['image']), number(second['image'])] == [9, 25]
  assert 'Question: Why? Answer: rain' in TOKENIZER.decode(second['text'][1:].tolist())
  with pytest.raises(UserError, match='q.json has questions without answers; .* annotations='):
    rows(source, 1)
  (pictures / 'a.json').write_text(json.dumps({'annotations': annotations[:1]}))
  with pytest.raises(UserError, match=r'q.json: question 0 \(question_id 90, image_id 9\)'):
    rows(source | {'annotations': 'a.json'}, 1)


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
  'record, options, message',
  [
    ({'conversations': 'hello'}, {}, 'b.jsonl:2: the conversation is str; give a list of turns'),
    (
      {'conversations': [{'from': 'bot', 'value': 'x'}]},
      {},
      "b.jsonl:2: a turn is {'from': 'bot', 'value': 'x'}; give",
    ),
    ({'conversations': [{'from': 'gpt'}]}, {}, "b.jsonl:2: a turn is {'from': 'gpt'}; give"),
    ({'image': {}, 'conversations': 3}, {}, 'b.jsonl:2: the conversation is int'),
    ({'image': [7], 'conversations': []}, {}, r'b.jsonl:2: the image is \[7\]; give a name or a'),
    ({}, {'text': 'dialog'}, "b.jsonl has no field 'dialog'"),
    ({}, {'text': ('a', 'b')}, "use 'chat' needs 1 fields of texts"),
    ({}, {'use': 'answer'}, "b.jsonl has no field 'question'"),
    ({}, {'captions': 'no.json'}, "has no file 'no.json'"),
    ({}, {'format': 'tars'}, "has use 'chat', which the format 'folder' has"),
  ],
)
def test_what_is_wrong_is_named(pictures, record, options, message):
  good = {'image': '1.png', 'conversations': TWO_TURNS}
  source = chats(pictures, 'b.jsonl', [good, record]) | options
  if options.get('format') == 'tars':
    del source['captions']
  with pytest.raises(UserError, match=message):
    rows(source, 1)


def test_a_folder_without_a_file_is_named(tmp_path):
  (tmp_path / '1.png').write_bytes(image_file(1))
  source = dict(format='folder', path=str(tmp_path), use='chat')
  with pytest.raises(UserError, match="use 'chat' needs a file of conversations; it has 1 files"):
    rows(source, 1)


def test_options_for_conversations_need_some():
  for options, message in (
    (dict(shares={'caption': 1, 'chat': 1}), 'shares.chat=1 is for conversations; give'),
    (dict(max_images=2), 'max_images=2 is for conversations'),
  ):
    with pytest.raises(ValueError, match=message):
      batches(**options)


# ---------------------------------------------------------------------------------------- shares


def test_the_share_of_conversations(pictures, tmp_path):
  """With `shares.chat` the shares are those of the rows, whatever the weights of the sources."""
  records = [{'image': '1.png', 'conversations': TWO_TURNS}]
  sources = (
    write_folder(tmp_path) | {'weight': 20.0},
    chats(pictures, 'x.json', records, weight=3.0),
    chats(pictures, 'y.json', records),
  )
  shares = {'caption': 0.1, 'draw': 0.3, 'chat': 0.6, 'answer': 0.9}
  options = dict(batch_size=64, text_length=40, num_threads=0)
  iterator = batches(*sources, shares=shares, **options)
  kinds = np.concatenate([batch['kind'] for batch in itertools.islice(iterator, 3)])
  counts = np.bincount(kinds, minlength=4) / len(kinds)
  np.testing.assert_allclose(counts, [0.1, 0.3, 0, 0.6], atol=0.05)
  by_weight = batches(*sources, shares=shares | {'chat': 0}, **options)
  kinds = np.concatenate([batch['kind'] for batch in itertools.islice(by_weight, 3)])
  np.testing.assert_allclose((kinds == CHAT).mean(), 4 / 24, atol=0.02)
  assert set(next(batches(sources[1], shares={'chat': 1}, text_length=40))['kind']) == {CHAT}
  with pytest.raises(ValueError, match=r'those of the other sources \(text\) are 0'):
    batches(sources[0] | {'use': 'text'}, sources[1], shares=shares)


# -------------------------------------------------------------------------------------- templates


@pytest.mark.parametrize(
  'content, written',
  [
    (('A', 'What?'), ['A', 'Question: What? Answer:']),
    (('What?', 'A'), ['A', 'Question: What? Answer:']),
    (('A', 'B', 'What?'), ['A', 'B', 'Question: What? Answer:']),
    (('A', 'this', 'B', 'that'), ['A', 'Question: this', 'B', 'that Answer:']),
    (('this', 'A', 'or', 'B'), ['Question: this', 'A', 'or', 'B', 'Answer:']),
    (('A', ' '), ['A']),
    (('one', 'two'), ['Question: one\ntwo Answer:']),
  ],
)
def test_places_of_images_in_a_message(content, written):
  """Capital letters are images."""
  images = {name: object() for name in 'AB'}
  parts = tuple(images.get(part, part) for part in content)
  (turn,) = chat.render([Message(USER, parts)], TEMPLATES['lavit'])
  assert turn.answer is None
  assert list(turn.prompt) == [images.get(part, part) for part in written]


def test_messages_in_any_order_lose_nothing():
  messages = [
    Message(SYSTEM, ('be brief',)),
    Message(USER, ('a',)),
    Message(USER, ('b',)),
    Message(ASSISTANT, ('c',)),
    Message(ASSISTANT, ('d',)),
    Message(USER, ('e',)),
  ]
  turns = chat.render(messages, TEMPLATES['plain'])
  assert turns == [(('be brief', 'a', 'b'), 'c'), ((), 'd'), (('e',), None)]
