"""Sequences in slots have the tokens that they have alone."""

import numpy as np
import pytest

from lavit_jax.data import prompts
from lavit_jax.errors import InputError, UserError
from lavit_jax.inference.slot_decoder import SlotDecoder, TextSequence

NEW_TOKENS = 7


@pytest.fixture(scope='module')
def images(model):
  rng = np.random.default_rng(0)
  size = model.modules.image_size
  return rng.integers(0, 256, (6, size, size, 3), np.uint8)


@pytest.fixture(scope='module')
def decoder(model):
  return SlotDecoder(model, num_slots=3, prompt_tokens=100, new_tokens=NEW_TOKENS)


def alone(model, image, question, seed, **options):
  """The new tokens of a lone question."""
  (output,) = model.answer_outputs(
    [image], [question], seed=[seed], min_new_tokens=2, max_new_tokens=NEW_TOKENS, **options
  )
  return output.ids.tolist()


def sequence(model, image, question, **options):
  ids = model.tokenizer.encode(prompts.question_prompt(question))
  return TextSequence([image, ids], min_new_tokens=2, **options)


def run(decoder, arrivals):
  """Tokens of sequences {sequence: step at which it arrives}; each joins once a slot is free."""
  tokens = {arriving: [] for arriving in arrivals}
  waiting = sorted(arrivals, key=arrivals.get)
  step = 0
  while waiting or decoder.num_active:
    ready = [s for s in waiting if arrivals[s] <= step][: decoder.num_free]
    new = decoder.join(ready) if ready else []
    waiting = [s for s in waiting if s not in ready]
    if decoder.num_active:
      new += decoder.advance()
    for token in new:
      assert token.error is None
      tokens[token.sequence].append(token.id)
    step += 1
  return tokens


def test_sequences_that_come_and_go_have_the_tokens_of_a_lone_one(model, decoder, images):
  """Greedy and sampled ones share slots, and the columns go round more than once."""
  arrivals = {}
  expected = {}
  for number, image in enumerate(images):
    question = 'What is this?' + ' And that?' * number
    limit = NEW_TOKENS - number % 3
    if number % 2:
      options = dict(temperature=0.0)
      lone_options = dict(num_beams=1)
    else:
      options = dict(temperature=0.8, top_p=0.9)
      lone_options = dict(do_sample=True, top_k=None, **options)
    own = sequence(model, image, question, seed=number, max_new_tokens=limit, **options)
    arrivals[own] = 2 * number
    expected[own] = alone(model, image, question, number, **lone_options)[:limit]
  assert run(decoder, arrivals) == expected
  assert len({tuple(ids) for ids in expected.values()}) > 3


def test_samples_of_a_prompt_differ_and_are_those_of_the_api(model, decoder, images):
  outputs = model.answer_outputs(
    [images[0]],
    ['What is this?'],
    seed=[5],
    do_sample=True,
    top_k=None,
    min_new_tokens=2,
    max_new_tokens=NEW_TOKENS,
    num_return_sequences=3,
  )
  samples = [
    sequence(model, images[0], 'What is this?', seed=5, number=i, max_new_tokens=NEW_TOKENS)
    for i in range(3)
  ]
  tokens = run(decoder, dict.fromkeys(samples, 0))
  assert [tokens[sample] for sample in samples] == [output.ids.tolist() for output in outputs]


def test_a_sequence_that_leaves_frees_its_slot_and_changes_no_other(model, decoder, images):
  stays = sequence(model, images[1], 'What is this?', temperature=0.0, max_new_tokens=NEW_TOKENS)
  leaves = sequence(model, images[2], 'What is this?', temperature=0.0, max_new_tokens=NEW_TOKENS)
  ids = [token.id for token in decoder.join([leaves, stays]) if token.sequence is stays]
  decoder.leave(leaves)
  decoder.leave(leaves)  # once more: nothing
  assert decoder.num_free == 2
  while decoder.num_active:
    ids += [token.id for token in decoder.advance()]
  assert ids == alone(model, images[1], 'What is this?', 0, num_beams=1)


def test_what_does_not_fit_is_refused(model, decoder, images):
  with pytest.raises(InputError, match='^8 new tokens are too many; ask for at most 7'):
    decoder.check(TextSequence([images[0]], max_new_tokens=8))
  with pytest.raises(InputError, match='^the prompt is empty'):
    decoder.check(TextSequence([], max_new_tokens=1))
  with pytest.raises(InputError, match='is at least 200 tokens long; shorten it to 128'):
    decoder.check(TextSequence([(5,) * 200], max_new_tokens=1))
  long = TextSequence([images[0], (5,) * 125], max_new_tokens=2)
  decoder.check(long)  # the number of visual tokens is not known yet
  (token,) = decoder.join([long])
  assert token.is_last and 'tokens long; shorten it to 128' in str(token.error)
  assert decoder.num_free == 3
  with pytest.raises(UserError, match='are more than the .* that the language model reads'):
    SlotDecoder(model, num_slots=1, prompt_tokens=10**6, new_tokens=1)
