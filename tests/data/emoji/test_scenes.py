"""Composed images, their captions and their questions agree with the facts."""

import itertools

import numpy as np
import pytest

from lavit_jax.data.emoji import colors, corpus, grammar, questions, splits, sprites
from lavit_jax.data.emoji.scenes import CANVAS, Composer


@pytest.fixture(scope='module')
def loaded():
  return sprites.load()


@pytest.fixture(scope='module')
def examples(loaded):
  compose = Composer(loaded, 'train', scene_share=0.6)
  return [compose(3, index) for index in range(600)]


def test_an_example_depends_on_seed_and_index_alone(loaded, examples):
  again = Composer(loaded, 'train', scene_share=0.6)(3, 411)
  np.testing.assert_array_equal(again.image, examples[411].image)
  np.testing.assert_array_equal(again.object_map, examples[411].object_map)
  assert again[1:4] == examples[411][1:4]


def test_seeds_and_indices_give_different_examples(loaded):
  compose = Composer(loaded)
  pairs = itertools.product(range(10), range(10))
  captions = {compose(seed, index).caption for seed, index in pairs}
  assert len(captions) > 50


def test_sprites_lie_inside_the_image_and_do_not_overlap(examples):
  for example in examples:
    boxes = list(itertools.chain.from_iterable(item.boxes for item in example.facts.objects))
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


def test_pixels_show_what_the_facts_say(loaded, examples):
  """Each box has ink, and all other pixels have the color of the background."""
  for example in examples[:200]:
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


@pytest.mark.parametrize('image_size', [64, 96])
def test_the_object_mask_covers_what_differs_from_the_background(loaded, image_size):
  compose = Composer(loaded, scene_share=0.6, image_size=image_size)
  for index in range(60):
    example = compose(4, index)
    mask = compose.object_mask(example.facts)
    assert mask.shape == (image_size, image_size) and mask.dtype == np.float32
    assert mask.min() >= 0 and 0.5 < mask.max() <= 1
    clear = example.image[mask == 0]
    if len(clear):  # one color outside of the sprites
      assert (clear == clear[0]).all()
      differs = (example.image != clear[0]).any(-1)
      assert (mask[differs] > 0).all()
    # Without the background, what is left of an image is its mask.
    other_color = 'blue' if example.facts.background != 'blue' else 'red'
    other, _ = compose._render(
      np.random.default_rng(0), example.facts._replace(background=other_color)
    )
    np.testing.assert_array_equal(example.image[mask == 1], other[mask == 1])


def test_given_facts_are_drawn_with_fewer_objects_and_other_boxes(loaded):
  composer = Composer(loaded, 'train', scene_share=0)
  facts = composer(1, 0).facts
  empty = composer.draw(facts._replace(objects=()))
  assert empty.shape == (64, 64, 3)
  assert (empty == empty[0, 0]).all()
  boxes = ((2, 2, 20), (40, 30, 20))
  moved = facts._replace(objects=(facts.objects[0]._replace(boxes=boxes),))
  image = composer.draw(moved)
  differs = (image != empty[0, 0]).any(-1)
  assert differs[2:22, 2:22].any() and differs[30:50, 40:60].any()
  differs[2:22, 2:22] = differs[30:50, 40:60] = False
  assert not differs.any()
  np.testing.assert_array_equal(image[2:22, 2:22], image[30:50, 40:60])


def test_the_object_map_says_which_sprite_covers_a_pixel(loaded):
  compose = Composer(loaded, scene_share=0.6)
  seen = set()
  for index in range(60):
    example = compose(4, index)
    covered = compose.object_mask(example.facts) > 0.5
    np.testing.assert_array_equal(example.object_map > 0, covered)
    for number, item in enumerate(example.facts.objects):
      ys, xs = np.nonzero(example.object_map == number + 1)
      seen.add(number)
      for y, x in zip(ys, xs, strict=True):
        assert any(
          int(left) <= x <= left + side and int(top) <= y <= top + side
          for left, top, side in item.boxes
        )
  assert seen == {0, 1}


def test_augmented_images_differ_and_say_the_same(loaded):
  plain = Composer(loaded, scene_share=0.6)
  augmented = Composer(loaded, scene_share=0.6, augment=True)
  for index in range(30):
    one = plain(5, index)
    other = augmented(5, index)
    assert one.facts == other.facts and one.questions == other.questions
    assert (one.image != other.image).any()
    # A turned sprite covers nearly the same place.
    both = (one.object_map > 0) & (other.object_map > 0)
    either = (one.object_map > 0) | (other.object_map > 0)
    assert both.sum() > 0.4 * either.sum()
    background = one.object_map + other.object_map == 0
    color = np.median(one.image[background], axis=0)
    change = np.abs(np.median(other.image[background], axis=0) - color)
    assert (change <= 0.16 * color + 1).all()  # a gain of at most 1 +- (0.12 + 0.04), rounded


def test_relation_and_counts_are_true_of_the_positions(examples):
  seen = set()
  for example in examples:
    facts = example.facts
    if facts.relation:
      axis = {'left': 0, 'above': 1}[facts.relation]
      first, second = (_centers(item)[:, axis] for item in facts.objects)
      assert max(first) < min(second)
      seen.add(facts.relation)
  assert seen == {'left', 'above'}


def test_answers_agree_with_the_facts(examples):
  seen = set()
  for example in examples:
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
        case 'place':
          assert answer == _place(facts, question)
        case 'position':
          assert answer == _where(facts, question)
        case 'yes/no':
          assert answer == ('yes' if _is_true(facts, question) else 'no'), question
  assert seen == set(questions.TYPES)


def _phrase(item):
  return grammar.definite(item.name, item.count)[1]


def _centers(item):
  """Returns the centers (x, y) of the sprites of an object, f64[count, 2]."""
  return np.array([(left + side / 2, top + side / 2) for left, top, side in item.boxes])


def _place(facts, question):
  """Answers where in the image something is, by the boxes alone."""
  names = {'left': 'left', 'right': 'right', 'above': 'top', 'below': 'bottom'}
  if facts.relation:
    subject = next(item for item in facts.objects if f' {_phrase(item)}?' in question)
    return names[_where(facts, f' {_phrase(subject)}, seen')]
  ((x, y),) = _centers(facts.objects[0]) - 32
  assert max(abs(x), abs(y)) >= max(5, 2 * min(abs(x), abs(y)))  # it is clearly on one side
  if abs(x) > abs(y):
    return 'left' if x < 0 else 'right'
  return 'top' if y < 0 else 'bottom'


def _where(facts, question):
  """Answers a question about a position by the boxes alone."""
  first, second = facts.objects
  subject, other = first, second
  if f' {_phrase(first)}, seen' not in question:
    subject, other = second, first
  # Sprites of two halves may be apart along both axes; the facts say which of the two true
  # relations is meant.
  if facts.relation == 'left':
    return 'left' if subject.boxes[0][0] < other.boxes[0][0] else 'right'
  return 'above' if subject.boxes[0][1] < other.boxes[0][1] else 'below'


def _is_true(facts, question):
  """Answers a yes/no question by its text and the facts alone."""
  statement = question.removesuffix('?')
  for prefix, names in (
    ('Is the background ', {facts.background}),
    ('Is the kind ', {questions.CATEGORIES[facts.objects[0].group]}),
    ('Is this ', {grammar.indefinite(facts.objects[0].name)}),
    ('Is there ', {grammar.indefinite(item.name) for item in facts.objects}),
  ):
    if statement.startswith(prefix):
      return statement.removeprefix(prefix) in names
  if statement.startswith('Is the number of '):
    name, number = statement.removeprefix('Is the number of ').rsplit(' ', 1)
    counts = {grammar.plural(item.name): item.count for item in facts.objects}
    return counts[name] == grammar.NUMBERS.index(number)
  side = _side_of(statement, 'the ')
  first, second = facts.objects
  subject = statement.split(f' {questions.PREPOSITION[side]} ')[0]
  item = first if subject.endswith(_phrase(first)) else second
  return side == _where(facts, f' {_phrase(item)}, seen')


def _side_of(text, article=''):
  """Returns the side that a text names, with an article behind it."""
  return next(side for side, name in questions.PREPOSITION.items() if f' {name} {article}' in text)


def test_captions_have_the_relation_of_the_image(examples):
  for example in examples:
    facts = example.facts
    assert example.caption.endswith(f'on {grammar.indefinite(facts.background)} background')
    if facts.relation:
      side = _side_of(example.caption)
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


def test_sides_are_balanced(examples):
  asked = itertools.chain.from_iterable(example.questions for example in examples)
  sides = [question.answer for question in asked if question.type == 'position']
  assert min(sides.count(side) for side in questions.OPPOSITE) > len(sides) / 8


def test_image_size_scales_the_same_composition(loaded):
  small, large = (Composer(loaded, image_size=size)(0, 5) for size in (64, 128))
  assert large.image.shape == (128, 128, 3)
  assert large.facts == small.facts
  shrunk = large.image.reshape(64, 2, 64, 2, 3).mean((1, 3))
  assert np.corrcoef(shrunk.ravel(), small.image.ravel())[0, 1] > 0.9


@pytest.mark.parametrize(
  'name, count, expected',
  [
    ('owl', 1, 'an owl'),
    ('glasses', 1, 'glasses'),
    ('red apple', 3, 'three red apples'),
    ('woman with veil', 2, 'two women with veil'),
    ('man golfing', 2, 'two men golfing'),
    ('woman cook', 2, 'two women cooks'),
    ('card index dividers', 2, 'two card index dividers'),
    ('up right arrow', 2, 'two up right arrows'),
    ('flag of peru', 2, 'two flags of peru'),
    ('unicorn', 1, 'a unicorn'),
    ('umbrella', 1, 'an umbrella'),
  ],
)
def test_counted(name, count, expected):
  assert grammar.counted(name, count) == expected


@pytest.mark.parametrize(
  'name, expected',
  [
    ('fox', 'foxes'),
    ('cherry', 'cherries'),
    ('bus', 'buses'),
    ('sheep', 'sheep'),
    ('monkey', 'monkeys'),
  ],
)
def test_plural(name, expected):
  assert grammar.plural(name) == expected


def test_definite():
  assert grammar.definite('star', 2) == ('are', 'the stars')


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
def test_dominant_color(name, rgb):
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
  num_mixed = 0
  for example in examples:
    unseen = {
      item.name
      for item in example.facts.objects
      if splits.heldout_concept(item.name)
      or splits.heldout_pair(example.facts.style, item.codepoint)
    }
    names = [answer for kind, _, answer in example.questions if kind == 'what']
    assert names and set(names) <= unseen
    num_mixed += len(example.facts.objects) > 1
  assert num_mixed > 5  # images that have a training concept, too
