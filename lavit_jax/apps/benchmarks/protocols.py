"""How the model is asked, and how its texts are compared, under each protocol.

`lavit` is what the paper's authors ran. `standard` is the official metric with the prompts and the
greedy decoding of lmms-eval. In both, a question stands in the model's own template, and a text
ends as `Lavit.caption` and `Lavit.answer` end it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lavit_jax.evaluation import lemmas
from lavit_jax.evaluation.vqa_accuracy import vqa_accuracy

PROTOCOLS = ('lavit', 'standard')
_SHORT = '\nAnswer the question using a single word or phrase.'
_INSUFFICIENT = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
_PUBLISHED_CAPTION = {
  'num_beams': 2,
  'length_penalty': 1.0,
  'min_new_tokens': 8,
  'max_new_tokens': 36,
}
_PUBLISHED_ANSWER = {
  'num_beams': 5,
  'length_penalty': 0.0,
  'early_stopping': True,
  'min_new_tokens': 2,
  'max_new_tokens': 10,
}


class Protocol(NamedTuple):
  """How texts come about and are compared.

  Attributes:
    options: of `Lavit.caption`, `Lavit.answer` or `Lavit.generate`.
    question: what the model is asked, with {} for the question of the record.
    capitalize: whether the first letter of the question becomes a capital, all others small.
    kept: the groups that records must have; the others are left out.
    change_prediction: applied to answers of the model.
    change_reference: applied to answers of annotators.
    accuracy: (prediction, references) -> 0 to 1.
  """

  options: Mapping[str, Any]
  question: str = '{}'
  capitalize: bool = False
  kept: Mapping[str, str] = {}
  change_prediction: Callable[[str], str] = str
  change_reference: Callable[[str], str] = str
  accuracy: Callable[[str, list[str]], float] = vqa_accuracy

  def ask(self, question: str) -> str:
    """The question as the model gets it."""
    return self.question.format(question.capitalize() if self.capitalize else question)


def _greedy(max_new_tokens: int, **options: Any) -> dict[str, Any]:
  return {'num_beams': 1, 'min_new_tokens': 1, 'max_new_tokens': max_new_tokens, **options}


def _lemmatized_prediction(answer: str) -> str:
  return lemmas.lemmatize(lemmas.shorten_answer(answer))


def _exact_match(prediction: str, references: list[str]) -> float:
  """Whether the one reference is the prediction, as GQA's evaluation script compares."""
  return float(prediction == references[0])


LAVIT_CAPTION = Protocol(_PUBLISHED_CAPTION)
STANDARD_CAPTION = Protocol(
  _greedy(64, prompt='Provide a one-sentence caption for the provided image.')
)
LAVIT_VQA = Protocol(
  _PUBLISHED_ANSWER,
  change_prediction=_lemmatized_prediction,
  change_reference=lemmas.lemmatize,
)
LAVIT_VIZWIZ = LAVIT_VQA._replace(
  options={**_PUBLISHED_ANSWER, 'check_answerable': True}, kept={'answerable': 'yes'}
)
LAVIT_GQA = LAVIT_VQA._replace(change_prediction=lemmas.lemmatize, accuracy=_exact_match)
STANDARD_VQA = Protocol(_greedy(16), question='{}' + _SHORT)
STANDARD_OKVQA = STANDARD_VQA._replace(question='{}' + _INSUFFICIENT + _SHORT)
STANDARD_VIZWIZ = STANDARD_OKVQA._replace(capitalize=True)
STANDARD_GQA = STANDARD_VQA._replace(
  change_prediction=str.lower, change_reference=str.lower, accuracy=_exact_match
)
STANDARD_GENERATION = Protocol({'num_inference_steps': 50})
# Of coco-fid, whose records are several samples of each caption.
LAVIT_COCO_FID = Protocol(
  {
    'num_inference_steps': 50,
    'top_k': 300,
    'guidance_scale': 1.5,
    'decoder_guidance_scale': 1.5,
  }
)
STANDARD_COCO_FID = STANDARD_GENERATION._replace(kept={'sample': '0'})
