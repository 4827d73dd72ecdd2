"""All benchmarks: how each is read, asked and written."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lavit_jax.apps.benchmarks import captions, coco_fid, geneval, protocols, questions
from lavit_jax.apps.benchmarks.files import DataSet, Record, Request
from lavit_jax.apps.benchmarks.protocols import Protocol

COCO_IMAGES = 'val2014 of cocodataset.org'
Submit = Callable[[list[Record], list[str]], list[dict[str, Any]]]
# (records, the generated image of each, the real image of each) -> the entries of the report
ImageMeasure = Callable[
  [list[Record], Sequence[pathlib.Path], Sequence[pathlib.Path]], dict[str, Any]
]


class Benchmark(NamedTuple):
  """A data set, and what is done with it.

  Attributes:
    task: the task of apps/batch: 'caption', 'answer' or 'generate'.
    read: reads the official files in a folder.
    protocols: by name.
    submit: makes the official result file; None where images are the result.
    subfolders: of the folder of images, where the images may be.
    images: the page that has the images; '' if there are none.
    image_measure: opens what measures generated images; None where texts are the result.
  """

  task: str
  read: Callable[[pathlib.Path], DataSet]
  protocols: Mapping[str, Protocol]
  submit: Submit | None = None
  subfolders: tuple[str, ...] = ('',)
  images: str = ''
  image_measure: Callable[[Request], ImageMeasure] | None = None


def _captions(
  read: Callable[[pathlib.Path], DataSet], subfolders: tuple[str, ...], images: str
) -> Benchmark:
  by_name = {'lavit': protocols.LAVIT_CAPTION, 'standard': protocols.STANDARD_CAPTION}
  return Benchmark('caption', read, by_name, captions.submission, subfolders, images)


BENCHMARKS = {
  'coco': _captions(captions.read_coco, ('', 'val2014'), COCO_IMAGES),
  'nocaps': _captions(captions.read_nocaps, ('', 'val'), captions.NOCAPS_PAGE),
  'flickr30k': _captions(captions.read_flickr30k, ('', 'flickr30k-images'), captions.FLICKR_PAGE),
  'vqav2': Benchmark(
    'answer',
    questions.read_vqav2,
    {'lavit': protocols.LAVIT_VQA, 'standard': protocols.STANDARD_VQA},
    questions.vqa_submission,
    ('', 'val2014'),
    COCO_IMAGES,
  ),
  'okvqa': Benchmark(
    'answer',
    questions.read_okvqa,
    {'lavit': protocols.LAVIT_VQA, 'standard': protocols.STANDARD_OKVQA},
    questions.vqa_submission,
    ('', 'val2014'),
    COCO_IMAGES,
  ),
  'gqa': Benchmark(
    'answer',
    questions.read_gqa,
    {'lavit': protocols.LAVIT_GQA, 'standard': protocols.STANDARD_GQA},
    questions.gqa_submission,
    ('', 'images'),
    questions.GQA_PAGE,
  ),
  'vizwiz': Benchmark(
    'answer',
    questions.read_vizwiz,
    {'lavit': protocols.LAVIT_VIZWIZ, 'standard': protocols.STANDARD_VIZWIZ},
    questions.vizwiz_submission,
    ('', 'val'),
    questions.VIZWIZ_PAGE,
  ),
  'own': Benchmark(
    'answer',
    questions.read_own,
    {'standard': protocols.OWN_QUESTIONS},
    questions.vqa_submission,
    images='your own pictures',
  ),
  'geneval': Benchmark(
    'generate',
    geneval.read,
    {'standard': protocols.STANDARD_GENERATION},
    image_measure=geneval.ImageMeasure,
  ),
  'coco-fid': Benchmark(
    'generate',
    coco_fid.read,
    {'lavit': protocols.LAVIT_COCO_FID, 'standard': protocols.STANDARD_COCO_FID},
    subfolders=('', 'val2014'),
    images=COCO_IMAGES,
    image_measure=coco_fid.ImageMeasure,
  ),
}
