"""TorchScript files, which hold the code of a module beside its weights.

Only who asks for one reads it: `files.load` and `lavit convert` do not, since they run no code.
"""

from __future__ import annotations

import pathlib
import zipfile

import numpy as np

from lavit_jax.errors import UserError


def is_script(path: pathlib.Path) -> bool:
  """Whether a file is TorchScript."""
  if not zipfile.is_zipfile(path):
    return False
  with zipfile.ZipFile(path) as archive:
    return any(name.split('/')[1:2] == ['code'] for name in archive.namelist())


def load(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The tensors of a TorchScript file by their names.

  Raises:
    UserError: the file is damaged, or torch is not installed.
  """
  try:
    import torch
  except ImportError:
    raise UserError(
      f"{path} is TorchScript, which needs torch; pip install -e '.[torch]' -c "
      'launch/constraints.txt, or save its state_dict as safetensors'
    ) from None
  try:
    module = torch.jit.load(path, map_location='cpu')
  except RuntimeError as error:
    raise UserError(
      f'{path} cannot be read as TorchScript ({str(error).splitlines()[0]}); download it again'
    ) from None
  return {name: tensor.numpy() for name, tensor in module.state_dict().items()}
