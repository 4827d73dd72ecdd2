"""Commands on many inputs: inputs, results, and that a resumed run gives the same results."""

import json
import os
import pathlib

import numpy as np
import pytest
from batch_runs import lavit, lines
from PIL import Image

from lavit_jax import cli
from lavit_jax.inference.pipeline import Lavit
from lavit_jax.inference.rng import IndexedSeed

RNG = np.random.default_rng(0)


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


def test_urls_of_files(stub, folder, tmp_path):
  (tmp_path / 'rows').mkdir()
  url = (folder / '04.PNG').as_uri()
  rows = tmp_path / 'rows' / 'rows.jsonl'
  rows.write_text(json.dumps(dict(image=url, parts=[url, 'on red'])))
  assert lavit('caption', '--input', rows, '--out', tmp_path / 'out') == 0
  assert lines((tmp_path / 'out').read_text())[0]['caption'] == '4 at 0'
  assert lavit('synthesize', '--input', rows, '--out', tmp_path / 'drawn') == 0
  assert stub.seen[0][0][0, 0, 0] == 4


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


@pytest.mark.slow
def test_a_row_has_the_same_result_in_any_block(shallow_folder):
  """With a real model: the keys of a row, and of the images in it, depend on its index alone."""
  model = Lavit.from_pretrained(shallow_folder)
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
