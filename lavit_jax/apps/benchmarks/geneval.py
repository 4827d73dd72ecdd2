"""GenEval: the images of its prompts, in the folders that its scorer reads."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from lavit_jax.apps.benchmarks.files import DataSet, Official, Record, Request
from lavit_jax.errors import UserError
from lavit_jax.output import write_atomic

PROMPTS = Official('evaluation_metadata.jsonl', "the folder prompts of GenEval's repository")
NUM_SAMPLES = 4  # images of each prompt, as the repository generates them


def read(folder: pathlib.Path) -> DataSet:
  """Reads the prompts; each has NUM_SAMPLES records, with the prompt as their question."""
  records = []
  for index, metadata in enumerate(_read_lines(folder)):
    for sample in range(NUM_SAMPLES):
      name = f'{index:05d}/samples/{sample:04d}.png'
      groups = {'tag': metadata['tag']}
      records.append(Record(name, '', [], question=metadata['prompt'], groups=groups))
  return DataSet(records, [folder / PROMPTS.name])


def _read_lines(folder: pathlib.Path) -> list[dict[str, Any]]:
  path = folder / PROMPTS.name
  try:
    lines = [json.loads(line) for line in path.read_bytes().splitlines() if line.strip()]
    valid = all(isinstance(line['prompt'], str) and isinstance(line['tag'], str) for line in lines)
  except OSError as error:
    raise UserError(
      f'{path} cannot be read ({error.strerror}); it comes from {PROMPTS.origin}'
    ) from None
  except (ValueError, TypeError, KeyError) as error:
    raise PROMPTS.wrong(folder, f'is not JSON lines of prompts ({error!r})') from None
  if not lines or not valid:
    raise PROMPTS.wrong(folder, 'has no prompts')
  return lines


class ImageMeasure:
  """Writes the folders that GenEval's scorer reads; it computes nothing."""

  def __init__(self, request: Request):
    """Reads the prompts of the request."""
    self.metadata = _read_lines(request.data)
    self.out = request.out

  def __call__(
    self,
    records: Sequence[Record],
    generated: Sequence[pathlib.Path],
    real: Sequence[pathlib.Path],
  ) -> dict[str, Any]:
    """Writes `00000/metadata.jsonl` and `00000/samples/0000.png` and so on.

    The arguments are those of `registry.ImageMeasure`; ids of the records name the images.

    Returns:
      No metrics, since an object detector of GenEval's repository computes them, and a note on it.
    """
    del real
    for record, path in zip(records, generated, strict=True):
      name = str(record.id)
      write_atomic(self.out / name, path.read_bytes())
      index = int(name.split('/')[0])
      write_atomic(self.out / f'{index:05d}/metadata.jsonl', json.dumps(self.metadata[index]))
    return {
      'metrics': {},
      'groups': {},
      'notes': [
        f"{self.out} has {len(generated)} images; evaluation/evaluate_images.py of GenEval's "
        'repository scores them'
      ],
    }
