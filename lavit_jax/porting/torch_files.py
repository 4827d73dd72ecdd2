"""Weight files of the PyTorch family as plain dicts of numpy arrays: `.safetensors`, and `.bin` where torch is installed."""

from __future__ import annotations

import json
import os
import pathlib

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy
import numpy as np
import safetensors
import safetensors.numpy

from lavit_jax.errors import UserError


def load(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Reads a file, or all the shards of a folder.

  Args:
    path: a `.safetensors` or pickled (`.bin`, `.pth`, `.pt`) file; or a folder with one such file, or with shards and the
      `*.index.json` that names them.

  Returns:
    torch name -> array, in the type stored (bfloat16 from pickles: float32). A pickle of one bare tensor goes by the stem of
    its file.

  Raises:
    UserError: the path is missing, damaged or ambiguous, or torch is needed and not installed.
  """
  state = {}
  for file in _files(pathlib.Path(path)):
    shard = _load_safetensors(file) if file.suffix == '.safetensors' else _load_pickle(file)
    if twice := shard.keys() & state.keys():
      raise UserError(f'{file} repeats names of another shard: {", ".join(sorted(twice))}; remove the stale file')
    state |= shard
  return state


def save(path: str | os.PathLike, state: dict[str, np.ndarray]) -> None:
  """Writes a `.safetensors` file that torch, transformers and diffusers read; the whole of it or nothing.

  Raises:
    UserError: the file cannot be written.
  """
  path = pathlib.Path(path)
  part = path.with_name(f'.{path.name}.part')
  try:
    safetensors.numpy.save_file({name: np.ascontiguousarray(x) for name, x in state.items()}, part, {'format': 'pt'})
    os.chmod(part, 0o644)  # safetensors makes files that only their owner may read
    os.replace(part, path)
  except (OSError, safetensors.SafetensorError) as error:
    raise UserError(f'cannot write {path}: {error}; free some space or choose another place') from error
  finally:
    part.unlink(missing_ok=True)


def _files(path: pathlib.Path) -> list[pathlib.Path]:
  if path.is_file():
    return [path]
  if not path.is_dir():
    raise UserError(f'{path} does not exist')
  for suffix in ('.safetensors', '.bin'):  # both may lie side by side, with the same content
    for index in sorted(path.glob(f'*{suffix}.index.json')):
      try:
        return sorted({path / name for name in json.loads(index.read_text())['weight_map'].values()})
      except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{index} is damaged ({error!r}); download it again') from None
    if found := sorted(path.glob(f'*{suffix}')):
      if len(found) > 1:
        raise UserError(f'{path} holds {len(found)} {suffix} files and no index; name the one to read')
      return found
  raise UserError(f'{path} holds no .safetensors and no .bin file')


def _load_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  try:
    return safetensors.numpy.load_file(path)
  except FileNotFoundError:
    raise UserError(f'{path} is missing; download the checkpoint again') from None
  except (OSError, ValueError, safetensors.SafetensorError) as error:
    raise UserError(f'{path} is truncated or damaged ({error}); download it again') from None


def _load_pickle(path: pathlib.Path) -> dict[str, np.ndarray]:
  try:
    import torch
  except ImportError:
    raise UserError(f'{path} is a PyTorch pickle; to read it: pip install "lavit_jax[torch]"') from None
  if not path.is_file():
    raise UserError(f'{path} is missing; download the checkpoint again')
  try:
    content = torch.load(path, map_location='cpu', weights_only=True)
  except Exception as error:  # pickle, zip and torch each have their own for a damaged file
    raise UserError(f'{path} is truncated or damaged ({type(error).__name__}); download it again') from None
  tensors = {path.stem: content} if isinstance(content, torch.Tensor) else content
  if not isinstance(tensors, dict) or not all(isinstance(x, torch.Tensor) for x in tensors.values()):
    raise UserError(f'{path} is not a flat dict of tensors')
  return {name: (x.float() if x.dtype == torch.bfloat16 else x).detach().numpy() for name, x in tensors.items()}
