"""Inputs that cannot be used: a line for the row, or an error that names the remedy."""

import contextlib
import io
import json
import os

import pytest
from batch_runs import lavit, lines

from lavit_jax.errors import UserError


def test_a_text_with_an_error_has_a_line(stub, folder, tmp_path, capsys):
  rows = [dict(image='pictures/04.PNG', question=question) for question in ('a', 'bad', 'b')]
  (tmp_path / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  assert lavit('answer', '--input', tmp_path / 'rows.jsonl', '--json') == 2
  printed = capsys.readouterr()
  assert [row.get('answer') for row in lines(printed.out)] == ['4 a', None, '4 b']
  assert '1 of 3 failed, the first: the text is bad' in printed.err
  assert lavit('answer', folder / '04.PNG', 'a', 'bad') == 2  # of arguments, it ends the run
  assert capsys.readouterr().err == 'lavit: error: the text is bad\n'


def test_file_names_that_are_not_utf8(stub, folder, tmp_path, capsys):
  os.rename(os.fsencode(folder / '04.PNG'), os.fsencode(folder) + b'/\xff.png')
  image = folder / os.fsdecode(b'\xff.png')
  out = tmp_path / 'captions.jsonl'
  arguments = ('caption', image, folder / '06.PNG')
  for encoding in ('utf-8', 'ascii'):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding, 'strict')
    with contextlib.redirect_stdout(stdout):
      assert lavit(*arguments) == 0
      assert lavit(*arguments, '--json') == 0
    text, _, first, _ = stdout.buffer.getvalue().decode(encoding).splitlines()
    assert text.endswith('\\udcff.png: 4 at 0')
    assert json.loads(first)['image'] == os.fspath(image)
  assert lavit(*arguments, '--out', out) == 0
  whole = out.read_text('utf-8')
  out.write_text(whole.splitlines(keepends=True)[0])
  assert lavit(*arguments, '--out', out) == 0
  assert out.read_text() == whole


@pytest.mark.parametrize(
  'command, row',
  [
    ('caption', '{"image": "\\ud800.png"}'),
    ('caption', '{"image": "\\u0000.png"}'),
    ('generate', '{"prompt": "an \\ud800"}'),
    ('synthesize', '{"parts": ["on \\ud800"]}'),
    ('answer', '{"image": "pictures/04.PNG", "question": "\\ud800"}'),
  ],
)
def test_a_lone_surrogate_has_a_line(stub, folder, tmp_path, capsys, command, row):
  good = dict(image='pictures/04.PNG', question='q', prompt='ä', parts=['pictures/04.PNG'])
  (tmp_path / 'rows.jsonl').write_text(row + '\n' + json.dumps(good))
  arguments = command, '--input', tmp_path / 'rows.jsonl', '--out', tmp_path / 'out'
  assert lavit(*arguments, '--json') == 2
  bad, other = lines(capsys.readouterr().out)
  assert 'is not a valid text or path' in bad['error']
  assert 'error' not in other
  assert lavit(*arguments) == 2
  assert '2 of 2 are in' in capsys.readouterr().err


@pytest.mark.parametrize(
  'arguments, text, message',
  [
    (['caption'], None, 'required: IMAGE; name it, or give rows by --input ROWS.jsonl'),
    (['answer', 'a.png'], None, 'required: QUESTION'),
    (
      ['caption', 'a.png', '--input', 'ROWS'],
      '{"image": "a.png"}',
      "both 'a.png' and --input .*rows.jsonl are given",
    ),
    (['caption', '--input', 'nowhere.jsonl'], None, r'nowhere.jsonl cannot be read \(No such file'),
    (['caption', '--input', 'ROWS'], '', 'has no rows; give it lines such as {"image": "cat.png"}'),
    (
      ['caption', '--input', 'ROWS'],
      '{"image": "a.png"}\n{"image": "a.p',
      'rows.jsonl:2 is not JSON',
    ),
    (
      ['caption', '--input', 'ROWS'],
      '["a.png"]',
      "rows.jsonl:1 has no 'image' that is a text; give each line",
    ),
    (['caption', '--input', 'ROWS'], '{"image": 3}', "rows.jsonl:1 has no 'image' that is a text"),
    (
      ['answer', '--input', 'ROWS'],
      '{"image": "a.png"}',
      "no 'question' that is a text; give each line .*What is this",
    ),
    (['synthesize', '--input', 'ROWS'], '{"parts": []}', "no 'parts'"),
    (
      ['synthesize', '--input', 'ROWS'],
      '{"parts": ["a", 3]}',
      "no 'parts' that is a list of texts",
    ),
    (
      ['caption', '--input', 'ROWS'],
      '{"image": "a.png", "caption": "owl"}',
      "has the key 'caption'.*rename it",
    ),
    (['caption', 'EMPTY'], None, 'empty: no images in this folder; their names end in .png'),
    (['reconstruct', 'PICTURES', '--out', 'PICTURES'], None, 'pictures is both read and written'),
    (['synthesize', 'PICTURES', 'PICTURES'], None, 'several folders'),
    (
      ['answer', 'a.png', 'b.PNG', 'What?'],
      None,
      "'b.PNG' is an image or a file, not a question; .* rows by --input ROWS.jsonl: {",
    ),
    (
      ['answer', 'PICTURES', 'What?', 'PICTURES'],
      None,
      "pictures' is an image or a file, not a question",
    ),
  ],
)
def test_invalid_inputs(stub, folder, tmp_path, capsys, arguments, text, message):
  paths = dict(ROWS=tmp_path / 'rows.jsonl', EMPTY=tmp_path / 'empty', PICTURES=folder)
  paths['EMPTY'].mkdir()
  if text is not None:
    paths['ROWS'].write_text(text)
  assert lavit(*[paths.get(argument, argument) for argument in arguments]) == 2
  with pytest.raises(UserError, match=message):
    raise UserError(capsys.readouterr().err.strip())
