"""The tasks of the page of `lavit app`, sizes, wrong uploads and other invalid inputs."""

import asyncio
import base64
import io
import pathlib
import re
import types

import numpy as np
import pytest
from PIL import Image
from web_stub import IDS, IMAGE, KEEP, Params, Stub, upload

pytest.importorskip(
  'gradio', reason="the page needs Gradio; pip install -e '.[app]' -c launch/constraints.txt"
)

import gradio as gr

from lavit_jax.apps import web
from lavit_jax.errors import UserError
from lavit_jax.inference import image_decoder


def images_in(text):
  images = []
  for data in re.findall('base64,([^"]+)', text):
    images.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))))
  return images


def test_tokens_are_shown_in_order(tasks):
  caption, shown = tasks.caption(IMAGE)
  image = Image.open(IMAGE).convert('RGB')
  assert caption == f'red {image.getpixel((0, 0))[0]}'
  overlay, *patches = images_in(shown)
  corners = [(8 * (i % 8), 8 * (i // 8)) for i in range(64)]
  crops = [np.asarray(image.crop((x, y, x + 8, y + 8))) for x, y in corners]
  for patch, i in zip(patches, np.flatnonzero(KEEP), strict=True):
    np.testing.assert_array_equal(patch, crops[i])
  for i, (x, y) in enumerate(corners):
    assert np.array_equal(overlay[y : y + 8, x : x + 8], crops[i]) == KEEP[i]
  assert [int(code) for code in re.findall(r'>(\d+)</b>', shown)] == IDS.tolist()
  assert f'{KEEP.sum()} of 64 patches' in shown


def test_similar_codes_have_similar_colors(tasks):
  vectors = np.random.default_rng(1).normal(size=(50, 8))
  vectors[7] = vectors[3] + 1e-4
  tasks.model.modules = types.SimpleNamespace(
    **vars(Stub.modules) | dict(tokenizer=types.SimpleNamespace(apply=lambda *_, **__: vectors))
  )
  colors = np.array([re.findall(r'\d+', color) for color in tasks.code_colors], int)
  assert colors.shape == (50, 3)
  assert colors.min() >= 0
  assert colors.max() < 256
  assert colors.std(0).min() > 10
  assert abs(colors[7] - colors[3]).max() <= 1
  assert abs(colors[7] - np.delete(colors, [3, 7], 0)).sum(-1).min() > 1


def test_drawing(tasks):
  image, shown = tasks.draw(' an owl ', 3, 4.5, 7)
  assert image.shape == (64, 64, 3)
  assert image[0, 0, 0] == 7
  assert shown.count('<li>') == 5
  tasks.mix(dict(files=[IMAGE, IMAGE], text=' '), 0, 5, 7)
  tasks.mix(dict(files=[IMAGE], text='on red'), 0, 5, 7)
  (text, guidance, seed), (two, *_), (mixed, *_) = tasks.model.seen
  assert (text, guidance, seed) == ([['an owl']], 4.5, 3)
  assert [part.shape for part in two[0]] == [(64, 64, 3)] * 2
  assert mixed[0][1:] == ['on red']
  image, shown = tasks.rebuild(IMAGE, 0, 5, 7)
  np.testing.assert_array_equal(image, np.asarray(Image.open(IMAGE).convert('RGB')))


def test_texts_keep_their_order(tasks):
  tasks.mix(dict(files=[IMAGE, IMAGE], text='on red'), 0, 5, 7, None, ' an owl and ')
  (prompt,), *_ = tasks.model.seen[0]
  assert [part if isinstance(part, str) else part.shape for part in prompt] == [
    'an owl and',
    (64, 64, 3),
    (64, 64, 3),
    'on red',
  ]


def test_sizes_are_those_of_the_checkpoint(tasks, monkeypatch):
  assert tasks.sizes() == ['512x512']
  assert tasks.defaults('512x512') == (50, 5.0)
  with pytest.raises(UserError, match='1024x1024 needs highres_decoder'):
    tasks.draw('owl', 0, 4, 7, '1024x1024')
  assert not tasks.model.seen
  monkeypatch.setattr(Stub, 'params', Params(dict.fromkeys(image_decoder.HIGHRES.modules)))
  assert tasks.sizes()[:3] == ['512x512', '1024x1024', '896x1152']
  assert len(tasks.sizes()) == 7
  assert tasks.defaults('896x1152') == (25, 7.0)
  tasks.draw('owl', 0, 4, 7, '896x1152')
  assert tasks.model.size == (896, 1152)
  with pytest.raises(UserError, match="'big' is not a size"):
    tasks.draw('owl', 0, 4, 7, 'big')
  monkeypatch.setattr(
    Stub, 'modules', types.SimpleNamespace(**vars(Stub.modules) | dict(variant='tiny'))
  )
  assert tasks.defaults('512x512') == (25, 5.0)

  def sliders(page):
    values = []
    for component in page.get_config_file()['components']:
      if component['type'] in ('slider', 'dropdown'):
        props = component['props']
        values.append((props['label'], props['value'], props['visible']))
    return values[:3]

  assert sliders(web.build(tasks)) == [
    ('Guidance', 4.0, True),
    ('Steps', 25, True),
    ('Size', '512x512', True),
  ]
  monkeypatch.setattr(
    Stub, 'modules', types.SimpleNamespace(**vars(Stub.modules) | dict(variant='stub'))
  )
  page = web.build(tasks)
  updates = []
  for event in page.fns.values():
    is_private = event.api_visibility == 'private'
    if is_private and [component.label for component in event.inputs] == ['Size']:
      updates.append(asyncio.run(page.process_api(event, ['896x1152']))['data'])
  assert updates == [[25], [25], [25, 7.0]]  # of Generate, Mix, Reconstruct
  monkeypatch.setattr(Stub, 'params', {})
  assert sliders(web.build(tasks))[2] == ('Size', '512x512', False)


def test_wrong_steps_are_reported_before_the_model_runs(tasks):
  for call in (
    lambda: tasks.draw('owl', 0, 4, 0),
    lambda: tasks.mix(dict(files=[IMAGE], text='owl'), 0, 4, 2000),
  ):
    with pytest.raises(UserError, match='steps=0 is not allowed|steps=2000 must be in'):
      call()
  assert not tasks.model.seen


def test_a_flagged_image_is_not_shown(tasks):
  for call in (lambda: tasks.draw('owl', 0, 4, 66), lambda: tasks.rebuild(IMAGE, 0, 5, 66)):
    with pytest.raises(UserError, match='the safety checker flagged this image'):
      call()


@pytest.mark.parametrize(
  'data, message',
  [
    (b'words', '^upload.png: not an image that Pillow can read'),
    (b'', '^upload.png: the file is empty'),
    (pathlib.Path(IMAGE).read_bytes()[:300], '^upload.png: .*truncated'),
  ],
)
def test_uploads_that_are_not_images(tasks, tmp_path, data, message):
  for call in (
    tasks.caption,
    lambda path: tasks.mix(dict(files=[IMAGE, path]), 0, 5, 2),
    lambda path: tasks.rebuild(path, 0, 5, 2),
  ):
    with pytest.raises(UserError, match=message):
      call(upload(tmp_path, data))


def test_the_size_of_an_upload_is_checked_before_it_is_read(tasks, tmp_path, monkeypatch):
  monkeypatch.setattr(web.tasks, 'read_image', lambda *_: pytest.fail('decoded'))
  buffer = io.BytesIO()
  Image.new('1', (8000, 6250)).save(buffer, 'PNG')
  with pytest.raises(
    UserError, match='upload.png is 8000 x 6250, 50 million pixels; scale it below 40 million'
  ):
    tasks.caption(upload(tmp_path, buffer.getvalue()))
  path = upload(tmp_path, b'')
  with open(path, 'ab') as file:
    file.truncate(web.MAX_BYTES + 2**20)
  with pytest.raises(UserError, match='upload.png has 21 MB; make it smaller than 20 MB'):
    tasks.caption(path)


def test_a_deleted_upload(tasks, tmp_path):
  for call in (tasks.caption, lambda path: tasks.mix(dict(files=[path]), 0, 5, 2)):
    with pytest.raises(
      UserError, match='^cat.png was uploaded too long ago and is deleted; upload it again'
    ):
      call(str(tmp_path / 'cat.png'))


@pytest.mark.parametrize(
  'call, message',
  [
    (lambda t: t.caption(None), 'no image yet'),
    (lambda t: t.ask(IMAGE, ' '), 'the text is empty; ask something'),
    (lambda t: t.draw(None, 0, 4, 2), 'the text is empty; describe an image'),
    (lambda t: t.draw('owl ' * 200, 0, 4, 2), 'the text has 799 characters; shorten it to 500'),
    (lambda t: t.draw('owl', -1, 4, 2), 'seed is a whole number'),
    (lambda t: t.draw('owl', None, 4, 2), 'seed is a whole number'),
    (lambda t: t.mix(None, 0, 4, 2), 'no image; add one'),
    (
      lambda t: t.mix(dict(files=[IMAGE] * 5, text=''), 0, 4, 2),
      '5 images are too many; leave at most 4',
    ),
  ],
)
def test_invalid_inputs(tasks, call, message):
  with pytest.raises(UserError, match=message):
    call(tasks)


def test_errors_are_shown_without_internals(tasks, caplog):
  with pytest.raises(gr.Error) as error:
    web.report_errors(tasks.ask)('<i>.png', 'a')
  with pytest.raises(gr.Error) as error:
    web.report_errors(tasks.draw)('owl', -1, 4, 2)
  assert (
    error.value.message == 'the seed is a whole number from 0 up to four billion; choose another.'
  )
  with pytest.raises(gr.Error) as error:
    web.report_errors(tasks.ask)(IMAGE, 'fail')
  assert 'log of the server' in error.value.message
  assert 'secret' not in error.value.message
  assert 'secret.py' in caplog.text
