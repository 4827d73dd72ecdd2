import numpy as np
import pytest

from lavit_jax.data.emoji import colors, corpus, grammar, questions, splits, sprites
from lavit_jax.data.emoji.scenes import CANVAS, Composer


@pytest.fixture(scope='module')
def loaded():
  return sprites.load()


@pytest.fixture(scope='module')
def drawn(loaded):
  compose = Composer(loaded, 'train', scene_share=0.6)
  return [compose(3, index) for index in range(600)]


def test_same_seed_and_index_same_example_whatever_was_asked_before(loaded, drawn):
  again = Composer(loaded, 'train', scene_share=0.6)(3, 411)
  np.testing.assert_array_equal(again.image, drawn[411].image)
  assert again[1:] == drawn[411][1:]


def test_seeds_and_indices_give_different_examples(loaded):
  compose = Composer(loaded)
  captions = {compose(seed, index).caption for seed in range(10) for index in range(10)}
  assert len(captions) > 50


def test_things_lie_inside_the_picture_and_do_not_overlap(drawn):
  for example in drawn:
    boxes = [box for item in example.facts.objects for box in item.boxes]
    assert 1 <= len(boxes) <= 4
    for i, (left, top, side) in enumerate(boxes):
      assert left >= 0 and top >= 0 and left + side <= CANVAS and top + side <= CANVAS
      for other_left, other_top, other_side in boxes[:i]:
        assert (
          left + side <= other_left + 1e-6
          or other_left + other_side <= left + 1e-6
          or top + side <= other_top + 1e-6
          or other_top + other_side <= top + 1e-6
        )


def test_pixels_show_what_the_facts_say(loaded, drawn):
  """Ink only inside the boxes, ink in each box, and the background's colour everywhere else."""
  for example in drawn[:200]:
    outside = np.ones((CANVAS, CANVAS), bool)
    for item in example.facts.objects:
      for left, top, side in item.boxes:
        box = np.s_[int(top) : int(top + side) + 1, int(left) : int(left + side) + 1]
        outside[box] = False
        assert np.ptp(example.image[box].reshape(-1, 3).astype(int), axis=0).max() > 25
    background = example.image[outside]
    if not len(background):
      continue
    assert (background == background[0]).all()
    distance = np.abs(background[0] - np.array(colors.BACKGROUNDS[example.facts.background]))
    assert distance.max() <= colors.JITTER


def test_relation_and_counts_are_true_of_the_positions(drawn):
  seen = set()
  for example in drawn:
    facts = example.facts
    if facts.relation:
      axis = {'left': 0, 'above': 1}[facts.relation]
      first, second = ([box[axis] + box[2] / 2 for box in item.boxes] for item in facts.objects)
      assert max(first) < min(second)
      seen.add(facts.relation)
  assert seen == {'left', 'above'}


def test_answers_are_true_to_the_composition(drawn):
  seen = set()
  for example in drawn:
    facts = example.facts
    by_plural = {grammar.plural(item.name): item for item in facts.objects}
    for kind, question, answer in example.questions:
      seen.add(kind)
      match kind:
        case 'background':
          assert answer == facts.background
        case 'style':
          assert answer == facts.style
        case 'category':
          assert answer == questions.CATEGORIES[facts.objects[0].group]
        case 'colour':
          assert answer in {item.color for item in facts.objects} - {''}
        case 'how many' if 'things' in question:
          assert grammar.NUMBERS.index(answer) == sum(len(item.boxes) for item in facts.objects)
        case 'how many':
          name = question.removeprefix('How many ').removesuffix(' are there?')
          assert grammar.NUMBERS.index(answer) == len(by_plural[name].boxes)
        case 'what':
          assert answer in {item.name for item in facts.objects}
        case 'position':
          assert answer == _where(facts, question)
        case 'yes/no':
          assert answer == ('yes' if _holds(facts, question) else 'no'), question
  assert seen == set(questions.TYPES)


def _phrase(item):
  return grammar.definite(item.name, item.count)[1]


def _side(subject, other):
  (x, y), (u, v) = (
    np.mean([(left + side / 2, top + side / 2) for left, top, side in item.boxes], axis=0)
    for item in (subject, other)
  )
  boxes = {i: [(box[i], box[i] + box[2]) for box in subject.boxes] for i in (0, 1)}
  others = {i: [(box[i], box[i] + box[2]) for box in other.boxes] for i in (0, 1)}
  if max(end for _, end in boxes[0]) <= min(start for start, _ in others[0]) and x < u - 10:
    return 'left'
  if max(end for _, end in others[0]) <= min(start for start, _ in boxes[0]) and x > u + 10:
    return 'right'
  return 'above' if y < v else 'below'


def _where(facts, question):
  first, second = facts.objects
  subject, other = (first, second) if f' {_phrase(first)}, seen' in question else (second, first)
  # Sprites of two halves may be apart along both axes; the facts say which of the two true
  # relations is meant.
  if facts.relation == 'left':
    return 'left' if subject.boxes[0][0] < other.boxes[0][0] else 'right'
  return 'above' if subject.boxes[0][1] < other.boxes[0][1] else 'below'


def _holds(facts, question):
  """Judges a yes/no question from its words and the facts alone."""
  words = question.removesuffix('?')
  if words.startswith('Is the background '):
    return words.removeprefix('Is the background ') == facts.background
  if words.startswith('Is the kind '):
    return words.removeprefix('Is the kind ') == questions.CATEGORIES[facts.objects[0].group]
  if words.startswith('Is this '):
    return words.removeprefix('Is this ') == grammar.indefinite(facts.objects[0].name)
  if words.startswith('Is there '):
    return words.removeprefix('Is there ') in {
      grammar.indefinite(item.name) for item in facts.objects
    }
  if words.startswith('Is the number of '):
    name, number = words.removeprefix('Is the number of ').rsplit(' ', 1)
    return next(
      item.count for item in facts.objects if grammar.plural(item.name) == name
    ) == grammar.NUMBERS.index(number)
  side = next(side for side, words_ in questions.PREPOSITION.items() if f' {words_} the ' in words)
  subject, other = (
    facts.objects
    if words.split(f' {questions.PREPOSITION[side]} ')[0].endswith(_phrase(facts.objects[0]))
    else facts.objects[::-1]
  )
  return side == _where(facts, f' {_phrase(subject)}, seen')


def test_captions_tell_the_relation_of_the_picture(drawn):
  for example in drawn:
    facts = example.facts
    assert example.caption.endswith(f'on {grammar.indefinite(facts.background)} background')
    if facts.relation:
      side = next(
        side for side, words in questions.PREPOSITION.items() if f' {words} ' in example.caption
      )
      first = grammar.counted(facts.objects[0].name, facts.objects[0].count)
      assert example.caption.startswith(first) == (side == facts.relation)


def test_yes_and_no_are_balanced_for_every_form_of_question(loaded):
  compose = Composer(loaded, scene_share=0.5)
  forms = 'Is the background ', 'Is the kind ', 'Is the number ', 'Is this ', 'Is there '
  tally = {}
  for index in range(2000):
    for kind, question, answer in compose(1, index).questions:
      if kind == 'yes/no':
        form = next((form for form in forms if question.startswith(form)), 'side')
        tally.setdefault(form, []).append(answer == 'yes')
  assert len(tally) == 6
  for form, yes in tally.items():
    assert abs(np.mean(yes) - 0.5) < 4 * 0.5 / len(yes) ** 0.5, form


def test_sides_are_balanced(drawn):
  sides = [
    answer for example in drawn for kind, _, answer in example.questions if kind == 'position'
  ]
  assert min(sides.count(side) for side in questions.OPPOSITE) > len(sides) / 8


def test_image_size_scales_the_same_composition(loaded):
  small, large = (Composer(loaded, image_size=size)(0, 5) for size in (64, 128))
  assert large.image.shape == (128, 128, 3) and large.facts == small.facts
  shrunk = large.image.reshape(64, 2, 64, 2, 3).mean((1, 3))
  assert np.corrcoef(shrunk.ravel(), small.image.ravel())[0, 1] > 0.9


def test_grammar():
  assert grammar.counted('owl', 1) == 'an owl'
  assert grammar.counted('woman with veil', 2) == 'two women with veil'
  assert [
    grammar.counted(name, 2)
    for name in ('man golfing', 'woman cook', 'card index dividers', 'up right arrow')
  ] == ['two men golfing', 'two women cooks', 'two card index dividers', 'two up right arrows']
  assert grammar.counted('red apple', 3) == 'three red apples'
  assert grammar.counted('glasses', 1) == 'glasses'
  assert grammar.counted('flag of peru', 2) == 'two flags of peru'
  assert [grammar.plural(name) for name in ('fox', 'cherry', 'bus', 'sheep', 'monkey')] == [
    'foxes',
    'cherries',
    'buses',
    'sheep',
    'monkeys',
  ]
  assert grammar.definite('star', 2) == ('are', 'the stars')
  assert (
    grammar.indefinite('unicorn') == 'a unicorn' and grammar.indefinite('umbrella') == 'an umbrella'
  )


@pytest.mark.parametrize(
  'name, rgb',
  [
    ('red', (230, 30, 40)),
    ('green', (40, 160, 60)),
    ('blue', (40, 90, 220)),
    ('yellow', (250, 205, 60)),
    ('brown', (120, 70, 40)),
    ('white', (250, 250, 250)),
    ('black', (10, 10, 10)),
    ('gray', (130, 130, 130)),
    ('pink', (250, 160, 190)),
    ('purple', (120, 60, 180)),
    ('orange', (245, 140, 20)),
  ],
)
def test_dominant_colour(name, rgb):
  sprite = np.zeros((96, 96, 4), np.uint8)
  sprite[16:80, 16:80] = (*rgb, 255)
  sprite[16:22, 16:80, :3] = 0  # An outline does not count.
  assert colors.dominant_color(sprite) == name
  sprite[16:48, 16:80, :3] = (0, 200, 220) if name != 'blue' else (220, 30, 30)
  assert colors.dominant_color(sprite) == ''


def test_backgrounds_are_named_as_they_look():
  for name, rgb in colors.BACKGROUNDS.items():
    assert colors.name_pixels(np.array([rgb], np.uint8))[0] == name
    assert all(colors.JITTER <= channel <= 255 - colors.JITTER for channel in rgb)


@pytest.mark.parametrize('split', ['heldout/concept', 'heldout/pair'])
def test_held_out_questions_ask_about_what_is_held_out(split):
  examples = corpus.examples('embedded', split, 3, 40, 'scene')
  told = 0
  for example in examples:
    unseen = {
      item.name
      for item in example.facts.objects
      if splits.heldout_concept(item.codepoint)
      or splits.heldout_pair(example.facts.style, item.codepoint)
    }
    names = [answer for kind, _, answer in example.questions if kind == 'what']
    assert names and set(names) <= unseen
    told += len(example.facts.objects) > 1
  assert told > 5  # in pictures that hold a training concept too
