"""Images of one color that encode their number, with captions that name it, in each format."""

import io
import itertools
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow_datasets as tfds
from PIL import Image

from lavit_jax.data import array_record, formats, loader, text

SIZE = 8
FOLDER = str(Path(text.__file__).parent.parent / 'assets/tiny/language_model')
TOKENS = text.TextTokenizer.load(FOLDER)


def image_file(i: int) -> bytes:
  """A PNG of one color, which encodes its number."""
  out = io.BytesIO()
  Image.new('RGB', (SIZE, SIZE), (i % 256, i // 256, 7)).save(out, 'PNG')
  return out.getvalue()


def number(image) -> int:
  assert (image == image[0, 0]).all() and image[0, 0, 2] == 7
  return int(image[0, 0, 0]) + 256 * int(image[0, 0, 1])


def read_numbers(iterator, count: int) -> list[int]:
  """The numbers of all images in `count` batches."""
  numbers = []
  for _ in range(count):
    numbers += [number(image) for image in next(iterator)['image']]
  return numbers


def caption(i: int) -> str:
  return f'thing number {i}'


def write_tar(path, samples, **options):
  """Writes samples, (key, {extension: bytes}) pairs."""
  with tarfile.open(path, 'w', **options) as tar:
    for key, members in samples:
      for extension, content in members.items():
        info = tarfile.TarInfo(f'{key}.{extension}')
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))


def sample(i: int) -> tuple[str, dict[str, bytes]]:
  texts = {'caption': caption(i), 'again': f'again {i}'}
  members = {
    'png': image_file(i),
    'txt': caption(i).encode(),
    'json': json.dumps(texts).encode(),
    'npy': b'\x93\xff',
  }
  return f'{i:09d}', members


def write_tars(folder, count=24, tars=4):
  size = count // tars
  for t in range(tars):
    write_tar(folder / f'{t:05d}.tar', [sample(i) for i in range(t * size, (t + 1) * size)])
  return dict(format='tars', path=f'{folder}/{{00000..{tars - 1:05d}}}.tar', window=5)


def write_parquet(folder, count=24):
  half = count // 2
  for f in range(2):
    numbers = range(f * half, (f + 1) * half)
    table = {
      'image': [{'bytes': image_file(i), 'path': None} for i in numbers],
      'text': [caption(i) for i in numbers],
      'other': list(numbers),
    }
    pq.write_table(pa.table(table), folder / f'{f}.parquet', row_group_size=3)
  return dict(format='parquet', path=f'{folder}/*.parquet', window=5)


def write_arrayrecord(folder, count=24):
  source = write_tars(folder, count)
  array_record.write_array_records(source['path'], f'{folder}/packed', log=lambda line: None)
  return dict(format='arrayrecord', path=f'{folder}/packed/*.array_record')


def write_folder(folder, count=24):
  (folder / 'pictures').mkdir()
  with (folder / 'captions.jsonl').open('w') as file:
    for i in range(count):
      (folder / 'pictures' / f'{i}.png').write_bytes(image_file(i))
      file.write(json.dumps({'file_name': f'pictures/{i}.png', 'text': caption(i)}) + '\n')
  return dict(format='folder', path=str(folder))


def write_tfds(folder, count=24):
  class Numbered(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version('1.0.0')
    pkg_dir_path = folder

    def _info(self):
      return self.dataset_info_from_configs(
        features=tfds.features.FeaturesDict(
          {
            'image': tfds.features.Image(shape=(SIZE, SIZE, 3)),
            'captions': tfds.features.Sequence({'text': tfds.features.Text()}),
          }
        )
      )

    def _split_generators(self, dl_manager):
      return {'train': self._generate_examples()}

    def _generate_examples(self):
      for i in range(count):
        yield i, {'image': image_file(i), 'captions': [{'text': caption(i)}]}

  builder = Numbered(data_dir=str(folder), file_format='array_record')
  builder.download_and_prepare()
  return dict(format='tfds', path=str(builder.data_path), text='captions.text')


WRITERS = {
  'tars': write_tars,
  'parquet': write_parquet,
  'arrayrecord': write_arrayrecord,
  'folder': write_folder,
  'tfds': write_tfds,
}


def batches(*positional, sources=(), task='lm', batch_size=3, seed=1, **options):
  """`loader.batches` of these sources, of captions only unless `shares` are given."""
  options = dict(shares={'caption': 1}, num_threads=2, text_length=24) | options
  return loader.batches(
    task,
    sources=positional or sources,
    batch_size=batch_size,
    image_size=SIZE,
    tokenizer_folder=FOLDER,
    seed=seed,
    **options,
  )


def numbers(iterator, count) -> list[int]:
  """The numbers of the images of `count` batches, each checked to have its own caption."""
  found = []
  for batch in itertools.islice(iterator, count):
    for i, image in enumerate(batch['image']):
      found.append(number(image))
      if 'text' in batch:
        assert TOKENS.decode(batch['text'][i][: batch['text_length'][i]]) in (
          caption(found[-1]),
          f'again {found[-1]}',
        )
  return found


class Counted:
  """A store of 24 records, or a stream of units of 40, which counts what is read of it."""

  cost = 1

  def __init__(self, units=24):
    self.units = units
    self.count = 0

  def __len__(self):
    return self.units

  def read(self, unit, start=0, ahead=0):
    for i in range(start, 40):
      self.count += 1
      yield i, i + 1, formats.Record(b'', (), f'{unit} {i}')
    yield 40, 40, formats.Skip('', str(unit), 'files')
