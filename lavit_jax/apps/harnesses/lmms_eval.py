"""A model of lmms-eval (tested with 0.7.3), which finds it by the entry point `lmms_eval.models`.

lmms-eval --model lavit --model_args folder=/mnt/LaVIT-7B-v2 --tasks vqav2_val_lite
"""

from __future__ import annotations

from collections.abc import Sequence

# pyright: reportMissingImports=false
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from lavit_jax.apps.harnesses.requests import Request, Responder
from lavit_jax.errors import UserError
from lavit_jax.inference.pipeline import Lavit

MANIFEST = ModelManifest('lavit', simple_class_path=f'{__name__}.LavitModel')


class LavitModel(lmms):
  """LaVIT for tasks that generate a text from one image."""

  def __init__(
    self,
    folder: str,
    task: str = 'answer',
    seed: int | str = 0,
    batch_size: int | str = 8,
    device: str | None = None,
    weights_dtype: str | None = None,
    **others: object,
  ):
    """Opens a checkpoint.

    Args:
      folder: of the checkpoint.
      task: 'answer' or 'caption' (`Responder`).
      seed: of the patches that become tokens, and of sampling.
      batch_size: requests at once.
      device: not read; JAX takes what it finds.
      weights_dtype: see `Lavit.from_pretrained`.
      **others: what lmms-eval gives to all models; not read.
    """
    del device, others
    super().__init__()
    model = Lavit.from_pretrained(folder, weights_dtype=weights_dtype)
    self._respond = Responder(model, task, int(seed), int(batch_size))

  def generate_until(self, requests: Sequence[Instance]) -> list[str]:
    """The text for each request; their stop texts have no effect (`Responder`)."""
    own_requests = []
    for instance in requests:
      context, options, doc_to_visual, doc_id, task, split = instance.args
      images = doc_to_visual(self.task_dict[task][split][doc_id])
      own_requests.append(Request(images, context, options))
    return self._respond(own_requests)

  def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
    """Is not computed."""
    raise UserError('lavit has no tasks of several rounds in lmms-eval; leave this task out')

  def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
    """Is not computed."""
    raise UserError('lavit scores no given texts in lmms-eval; choose a task that generates')
