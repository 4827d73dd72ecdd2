import functools
import itertools
from pathlib import Path

import numpy as np
import pytest

from lavit_jax.data import loader, text
from lavit_jax.data.emoji import corpus

FOLDER = str(Path(text.__file__).parent.parent / 'assets/tiny/language_model')
batches = functools.partial(loader.batches, batch_size=8, tokenizer_folder=FOLDER)


def take(iterator, count):
  return list(itertools.islice(iterator, count))


def equal(one, other):
  assert one.keys() == other.keys()
  for key in one:
    np.testing.assert_array_equal(one[key], other[key], err_msg=key)


@pytest.mark.parametrize(
  'task, keys',
  [
    ('images', {'image'}),
    ('contrastive', {'image', 'text', 'text_length', 'object_map', 'object_names'}),
    ('lm', {'image', 'text', 'text_length', 'text_weight', 'kind'}),
  ],
)
def test_shapes_and_dtypes(task, keys):
  batch = next(batches(task, text_length=40))
  assert batch.keys() == keys
  shapes = {
    'image': ((8, 64, 64, 3), 'uint8'),
    'text': ((8, 40), 'int32'),
    'text_length': ((8,), 'int32'),
    'text_weight': ((8, 41), 'float32'),
    'kind': ((8,), 'int32'),
    'object_map': ((8, 64, 64), 'uint8'),
    'object_names': ((8, 2), 'int32'),
  }
  assert {key: (value.shape, str(value.dtype)) for key, value in batch.items()} == {
    key: shapes[key] for key in keys
  }


@pytest.mark.parametrize('num_threads', [0, 1, 5])
def test_threads_change_nothing(num_threads):
  for one, other in zip(
    take(batches('lm', num_threads=2), 4), take(batches('lm', num_threads=num_threads), 4)
  ):
    equal(one, other)


@pytest.mark.parametrize('shards', [2, 4])
def test_shards_are_the_blocks_of_the_unsharded_batches(shards):
  whole = take(batches('lm'), 3)
  parts = [
    take(batches('lm', batch_size=8 // shards, shard_index=shard, shard_count=shards), 3)
    for shard in range(shards)
  ]
  for step, batch in enumerate(whole):
    shards_of_step = [part[step] for part in parts]
    for key, value in batch.items():
      np.testing.assert_array_equal(value, np.concatenate([part[key] for part in shards_of_step]))


def test_rows_of_a_shard_may_lie_apart():
  whole = take(batches('lm'), 3)
  some = take(batches('lm', batch_size=4, shard_count=2, rows=[0, 1, 4, 5]), 3)
  for batch, part in zip(whole, some):
    equal({key: value[[0, 1, 4, 5]] for key, value in batch.items()}, part)


def test_a_position_serves_any_number_of_shards():
  whole = batches('lm')
  expected = take(whole, 5)[3:]
  take(first := batches('lm', batch_size=2, shard_index=1, shard_count=4), 3)
  second = batches('lm', batch_size=4, shard_index=1, shard_count=2)
  second.set_state(first.get_state())
  for one, other in zip(expected, take(second, 2)):
    equal({key: value[4:] for key, value in one.items()}, other)


def test_state_resumes_bit_for_bit():
  first = batches('lm')
  take(first, 3)
  state = first.get_state()
  expected = take(first, 3)
  resumed = batches('lm')
  resumed.set_state(state)
  for one, other in zip(expected, take(resumed, 3)):
    equal(one, other)


def test_seed_and_split_change_the_batch():
  reference = next(batches('images'))['image']
  assert (next(batches('images', seed=1))['image'] != reference).any()
  assert (next(batches('images', split='heldout'))['image'] != reference).any()


def test_tasks_show_the_same_images():
  equal({'image': next(batches('images'))['image']}, {'image': next(batches('lm'))['image']})


def test_weights_and_kinds_of_each_share():
  tokenizer = text.TextTokenizer.load(FOLDER)

  def rows(**shares):
    batch = next(batches('lm', batch_size=64, shares=shares, draw_text_weight=0.25))
    inside = np.arange(48) < batch['text_length'][:, None]
    assert (batch['text'][~inside] == 0).all()
    behind = np.take_along_axis(batch['text_weight'], batch['text_length'][:, None], axis=1)
    assert (behind == 1).all()  # these texts are whole: their end is learnt
    np.put_along_axis(batch['text_weight'], batch['text_length'][:, None], 0.0, axis=1)
    batch['text_weight'] = batch['text_weight'][:, :48]
    assert (batch['text_weight'][~inside] == 0).all()
    assert not np.isin(batch['text'][inside], (text.UNKNOWN, text.BEGIN, text.END)).any()
    return (
      batch,
      inside,
      [tokenizer.decode(ids[:n]) for ids, n in zip(batch['text'], batch['text_length'])],
    )

  batch, inside, texts = rows(caption=1)
  assert (batch['kind'] == 0).all() and (batch['text_weight'][inside] == 1).all()
  assert all(string.endswith('background') for string in texts)

  batch, inside, texts = rows(draw=1)
  assert (batch['kind'] == 1).all() and (batch['text_weight'][inside] == 0.25).all()
  assert all(not string or string.endswith('background') for string in texts)

  batch, inside, texts = rows(text=1)
  assert (batch['kind'] == 2).all() and (batch['text_weight'][inside] == 1).all()
  assert all('Kind:' in string for string in texts)

  batch, inside, texts = rows(answer=1)
  assert (batch['kind'] == 0).all()
  for ids, weight, string in zip(batch['text'], batch['text_weight'], texts):
    answer = string.split(' Answer: ')[1]
    assert tokenizer.decode(ids[weight == 1]) == answer
    assert string.startswith('Question: ') and set(np.unique(weight)) == {0, 1}


def test_shares_are_met():
  kinds = np.concatenate(
    [
      batch['kind']
      for batch in take(batches('lm', batch_size=200, shares={'caption': 1, 'draw': 3}), 5)
    ]
  )
  assert set(kinds) == {0, 1}
  assert abs((kinds == 1).mean() - 0.75) < 4 * (0.75 * 0.25 / 1000) ** 0.5


@pytest.mark.parametrize(
  'shares, sources, expected',
  [
    (dict(caption=2, answer=3, draw=4, text=1), (), (0.5, 0.4, 0.1)),
    (
      dict(caption=1, answer=7, draw=3),
      (dict(weight=2.0), dict(use='text'), dict(use='draw', weight=1.0)),
      (0.125, 0.625, 0.25),
    ),
    (dict(text=1), (dict(use=''),), (1, 0, 0)),
  ],
)
def test_kinds_to_expect(shares, sources, expected):
  np.testing.assert_allclose(loader.task_shares(shares, sources), expected)


def test_questions_are_asked_by_weight():
  def kinds(weights):
    iterator = batches(
      'lm', batch_size=400, shares={'answer': 1}, scene_share=1.0, question_weights=weights
    )
    tokenizer = text.TextTokenizer.load(FOLDER)
    batch = next(iterator)
    found = []
    for ids, length in zip(batch['text'], batch['text_length']):
      question, answer = tokenizer.decode(ids[:length]).split(' Answer: ')
      if answer in ('yes', 'no'):
        found.append('yes/no')
      elif ', seen from' in question:
        found.append('position')
      else:
        found.append('other')
    return np.array(found)

  def close(found, share):
    return abs(found.mean() - share) < 4 * (share * (1 - share) / len(found)) ** 0.5

  even = kinds(None)
  weighted = kinds({'yes/no': 1000.0})
  assert 0.1 < (even == 'yes/no').mean() < 0.25  # one of the five to seven questions of a scene
  assert close(weighted == 'yes/no', 1000 / 1006)
  assert (kinds({'position': 4.0}) == 'position').mean() > 2 * (even == 'position').mean()


def test_several_questions_about_an_image_are_different_ones():
  tokenizer = text.TextTokenizer.load(FOLDER)

  def turns(max_questions):
    options = dict(shares={'answer': 1}, scene_share=1.0, max_questions=max_questions)
    batch = next(batches('lm', batch_size=100, text_length=128, **options))
    rows = []
    for ids, length in zip(batch['text'], batch['text_length']):
      ends = [0, *np.flatnonzero(ids[:length] == text.END), length]
      rows.append([tokenizer.decode(ids[i:j]) for i, j in itertools.pairwise(ends)])
    return rows

  several = turns(3)
  assert [row[:1] for row in several] == turns(1)
  assert all(len(set(row)) == 3 for row in several)


def test_no_answer_of_a_row_gives_another_away():
  """What is to the left of the owl, where the cat is, and where it is seen from the owl."""
  tokenizer = text.TextTokenizer.load(FOLDER)
  options = dict(shares={'answer': 1}, scene_share=1.0, max_questions=9)
  batch = next(batches('lm', batch_size=100, text_length=128, **options))
  found = []
  for ids, length in zip(batch['text'], batch['text_length']):
    row = tokenizer.decode(ids[:length])
    found.append(sum(row.count(start) for start in ('What is', 'What are', 'Where')))
  assert set(found) == {1}


@pytest.mark.parametrize('drop_text', [0.0, 0.3, 1.0])
def test_some_images_to_draw_have_no_text(drop_text):
  rows = take(
    batches('lm', batch_size=200, shares={'caption': 1, 'draw': 3}, drop_text=drop_text), 3
  )
  kind = np.concatenate([batch['kind'] for batch in rows])
  length = np.concatenate([batch['text_length'] for batch in rows])
  assert (length[kind == 0] > 0).all()  # nothing else loses its text
  drawn = (kind == 1).sum()
  assert (
    abs((length[kind == 1] == 0).mean() - drop_text)
    <= 4 * (drop_text * (1 - drop_text) / drawn) ** 0.5
  )


def test_examples_are_singles_or_scenes():
  assert all(
    example.facts.objects[0].count == len(example.facts.objects) == 1
    for example in corpus.examples(count=20)
  )
  scenes = corpus.examples(count=20, kind='scene')
  for example in scenes:
    assert 2 <= sum(item.count for item in example.facts.objects) <= 4
  assert {example.facts.heldout for example in scenes} == {'concept', 'pair', 'combination'}


@pytest.mark.parametrize(
  'options, message',
  [
    ({'task': 'pictures'}, "unknown task 'pictures'"),
    ({'split': 'test'}, "unknown split 'test'"),
    ({'shares': {'captions': 1}}, 'shares must be.*captions'),
    ({'shares': {'caption': 0}}, 'shares must be'),
    ({'question_weights': {'where': 1}}, "question_weights must be.*position.*'where'"),
    ({'question_weights': {'what': 0}}, 'question_weights must be'),
    ({'tokenizer_folder': None}, 'tokenizer_folder'),
  ],
)
def test_bad_options_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    batches(**{'task': 'lm', **options})


def test_a_text_that_is_too_long_is_named():
  with pytest.raises(ValueError, match='text_length is 4.*background'):
    next(batches('lm', text_length=4, shares={'caption': 1}))


def test_missing_data_set_names_folder_and_remedy(tmp_path):
  with pytest.raises(FileNotFoundError, match=f'{tmp_path}.*lavit data build'):
    batches('images', source=str(tmp_path))
