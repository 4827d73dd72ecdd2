"""Builds the emoji data set: every emoji as drawn by three hands (dataset.py says what a record holds).

python -m lavit_jax.data.emoji.build --data_dir DIR             # some 3,770 concepts x 3 styles, a few minutes
python -m lavit_jax.data.emoji.build --data_dir DIR --sample    # the two dozen concepts that travel with the package
"""

import argparse
import os


def build(data_dir: str, sample: bool = False) -> str:
  """Draws and writes the data set as ArrayRecord; returns its folder. Nothing happens if it is already there.

  Raises ImportError, naming the remedy, when the extra `[emoji]` is not installed.
  """
  from lavit_jax.data.emoji import (
    dataset,  # Here, because tensorflow-datasets refuses builders defined in __main__'s file.
  )

  builder = dataset.Emoji(
    data_dir=data_dir, config='sample' if sample else 'full', file_format='array_record'
  )
  builder.download_and_prepare()
  return os.fspath(builder.data_path)


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description='Draw the emoji data set.')
  parser.add_argument('--data_dir', required=True)
  parser.add_argument('--sample', action='store_true')
  print(build(**vars(parser.parse_args())))
