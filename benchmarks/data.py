"""Pictures a second from JPEG tars to uint8[224, 224, 3] batches on one core, beside webdataset + torch DataLoader.

    pip install webdataset torch
    taskset -c 0 python benchmarks/data.py [--pictures 2000] [--repeats 3] [--tars FOLDER] [--json FILE]

Writes tars as img2dataset does (jpg, txt, json; pictures of 256 to 512 pixels a side with the spectrum of photographs), and reads them in
turn: ours as a training reads them, with states and counts; webdataset in the loader's process and with a worker, its pictures through
Pillow straight to the square, as ours are (`pil`), and through our own `transforms.decode` (`same decode`). The page cache is warm. Times are
of the batches after the first, the best of the repeats: by the clock, and by the processor time of this process, which a core that is
shared with other work does not blur, but which knows nothing of workers.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pathlib
import tarfile
import tempfile
import time
import warnings

import numpy as np
from PIL import Image

from lavit_jax.data import loader, transforms

SIZE, BATCH, A_TAR = 224, 64, 500


def photograph(rng: np.random.Generator) -> bytes:
  """Noise with the spectrum of photographs, as a JPEG of quality 95 like img2dataset's."""
  width, height = rng.integers(256, 513, 2)
  frequency = np.hypot(*np.meshgrid(np.fft.rfftfreq(width), np.fft.fftfreq(height))) + 1 / width
  noise = np.fft.irfft2(
    np.fft.rfft2(rng.normal(size=(3, height, width))) / frequency**1.2, (height, width)
  )
  noise /= noise.std((1, 2), keepdims=True)
  pixels = np.clip(128 + 50 * (noise[:1] + 0.3 * noise), 0, 255).astype(np.uint8)
  out = io.BytesIO()
  Image.fromarray(pixels.transpose(1, 2, 0)).save(out, 'JPEG', quality=95)
  return out.getvalue()


def write(folder: pathlib.Path, count: int) -> int:
  """Fills tars; returns the bytes of all pictures."""
  rng, total = np.random.default_rng(0), 0
  for start in range(0, count, A_TAR):
    with tarfile.open(folder / f'{start // A_TAR:05d}.tar', 'w') as tar:
      for i in range(start, min(start + A_TAR, count)):
        about = dict(
          caption=f'picture {i}',
          url=f'https://example.com/{i}.jpg',
          key=f'{i:09d}',
          status='success',
          width=400,
          height=300,
        )
        members = {
          'jpg': photograph(rng),
          'txt': f'picture {i}'.encode(),
          'json': json.dumps(about).encode(),
        }
        total += len(members['jpg'])
        for extension, content in members.items():
          info = tarfile.TarInfo(f'{i:09d}.{extension}')
          info.size = len(content)
          tar.addfile(info, io.BytesIO(content))
  return total


def ours(folder: pathlib.Path, threads: int):
  source = dict(format='tars', path=f'{folder}/*.tar', window=512)
  for batch in loader.batches(
    'images', sources=(source,), batch_size=BATCH, image_size=SIZE, num_threads=threads
  ):
    yield batch['image']


def theirs(folder: pathlib.Path, workers: int, decode):
  import torch
  import webdataset as wds

  torch.set_num_threads(1)
  warnings.filterwarnings(
    'ignore', 'The given NumPy array is not writable'
  )  # Pillow's; collate copies it
  files = sorted(map(str, folder.glob('*.tar')))
  data = (
    wds.WebDataset(files, shardshuffle=len(files), resampled=False, empty_check=False)
    .repeat()
    .shuffle(512)
  )
  data = data.to_tuple('jpg', 'txt').map_tuple(decode, bytes.decode)
  for images, _ in torch.utils.data.DataLoader(data, batch_size=BATCH, num_workers=workers):
    yield images


def pil(data: bytes) -> np.ndarray:
  return np.asarray(
    Image.open(io.BytesIO(data)).convert('RGB').resize((SIZE, SIZE), Image.Resampling.BICUBIC)
  )


def same(data: bytes) -> np.ndarray:
  return transforms.decode(data, SIZE)


def speed(batches, count: int) -> np.ndarray:
  """Pictures a second of the clock and of processor time, over `count` of them after the first batch."""
  first = next(batches)
  assert tuple(first.shape) == (BATCH, SIZE, SIZE, 3)
  start = np.array([time.perf_counter(), time.process_time()])
  for _ in range(count // BATCH):
    next(batches)
  seconds = np.array([time.perf_counter(), time.process_time()]) - start
  batches.close()
  return count // BATCH * BATCH / seconds


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--pictures', type=int, default=2000)
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument(
    '--tars', metavar='FOLDER', type=pathlib.Path, help='a new folder in which the tars stay'
  )
  parser.add_argument('--json', metavar='FILE')
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as scratch:
    folder = args.tars or pathlib.Path(scratch)
    folder.mkdir(exist_ok=not args.tars)
    total = write(folder, args.pictures)
    print(
      f'{args.pictures} pictures, {total / args.pictures / 1e3:.0f} KB each, {len(os.sched_getaffinity(0))} core(s)'
    )
    runs = {
      'ours, 1 thread': lambda: ours(folder, 1),
      'ours, no thread': lambda: ours(folder, 0),
      'webdataset, 1 worker, pil': lambda: theirs(folder, 1, pil),
      'webdataset, no worker, pil': lambda: theirs(folder, 0, pil),
      'webdataset, 1 worker, same decode': lambda: theirs(folder, 1, same),
      'webdataset, no worker, same decode': lambda: theirs(folder, 0, same),
    }
    best = {name: np.zeros(2) for name in runs}
    for _ in range(args.repeats):
      for name, run in runs.items():  # in turn, so that a busy moment strikes all of them
        best[name] = np.maximum(best[name], speed(run(), args.pictures))
  for name in best:
    if '1 worker' in name:
      best[name][1] = np.nan
  reference = np.nanmax([value for name, value in best.items() if name.startswith('webdataset')], 0)
  print(
    '| loader | pictures/s | of the best webdataset | pictures/CPU s | of the best webdataset |\n|---|---|---|---|---|'
  )
  for name, value in best.items():
    print(
      f'| {name} | '
      + ' | '.join(f'{a:.0f} | {b:.2f}' for a, b in zip(value, value / reference)).replace(
        'nan', ''
      )
      + ' |'
    )
  if args.json:
    rates = {
      name: dict(zip(('clock', 'processor'), map(float, value[: 1 + ('1 worker' not in name)])))
      for name, value in best.items()
    }
    result = dict(pictures=args.pictures, size=SIZE, batch=BATCH, pictures_per_s=rates)
    pathlib.Path(args.json).write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
  main()
