"""The data sets of captions: COCO (Karpathy test), NoCaps and Flickr30k."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable
from typing import Any

from lavit_jax.apps.benchmarks.files import DataSet, Official, Record, by_group
from lavit_jax.evaluation import caption_metrics

Item = dict[str, Any]

KARPATHY_PAGE = "Karpathy's caption_datasets.zip, cs.stanford.edu/people/karpathy/deepimagesent"
BLIP_PAGE = 'the annotations of BLIP, storage.googleapis.com/sfr-vision-language-research'
NOCAPS_PAGE = 'the download page of NoCaps, nocaps.org'
FLICKR_PAGE = 'the page of Flickr30k, shannon.cs.illinois.edu/DenotationGraph'


def read_coco(folder: pathlib.Path) -> DataSet:
  """Reads Karpathy's test split: his own file, or the two files of BLIP with the same images."""
  if not (folder / 'coco_karpathy_test.json').exists():
    return _read_karpathy(folder, 'dataset_coco.json', lambda item: item['cocoid'])
  names = Official('coco_karpathy_test.json', BLIP_PAGE)
  truth = Official('coco_karpathy_test_gt.json', BLIP_PAGE, 'annotations')
  images = {}
  try:
    for item in names.read(folder):
      name = pathlib.PurePosixPath(item['image']).name
      images[int(re.findall(r'\d+', name)[-1])] = name
  except (KeyError, TypeError, IndexError) as error:
    raise names.wrong(folder, f'has an unexpected item ({error!r})') from None
  return _read_coco_form(folder, truth, lambda item: Record(item['id'], images[item['id']], []))


def read_nocaps(folder: pathlib.Path) -> DataSet:
  """Reads NoCaps val; the domains are measured apart."""
  official = Official('nocaps_val_4500_captions.json', NOCAPS_PAGE, 'annotations')

  def parse(item: Item) -> Record:
    return Record(item['id'], item['file_name'], [], groups={'domain': item['domain']})

  return _read_coco_form(folder, official, parse)


def read_flickr30k(folder: pathlib.Path) -> DataSet:
  """Reads Karpathy's test split of Flickr30k; the id of an image is the number of its file."""
  return _read_karpathy(
    folder, 'dataset_flickr30k.json', lambda item: int(pathlib.Path(item['filename']).stem)
  )


def _read_karpathy(folder: pathlib.Path, name: str, image_id: Callable[[Item], Any]) -> DataSet:
  """Reads a file of Karpathy's splits."""
  official = Official(name, KARPATHY_PAGE, 'images')
  items = official.read(folder)
  try:
    items = [item for item in items if item['split'] == 'test']
  except (KeyError, TypeError) as error:
    raise official.wrong(folder, f'has an unexpected image ({error!r})') from None

  def parse(item: Item) -> Record:
    return Record(
      image_id(item), item['filename'], [sentence['raw'] for sentence in item['sentences']]
    )

  return DataSet(official.parse(folder, items, parse), [folder / name])


def _read_coco_form(
  folder: pathlib.Path, official: Official, parse: Callable[[Item], Record]
) -> DataSet:
  """Reads a file with `images` and `annotations`; `parse` makes a record without captions."""
  captions: dict[Any, list[str]] = {}
  for item in official.read(folder):
    try:
      captions.setdefault(item['image_id'], []).append(item['caption'])
    except (KeyError, TypeError) as error:
      raise official.wrong(folder, f'has an unexpected annotation ({error!r})') from None

  def with_captions(item: Item) -> Record:
    record = parse(item)
    return record._replace(references=captions[record.id])

  images = official._replace(key='images').read(folder)
  return DataSet(official.parse(folder, images, with_captions), [folder / official.name])


def submission(records: list[Record], captions: list[str]) -> list[dict[str, Any]]:
  """The form that the servers of COCO and NoCaps take."""
  return [
    {'image_id': record.id, 'caption': caption}
    for record, caption in zip(records, captions, strict=True)
  ]


def measure(records: list[Record], captions: list[str]) -> dict[str, Any]:
  """Computes the metrics of all images and of each group.

  CIDEr takes the document frequencies from the references of what it measures. Those of a group
  therefore differ from those of the whole; `CIDEr of the whole` is the mean over the group of what
  its images have in the whole.
  """
  tokenized = caption_metrics.tokenize(
    {record.id: record.references for record in records},
    {record.id: caption for record, caption in zip(records, captions, strict=True)},
  )
  scorers = caption_metrics.make_scorers(tokenized.java)
  metrics, of_images = caption_metrics.measure(tokenized, scorers)
  whole = 'CIDEr of the whole' + ('' if tokenized.java else caption_metrics.PLAIN)
  groups: dict[str, dict[str, dict[str, float]]] = {}
  for kind, values in by_group(records, [record.id for record in records]).items():
    groups[kind] = {}
    for value, ids in values.items():
      part, _ = caption_metrics.measure(tokenized.of_images(ids), scorers)
      part[whole] = sum(of_images[key] for key in ids) / len(ids)
      groups[kind][value] = part | {'count': len(ids)}
  return {
    'metrics': metrics,
    'groups': groups,
    'notes': caption_metrics.missing_metrics(tokenized),
    'java': caption_metrics.java_version(),
  }
