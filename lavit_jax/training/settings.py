"""The settings that a run trains with (models/settings.py): those of the checkpoints that it begins with."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable

from lavit_jax.errors import UserError
from lavit_jax.models import lavit
from lavit_jax.models.settings import GROUPS, differences, for_modules, format_setting
from lavit_jax.training import stages
from lavit_jax.training.checkpoint import saved_settings
from lavit_jax.weights.store import folder


def run_settings(
  config, frozen: Iterable[str], init_from: Iterable[str], workdir: pathlib.Path
) -> dict[str, dict]:
  """The settings of the parts that a run reads from its folders; of the others, those that its last checkpoint was trained with.

  Args:
    config: the page.
    frozen, init_from: the folders that it names.
    workdir: of the run.

  Raises:
    UserError: two folders disagree about a part, or one is damaged.
  """
  stage = stages.build_stage(config, lavit.build(config.variant), 1)
  wanted = stage.needs + stage.starts
  taken = [
    (path, [name for name in folder.read_config(path)['parts'] if name in wanted])
    for path in frozen
  ]
  taken += [
    (path, [name for name in folder.read_config(path)['parts'] if name not in stage.needs])
    for path in init_from
  ]
  found, origins = {}, {}
  for path, parts in taken:
    theirs = for_modules(folder.read_settings(path), parts)
    for name, part in GROUPS.items():
      if part.module not in parts:
        continue
      fields = theirs.get(name, {})
      if name in found and (odd := differences({name: found[name]}, {name: fields})):
        row, field = lavit.variant_config(config.variant), odd[0][1]
        raise UserError(
          f'{origins[name]} has {format_setting(found, name, field, row)} of {name}, and {path} has {format_setting(theirs, name, field, row)}; '
          'name one of the two alone, in frozen or init_from'
        )
      found[name] = fields
      origins.setdefault(name, path)
  before = {name: fields for name, fields in saved_settings(workdir).items() if name not in found}
  return before | {name: fields for name, fields in found.items() if fields}
