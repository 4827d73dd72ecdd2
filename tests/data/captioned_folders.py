"""Folders of images with NAMES, whose captions are SENTENCES."""

import csv
import io

from numbered_images import image_file

from lavit_jax.data import formats

NAMES = ['0.png', '1.png', '2.png']
SENTENCES = ['a dog, a cat, and a bee', 'an owl', 'the "best" pie']


def read(folder, image=None, text=(), **options) -> dict[str, tuple[str, ...]]:
  """Returns the texts by name, and checks that each record has its own image."""
  records = formats.Folder(str(folder), image, text, **options)
  texts = {}
  for i in range(len(records)):
    record = records.read(i)
    name = record.origin.removeprefix(f'{folder}/')
    assert record.image == image_file(NAMES.index(name))
    texts[name] = record.texts
  return texts


def pairs_of(captions) -> dict[str, tuple[str, ...]]:
  return {name: (text,) for name, text in zip(NAMES, captions)}


def table(captions, **options) -> str:
  file = io.StringIO()
  writer = csv.writer(file, **options)
  writer.writerows([('file_name', 'text'), *zip(NAMES, captions)])
  return file.getvalue()


ROWS = [dict(file_name=name, text=text) for name, text in zip(NAMES, SENTENCES)]
