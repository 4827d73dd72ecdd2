"""Images of COCO captions, by the FID of Heusel et al. 2017 and the CLIP score."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lavit_jax.apps.benchmarks import files
from lavit_jax.apps.benchmarks.files import DataSet, Official, Record, Request
from lavit_jax.data.images import read_image, read_images
from lavit_jax.errors import UserError
from lavit_jax.evaluation import clip_score, frechet, inception

CAPTIONS = Official(
  'captions_val2014.json', 'annotations_trainval2014.zip of cocodataset.org', 'annotations'
)
NUM_IMAGES = 30_000  # whose captions are drawn
NUM_SAMPLES = 4  # images of a caption, of which the protocol of the authors takes the best
SAMPLE = 'sample'  # a group of the records
_BATCH = 32  # images on a device at once
_FEW = 10_000  # images, below which an FID says little


def read(folder: pathlib.Path) -> DataSet:
  """Reads a caption each of `NUM_IMAGES` images; each has `NUM_SAMPLES` records.

  Which images: the first by the SHA-256 of their id, which is a random order. Which caption: that
  of the least id.
  """
  captions: dict[int, tuple[int, str]] = {}
  try:
    for annotation in CAPTIONS.read(folder):
      caption = (int(annotation['id']), str(annotation['caption']))
      image = int(annotation['image_id'])
      captions[image] = min(caption, captions.get(image, caption))
  except (KeyError, TypeError, ValueError) as error:
    raise CAPTIONS.wrong(folder, f'has an unexpected item ({error!r})') from None
  if not captions:
    raise CAPTIONS.wrong(folder, 'has no captions')
  chosen = sorted(captions, key=lambda image: hashlib.sha256(str(image).encode()).digest())
  records = []
  for image in chosen[:NUM_IMAGES]:
    _, caption = captions[image]
    for sample in range(NUM_SAMPLES):
      records.append(
        Record(
          f'{image}-{sample}',
          f'COCO_val2014_{image:012d}.jpg',
          [],
          question=caption,
          groups={SAMPLE: str(sample)},
        )
      )
  return DataSet(records, [folder / CAPTIONS.name])


class ImageMeasure:
  """Measures generated images beside the real ones of the same captions.

  Attributes:
    weights: of the Inception network.
    clip: None without a CLIP.
    digests: the SHA-256 of both.
  """

  def __init__(self, request: Request):
    """Opens the networks.

    Raises:
      UserError: one is missing or another one.
    """
    if request.inception is None:
      raise UserError(
        '--benchmark coco-fid needs --inception FILE, the Inception-v3 weights of the FID; '
        'pytorch-fid and torch-fidelity say where they are'
      )
    if request.clip is None and request.protocol == 'lavit':
      raise UserError(
        '--benchmark coco-fid needs --clip DIR, by which --protocol lavit takes the best of '
        f'{NUM_SAMPLES} images; name the folder of a CLIPModel'
      )
    self.weights = inception.read_weights(request.inception)
    self.clip = clip_score.ClipScorer(request.clip) if request.clip else None
    self.digests = {'inception': files.file_digest(request.inception)}
    if request.clip:
      self.digests['clip'] = files.folder_digest(request.clip)
    self.chooses = request.protocol == 'lavit'
    mesh = jax.make_mesh((jax.local_device_count(),), ('data',), devices=jax.local_devices())
    self._sharding = NamedSharding(mesh, P('data'))
    self._extract = jax.jit(inception.extract_features)

  def __call__(
    self,
    records: Sequence[Record],
    generated: Sequence[pathlib.Path],
    real: Sequence[pathlib.Path],
  ) -> dict[str, Any]:
    """Computes the metrics.

    The arguments are those of `registry.ImageMeasure`; records of one caption follow each other.

    Raises:
      UserError: there are fewer than two captions.
    """
    height, width, _ = read_image(generated[0]).shape
    size = (height, width)
    scores = self._scores(records, generated, size)
    chosen = self._choose(records, scores)
    if len(chosen) < 2:
      raise UserError('the FID needs at least two captions; give a larger --limit')
    sums = []
    for paths in (generated, real):
      sums.append(self._feature_sums([paths[index] for index in chosen], size))
    metrics = {'FID': frechet.frechet_distance(*sums)}
    if self.clip:
      metrics['CLIP score'] = float(np.maximum(scores[chosen], 0).mean(dtype=np.float64))
    notes = []
    if len(chosen) < _FEW:
      notes.append(f'an FID of {len(chosen)} images is far larger than one of {NUM_IMAGES:,}')
    return {'metrics': metrics, 'groups': {}, 'measured_by': self.digests, 'notes': notes}

  def _scores(
    self, records: Sequence[Record], paths: Sequence[pathlib.Path], size: tuple[int, int]
  ) -> np.ndarray:
    """The CLIP score of each image, f32; zeros without a CLIP."""
    scores = np.zeros(len(records), np.float32)
    if self.clip:
      for start in range(0, len(records), _BATCH):
        part = slice(start, start + _BATCH)
        texts = [record.question for record in records[part]]
        scores[part] = self.clip.score(read_images(list(paths[part]), size), texts)
    return scores

  def _choose(self, records: Sequence[Record], scores: np.ndarray) -> list[int]:
    """The index of the image of each caption that counts."""
    best: dict[str, int] = {}
    for index, record in enumerate(records):
      before = best.setdefault(record.image, index)
      if self.chooses and scores[index] > scores[before]:
        best[record.image] = index
    return list(best.values())

  def _feature_sums(
    self, paths: Sequence[pathlib.Path], size: tuple[int, int]
  ) -> frechet.FeatureSums:
    """Features of images, resized (bicubic) to (height, width)."""
    sums = frechet.FeatureSums.zeros(inception.NUM_FEATURES)
    batch_size = _BATCH * jax.local_device_count()
    for start in range(0, len(paths), batch_size):
      images = read_images(list(paths[start : start + batch_size]), size)
      missing = -len(images) % jax.local_device_count()
      padded = np.concatenate([images, np.repeat(images[-1:], missing, 0)])
      features = self._extract(self.weights, jax.device_put(padded, self._sharding))
      sums.add(np.asarray(features)[: len(images)])
    return sums
