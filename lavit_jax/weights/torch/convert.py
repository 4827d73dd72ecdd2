"""`lavit convert`: a PyTorch folder <-> a checkpoint folder of Orbax, one tensor at a time.

What a PyTorch folder has beside the weights of the model (tokenizer, schedulers, descriptions,
other models) travels in `torch/` of the checkpoint folder, with the tensors that the model computes
itself or does not use. So the way back gives every tensor again, bit for bit.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib

from lavit_jax.errors import UserError
from lavit_jax.weights.torch import formats
from lavit_jax.weights.torch.conversion_plan import Conversion
from lavit_jax.weights.torch.export_folder import plan_export
from lavit_jax.weights.torch.import_folder import plan_import
from lavit_jax.weights.torch.merge_folder import plan_merge


def plan_conversion(
  src: str | os.PathLike,
  dst: str | os.PathLike,
  *,
  variant: str | None = None,
  dtype: str | None = None,
  allow_missing: str = '',
  force: bool = False,
  pickles: bool = False,
  grow: bool = True,
  weights_variant: str | None = None,
  allow_nonfinite: bool = False,
  adapter: str | os.PathLike | None = None,
) -> Conversion:
  """Plans the conversion of a folder; nothing is written before the result's `run` is called.

  Args:
    src: a PyTorch folder or file (formats.py), or a checkpoint folder; decides the direction.
    dst: where the other one is written.
    variant: of the model; None finds the largest whose shapes the files have.
    dtype: of floating tensors in the result; None keeps the dtypes.
    allow_missing: regex of torch names that may be missing; recorded in the result.
    force: replace what an earlier conversion wrote at `dst`.
    pickles: write `.bin` files instead of safetensors.
    grow: add the rows of [IMG], [/IMG] and the codes to a language model that has the text's only
      (vocabulary_growth.py).
    weights_variant: the variant of the weight files, such as 'fp16', where a folder has several
      (weight_files.py).
    allow_nonfinite: keep NaN and infinity in the source, with a note; otherwise they are an error.
    adapter: a folder of adapters (adapters.py), to be merged into the checkpoint folder `src`.

  Raises:
    UserError: `src` is unknown or damaged, `dst` exists or overlaps it, or pickles cannot be
      written.
    PortingError: the files and the variant do not fit.
  """
  src = pathlib.Path(os.path.abspath(src))  # not resolved: the target of a link may have no name
  dst = pathlib.Path(dst).resolve()
  _check_destination(src.resolve(), dst, force)
  is_checkpoint = 'variant' in formats.read_json(src / 'config.json')
  if adapter is not None:
    if not is_checkpoint:
      raise UserError(
        f'{src} is no checkpoint folder of ours: convert it first, and merge into the result'
      )
    return plan_merge(src, dst, pathlib.Path(adapter), dtype)
  if is_checkpoint:
    if pickles and importlib.util.find_spec('torch') is None:
      raise UserError(
        '.bin files need PyTorch: pip install -e ".[torch]" -c launch/constraints.txt; '
        'or leave out --bin'
      )
    return plan_export(src, dst, dtype, pickles, allow_nonfinite)
  if pickles:
    raise UserError(f'{src} becomes a folder of ours, which has no .bin files; leave out --bin')
  return plan_import(
    src,
    dst,
    variant=variant,
    dtype=dtype,
    allow_missing=allow_missing,
    grow=grow,
    weights_variant=weights_variant,
    allow_nonfinite=allow_nonfinite,
  )


def _check_destination(src: pathlib.Path, dst: pathlib.Path, force: bool) -> None:
  """Raises UserError if the destination exists, or overlaps the source."""
  is_empty_folder = dst.is_dir() and not any(dst.iterdir())
  if dst.exists() and not is_empty_folder and not force:
    raise UserError(f'{dst} exists; choose another place, or --force to replace it')
  if dst == src or src in dst.parents or dst in src.parents:
    raise UserError(f'{dst} and {src} lie within each other; choose another place')
