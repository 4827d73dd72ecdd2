"""Commands on many inputs: inputs, results, and that a resumed run gives the same results."""

import contextlib
import io
import json
import os
import pathlib
import types

import numpy as np
import pytest
from PIL import Image

from lavit_jax import cli
from lavit_jax.errors import InputError, UserError
from lavit_jax.inference.outputs import DecodedImages
from lavit_jax.inference.pipeline import Lavit
from lavit_jax.inference.rng import IndexedSeed

RNG = np.random.default_rng(0)


class Stub:
  """A model that answers with its inputs: an image's first pixel, the text, the index of the row.

  It counts its calls. An image generated from a text with 'bad' is flagged.
  """

  modules = types.SimpleNamespace(image_size=8)

  def __init__(self):
    self.calls = 0

  def caption(self, images, seed):
    self.calls += 1
    return [f'{image[0, 0, 0]} at {index}' for image, index in zip(images, seed.rows, strict=True)]

  def answer(self, images, questions, seed):
    if 'bad' in questions:
      raise InputError('the text is bad')
    return [f'{image[0, 0, 0]} {text}' for image, text in zip(images, questions, strict=True)]

  def generate_outputs(self, prompts, seed, guidance_scale, **options):
    self.calls += 1
    images = []
    for text, index in zip(prompts, seed.rows, strict=True):
      color = [index, len(text), guidance_scale + seed.seed]
      images.append(np.full((8, 8, 3), color, np.uint8))
    return decoded(images, ['bad' in text for text in prompts])

  def synthesize_outputs(self, prompts, seed, **options):
    self.seen = prompts
    return decoded([np.full((8, 8, 3), index, np.uint8) for index in seed.rows])

  def reconstruct_outputs(self, images, seed, guidance_scale, **options):
    return decoded(images)


def decoded(images, flagged=None):
  return DecodedImages(np.stack(images), np.array(flagged or [False] * len(images)))


@pytest.fixture
def stub(monkeypatch):
  stub = Stub()
  monkeypatch.setattr(cli.options, 'load_model', lambda args: stub)
  return stub


def lavit(*arguments):
  return cli.main([str(argument) for argument in arguments])


def lines(text):
  return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def folder(tmp_path):
  """Twenty gray images at two depths; notes, a hidden file, and a text named like an image."""
  folder = tmp_path / 'pictures'
  (folder / 'deep').mkdir(parents=True)
  for i in range(20):
    Image.new('RGB', (8, 8), (i, i, i)).save(folder / ('deep' if i % 2 else '') / f'{i:02}.PNG')
  (folder / '07.jpg').write_text('words')
  (folder / 'notes.txt').write_text('words')
  (folder / '.hidden.png').write_text('words')
  return folder


def test_a_folder(stub, folder, capsys):
  assert lavit('caption', folder) == 2
  printed = capsys.readouterr()
  even = [f'{i:02}.PNG' for i in range(0, 20, 2)]
  odd = [f'deep/{i:02}.PNG' for i in range(1, 20, 2)]
  names = [*even[:4], '07.jpg', *even[4:], *odd]
  expected = []
  for i, name in enumerate(names):
    if name != '07.jpg':
      expected.append(f'{folder}/{name}: {int(pathlib.Path(name).stem)} at {i}')
  assert printed.out.splitlines() == expected
  first, last = printed.err.splitlines()
  assert first.startswith(f'lavit: {folder}/07.jpg: not an image')
  assert last.startswith('lavit: error: 1 of 21 failed, the first: ')
  assert '07.jpg: not an image' in last
  assert lavit('caption', folder, '--json') == 2
  rows = lines(capsys.readouterr().out)
  assert [row['image'] for row in rows] == [f'{folder}/{name}' for name in names]
  assert [set(row) - {'image'} for row in rows] == [
    {'error'} if name == '07.jpg' else {'caption'} for name in names
  ]


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


def test_several_files_behave_like_a_folder(stub, folder, tmp_path, capsys):
  """A file with an error has a line, the others go on, and generated images have a manifest."""
  files = [folder / name for name in ('02.PNG', '07.jpg', '04.PNG')]
  out = tmp_path / 'captions.jsonl'
  drawn = tmp_path / 'drawn'
  assert lavit('caption', *files, '--out', out) == 2
  assert [row.get('caption') for row in lines(out.read_text())] == ['2 at 0', None, '4 at 2']
  assert '1 of 3 failed, the first: ' in capsys.readouterr().err
  assert lavit('reconstruct', *files, '--out', drawn) == 2
  assert [row.get('file') for row in lines((drawn / 'manifest.jsonl').read_text())] == [
    '0-02.png',
    None,
    '2-04.png',
  ]
  whole = out.read_bytes()
  out.write_bytes(b''.join(whole.splitlines(keepends=True)[:2]))
  assert lavit('caption', *files, '--out', out) == 2
  assert out.read_bytes() == whole
  assert lavit('caption', folder / '07.jpg', '--out', tmp_path / 'one') == 2
  assert not (tmp_path / 'one').exists()


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


def test_urls_of_files(stub, folder, tmp_path):
  (tmp_path / 'rows').mkdir()
  url = (folder / '04.PNG').as_uri()
  rows = tmp_path / 'rows' / 'rows.jsonl'
  rows.write_text(json.dumps(dict(image=url, parts=[url, 'on red'])))
  assert lavit('caption', '--input', rows, '--out', tmp_path / 'out') == 0
  assert lines((tmp_path / 'out').read_text())[0]['caption'] == '4 at 0'
  assert lavit('synthesize', '--input', rows, '--out', tmp_path / 'drawn') == 0
  assert stub.seen[0][0][0, 0, 0] == 4


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


def test_results_have_the_keys_of_their_rows(stub, folder, tmp_path, capsys):
  rows = []
  for i in (4, 2, 4):
    rows.append(dict(id=i, image=f'pictures/{i:02}.PNG', question=f'q{i}', truth='ä'))
  rows.append(dict(image='nowhere.png', question='q'))
  (tmp_path / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n\n')
  out = tmp_path / 'answers.jsonl'
  arguments = ('answer', '--input', tmp_path / 'rows.jsonl', '--json', '--out', out, '--seed', 5)
  assert lavit(*arguments) == 2
  printed = lines(capsys.readouterr().out)
  assert printed[:3] == [dict(row, answer=f'{row["id"]} q{row["id"]}') for row in rows[:3]]
  assert printed[3].keys() == {'image', 'question', 'error'}
  assert 'nowhere.png: no such file' in printed[3]['error']
  settings = dict(command='answer', folder=os.path.realpath(cli.TINY), safety_checker=True, seed=5)
  assert lines(out.read_text()) == [dict(row, settings=settings) for row in printed]


def test_a_text_with_an_error_has_a_line(stub, folder, tmp_path, capsys):
  rows = [dict(image='pictures/04.PNG', question=question) for question in ('a', 'bad', 'b')]
  (tmp_path / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  assert lavit('answer', '--input', tmp_path / 'rows.jsonl', '--json') == 2
  printed = capsys.readouterr()
  assert [row.get('answer') for row in lines(printed.out)] == ['4 a', None, '4 b']
  assert '1 of 3 failed, the first: the text is bad' in printed.err
  assert lavit('answer', folder / '04.PNG', 'a', 'bad') == 2  # of arguments, it ends the run
  assert capsys.readouterr().err == 'lavit: error: the text is bad\n'


def test_generated_images_have_a_manifest(stub, tmp_path, capsys):
  rows = [dict(prompt='owl ' * (i % 3 + 1), id=i) for i in range(18)]
  (tmp_path / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  out = tmp_path / 'drawn'
  arguments = 'generate', '--input', tmp_path / 'rows.jsonl', '--out', out, '--guidance', 2
  assert lavit(*arguments) == 0
  names = [f'{i}-{"-".join(["owl"] * (i % 3 + 1))}.png' for i in range(18)]
  assert capsys.readouterr().out.splitlines() == [str(out / name) for name in names]
  manifest = lines((out / 'manifest.jsonl').read_text())
  assert [row['file'] for row in manifest] == names
  assert [row['id'] for row in manifest] == list(range(18))
  assert manifest[0]['settings'] == dict(
    command='generate',
    folder=os.path.realpath(cli.TINY),
    safety_checker=True,
    seed=0,
    sampler='ddim',
    rescale=0.0,
    guidance=2.0,
    top_k=50,
    temperature=1.0,
    negative='',
    strength=0.8,
  )
  pixels = [np.asarray(Image.open(out / name))[0, 0].tolist() for name in names]
  assert pixels == [[i, 4 * (i % 3 + 1), 2] for i in range(18)]
  whole = (out / 'manifest.jsonl').read_bytes()
  (out / 'manifest.jsonl').write_bytes(b''.join(whole.splitlines(keepends=True)[:17]))
  (out / names[17]).unlink()
  stub.calls = 0
  assert lavit(*arguments) == 0
  assert stub.calls == 1
  assert (out / 'manifest.jsonl').read_bytes() == whole
  assert (out / names[17]).exists()


def test_images_of_arguments_have_no_manifest(stub, folder, tmp_path, capsys):
  out = tmp_path / 'drawn'
  assert lavit('generate', 'An owl', 'a key', '--out', out) == 0
  assert lavit('generate', 'An owl', '--out', out, '--seed', 1) == 0
  assert lavit('reconstruct', folder / '04.PNG', '--out', out, '--json') == 0
  assert sorted(path.name for path in out.iterdir()) == [
    '0-04.png',
    '0-an-owl.png',
    '1-a-key.png',
    '1-an-owl.png',
  ]
  printed = capsys.readouterr().out.splitlines()
  assert printed[:3] == [f'{out}/0-an-owl.png', f'{out}/1-a-key.png', f'{out}/1-an-owl.png']
  assert json.loads(printed[3]) == dict(image=f'{folder}/04.PNG', file=f'{out}/0-04.png')


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


def test_flagged_images_are_in_the_manifest(stub, tmp_path, capsys, caplog):
  rows = [dict(prompt='a bad owl' if i in (3, 19) else 'an owl') for i in range(21)]
  out = tmp_path / 'drawn'
  (tmp_path / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  assert lavit('generate', '--input', tmp_path / 'rows.jsonl', '--out', out, '--json') == 0
  expected = [True if i in (3, 19) else None for i in range(21)]
  for results in (capsys.readouterr().out, (out / 'manifest.jsonl').read_text()):
    assert [result.get('flagged') for result in lines(results)] == expected
  logged = [record.getMessage().split(' was flagged')[0] for record in caplog.records]
  assert logged == ['3-a-bad-owl.png, of row 4 of 21,', '19-a-bad-owl.png, of row 20 of 21,']


def test_keys_of_other_tasks_are_kept(stub, folder, tmp_path, capsys):
  rows = tmp_path / 'rows.jsonl'
  out = tmp_path / 'out'
  row = dict(image='pictures/04.PNG', file='x', picture='y', flagged=1, parts=3, prompt=[4])
  rows.write_text(json.dumps(row))
  assert lavit('caption', '--input', rows, '--out', out, '--json') == 0
  assert lines(capsys.readouterr().out) == [row | dict(caption='4 at 0')]
  assert lavit('caption', '--input', rows, '--out', out) == 0
  assert len(lines(out.read_text())) == 1
  del row['file'], row['flagged']
  rows.write_text(json.dumps(row))
  assert lavit('reconstruct', '--input', rows, '--out', tmp_path / 'drawn', '--json') == 0
  assert lines(capsys.readouterr().out) == [row | dict(file=str(tmp_path / 'drawn' / '0-04.png'))]


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


def test_parts(stub, folder, tmp_path):
  rows = [
    dict(parts=['pictures/04.PNG', 'on red', 'pictures/06.PNG']),
    dict(parts=['nowhere.png', 'on red']),
  ]
  (tmp_path / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  assert lavit('synthesize', '--input', tmp_path / 'rows.jsonl', '--out', tmp_path / 'drawn') == 2
  ((first, text, second),) = stub.seen
  assert (first[0, 0, 0], text, second[0, 0, 0]) == (4, 'on red', 6)
  assert lavit('synthesize', 'on red', folder / 'deep', '--out', tmp_path / 'each') == 0
  assert len(lines((tmp_path / 'each' / 'manifest.jsonl').read_text())) == 10
  assert {len(prompt) for prompt in stub.seen} == {2}


def test_results_inside_the_input_folder_are_not_inputs(stub, folder):
  out = folder / 'deep' / 'again'
  assert lavit('reconstruct', folder / 'deep', '--out', out) == 0
  assert lavit('reconstruct', folder / 'deep', '--out', out) == 0
  assert len(list(out.iterdir())) == 11


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


def test_generation_options_reach_the_model(stub, folder, tmp_path, monkeypatch):
  seen = []
  monkeypatch.setattr(
    stub,
    'caption',
    lambda images, seed, **options: seen.append((seed.rows, options)) or ['owl'] * len(images),
  )
  out = tmp_path / 'captions.jsonl'
  options = (
    '--sample',
    '--top-p',
    0.9,
    '--temperature',
    2,
    '--max-tokens',
    5,
    '--prompt',
    'a',
    '--repetition-penalty',
    1.5,
    '--samples',
    3,
  )
  assert lavit('caption', folder / '04.PNG', folder / '06.PNG', *options, '--out', out) == 0
  expected = dict(
    do_sample=True, top_p=0.9, temperature=2.0, max_new_tokens=5, prompt='a', repetition_penalty=1.5
  )
  recorded = dict(  # result files keep their older names
    sample=True, top_p=0.9, temperature=2.0, max_tokens=5, prompt='a', repetition_penalty=1.5
  )
  assert seen == [([0, 1, 2, 3, 4, 5], expected)]  # each sample has an index of its own
  results = lines(out.read_text())
  assert [pathlib.Path(row['image']).name for row in results] == ['04.PNG'] * 3 + ['06.PNG'] * 3
  assert results[0]['settings'].items() >= dict(recorded, samples=3).items()
  assert lavit('answer', folder / '04.PNG', 'What?', '--beams', 0) == 2
  assert lavit('generate', 'owl', '--samples', 2, '--out', tmp_path / 'drawn') == 0
  assert sorted(path.name for path in (tmp_path / 'drawn').iterdir()) == ['0-owl.png', '1-owl.png']


def test_results_of_other_settings(stub, folder, tmp_path, capsys):
  out = tmp_path / 'captions.jsonl'
  lavit('caption', folder / '04.PNG', '--out', out)
  capsys.readouterr()
  assert lavit('caption', folder, '--out', out, '--seed', 1) == 2
  error = capsys.readouterr().err
  assert 'holds results of seed 0, not of seed 1; give --out another name' in error
  assert lavit('answer', folder / '04.PNG', 'q', '--out', out) == 2
  assert 'holds results of command "caption", not of command "answer"' in capsys.readouterr().err


@pytest.mark.slow
def test_a_row_has_the_same_result_in_any_block(tiny_folder):
  """With a real model: the keys of a row, and of the images in it, depend on its index alone."""
  model = Lavit.from_pretrained(tiny_folder)
  pictures = RNG.integers(0, 256, (3, 64, 64, 3), np.uint8)
  part = IndexedSeed(4, [1, 2])
  np.testing.assert_array_equal(
    model.tokenize(pictures, seed=4).keep[1:], model.tokenize(pictures[1:], seed=part).keep
  )
  # The batches have one shape, since other shapes may round differently.
  drawn = model.reconstruct(pictures, num_inference_steps=1, seed=4)
  np.testing.assert_array_equal(
    drawn[[2, 0, 1]],
    model.reconstruct(pictures[[2, 0, 1]], num_inference_steps=1, seed=IndexedSeed(4, [2, 0, 1])),
  )
  prompts = [[pictures[0], 'a'], [pictures[1], pictures[2]], [pictures[2], 'b']]
  whole = model.sample_codes(prompts, seed=IndexedSeed(4, [0, 1, 2]))
  for ours, again in zip(whole[1:], model.sample_codes(prompts[1:], seed=part), strict=True):
    np.testing.assert_array_equal(ours, again)
  for ours, again in zip(whole, model.sample_codes(prompts, seed=4), strict=True):
    np.testing.assert_array_equal(ours, again)
