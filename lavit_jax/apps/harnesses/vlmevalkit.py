"""A model of VLMEvalKit (tested with the model class of ms-vlmeval 0.0.20).

A script enters it, which is run with `--model LaVIT-7B-v2` and the other options of `run.py`:

    from functools import partial
    from vlmeval.config import supported_VLM
    from lavit_jax.apps.harnesses.vlmevalkit import LavitModel
    from vlmeval.run import main

    supported_VLM['LaVIT-7B-v2'] = partial(LavitModel, '/mnt/LaVIT-7B-v2')
    main()
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

# pyright: reportMissingImports=false
from vlmeval.vlm.base import BaseModel

from lavit_jax.apps.harnesses.requests import Request, Responder
from lavit_jax.inference.pipeline import Lavit


class LavitModel(BaseModel):
  """LaVIT for data sets of questions about one image."""

  INTERLEAVE = False

  def __init__(
    self, folder: str | os.PathLike, task: str = 'answer', seed: int = 0, **options: object
  ):
    """Opens a checkpoint.

    Args:
      folder: of the checkpoint.
      task: 'answer' or 'caption' (`Responder`).
      seed: of the patches that become tokens, and of sampling.
      **options: of the generation: `OPTIONS` of requests.py.
    """
    super().__init__()
    self._options = options
    self._respond = Responder(Lavit.from_pretrained(folder), task, seed)

  def generate_inner(self, message: Sequence[dict[str, str]], dataset: str | None = None) -> str:
    """The text for a message [{'type': 'image' or 'text', 'value': path or text}, ...]."""
    del dataset
    images = [pathlib.Path(part['value']) for part in message if part['type'] == 'image']
    text = '\n'.join(part['value'] for part in message if part['type'] == 'text')
    return self._respond([Request(images, text, self._options)])[0]
