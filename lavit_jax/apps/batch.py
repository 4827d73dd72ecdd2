"""Many inputs through one task: rows go in, one result line a row comes out, in order; started again, a run goes on.

    rows.jsonl                                     results.jsonl
    {"image": "cats/1.jpg", "id": 17}      ->      {"image": "cats/1.jpg", "id": 17, "caption": "a cat on a red background", "settings": {...}}
    {"image": "cats/2.txt", "id": 18}      ->      {"image": "cats/2.txt", "id": 18, "error": "cats/2.txt: not a picture ...", "settings": {...}}

Rows are computed in fixed blocks of MAX_BATCH, the n-th row with the n-th key of the seed. A block of which lines are missing is computed
whole and only these are written: so what a row becomes, to the bit, does not depend on where a run was interrupted.
"""

from __future__ import annotations

import collections
import itertools
import json
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lavit_jax.data.images import SUFFIXES, read_images
from lavit_jax.errors import InputError, UserError
from lavit_jax.inference.faults import NotFinite
from lavit_jax.inference.generation_config import IndexedSeed
from lavit_jax.inference.image_generation import DecodedImages, report_flagged
from lavit_jax.inference.pipeline import MAX_BATCH, ImageOutput, Lavit
from lavit_jax.local_paths import expand_home
from lavit_jax.output import encode_png, slug, write_atomic


class Task(NamedTuple):
  """A command on rows."""

  needs: tuple[
    str, ...
  ]  # the keys of a row: 'image', 'question', 'prompt' are text, 'parts' is a list of it
  gives: tuple[
    str, ...
  ]  # the keys of a result; 'file' names a drawn picture, 'flagged' is there where that was made black
  show: str  # how a result is told, a format of all these
  compute: Callable  # (model, rows with arrays in place of pictures, **options and seed) -> results; 'picture' of one is to become its file


def _caption(model, rows, **options):
  return [dict(caption=text) for text in model.caption(_column(rows, 'image'), **options)]


def _answer(model, rows, **options):
  return [
    dict(answer=text)
    for text in model.answer(_column(rows, 'image'), _column(rows, 'question'), **options)
  ]


def _tokenize(model, rows, **options):
  return [
    dict(count=int(count), ids=ids.tolist(), patches=keep.nonzero()[0].tolist())
    for ids, keep, count in zip(*model.tokenize(_column(rows, 'image'), **options))
  ]


def _generate(model, rows, **options):
  return _drawn(model.generate(_column(rows, 'prompt'), details=True, **options))


def _synthesize(model, rows, **options):
  return _drawn(model.synthesize(_column(rows, 'parts'), details=True, **options))


def _reconstruct(model, rows, decoder_guidance=None, **options):
  return _drawn(
    model.reconstruct(_column(rows, 'image'), guidance=decoder_guidance, details=True, **options)
  )


def _drawn(drawn: DecodedImages | ImageOutput):
  return [
    dict(picture=picture) | (dict(flagged=True) if flagged else {})
    for picture, flagged in zip(drawn.pictures, drawn.flagged)
  ]


def _column(rows, key):
  return [row[key] for row in rows]


TASKS = dict(
  caption=Task(('image',), ('caption',), '{image}: {caption}', _caption),
  answer=Task(('image', 'question'), ('answer',), '{image}: {question} {answer}', _answer),
  tokenize=Task(
    ('image',), ('count', 'ids', 'patches'), '{image}: {count} tokens {ids}', _tokenize
  ),
  generate=Task(('prompt',), ('file', 'flagged'), '{file}', _generate),
  synthesize=Task(('parts',), ('file', 'flagged'), '{file}', _synthesize),
  reconstruct=Task(('image',), ('file', 'flagged'), '{file}', _reconstruct),
)


# -------------------------------------------------------------------------------------------------------------------- rows


def resolve_rows(
  task: Task, inputs: Sequence[str], path: str | None, out: str | None
) -> tuple[list[dict], pathlib.Path, bool]:
  """What a command is to be done on: from its arguments `inputs` or from the file `path`.

  Of a folder among the arguments every picture is meant; `out`, where results go, is not read.

  Returns:
    The rows; the folder that their pictures are relative to; whether there may be many, of which one at fault must not stop the others.

  Raises:
    UserError: neither arguments nor a file, or both; a picture in the place of a question; and as `read_rows`, `find_images`.
  """
  if path is not None:
    if inputs:
      raise UserError(f'both {inputs[0]!r} and --input {path} are given; give one of them')
    return read_rows(path, task.needs, task.gives), pathlib.Path(path).parent, True
  wanted = [
    dict(image='IMAGE', question='QUESTION', prompt='TEXT', parts='IMAGE or TEXT')[key]
    for key in task.needs
  ]
  if len(inputs) < len(wanted):
    raise UserError(
      f'required: {", ".join(wanted[len(inputs) :])}; name it, or give rows by --input ROWS.jsonl'
    )
  folders = [i for i, each in enumerate(inputs) if os.path.isdir(expand_home(each))]
  if task.needs == ('prompt',):
    return [dict(prompt=text) for text in inputs], pathlib.Path(), False
  if task.needs == ('parts',):
    if len(folders) > 1:
      raise UserError(
        'several folders are given; pictures are drawn with each of one folder at a time'
      )
    each = [find_images([part], out) if i in folders else [part] for i, part in enumerate(inputs)]
    return (
      [dict(parts=list(parts)) for parts in itertools.product(*each)],
      pathlib.Path(),
      bool(folders),
    )
  if 'question' in task.needs:
    taken = [each for each in inputs[1:] if is_image_path(each) or os.path.exists(each)]
    if taken:
      raise UserError(
        f'{taken[0]!r} is a picture or a file, not a question; ask about one picture or folder at a time, '
        f'IMAGE QUESTION ..., or give rows by --input ROWS.jsonl: {example(task.needs)}'
      )
    pictures = find_images(inputs[:1], out)
    return (
      [dict(image=image, question=text) for image in pictures for text in inputs[1:]],
      pathlib.Path(),
      0 in folders,
    )
  return (
    [dict(image=image) for image in find_images(inputs, out)],
    pathlib.Path(),
    bool(folders) or len(inputs) > 1,
  )


def find_images(paths: Sequence[str], but: str | None = None) -> list[str]:
  """Files as they are, and folders as the pictures in them: at any depth, by suffix, in order of their names, hidden ones left out.

  Raises:
    UserError: a folder has no pictures, or is the folder `but` that the results go to (which is left out where it lies deeper).
  """
  found, but = [], but and os.path.realpath(but)
  for path in map(expand_home, paths):
    if not os.path.isdir(path):
      found.append(path)
      continue
    if but == os.path.realpath(path):
      raise UserError(f'{path} is both read and written; give --out another folder')
    inside = []
    for folder, deeper, names in os.walk(path):
      deeper[:] = [
        name
        for name in deeper
        if not name.startswith('.') and os.path.realpath(os.path.join(folder, name)) != but
      ]
      inside += [
        os.path.join(folder, name)
        for name in names
        if is_image_path(name) and not name.startswith('.')
      ]
    if not inside:
      raise UserError(
        f'{path}: no pictures in this folder; their names end in {", ".join(SUFFIXES)}'
      )
    found += sorted(inside, key=lambda name: name.split(os.sep))
  return found


def is_image_path(path: str) -> bool:
  """Whether a name or path is a picture's, by its suffix."""
  return path.lower().endswith(SUFFIXES)


def read_rows(path: str, needs: Sequence[str], results: Sequence[str]) -> list[dict]:
  """The rows of a JSONL file, each with the keys that its task needs; other keys travel through.

  Args:
    needs: of 'image', 'question', 'prompt' (text) and 'parts' (a list of it).
    results: the keys that the task writes, which a row must not have.

  Raises:
    UserError: no such file, or a line that is not such a row, by its number.
  """
  try:
    lines = pathlib.Path(path).read_text(encoding='utf-8').split('\n')
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(
      f'{path} cannot be read ({getattr(error, "strerror", "not UTF-8")}); give --input a file of JSON lines'
    ) from None
  rows = []
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except ValueError as error:
      raise UserError(f'{path}:{number} is not JSON ({error}); give one object a line') from None
    for key in needs:
      value = row.get(key) if isinstance(row, dict) else None
      texts = value if key == 'parts' else [value]
      if (
        not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts)
      ):
        form = 'that is a list of texts' if key == 'parts' else 'that is a text'
        raise UserError(f'{path}:{number} has no {key!r} {form}; give each line {example(needs)}')
    taken = sorted(row.keys() & {*results, 'error', 'settings'})
    if taken:
      raise UserError(
        f'{path}:{number} has the key {taken[0]!r}, which is what the result is written to; name it otherwise'
      )
    rows.append(row)
  if not rows:
    raise UserError(f'{path} has no rows; give it lines such as {example(needs)}')
  return rows


def example(needs: Sequence[str]) -> str:
  """A row of --input, to show."""
  values = dict(
    image='cat.png',
    question='What is this?',
    prompt='a cat',
    parts=['cat.png', 'on a red background'],
  )
  return json.dumps({key: values[key] for key in needs})


def load(row: dict, needs: Sequence[str], base: pathlib.Path, size: int) -> dict:
  """What a task needs of a row, pictures read, uint8[size, size, 3]: its 'image', and of 'parts' what is a file or is named like a picture.

  Raises UserError as `read_images`, and for what JSON can say and no text or path can be, such as half a character.
  """

  def read(key, text):
    path = text if text.startswith('file:') else base / expand_home(text)
    try:
      if key == 'image' or key == 'parts' and (is_image_path(text) or os.path.isfile(path)):
        return read_images(path, size)[0]
      return text.encode().decode()
    except ValueError as error:
      raise UserError(f'{text!r} is no text or path ({error}); write it anew') from None

  return {
    key: [read(key, part) for part in row[key]] if key == 'parts' else read(key, row[key])
    for key in needs
  }


# ----------------------------------------------------------------------------------------------------------------- results


class ResultsFile:
  """A file of result lines that only grows. Opened again, it knows which rows are done; a torn last line of ours is dropped.

  Attributes:
    count: how many lines there were when it was opened.
    number: where the numbers of further pictures begin: after all in the file, of which lines may have been deleted.
    failed: what a row is known by and its 'error', of those that have one.
  """

  def __init__(self, path, keys: Sequence[str], settings: dict):
    """Opens or begins the file. `keys`: those that the task writes; `settings`: what else the results depend on.

    Raises:
      UserError: the file holds something else, or results of other settings; it is left as it is.
    """
    self.path, self.keys, self.settings = pathlib.Path(path), {*keys, 'error', 'settings'}, settings
    self.count, self.number, self.failed, self.done = 0, 0, [], collections.Counter()
    if not self.path.exists():
      return
    end = 0
    with open(self.path, 'rb') as file:
      for line in file:
        if line.endswith(b'\n'):
          self._know(line)
          end += len(line)
        elif self.count or self._is_ours(line):
          os.truncate(self.path, end)
        else:
          raise self._foreign()

  def _know(self, line: bytes):
    try:
      result = json.loads(line)
      theirs = {**result['settings']}
    except (ValueError, TypeError, KeyError):
      raise self._foreign() from None
    changed = [key for key in self.settings | theirs if self.settings.get(key) != theirs.get(key)]
    if changed:
      was, is_ = (
        f'{changed[0]} {json.dumps(each.get(changed[0]))}' for each in (theirs, self.settings)
      )
      raise UserError(
        f'{self.path} holds results of {was}, not of {is_}; give --out another name, or delete it to begin anew'
      )
    self.count += 1
    own = re.match('[0-9]{1,9}(?=-)', str(result.get('file')))
    self.number = max(self.number, int(own[0]) if own else 0) + 1
    self.done[self._row(result)] += 1
    self._note(result)

  def _row(self, line: dict) -> int:
    return _identity({key: value for key, value in line.items() if key not in self.keys})

  def _note(self, line: dict):
    if 'error' in line:
      self.failed.append((self._row(line), line['error']))

  def _is_ours(self, line: bytes) -> bool:
    """Whether a line without an end is the beginning of one of ours: torn in the settings, the last that is written."""
    _, key, torn = line.rpartition(b', "settings": ')
    return bool(key) and f'{json.dumps(self.settings)}}}'.encode().startswith(torn)

  def _foreign(self) -> UserError:
    return UserError(
      f'{self.path}:{self.count + 1} is no result of such a run; give --out another name'
    )

  def missing(self, rows: Sequence[dict]) -> list[bool]:
    """Which rows have no line yet; of several that are alike, the later ones."""
    left = self.done.copy()
    out = []
    for row in rows:
      known = _identity(row)
      out.append(left[known] == 0)
      left[known] -= not out[-1]
    return out

  def add(self, lines: Sequence[dict]):
    """Appends lines, and sees to it that they are the file's before it returns. In ASCII, for the name of a picture may be no UTF-8."""
    self.path.parent.mkdir(parents=True, exist_ok=True)
    with open(self.path, 'ab') as file:
      file.write(
        ''.join(json.dumps(line | dict(settings=self.settings)) + '\n' for line in lines).encode()
      )
    for line in lines:
      self._note(line)

  def errors(self, rows: Sequence[dict]) -> list[str]:
    """The 'error' of each line that is of one of these rows; others are not asked for any more."""
    asked = {*map(_identity, rows)}
    return [error for row, error in self.failed if row in asked]


def _identity(row: dict) -> int:
  return hash(json.dumps(row, sort_keys=True))


# ---------------------------------------------------------------------------------------------------------------- the run


def run_batch(
  task: Task,
  model: Lavit,
  rows: Sequence[dict],
  seed: int | None,
  options: dict,
  *,
  base: pathlib.Path,
  many: bool,
  as_json: bool = False,
  results: ResultsFile | None = None,
  pictures: str | None = None,
):
  """Computes the rows that have no line in `results` yet; tells each on stdout and adds its line.

  Args:
    rows: as given, what a result line begins with.
    options: what the model's method gets beside its inputs and the seed.
    base: the folder that relative pictures are in.
    many: a row at fault becomes a line with an 'error' and the others go on; without, it ends the run.
    as_json: tell a row as JSON.
    pictures: the folder that drawn pictures go to.

  Raises:
    UserError: at the end, how many rows failed; or at once, what stops every row.
  """
  pending = [True] * len(rows) if results is None else results.missing(rows)
  errors, number = [], 0 if results is None else results.number
  if not all(pending):
    print(
      f'lavit: {len(rows) - sum(pending)} of {len(rows)} are in {results.path} already',
      file=sys.stderr,
    )
  progress = _Progress(sum(pending))
  for start in range(0, len(rows), MAX_BATCH):
    block = range(start, min(start + MAX_BATCH, len(rows)))
    if not any(pending[i] for i in block):
      continue
    outcomes, lines, flagged = (
      _block(task, model, {i: rows[i] for i in block}, seed, options, base, many),
      [],
      [],
    )
    for i in block:
      if pending[i]:
        if 'picture' in outcomes[i]:
          number, outcomes[i]['file'] = _save(
            pictures, number, _name(rows[i][task.needs[0]]), outcomes[i].pop('picture')
          )
          if 'flagged' in outcomes[i]:
            flagged.append(f'{outcomes[i]["file"]}, of row {i + 1} of {len(rows)},')
        lines.append(rows[i] | outcomes[i])
        number += 1
    if results is None:
      errors += [line['error'] for line in lines if 'error' in line]
    else:
      results.add(lines)
    progress.clear()
    report_flagged(flagged)
    for line in lines:
      _tell(
        line | dict(file=os.path.join(pictures, line['file']))
        if pictures and 'file' in line
        else line,
        task,
        many,
        as_json,
      )
    progress.step(len(lines))
  progress.clear()
  errors = errors if results is None else results.errors(rows)
  if errors:
    again = (
      f'mend it, and delete its line from {results.path} to try it again'
      if results
      else 'mend it, and try again'
    )
    raise UserError(f'{len(errors)} of {len(rows)} failed, the first: {errors[0]}; {again}')


def _block(
  task: Task,
  model: Lavit,
  rows: dict[int, dict],
  seed: int | None,
  options: dict,
  base: pathlib.Path,
  many: bool,
) -> dict[int, dict]:
  """What each row becomes, by its place among all rows; where `many`, an 'error' for a row at fault."""
  loaded, outcomes = {}, {}
  for place, row in rows.items():
    try:
      loaded[place] = load(row, task.needs, base, model.model.image_size)
    except UserError as error:
      if not many:
        raise
      outcomes[place] = dict(error=str(error))

  def computed(places):
    found = task.compute(
      model,
      [loaded[i] for i in places],
      seed=None if seed is None else IndexedSeed(seed, places),
      **options,
    )
    return dict(zip(places, found))

  try:
    return outcomes | (computed(list(loaded)) if loaded else {})
  except NotFinite as error:
    if not many:
      raise
    places = list(loaded)
    for i, message in error.rows.items():
      outcomes[places[i]] = dict(error=message)
    return outcomes | _block(
      task, model, {i: rows[i] for i in places if i not in outcomes}, seed, options, base, many
    )
  except InputError:  # a text that is empty or too long: each row alone shows whose
    if not many:
      raise
  for place in loaded:
    try:
      outcomes |= computed([place])
    except InputError as error:
      outcomes[place] = dict(error=str(error))
  return outcomes


def _save(folder: str, number: int, name: str, picture) -> tuple[int, str]:
  """Writes a picture; returns its number, the first from `number` on by which it replaces no other, and its file's name."""
  data = encode_png(picture)
  for number in itertools.count(number):
    path = pathlib.Path(folder, f'{number}-{name}.png')
    if (
      not os.path.lexists(path) or path.is_file() and path.read_bytes() == data
    ):  # itself, of a run that ended there
      return number, write_atomic(path, data).name


def _name(source: str | list[str]) -> str:
  """A file's name for what is drawn from a text or a picture's path, or several."""
  texts = source if isinstance(source, list) else [source]
  return slug(
    ' and '.join(
      os.path.basename(text) if is_image_path(text) or os.path.isfile(text) else text
      for text in texts
    )
  )


def _tell(line: dict, task: Task, many: bool, as_json: bool):
  if as_json:
    print(json.dumps(line), flush=True)
  elif 'error' in line:
    print('lavit: ' + ' '.join(line['error'].split()), file=sys.stderr)
  else:
    show = (
      task.show if many or 'question' not in line else '{question} {answer}'
    )  # of one picture, which everybody knows
    text, encoding = show.format(**line), sys.stdout.encoding or 'utf-8'
    print(text.encode(encoding, 'backslashreplace').decode(encoding), flush=True)


class _Progress:
  """One line on stderr, when that is a terminal: how many of how many, and how long it will take."""

  def __init__(self, total: int):
    self.total, self.count, self.start = total, 0, time.monotonic()
    self.on = sys.stderr.isatty() and total > MAX_BATCH
    self.step(0)

  def step(self, count: int):
    self.count += count
    if self.on:
      rate = self.count / max(time.monotonic() - self.start, 1e-9)
      rest = (
        f', {rate:.1f} a second, {(self.total - self.count) / rate / 60:.0f} min to go'
        if self.count
        else ''
      )
      print(f'\r\x1b[K{self.count} of {self.total}{rest}', end='', file=sys.stderr, flush=True)

  def clear(self):
    if self.on:
      print('\r\x1b[K', end='', file=sys.stderr, flush=True)
