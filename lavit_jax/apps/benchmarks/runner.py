"""Runs a benchmark: texts of the model, in shares; then the result file and the report.

Each process appends to a file of its own, `rows-I-of-N.jsonl` (apps/batch). A row has the key of
its index, and the blocks of a share are those of the whole run, so neither a kill nor the number of
processes changes a result. The process that finds all rows there merges them.
"""

from __future__ import annotations

import json
import pathlib
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

from rich.console import Console
from rich.table import Table

from lavit_jax.apps import batch
from lavit_jax.apps.benchmarks import captions, files
from lavit_jax.apps.benchmarks.files import Record, Request
from lavit_jax.apps.benchmarks.protocols import Protocol
from lavit_jax.apps.benchmarks.registry import BENCHMARKS, Benchmark
from lavit_jax.errors import UserError
from lavit_jax.evaluation import caption_metrics, lemmas
from lavit_jax.inference.pipeline import Lavit
from lavit_jax.output import write_atomic, write_json

RESULTS = 'results.json'
REPORT = 'report.json'
SHOWN_GROUPS = 12  # a kind with more of them, such as the 65 question types, is in the report alone


def run_benchmark(
  load_model: Callable[[], Lavit],
  folder: str,
  request: Request,
  seed: int | None,
  model_options: Mapping[str, Any],
) -> dict[str, Any] | None:
  """Computes a share of a benchmark; if no row is missing then, writes and prints the metrics.

  Args:
    load_model: opens the checkpoint; files are checked before.
    folder: of the checkpoint.
    request: what to evaluate.
    seed: of the patches that become tokens; None keeps the most probable patches.
    model_options: how the checkpoint was opened, for the report.

  Returns:
    The report, or None while rows of other shares are missing.

  Raises:
    UserError: a file is missing or wrong, a package is missing, or rows have errors.
  """
  benchmark = BENCHMARKS[request.benchmark]
  protocol = benchmark.protocols[request.protocol]
  if benchmark.task == 'caption':
    caption_metrics.require_package()
  elif benchmark.task == 'answer' and request.protocol == 'lavit':
    lemmas.require_lemmatizer()
  data = benchmark.read(request.data)
  records = _kept_records(data.records, protocol, request.limit)
  if not records:
    raise UserError(
      f'{data.files[0]} has no records that protocol {request.protocol!r} evaluates; take the '
      'whole official file'
    )
  images = _find_images(benchmark, records, request.images)
  rows = _make_rows(benchmark, protocol, records, images)
  measure = benchmark.image_measure(request) if benchmark.image_measure else None
  model = load_model()
  settings = {
    'benchmark': request.benchmark,
    'protocol': request.protocol,
    'checkpoint': files.folder_digest(folder),
    'compute_dtype': str(model.modules.llama.dtype),
    'seed': seed,
    **({} if request.limit is None else {'limit': request.limit}),
    **model_options,
    **protocol.options,
  }
  task = batch.TASKS[benchmark.task]
  suffix = f'{request.share[0]}-of-{request.share[1]}'
  batch.run_batch(
    task,
    model,
    batch.Inputs(rows, request.images, True),
    seed,
    dict(protocol.options),
    results=batch.ResultsFile(request.out / f'rows-{suffix}.jsonl', task.outputs, settings),
    image_folder=str(request.out / f'images-{suffix}') if 'file' in task.outputs else None,
    share=request.share,
    quiet=True,
  )
  results = _read_results(request.out, task.outputs[0], settings)
  missing = sum(record.id not in results for record in records)
  if missing:
    print(
      f'lavit: {request.out} has {len(records) - missing} of {len(records)} rows; the share that '
      'completes them writes the results',
      file=sys.stderr,
    )
    return None
  outputs = [results[record.id] for record in records]
  if measure:
    generated = [pathlib.Path(path) for path in outputs]
    measured = measure(records, generated, [request.images / image for image in images])
  else:
    measured = _measure_texts(request, records, outputs)
  report = {
    'benchmark': request.benchmark,
    'protocol': request.protocol,
    'count': len(records),
    **measured,
    'settings': settings | {'question': protocol.question},
    'checkpoint': {
      'folder': str(folder),
      'variant': model.modules.variant,
      'sha256': settings['checkpoint'],
    },
    'files': {path.name: files.file_digest(path) for path in data.files},
    'versions': _versions(),
  }
  write_json(request.out / REPORT, report)
  if report['metrics']:
    Console().print(_table(report))
  for note in report.get('notes', ()):
    print(f'lavit: {note}', file=sys.stderr)
  return report


def _find_images(benchmark: Benchmark, records: list[Record], folder: pathlib.Path) -> list[str]:
  """The images of the records, relative to their folder; '' for each where there are none."""
  names = [record.image for record in records]
  if not benchmark.images:
    return names
  unique = list(dict.fromkeys(names))
  paths = files.find_images(folder, unique, benchmark.subfolders, benchmark.images)
  path_of = dict(zip(unique, paths, strict=True))
  return [path_of[name] for name in names]


def _make_rows(
  benchmark: Benchmark, protocol: Protocol, records: list[Record], images: list[str]
) -> list[dict[str, Any]]:
  """The rows of apps/batch."""
  if benchmark.task == 'generate':
    return [{'id': record.id, 'prompt': record.question} for record in records]
  rows = []
  for record, path in zip(records, images, strict=True):
    row = {'id': record.id, 'image': path}
    if benchmark.task == 'answer':
      row['question'] = protocol.ask(record.question)
    rows.append(row)
  return rows


def _kept_records(records: Sequence[Record], protocol: Protocol, limit: int | None) -> list[Record]:
  """The records that a protocol evaluates, in order."""
  kept = []
  for record in records:
    if all(record.groups[key] == value for key, value in protocol.kept.items()):
      kept.append(record)
  return kept[:limit]


def _read_results(folder: pathlib.Path, key: str, settings: dict[str, Any]) -> dict[Any, str]:
  """The finished rows of all shares: id -> text, or path of the generated image.

  Other processes may be writing; a line without its end is not there yet.
  """
  expected = json.loads(json.dumps(settings))
  values = {}
  for path in sorted(folder.glob('rows-*-of-*.jsonl')):
    images = folder / path.stem.replace('rows', 'images', 1)
    for line in path.read_bytes().splitlines(keepends=True):
      if not line.endswith(b'\n'):
        continue
      result = json.loads(line)
      if result.get('settings') != expected:
        raise UserError(
          f'{path} has results of other settings than this command; give --out another folder, or '
          'delete the file'
        )
      if key in result:
        values[result['id']] = str(images / result[key]) if key == 'file' else result[key]
  return values


def _measure_texts(request: Request, records: list[Record], outputs: list[str]) -> dict[str, Any]:
  """Writes the results in their official form; returns the metrics of the report."""
  benchmark = BENCHMARKS[request.benchmark]
  protocol = benchmark.protocols[request.protocol]
  assert benchmark.submit is not None
  predictions = [protocol.change_prediction(text) for text in outputs]
  submission = benchmark.submit(records, predictions)
  write_atomic(request.out / RESULTS, json.dumps(submission) + '\n')
  if benchmark.task == 'caption':
    return captions.measure(records, predictions)
  return _measure_answers(protocol, records, predictions)


def _measure_answers(
  protocol: Protocol, records: list[Record], predictions: list[str]
) -> dict[str, Any]:
  """The mean accuracy of all answers and of each group."""
  accuracies = []
  for record, prediction in zip(records, predictions, strict=True):
    references = [protocol.change_reference(answer) for answer in record.references]
    accuracies.append(protocol.accuracy(prediction, references))
  groups: dict[str, dict[str, dict[str, float]]] = {}
  for kind, values in files.by_group(records, accuracies).items():
    groups[kind] = {
      value: {'accuracy': sum(members) / len(members), 'count': len(members)}
      for value, members in values.items()
    }
  return {'metrics': {'accuracy': sum(accuracies) / len(accuracies)}, 'groups': groups}


def _versions() -> dict[str, str]:
  versions = {'python': platform.python_version()}
  for name in ('lavit_jax', 'jax', 'jaxlib', 'pillow', 'simplemma', 'pycocoevalcap'):
    try:
      versions[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      continue
  return versions


def _table(report: dict[str, Any]) -> Table:
  """The metrics of a report, for the terminal."""
  title = f'{report["benchmark"]}, protocol {report["protocol"]}, {report["count"]} records'
  table = Table('metric', 'x 100', title=title, title_justify='left')
  for name, value in report['metrics'].items():
    if name == 'FID':  # a distance, not a share
      table.add_row('FID (x 1)', f'{value:.2f}')
    else:
      table.add_row(name, f'{100 * value:.2f}')
  for kind, values in report['groups'].items():
    if len(values) > SHOWN_GROUPS:
      continue
    for value, metrics in values.items():
      for name, number in metrics.items():
        if name != 'count':
          table.add_row(f'{name}, {kind} {value} ({metrics["count"]})', f'{100 * number:.2f}')
  return table
