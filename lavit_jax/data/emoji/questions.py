"""Questions about a composed image, with the answers that follow from its facts."""

from collections.abc import Sequence

import numpy as np

from lavit_jax.data.emoji import colors, grammar, splits
from lavit_jax.data.emoji.facts import CANVAS, Facts, Question, SceneObject

TYPES = (
  'what',
  'category',
  'style',
  'colour',
  'background',
  'how many',
  'place',
  'position',
  'yes/no',
)
CATEGORIES = {  # group of Unicode -> the word for it in answers
  'Smileys & Emotion': 'emotion',
  'People & Body': 'people',
  'Animals & Nature': 'nature',
  'Food & Drink': 'food',
  'Travel & Places': 'travel',
  'Activities': 'activity',
  'Objects': 'object',
  'Symbols': 'symbol',
  'Flags': 'flag',
}
OPPOSITE = {'left': 'right', 'right': 'left', 'above': 'below', 'below': 'above'}
PLACE = {'left': 'left', 'right': 'right', 'above': 'top', 'below': 'bottom'}
_CLEAR_OFFSET = 5  # canvas units from the center, of an object that is clearly on one side
PREPOSITION = {
  'left': 'to the left of',
  'right': 'to the right of',
  'above': 'above',
  'below': 'below',
}


def make_questions(
  rng: np.random.Generator, facts: Facts, names: Sequence[str]
) -> tuple[Question, ...]:
  """Makes the questions about an image.

  Yes/no questions are balanced: the answer is drawn first, then a question that has it.

  Args:
    rng: draws the forms of the questions and the wrong answers.
    facts: of the image.
    names: of emoji, for the wrong answers of yes/no questions.
  """
  questions = [
    Question('background', 'What colour is the background?', facts.background),
  ]
  if not splits.heldout_style(facts.style):  # nobody can know its name
    questions.append(Question('style', 'Which style is this?', facts.style))
  if facts.relation or facts.objects[0].count > 1:
    return tuple(questions + _scene_questions(rng, facts, names))
  return tuple(questions + _single_questions(rng, facts, names))


def _single_questions(
  rng: np.random.Generator, facts: Facts, names: Sequence[str]
) -> list[Question]:
  """Questions about an image of one sprite."""
  (subject,) = facts.objects
  category = CATEGORIES[subject.group]
  questions = [
    Question('what', 'What is this?', subject.name),
    Question('category', 'What kind of thing is this?', category),
  ]
  if subject.color:
    questions.append(Question('colour', 'What colour is it?', subject.color))
  if side := _clear_side(subject.boxes[0]):
    questions.append(Question('place', 'Where in the image is it?', PLACE[side]))

  is_true = _toss(rng)
  form = rng.integers(3)
  if form == 0:
    name = subject.name if is_true else _other(rng, names, subject.name)
    text = f'Is this {grammar.indefinite(name)}?'
  elif form == 1:
    kind = category if is_true else _other(rng, list(CATEGORIES.values()), category)
    text = f'Is the kind {kind}?'
  else:
    text = _background_question(rng, facts, is_true)
  return [*questions, _yes_no(text, is_true)]


def _scene_questions(
  rng: np.random.Generator, facts: Facts, names: Sequence[str]
) -> list[Question]:
  """Questions about one kind of object in an image of several sprites."""
  candidates = _heldout_objects(facts) or facts.objects
  subject = candidates[rng.integers(len(candidates))]
  total = sum(scene_object.count for scene_object in facts.objects)
  questions = [Question('how many', 'How many things are there?', grammar.NUMBERS[total])]
  if facts.relation:
    questions += _relation_questions(facts, subject)
  else:
    questions.append(Question('what', 'What are these?', subject.name))
  if subject.color:
    verb, noun = grammar.definite(subject.name, subject.count)
    questions.append(Question('colour', f'What colour {verb} {noun}?', subject.color))

  is_true = _toss(rng)
  form = rng.integers(4 if facts.relation else 3)
  if form == 0:
    present = [scene_object.name for scene_object in facts.objects]
    name = subject.name if is_true else _other(rng, names, *present)
    text = f'Is there {grammar.indefinite(name)}?'
  elif form == 1:
    count = subject.count
    if not is_true:
      count = (count + rng.integers(3)) % 4 + 1  # any other number from 1 to 4
    text = f'Is the number of {grammar.plural(subject.name)} {grammar.NUMBERS[count]}?'
  elif form == 2:
    text = _background_question(rng, facts, is_true)
  else:
    other, side = _other_object(facts, subject)
    verb, noun = grammar.definite(subject.name, subject.count)
    _, other_noun = grammar.definite(other.name, other.count)
    preposition = PREPOSITION[side if is_true else OPPOSITE[side]]
    text = f'{verb.capitalize()} {noun} {preposition} {other_noun}?'
  return [*questions, _yes_no(text, is_true)]


def _relation_questions(facts: Facts, subject: SceneObject) -> list[Question]:
  """Questions about an object and the other one beside it."""
  other, side = _other_object(facts, subject)
  verb, noun = grammar.definite(subject.name, subject.count)
  _, other_noun = grammar.definite(other.name, other.count)
  return [
    Question(
      'how many',
      f'How many {grammar.plural(subject.name)} are there?',
      grammar.NUMBERS[subject.count],
    ),
    Question('place', f'Where in the image {verb} {noun}?', PLACE[side]),
    Question('position', f'Where {verb} {noun}, seen from {other_noun}?', side),
    Question('what', f'What is {PREPOSITION[side]} {other_noun}?', subject.name),
  ]


def _other_object(facts: Facts, subject: SceneObject) -> tuple[SceneObject, str]:
  """Returns the other object of a scene, and on which side of it `subject` is."""
  if facts.relation is None:
    raise ValueError('the image has one object, which has no relation')
  first, second = facts.objects
  if subject is first:
    return second, facts.relation
  return first, OPPOSITE[facts.relation]


def _clear_side(box: tuple[float, float, float]) -> str | None:
  """Returns the side of the image where an object clearly is; None if there is no such side."""
  left, top, side = box
  x = left + side / 2 - CANVAS / 2
  y = top + side / 2 - CANVAS / 2
  if max(abs(x), abs(y)) < max(_CLEAR_OFFSET, 2 * min(abs(x), abs(y))):
    return None
  if abs(x) > abs(y):
    return 'left' if x < 0 else 'right'
  return 'above' if y < 0 else 'below'


def _heldout_objects(facts: Facts) -> list[SceneObject]:
  """Objects that are held out. Beside one, the other object of a scene is from training."""
  return [
    scene_object
    for scene_object in facts.objects
    if splits.heldout_concept(scene_object.name)
    or splits.heldout_pair(facts.style, scene_object.codepoint)
  ]


def _background_question(rng: np.random.Generator, facts: Facts, is_true: bool) -> str:
  color = facts.background
  if not is_true:
    color = _other(rng, list(colors.BACKGROUNDS), facts.background)
  return f'Is the background {color}?'


def _yes_no(question: str, is_true: bool) -> Question:
  return Question('yes/no', question, 'yes' if is_true else 'no')


def _toss(rng: np.random.Generator) -> bool:
  return bool(rng.integers(2))


def _other(rng: np.random.Generator, choices: Sequence[str], *excluded: str) -> str:
  """Draws one of the choices, again until it is none of the excluded ones."""
  while (choice := choices[int(rng.integers(len(choices)))]) in excluded:
    pass
  return choice
