"""What a conversion will do: shown before it runs, and by a dry run."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from lavit_jax.weights.torch.formats import ModuleLocation
from lavit_jax.weights.torch.tensors import ArraySpec, nbytes

Progress = Callable[[int], None]  # is called with each number of bytes written, or read back


class ConversionItem(NamedTuple):
  """What becomes of one module.

  Attributes:
    module: its name.
    path: its files in the PyTorch folder, without their suffix.
    tensors: how many of them are converted.
    parameters: how many numbers the result has.
    dtype: of the result; several are listed.
    bytes: of the result.
  """

  module: str
  path: str
  tensors: int
  parameters: int
  dtype: str
  bytes: int


@dataclasses.dataclass(frozen=True)
class Conversion:
  """A conversion that has been checked and not yet run.

  Attributes:
    direction: 'torch -> orbax' or 'orbax -> torch'.
    kind: of the PyTorch folder (formats.py).
    variant: of the model.
    items: one for each module.
    run: writes the result, and reads it back; every byte is reported once for each.
    notes: which settings are followed, what of the source is not converted; `run` adds what it
      lets through.
  """

  direction: str
  kind: str
  variant: str
  items: list[ConversionItem]
  run: Callable[[Progress], None]
  notes: list[str] = dataclasses.field(default_factory=list)


def conversion_item(
  location: ModuleLocation, tensors: int, specs: Iterable[ArraySpec]
) -> ConversionItem:
  """The item of a module whose result has these shapes and dtypes."""
  specs = list(specs)
  dtypes = sorted({str(np.dtype(spec.dtype)) for spec in specs})
  return ConversionItem(
    module=location.module,
    path=str(pathlib.PurePosixPath(location.folder, location.stems[0])),
    tensors=tensors,
    parameters=sum(math.prod(spec.shape) for spec in specs),
    dtype=', '.join(dtypes),
    bytes=sum(nbytes(spec) for spec in specs),
  )
