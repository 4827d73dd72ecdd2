"""Sources and options that cannot be read are named."""

import pytest
from numbered_images import (
  batches,
)

from lavit_jax.errors import UserError


@pytest.mark.parametrize(
  'source, message',
  [
    (
      dict(format='zip', path='x'),
      r"sources\[0\] has format 'zip'; choose one of arrayrecord, tfds",
    ),
    (dict(format='tars', path='x', wieght=1), "does not know 'wieght'; did you mean 'weight'"),
    (dict(format='tars'), 'no path'),
    (dict(format='tars', path='nowhere/*.tar'), 'nowhere/.*matches no file'),
    (dict(format='tars', path='x', use='look'), "use 'look'"),
    (dict(format='tars', path='x', weight=0), 'weight must be a number above 0'),
    (dict(format='tars', path='x', text=5), r'sources\[0\] has text 5, which is no str'),
    (dict(format='tars', path='x', image=('jpg', 5)), r"has image \('jpg', 5\), which is no str"),
    (dict(format='parquet', path='x', image=('a', 'b')), 'give the name of one column'),
    (dict(format='arrayrecord', path='x', image='jpg'), 'each record has one image; leave it out'),
    (
      dict(format='tars', path='x', weight=float('inf')),
      r'weight must be a number above 0 \(now inf\)',
    ),
    (dict(format='arrayrecord', path='gs://a/b.array_record'), 'local files only'),
    (
      dict(format='arrayrecord', path='nowhere.array_record'),
      'no such file; make it with lavit data pack',
    ),
    (dict(format='folder', path='.'), 'has no captions.jsonl'),
    (dict(format='parquet', path='nowhere.parquet'), 'not a Parquet file'),
    (dict(format='tfds', path='nothing_of_this_name'), 'tfds .nothing_of_this_name'),
  ],
)
def test_a_bad_source_is_named(source, message):
  with pytest.raises(UserError, match=message):
    batches(source)


@pytest.mark.parametrize(
  'options, message',
  [
    (dict(task='contrastive'), "tasks 'images' and 'lm'"),
    (dict(split='heldout'), 'data.heldout'),
    (dict(crop='round'), "unknown crop 'round'"),
    (dict(split='test'), "unknown split 'test'"),
    (dict(shares={'captions': 1}), 'shares must be'),
  ],
)
def test_bad_options_with_sources(options, message):
  with pytest.raises(ValueError, match=message):
    batches(dict(format='tars', path='x'), **options)
