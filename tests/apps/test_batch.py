"""Commands on many inputs: what is read, what is written, and that an interrupted run ends as one that was not."""

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
  """Tells of each row what it was given: the picture's first pixel, the text, the row's place, the options. Knows how often it was called.

  What it draws of a text that says 'bad' is flagged.
  """

  modules = types.SimpleNamespace(image_size=8)

  def __init__(self):
    self.calls = 0

  def caption(self, images, seed):
    self.calls += 1
    return [f'{image[0, 0, 0]} at {place}' for image, place in zip(images, seed.rows, strict=True)]

  def answer(self, images, questions, seed):
    if 'bad' in questions:
      raise InputError('the text is bad')
    return [f'{image[0, 0, 0]} {text}' for image, text in zip(images, questions, strict=True)]

  def generate_outputs(self, prompts, seed, guidance_scale, **options):
    self.calls += 1
    colours = [
      [place, len(text), guidance_scale + seed.seed]
      for text, place in zip(prompts, seed.rows, strict=True)
    ]
    return drawn(
      [np.full((8, 8, 3), colour, np.uint8) for colour in colours],
      ['bad' in text for text in prompts],
    )

  def synthesize_outputs(self, prompts, seed, **options):
    self.seen = prompts
    return drawn([np.full((8, 8, 3), place, np.uint8) for place in seed.rows])

  def reconstruct_outputs(self, images, seed, guidance_scale, **options):
    return drawn(images)


def drawn(pictures, flagged=None):
  return DecodedImages(np.stack(pictures), np.array(flagged or [False] * len(pictures)))


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
  """Twenty pictures at two depths, each of one grey, and what is none: notes, a hidden file, a text by a picture's name."""
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
  told = capsys.readouterr()
  even, odd = ([f'{i:02}.PNG' for i in range(first, 20, 2)] for first in (0, 1))
  names = [*even[:4], '07.jpg', *even[4:], *(f'deep/{name}' for name in odd)]
  expected = [
    f'{folder}/{name}: {int(pathlib.Path(name).stem)} at {i}'
    for i, name in enumerate(names)
    if name != '07.jpg'
  ]
  assert told.out.splitlines() == expected
  first, last = told.err.splitlines()
  assert first.startswith(f'lavit: {folder}/07.jpg: not an image')
  assert (
    last.startswith('lavit: error: 1 of 21 failed, the first: ') and '07.jpg: not an image' in last
  )
  assert lavit('caption', folder, '--json') == 2
  rows = lines(capsys.readouterr().out)
  assert [row['image'] for row in rows] == [f'{folder}/{name}' for name in names]
  assert [set(row) - {'image'} for row in rows] == [
    {'error'} if name == '07.jpg' else {'caption'} for name in names
  ]


def test_an_interrupted_run_ends_as_one_that_was_not(stub, folder, tmp_path, capsys):
  out = tmp_path / 'captions.jsonl'
  arguments = 'caption', folder, '--out', out
  assert lavit(*arguments) == 2
  whole = out.read_bytes()
  assert len(lines(whole.decode())) == 21
  for keep in (0, 3, 16, 20, 21):  # complete lines, and half of the next
    part = whole.splitlines(keepends=True)
    out.write_bytes(b''.join(part[:keep]) + (part[keep][:-9] if keep < 21 else b''))
    stub.calls = 0
    capsys.readouterr()
    assert lavit(*arguments) == 2
    assert out.read_bytes() == whole
    assert stub.calls == (2 if keep < 16 else 1 if keep < 21 else 0)
    told = capsys.readouterr()
    assert ('in ' + str(out) + ' already' in told.err) == (keep > 0) and len(
      told.out.splitlines()
    ) == 21 - keep - (keep < 5)
    assert '1 of 21 failed' in told.err


def test_several_files_are_as_a_folder(stub, folder, tmp_path, capsys):
  """One at fault is a line, the others go on, and what is drawn has a manifest."""
  files, out, drawn = (
    [folder / name for name in ('02.PNG', '07.jpg', '04.PNG')],
    tmp_path / 'captions.jsonl',
    tmp_path / 'drawn',
  )
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
  assert lavit('caption', *files, '--out', out) == 2 and out.read_bytes() == whole
  assert (
    lavit('caption', folder / '07.jpg', '--out', tmp_path / 'one') == 2
    and not (tmp_path / 'one').exists()
  )


def test_errors_of_pictures_that_are_gone_are_not_told(stub, folder, tmp_path, capsys):
  out = tmp_path / 'captions.jsonl'
  assert lavit('caption', folder, '--out', out) == 2
  (folder / '07.jpg').unlink()
  assert lavit('caption', folder, '--out', out) == 0 and len(lines(out.read_text())) == 21
  (folder / '08.jpg').write_text('words')
  capsys.readouterr()
  assert (
    lavit('caption', folder, '--out', out) == 2
    and '1 of 21 failed, the first: ' + str(folder / '08.jpg') in capsys.readouterr().err
  )


def test_urls_of_files(stub, folder, tmp_path):
  (tmp_path / 'rows').mkdir()
  url, rows = (folder / '04.PNG').as_uri(), tmp_path / 'rows' / 'rows.jsonl'
  rows.write_text(json.dumps(dict(image=url, parts=[url, 'on red'])))
  assert lavit('caption', '--input', rows, '--out', tmp_path / 'out') == 0
  assert lines((tmp_path / 'out').read_text())[0]['caption'] == '4 at 0'
  assert (
    lavit('synthesize', '--input', rows, '--out', tmp_path / 'drawn') == 0
    and stub.seen[0][0][0, 0, 0] == 4
  )


def test_rows_that_are_alike_are_counted(stub, folder, tmp_path, capsys):
  out = tmp_path / 'captions.jsonl'
  arguments = 'caption', folder / '04.PNG', folder / '04.PNG', '--out', out
  assert lavit(*arguments) == 0
  whole = out.read_text()
  assert [row['caption'] for row in lines(whole)] == ['4 at 0', '4 at 1']
  out.write_text(whole.splitlines(keepends=True)[0])
  assert lavit(*arguments) == 0 and out.read_text() == whole


def test_a_folder_that_has_grown(stub, folder, tmp_path):
  out = tmp_path / 'captions.jsonl'
  (folder / '07.jpg').unlink()
  assert lavit('caption', folder, '--out', out) == 0
  before = out.read_text()
  Image.new('RGB', (8, 8)).save(folder / '00a.png')
  assert lavit('caption', folder, '--out', out) == 0
  assert out.read_text().startswith(before)
  assert [pathlib.Path(row['image']).name for row in lines(out.read_text())[20:]] == ['00a.png']


def test_rows_travel_through(stub, folder, tmp_path, capsys):
  rows = [
    dict(id=i, image=f'pictures/{i:02}.PNG', question=f'q{i}', truth='ä') for i in (4, 2, 4)
  ] + [dict(image='nowhere.png', question='q')]
  (tmp_path / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n\n')
  out = tmp_path / 'answers.jsonl'
  assert (
    lavit('answer', '--input', tmp_path / 'rows.jsonl', '--json', '--out', out, '--seed', 5) == 2
  )
  told = lines(capsys.readouterr().out)
  assert told[:3] == [dict(row, answer=f'{row["id"]} q{row["id"]}') for row in rows[:3]]
  assert (
    told[3].keys() == {'image', 'question', 'error'}
    and 'nowhere.png: no such file' in told[3]['error']
  )
  settings = dict(command='answer', folder=os.path.realpath(cli.TINY), safety_checker=True, seed=5)
  assert lines(out.read_text()) == [dict(row, settings=settings) for row in told]


def test_a_text_at_fault_is_its_row(stub, folder, tmp_path, capsys):
  rows = [dict(image='pictures/04.PNG', question=question) for question in ('a', 'bad', 'b')]
  (tmp_path / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  assert lavit('answer', '--input', tmp_path / 'rows.jsonl', '--json') == 2
  told = capsys.readouterr()
  assert [row.get('answer') for row in lines(told.out)] == ['4 a', None, '4 b']
  assert '1 of 3 failed, the first: the text is bad' in told.err
  assert (
    lavit('answer', folder / '04.PNG', 'a', 'bad') == 2
  )  # on arguments, it is the error as ever
  assert capsys.readouterr().err == 'lavit: error: the text is bad\n'


def test_drawings_have_a_manifest(stub, tmp_path, capsys):
  (tmp_path / 'rows.jsonl').write_text(
    '\n'.join(json.dumps(dict(prompt='owl ' * (i % 3 + 1), id=i)) for i in range(18))
  )
  out = tmp_path / 'drawn'
  arguments = 'generate', '--input', tmp_path / 'rows.jsonl', '--out', out, '--guidance', 2
  assert lavit(*arguments) == 0
  names = [f'{i}-{"-".join(["owl"] * (i % 3 + 1))}.png' for i in range(18)]
  assert capsys.readouterr().out.splitlines() == [str(out / name) for name in names]
  manifest = lines((out / 'manifest.jsonl').read_text())
  assert [row['file'] for row in manifest] == names and [row['id'] for row in manifest] == list(
    range(18)
  )
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
  assert (
    stub.calls == 1
    and (out / 'manifest.jsonl').read_bytes() == whole
    and (out / names[17]).exists()
  )


def test_drawings_of_arguments_have_none(stub, folder, tmp_path, capsys):
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
  told = capsys.readouterr().out.splitlines()
  assert told[:3] == [f'{out}/0-an-owl.png', f'{out}/1-a-key.png', f'{out}/1-an-owl.png']
  assert json.loads(told[3]) == dict(image=f'{folder}/04.PNG', file=f'{out}/0-04.png')


def test_no_picture_is_replaced(stub, tmp_path, capsys):
  """By a row whose line was deleted, by one that is new, by a command beside the manifest; and a run that ended early has its own again."""
  rows, out = tmp_path / 'rows.jsonl', tmp_path / 'drawn'
  manifest, arguments = out / 'manifest.jsonl', ('generate', '--input', rows, '--out', out)

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
  again, whole = files(), manifest.read_bytes()
  assert (
    again.items() >= {name: data for name, data in first.items() if name != '3-owl.png'}.items()
    and len(again) == 5
  )
  capsys.readouterr()
  assert lavit('generate', 'owl', '--out', out, '--seed', 5) == 0
  assert capsys.readouterr().out == f'{out}/1-owl.png\n' and files().items() > again.items()
  manifest.write_bytes(b''.join(whole.splitlines(keepends=True)[:3]))
  assert lavit(*arguments) == 0 and manifest.read_bytes() == whole and len(files()) == 6


def test_flagged_pictures_are_in_the_manifest(stub, tmp_path, capsys, caplog):
  rows, out = (
    [dict(prompt='a bad owl' if i in (3, 19) else 'an owl') for i in range(21)],
    tmp_path / 'drawn',
  )
  (tmp_path / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  assert lavit('generate', '--input', tmp_path / 'rows.jsonl', '--out', out, '--json') == 0
  for told in (capsys.readouterr().out, (out / 'manifest.jsonl').read_text()):
    assert [row.get('flagged') for row in lines(told)] == [
      True if i in (3, 19) else None for i in range(21)
    ]
  logged = [record.getMessage().split(' was flagged')[0] for record in caplog.records]
  assert logged == ['3-a-bad-owl.png, of row 4 of 21,', '19-a-bad-owl.png, of row 20 of 21,']


def test_keys_that_only_other_tasks_have(stub, folder, tmp_path, capsys):
  """They travel through: of a caption what is drawn, of a drawing what is read."""
  rows, out = tmp_path / 'rows.jsonl', tmp_path / 'out'
  row = dict(image='pictures/04.PNG', file='x', picture='y', flagged=1, parts=3, prompt=[4])
  rows.write_text(json.dumps(row))
  assert lavit('caption', '--input', rows, '--out', out, '--json') == 0
  assert lines(capsys.readouterr().out) == [row | dict(caption='4 at 0')]
  assert lavit('caption', '--input', rows, '--out', out) == 0 and len(lines(out.read_text())) == 1
  del row['file'], row['flagged']
  rows.write_text(json.dumps(row))
  assert lavit('reconstruct', '--input', rows, '--out', tmp_path / 'drawn', '--json') == 0
  assert lines(capsys.readouterr().out) == [row | dict(file=str(tmp_path / 'drawn' / '0-04.png'))]


def test_names_that_are_no_text(stub, folder, tmp_path, capsys):
  os.rename(os.fsencode(folder / '04.PNG'), os.fsencode(folder) + b'/\xff.png')
  out, arguments = (
    tmp_path / 'captions.jsonl',
    ('caption', folder / os.fsdecode(b'\xff.png'), folder / '06.PNG'),
  )
  for encoding in ('utf-8', 'ascii'):
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding, 'strict')) as told:
      assert lavit(*arguments) == 0 and lavit(*arguments, '--json') == 0
    text, _, first, _ = told.buffer.getvalue().decode(encoding).splitlines()
    assert text.endswith('\\udcff.png: 4 at 0') and json.loads(first)['image'] == os.fspath(
      arguments[1]
    )
  assert lavit(*arguments, '--out', out) == 0
  whole = out.read_text('utf-8')
  out.write_text(whole.splitlines(keepends=True)[0])
  assert lavit(*arguments, '--out', out) == 0 and out.read_text() == whole


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
def test_half_a_character_is_its_row(stub, folder, tmp_path, capsys, command, row):
  good = dict(image='pictures/04.PNG', question='q', prompt='ä', parts=['pictures/04.PNG'])
  (tmp_path / 'rows.jsonl').write_text(row + '\n' + json.dumps(good))
  arguments = command, '--input', tmp_path / 'rows.jsonl', '--out', tmp_path / 'out'
  assert lavit(*arguments, '--json') == 2
  bad, other = lines(capsys.readouterr().out)
  assert 'is not a valid text or path' in bad['error'] and 'error' not in other
  assert lavit(*arguments) == 2 and '2 of 2 are in' in capsys.readouterr().err


def test_parts(stub, folder, tmp_path):
  (tmp_path / 'rows.jsonl').write_text(
    json.dumps(dict(parts=['pictures/04.PNG', 'on red', 'pictures/06.PNG']))
    + '\n'
    + json.dumps(dict(parts=['nowhere.png', 'on red']))
  )
  assert lavit('synthesize', '--input', tmp_path / 'rows.jsonl', '--out', tmp_path / 'drawn') == 2
  ((first, words, second),) = stub.seen
  assert (first[0, 0, 0], words, second[0, 0, 0]) == (4, 'on red', 6)
  assert lavit('synthesize', 'on red', folder / 'deep', '--out', tmp_path / 'each') == 0
  assert len(lines((tmp_path / 'each' / 'manifest.jsonl').read_text())) == 10 and {
    len(prompt) for prompt in stub.seen
  } == {2}
  assert lavit('reconstruct', folder / 'deep', '--out', folder / 'deep' / 'again') == 0
  assert (
    lavit('reconstruct', folder / 'deep', '--out', folder / 'deep' / 'again') == 0
  )  # what it drew is not drawn again
  assert len(list((folder / 'deep' / 'again').iterdir())) == 11


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
def test_inputs_that_are_none(stub, folder, tmp_path, capsys, arguments, text, message):
  places = dict(ROWS=tmp_path / 'rows.jsonl', EMPTY=tmp_path / 'empty', PICTURES=folder)
  places['EMPTY'].mkdir()
  if text is not None:
    places['ROWS'].write_text(text)
  assert lavit(*[places.get(argument, argument) for argument in arguments]) == 2
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
def test_files_that_are_no_results_are_left_alone(stub, folder, tmp_path, capsys, text):
  out = tmp_path / 'captions.jsonl'
  out.write_text(text, 'latin-1')
  assert lavit('caption', folder, '--out', out) == 2
  assert (
    'captions.jsonl:1 is not a result of this command; give --out another name'
    in capsys.readouterr().err
  )
  assert out.read_text('latin-1') == text


def test_a_run_goes_on_from_wherever_it_is_started(stub, folder, tmp_path, capsys, monkeypatch):
  out, checkpoint = tmp_path / 'captions.jsonl', tmp_path / 'checkpoint'
  checkpoint.mkdir()
  (tmp_path / 'link').symlink_to(checkpoint)
  monkeypatch.chdir(tmp_path)
  assert lavit('caption', folder / '04.PNG', '--out', out, '--folder', 'checkpoint') == 0
  whole = out.read_bytes()
  monkeypatch.chdir(folder)
  for spelled in ('../checkpoint/', checkpoint, tmp_path / 'link'):
    assert lavit('caption', folder / '04.PNG', '--out', out, '--folder', spelled) == 0
  assert out.read_bytes() == whole and stub.calls == 1
  assert lavit('caption', folder / '04.PNG', '--out', out, '--folder', 'checkpoint') == 2
  assert 'holds results of folder' in capsys.readouterr().err


def test_settings_of_the_writing_reach_the_model(stub, folder, tmp_path, monkeypatch):
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
  assert seen == [([0, 1, 2, 3, 4, 5], expected)]  # a row for each sample, with a key of its own
  results = lines(out.read_text())
  assert [pathlib.Path(row['image']).name for row in results] == ['04.PNG'] * 3 + ['06.PNG'] * 3
  assert results[0]['settings'].items() >= dict(recorded, samples=3).items()
  assert lavit('answer', folder / '04.PNG', 'What?', '--beams', 0) == 2
  assert lavit('generate', 'owl', '--samples', 2, '--out', tmp_path / 'drawn') == 0
  assert sorted(path.name for path in (tmp_path / 'drawn').iterdir()) == ['0-owl.png', '1-owl.png']


def test_results_that_are_others(stub, folder, tmp_path, capsys):
  out = tmp_path / 'captions.jsonl'
  lavit('caption', folder / '04.PNG', '--out', out)
  capsys.readouterr()
  assert lavit('caption', folder, '--out', out, '--seed', 1) == 2
  assert (
    'holds results of seed 0, not of seed 1; give --out another name' in capsys.readouterr().err
  )
  assert lavit('answer', folder / '04.PNG', 'q', '--out', out) == 2
  assert 'holds results of command "caption", not of command "answer"' in capsys.readouterr().err


@pytest.mark.slow
def test_a_row_is_drawn_alike_in_any_part_of_a_run(tiny_folder):
  """With the model itself: the seed's key of a row, and of the pictures in it, follow the row."""
  model = Lavit.from_pretrained(tiny_folder)
  pictures = RNG.integers(0, 256, (3, 64, 64, 3), np.uint8)
  part = IndexedSeed(4, [1, 2])
  np.testing.assert_array_equal(
    model.tokenize(pictures, seed=4).keep[1:], model.tokenize(pictures[1:], seed=part).keep
  )
  drawn = model.reconstruct(
    pictures, num_inference_steps=1, seed=4
  )  # batches of one shape, for others may round otherwise
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
