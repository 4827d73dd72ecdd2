"""A resumed run gives the same results, and replaces nothing that it did not write."""

import json
import pathlib

import pytest
from batch_runs import lavit, lines
from PIL import Image


def test_a_resumed_run_gives_the_same_results(stub, folder, tmp_path, capsys):
  out = tmp_path / 'captions.jsonl'
  arguments = 'caption', folder, '--out', out
  assert lavit(*arguments) == 2
  whole = out.read_bytes()
  assert len(lines(whole.decode())) == 21
  complete = whole.splitlines(keepends=True)
  for keep, calls, printed_lines in (
    (0, 2, 20),
    (3, 2, 17),
    (16, 1, 5),
    (20, 1, 1),
    (21, 0, 0),
  ):
    torn = complete[keep][:-9] if keep < 21 else b''
    out.write_bytes(b''.join(complete[:keep]) + torn)
    stub.calls = 0
    capsys.readouterr()
    assert lavit(*arguments) == 2
    assert out.read_bytes() == whole
    assert stub.calls == calls
    printed = capsys.readouterr()
    assert (f'in {out} already' in printed.err) == (keep > 0)
    assert len(printed.out.splitlines()) == printed_lines
    assert '1 of 21 failed' in printed.err


def test_errors_of_deleted_images_are_not_reported(stub, folder, tmp_path, capsys):
  out = tmp_path / 'captions.jsonl'
  assert lavit('caption', folder, '--out', out) == 2
  (folder / '07.jpg').unlink()
  assert lavit('caption', folder, '--out', out) == 0
  assert len(lines(out.read_text())) == 21
  (folder / '08.jpg').write_text('words')
  capsys.readouterr()
  assert lavit('caption', folder, '--out', out) == 2
  assert f'1 of 21 failed, the first: {folder / "08.jpg"}' in capsys.readouterr().err


def test_equal_rows_are_counted(stub, folder, tmp_path, capsys):
  out = tmp_path / 'captions.jsonl'
  arguments = 'caption', folder / '04.PNG', folder / '04.PNG', '--out', out
  assert lavit(*arguments) == 0
  whole = out.read_text()
  assert [row['caption'] for row in lines(whole)] == ['4 at 0', '4 at 1']
  out.write_text(whole.splitlines(keepends=True)[0])
  assert lavit(*arguments) == 0
  assert out.read_text() == whole


def test_a_folder_that_has_grown(stub, folder, tmp_path):
  out = tmp_path / 'captions.jsonl'
  (folder / '07.jpg').unlink()
  assert lavit('caption', folder, '--out', out) == 0
  before = out.read_text()
  Image.new('RGB', (8, 8)).save(folder / '00a.png')
  assert lavit('caption', folder, '--out', out) == 0
  assert out.read_text().startswith(before)
  assert [pathlib.Path(row['image']).name for row in lines(out.read_text())[20:]] == ['00a.png']


def test_no_image_is_replaced(stub, tmp_path, capsys):
  """Neither by a row whose line was deleted, nor by a new row, nor by a command on arguments.

  A resumed run writes its own images again.
  """
  rows = tmp_path / 'rows.jsonl'
  out = tmp_path / 'drawn'
  manifest = out / 'manifest.jsonl'
  arguments = ('generate', '--input', rows, '--out', out)

  def files():
    return {path.name: path.read_bytes() for path in out.glob('*.png')}

  rows.write_text('\n'.join(json.dumps(dict(prompt=text)) for text in ('owl', ' ', 'owl', 'owl')))
  assert lavit(*arguments) == 0
  first = files()
  assert sorted(first) == ['0-owl.png', '1-picture.png', '2-owl.png', '3-owl.png']
  head, _, *tail = manifest.read_text().splitlines(keepends=True)
  manifest.write_text(head + ''.join(tail))
  (out / '3-owl.png').unlink()  # its line still has the name
  with rows.open('a') as file:
    file.write('\n{"prompt": "owl"}')
  assert lavit(*arguments) == 0
  assert [row['file'] for row in lines(manifest.read_text())] == [
    '0-owl.png',
    '2-owl.png',
    '3-owl.png',
    '4-picture.png',
    '5-owl.png',
  ]
  second = files()
  whole = manifest.read_bytes()
  del first['3-owl.png']
  assert second.items() >= first.items()
  assert len(second) == 5
  capsys.readouterr()
  assert lavit('generate', 'owl', '--out', out, '--seed', 5) == 0
  assert capsys.readouterr().out == f'{out}/1-owl.png\n'
  assert files().items() > second.items()
  manifest.write_bytes(b''.join(whole.splitlines(keepends=True)[:3]))
  assert lavit(*arguments) == 0
  assert manifest.read_bytes() == whole
  assert len(files()) == 6


def test_results_inside_the_input_folder_are_not_inputs(stub, folder):
  out = folder / 'deep' / 'again'
  assert lavit('reconstruct', folder / 'deep', '--out', out) == 0
  assert lavit('reconstruct', folder / 'deep', '--out', out) == 0
  assert len(list(out.iterdir())) == 11


@pytest.mark.parametrize(
  'text',
  [
    'my notes\n',
    'my notes',
    '{"my": "precious"}',
    '{"my": "precious',
    '{"settings": "x"}\n',
    '{"settings": [["x", 1]]}\n',
    '{"settings": 3}\n',
    '{"my": 1, "settings": {"seed": 1}}',
    '["settings"]\n',
    '"settings"\n',
    '\xff\n',
  ],
)
def test_other_files_are_left_unchanged(stub, folder, tmp_path, capsys, text):
  out = tmp_path / 'captions.jsonl'
  out.write_text(text, 'latin-1')
  assert lavit('caption', folder, '--out', out) == 2
  error = capsys.readouterr().err
  assert 'captions.jsonl:1 is not a result of this command; give --out another name' in error
  assert out.read_text('latin-1') == text


def test_a_run_is_resumed_from_another_folder(stub, folder, tmp_path, capsys, monkeypatch):
  out = tmp_path / 'captions.jsonl'
  checkpoint = tmp_path / 'checkpoint'
  checkpoint.mkdir()
  (tmp_path / 'link').symlink_to(checkpoint)
  monkeypatch.chdir(tmp_path)
  assert lavit('caption', folder / '04.PNG', '--out', out, '--folder', 'checkpoint') == 0
  whole = out.read_bytes()
  monkeypatch.chdir(folder)
  for path in ('../checkpoint/', checkpoint, tmp_path / 'link'):
    assert lavit('caption', folder / '04.PNG', '--out', out, '--folder', path) == 0
  assert out.read_bytes() == whole
  assert stub.calls == 1
  assert lavit('caption', folder / '04.PNG', '--out', out, '--folder', 'checkpoint') == 2
  assert 'holds results of folder' in capsys.readouterr().err


def test_an_address_in_a_store_is_no_local_path(stub, folder, tmp_path, monkeypatch):
  """Results name the checkpoint's address, and so go on from another folder."""
  out = tmp_path / 'captions.jsonl'
  arguments = 'caption', folder / '00.PNG', '--folder', 'gs://bucket/model', '--out', out
  assert lavit(*arguments) == 0
  assert lines(out.read_text())[0]['settings']['folder'] == 'gs://bucket/model'
  monkeypatch.chdir(folder)
  assert lavit(*arguments) == 0


def test_results_of_other_settings(stub, folder, tmp_path, capsys):
  out = tmp_path / 'captions.jsonl'
  lavit('caption', folder / '04.PNG', '--out', out)
  capsys.readouterr()
  assert lavit('caption', folder, '--out', out, '--seed', 1) == 2
  error = capsys.readouterr().err
  assert 'holds results of seed 0, not of seed 1; give --out another name' in error
  assert lavit('answer', folder / '04.PNG', 'q', '--out', out) == 2
  assert 'holds results of command "caption", not of command "answer"' in capsys.readouterr().err
