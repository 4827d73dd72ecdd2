"""Things: pictures of one colour that tell their number, with captions that tell it too, written in each format."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow_datasets as tfds
from PIL import Image

from lavit_jax.data import array_record, loader, text

SIZE = 8
FOLDER = str(Path(text.__file__).parent.parent / 'assets/tiny/language_model')


def picture(i: int) -> bytes:
  """A PNG of one colour, which tells its number."""
  out = io.BytesIO()
  Image.new('RGB', (SIZE, SIZE), (i % 256, i // 256, 7)).save(out, 'PNG')
  return out.getvalue()


def number(image) -> int:
  assert (image == image[0, 0]).all() and image[0, 0, 2] == 7
  return int(image[0, 0, 0]) + 256 * int(image[0, 0, 1])


def caption(i: int) -> str:
  return f'thing number {i}'


def write_tar(path, samples, **options):
  """samples: (key, {extension: bytes}) pairs."""
  with tarfile.open(path, 'w', **options) as tar:
    for key, members in samples:
      for extension, content in members.items():
        info = tarfile.TarInfo(f'{key}.{extension}')
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))


def sample(i: int) -> tuple[str, dict[str, bytes]]:
  about = json.dumps({'caption': caption(i), 'again': f'again {i}'}).encode()
  return f'{i:09d}', {
    'png': picture(i),
    'txt': caption(i).encode(),
    'json': about,
    'npy': b'\x93\xff',
  }


def write_tars(folder, count=24, tars=4):
  each = count // tars
  for t in range(tars):
    write_tar(folder / f'{t:05d}.tar', [sample(i) for i in range(t * each, (t + 1) * each)])
  return dict(format='tars', path=f'{folder}/{{00000..{tars - 1:05d}}}.tar', window=5)


def write_parquet(folder, count=24):
  half = count // 2
  for f in range(2):
    rows = range(f * half, (f + 1) * half)
    pq.write_table(
      pa.table(
        {
          'image': [{'bytes': picture(i), 'path': None} for i in rows],
          'text': [caption(i) for i in rows],
          'other': list(rows),
        }
      ),
      folder / f'{f}.parquet',
      row_group_size=3,
    )
  return dict(format='parquet', path=f'{folder}/*.parquet', window=5)


def write_arrayrecord(folder, count=24):
  source = write_tars(folder, count)
  array_record.write_array_records(source['path'], f'{folder}/packed', say=lambda line: None)
  return dict(format='arrayrecord', path=f'{folder}/packed/*.array_record')


def write_folder(folder, count=24):
  (folder / 'pictures').mkdir()
  with (folder / 'captions.jsonl').open('w') as file:
    for i in range(count):
      (folder / 'pictures' / f'{i}.png').write_bytes(picture(i))
      file.write(json.dumps({'file_name': f'pictures/{i}.png', 'text': caption(i)}) + '\n')
  return dict(format='folder', path=str(folder))


def write_tfds(folder, count=24):
  class Things(tfds.core.GeneratorBasedBuilder):
    VERSION, pkg_dir_path = tfds.core.Version('1.0.0'), folder

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
        yield i, {'image': picture(i), 'captions': [{'text': caption(i)}]}

  builder = Things(data_dir=str(folder), file_format='array_record')
  builder.download_and_prepare()
  return dict(format='tfds', path=str(builder.data_path), text='captions.text')


WRITERS = {
  'tars': write_tars,
  'parquet': write_parquet,
  'arrayrecord': write_arrayrecord,
  'folder': write_folder,
  'tfds': write_tfds,
}


def batches(*given, sources=(), task='lm', batch_size=3, seed=1, **options):
  """`loader.batches` of these sources, of captions alone unless something else is asked for."""
  options = dict(shares={'caption': 1}, num_threads=2) | options
  return loader.batches(
    task,
    sources=given or sources,
    batch_size=batch_size,
    image_size=SIZE,
    text_length=24,
    tokenizer_folder=FOLDER,
    seed=seed,
    **options,
  )
