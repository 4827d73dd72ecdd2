"""One task on many inputs: one result line for each row, in order; the same command resumes a run.

    rows.jsonl:     {"image": "cats/1.jpg", "id": 17}
                    {"image": "cats/2.txt", "id": 18}
    results.jsonl:  {"image": "cats/1.jpg", "id": 17, "caption": "a cat", "settings": {...}}
                    {"image": "cats/2.txt", "id": 18, "error": "...", "settings": {...}}

inputs.py reads the rows, tasks.py calls the model, results.py keeps the result file, and runner.py
computes block after block. shards.py does so for tars and Parquet files, whole files at a time.
"""

from lavit_jax.apps.batch.inputs import (
  Inputs,
  example_row,
  find_images,
  is_image_path,
  load_inputs,
  read_rows,
  resolve_inputs,
)
from lavit_jax.apps.batch.results import ResultsFile
from lavit_jax.apps.batch.runner import run_batch
from lavit_jax.apps.batch.shards import COLUMNS, ShardRequest, ShardRun, is_shards
from lavit_jax.apps.batch.tasks import TASKS, Outcome, Task

__all__ = [
  'COLUMNS',
  'TASKS',
  'Inputs',
  'Outcome',
  'ResultsFile',
  'ShardRequest',
  'ShardRun',
  'Task',
  'example_row',
  'find_images',
  'is_image_path',
  'is_shards',
  'load_inputs',
  'read_rows',
  'resolve_inputs',
  'run_batch',
]
