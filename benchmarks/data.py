"""Images per second from JPEG tars to uint8[224, 224, 3] batches, on one core, beside webdataset.

    pip install webdataset torch
    taskset -c 0 python benchmarks/data.py [--pictures 2000] [--repeats 3] [--tars FOLDER]
        [--json FILE]

Writes tars as img2dataset does (jpg, txt, json; images of 256 to 512 pixels a side with the
spectrum of photographs), and reads them with each loader in turn:

    ours            as a training run reads them, with states and counts
    webdataset      with torch's DataLoader, in its process or in a worker; images are resized by
                    Pillow straight to the square, as ours are (`pil`), or read by our own
                    `transforms.decode` (`same decode`)

The page cache is warm. Times are of the batches after the first, the best of the repeats: by the
clock, and by the processor time of this process. Processor time does not depend on other work that
shares the core, but it misses the work of worker processes.
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
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from lavit_jax.data import loader, transforms

SIZE = 224
BATCH = 64
TAR_LENGTH = 500  # images


def photograph(rng: np.random.Generator) -> bytes:
  """Noise with the spectrum of photographs, as a JPEG of quality 95 like img2dataset's."""
  width, height = rng.integers(256, 513, 2)
  frequency = np.hypot(*np.meshgrid(np.fft.rfftfreq(width), np.fft.fftfreq(height))) + 1 / width
  spectrum = np.fft.rfft2(rng.normal(size=(3, height, width))) / frequency**1.2
  noise = np.fft.irfft2(spectrum, (height, width))
  noise /= noise.std((1, 2), keepdims=True)
  pixels = np.clip(128 + 50 * (noise[:1] + 0.3 * noise), 0, 255).astype(np.uint8)
  out = io.BytesIO()
  Image.fromarray(pixels.transpose(1, 2, 0)).save(out, 'JPEG', quality=95)
  return out.getvalue()


def write_tars(folder: pathlib.Path, count: int) -> int:
  """Writes tars with `count` images; returns the number of bytes of all images."""
  rng = np.random.default_rng(0)
  total = 0
  for start in range(0, count, TAR_LENGTH):
    with tarfile.open(folder / f'{start // TAR_LENGTH:05d}.tar', 'w') as tar:
      for i in range(start, min(start + TAR_LENGTH, count)):
        image = photograph(rng)
        total += len(image)
        _add_sample(tar, i, image)
  return total


def _add_sample(tar: tarfile.TarFile, index: int, image: bytes) -> None:
  metadata = {
    'caption': f'picture {index}',
    'url': f'https://example.com/{index}.jpg',
    'key': f'{index:09d}',
    'status': 'success',
    'width': 400,
    'height': 300,
  }
  members = {
    'jpg': image,
    'txt': metadata['caption'].encode(),
    'json': json.dumps(metadata).encode(),
  }
  for extension, content in members.items():
    info = tarfile.TarInfo(f'{index:09d}.{extension}')
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def our_batches(folder: pathlib.Path, threads: int) -> Iterator[np.ndarray]:
  """Batches uint8[B, H, W, 3] of our loader."""
  source = {'format': 'tars', 'path': f'{folder}/*.tar', 'window': 512}
  batches = loader.batches(
    'images', sources=(source,), batch_size=BATCH, image_size=SIZE, num_threads=threads
  )
  for batch in batches:
    yield batch['image']


def webdataset_batches(
  folder: pathlib.Path, workers: int, decode: Callable[[bytes], np.ndarray]
) -> Iterator[np.ndarray]:
  """Batches uint8[B, H, W, 3] of webdataset and torch's DataLoader."""
  import torch
  import webdataset as wds

  torch.set_num_threads(1)
  # Pillow's arrays; collating copies them.
  warnings.filterwarnings('ignore', 'The given NumPy array is not writable')
  files = sorted(map(str, folder.glob('*.tar')))
  data = wds.WebDataset(files, shardshuffle=len(files), resampled=False, empty_check=False)
  data = data.repeat().shuffle(512)
  data = data.to_tuple('jpg', 'txt').map_tuple(decode, bytes.decode)
  for images, _ in torch.utils.data.DataLoader(data, batch_size=BATCH, num_workers=workers):
    yield images


def decode_with_pillow(data: bytes) -> np.ndarray:
  """Image file -> uint8[H, W, 3]."""
  image = Image.open(io.BytesIO(data)).convert('RGB')
  return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def decode_as_ours(data: bytes) -> np.ndarray:
  """Image file -> uint8[H, W, 3]."""
  return transforms.decode(data, SIZE)


LOADERS = {
  'ours, 1 thread': lambda folder: our_batches(folder, 1),
  'ours, no thread': lambda folder: our_batches(folder, 0),
  'webdataset, 1 worker, pil': lambda folder: webdataset_batches(folder, 1, decode_with_pillow),
  'webdataset, no worker, pil': lambda folder: webdataset_batches(folder, 0, decode_with_pillow),
  'webdataset, 1 worker, same decode': lambda folder: webdataset_batches(folder, 1, decode_as_ours),
  'webdataset, no worker, same decode': lambda folder: webdataset_batches(
    folder, 0, decode_as_ours
  ),
}


def speed(batches: Iterator[np.ndarray], count: int) -> np.ndarray:
  """Images per second by the clock and by processor time, over `count` images after one batch."""
  first = next(batches)
  assert tuple(first.shape) == (BATCH, SIZE, SIZE, 3)
  start = np.array([time.perf_counter(), time.process_time()])
  for _ in range(count // BATCH):
    next(batches)
  seconds = np.array([time.perf_counter(), time.process_time()]) - start
  batches.close()
  return count // BATCH * BATCH / seconds


def measure(folder: pathlib.Path, count: int, repeats: int) -> dict[str, np.ndarray]:
  """The best speed of each loader, [clock, processor time]; NaN where a worker's time is missed."""
  best = {name: np.zeros(2) for name in LOADERS}
  for _ in range(repeats):
    for name, batches in LOADERS.items():  # in turn: other work disturbs all of them alike
      best[name] = np.maximum(best[name], speed(batches(folder), count))
  for name, rates in best.items():
    if '1 worker' in name:
      rates[1] = np.nan
  return best


def print_table(best: dict[str, np.ndarray]) -> None:
  """Prints the speeds, and their ratios to the best webdataset, as a Markdown table."""
  peers = [rates for name, rates in best.items() if name.startswith('webdataset')]
  reference = np.nanmax(peers, 0)
  print(
    '| loader | pictures/s | of the best webdataset | pictures/CPU s | of the best webdataset |\n'
    '|---|---|---|---|---|'
  )
  for name, rates in best.items():
    cells = [name]
    for rate, ratio in zip(rates, rates / reference):
      cells += ['', ''] if np.isnan(rate) else [f'{rate:.0f}', f'{ratio:.2f}']
    print(f'| {" | ".join(cells)} |')


def main() -> None:
  """Writes the tars, measures and reports."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--pictures', type=int, default=2000)
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument(
    '--tars', metavar='FOLDER', type=pathlib.Path, help='a new folder in which the tars stay'
  )
  parser.add_argument('--json', metavar='FILE')
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as temporary:
    folder = args.tars or pathlib.Path(temporary)
    folder.mkdir(exist_ok=not args.tars)
    size = write_tars(folder, args.pictures) / args.pictures / 1e3
    cores = len(os.sched_getaffinity(0))
    print(f'{args.pictures} pictures, {size:.0f} KB each, {cores} core(s)')
    best = measure(folder, args.pictures, args.repeats)
  print_table(best)
  if args.json:
    rates = {}
    for name, (clock, processor) in best.items():
      rates[name] = {'clock': float(clock)}
      if not np.isnan(processor):
        rates[name]['processor'] = float(processor)
    result = {'pictures': args.pictures, 'size': SIZE, 'batch': BATCH, 'pictures_per_s': rates}
    pathlib.Path(args.json).write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
  main()
