"""Builds the emoji data set: every emoji in three styles (dataset.py describes a record).

    python -m lavit_jax.data.emoji.build --data_dir DIR
    python -m lavit_jax.data.emoji.build --data_dir DIR --sample

The first takes a few minutes for some 3,770 concepts in three styles. The second draws the two
dozen concepts that are part of the package.
"""

import argparse
import os


def build(data_dir: str, sample: bool = False) -> str:
  """Draws the data set and writes it as ArrayRecord, unless it exists.

  Args:
    data_dir: where tensorflow-datasets puts data sets.
    sample: build the two dozen concepts of the package instead of all.

  Returns:
    The folder of the data set.

  Raises:
    ImportError: the extra `[emoji]` is not installed.
  """
  # Imported here, because tensorflow-datasets refuses builders defined in the file of __main__.
  from lavit_jax.data.emoji import dataset

  config = 'sample' if sample else 'full'
  builder = dataset.Emoji(data_dir=data_dir, config=config, file_format='array_record')
  builder.download_and_prepare()
  return os.fspath(builder.data_path)


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description='Build the emoji data set.')
  parser.add_argument('--data_dir', required=True)
  parser.add_argument('--sample', action='store_true')
  print(build(**vars(parser.parse_args())))
