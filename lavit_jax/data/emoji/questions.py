"""Questions about a composed picture, with answers that follow from its facts."""

from lavit_jax.data.emoji import colors, grammar, splits

TYPES = ('what', 'category', 'style', 'colour', 'background', 'how many', 'position', 'yes/no')
CATEGORIES = {
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
PREPOSITION = {
  'left': 'to the left of',
  'right': 'to the right of',
  'above': 'above',
  'below': 'below',
}


def ask(rng, facts, names: list[str]) -> tuple[tuple[str, str, str], ...]:
  """(type, question, answer) triples about `scenes.Facts`. `names` supplies wrong answers for yes/no questions.

  Yes/no questions are balanced: the answer is tossed first, then a question is made that has it.
  """
  asked = [
    ('background', 'What colour is the background?', facts.background),
    ('style', 'Which style is this?', facts.style),
  ]
  scene = facts.relation or facts.things[0].count > 1
  return tuple(asked + (_about_scene if scene else _about_one)(rng, facts, names))


def _about_one(rng, facts, names):
  thing, category = facts.things[0], CATEGORIES[facts.things[0].group]
  asked = [
    ('what', 'What is this?', thing.name),
    ('category', 'What kind of thing is this?', category),
  ]
  if thing.colour:
    asked.append(('colour', 'What colour is it?', thing.colour))
  true, word = _toss(rng)
  match rng.integers(3):
    case 0:
      name = thing.name if true else _other(rng, names, thing.name)
      question = f'Is this {grammar.indefinite(name)}?'
    case 1:
      question = (
        f'Is the kind {category if true else _other(rng, list(CATEGORIES.values()), category)}?'
      )
    case _:
      question = _background_question(rng, facts, true)
  return [*asked, ('yes/no', question, word)]


def _about_scene(rng, facts, names):
  unseen = [
    thing
    for thing in facts.things
    if splits.heldout_concept(thing.codepoint) or splits.heldout_pair(facts.style, thing.codepoint)
  ]
  asked_about = (
    unseen or facts.things
  )  # of a held-out thing and its companion, which is a training one, ask about the former
  thing = asked_about[rng.integers(len(asked_about))]
  asked = [
    (
      'how many',
      'How many things are there?',
      grammar.NUMBERS[sum(each.count for each in facts.things)],
    )
  ]
  if len(facts.things) == 1:
    kind = 'What are these?', thing.name
  else:
    asked.append(
      (
        'how many',
        f'How many {grammar.plural(thing.name)} are there?',
        grammar.NUMBERS[thing.count],
      )
    )
    other = facts.things[facts.things[0] is thing]
    side = facts.relation if thing is facts.things[0] else OPPOSITE[facts.relation]
    (verb, subject), (_, object_) = (
      grammar.definite(thing.name, thing.count),
      grammar.definite(other.name, other.count),
    )
    asked.append(('position', f'Where {verb} {subject}, seen from {object_}?', side))
    kind = f'What is {PREPOSITION[side]} {object_}?', thing.name
  asked.append(('what', *kind))
  if thing.colour:
    asked.append(
      (
        'colour',
        'What colour {} {}?'.format(*grammar.definite(thing.name, thing.count)),
        thing.colour,
      )
    )

  true, word = _toss(rng)
  choice = rng.integers(4 if facts.relation else 3)
  if choice == 0:
    present = [each.name for each in facts.things]
    name = thing.name if true else _other(rng, names, *present)
    question = f'Is there {grammar.indefinite(name)}?'
  elif choice == 1:
    count = thing.count if true else (thing.count + rng.integers(3)) % 4 + 1
    question = f'Is the number of {grammar.plural(thing.name)} {grammar.NUMBERS[count]}?'
  elif choice == 2:
    question = _background_question(rng, facts, true)
  else:
    question = (
      f'{verb.capitalize()} {subject} {PREPOSITION[side if true else OPPOSITE[side]]} {object_}?'
    )
  return [*asked, ('yes/no', question, word)]


def _background_question(rng, facts, true: bool) -> str:
  return f'Is the background {facts.background if true else _other(rng, list(colors.BACKGROUNDS), facts.background)}?'


def _toss(rng) -> tuple[bool, str]:
  true = bool(rng.integers(2))
  return true, 'yes' if true else 'no'


def _other(rng, choices: list[str], *excluded: str) -> str:
  """Any of the choices but the excluded ones; of few, one is picked directly, of many by trying."""
  while (picked := choices[rng.integers(len(choices))]) in excluded:
    pass
  return picked
