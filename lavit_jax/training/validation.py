"""What a page may not say: told in one line before anything is traced or read."""

from __future__ import annotations

import contextlib

from lavit_jax import sharding
from lavit_jax.data import loader
from lavit_jax.errors import UserError
from lavit_jax.training import options, stages
from lavit_jax.training.config import config_leaves


def check_values(config) -> None:
  """Raises UserError for an option that cannot be meant, whatever the others are (options.py)."""
  options.check_values(dict(config_leaves(config)))
  if (
    config.optim.get('schedule') == 'rewarm' and not 0 < config.optim.rewarm_from < config.num_steps
  ):
    raise UserError(
      f"optim.schedule='rewarm' needs optim.rewarm_from, the step from which it warms up anew, between 0 and num_steps={config.num_steps} "
      f'(now {config.optim.rewarm_from})'
    )


def check_options(config, mesh) -> None:
  """Raises UserError for values that would fail later, in the middle of something."""
  check_values(config)
  values = dict(config_leaves(config))
  if config.eval_every and config.eval_batches < 1:
    raise UserError(
      f'eval_batches={config.eval_batches} with eval_every={config.eval_every}: give at least 1, or eval_every=0'
    )
  stages.validate_stage(config)
  with name_data_option():
    data = config.data.to_dict()
    checked = ('task', 'shares', 'question_weights', 'crop', 'sources', 'heldout')
    loader.validate_options(**{key: data[key] for key in checked if key in data})
  if config.accumulate > 1 and config.stage in ('encoder', 'tokenizer'):
    raise UserError(
      f'accumulate={config.accumulate}: stage {config.stage} learns from whole batches; use more devices or another remat policy'
    )
  if (
    config.data.get('sources')
    and not config.data.heldout
    and (config.eval_every or config.picture_every)
  ):
    raise UserError(
      'data.sources without data.heldout: give held-out sources too, or eval_every=0 and picture_every=0'
    )
  if config.data.get('sources') and config.batch_size % max(config.data.get('shards', 1), 1):
    raise UserError(
      f'batch_size={config.batch_size} must be a multiple of data.shards={config.data.shards}'
    )
  shards, sizes = (
    sharding.batch_shards(mesh),
    {key: values[key] for key in ('batch_size', 'lm.num_rows') if key in values},
  )
  fits = [
    n
    for n in range(1, config.accumulate + 1)
    if not any(size % (n * shards) for size in sizes.values())
  ]
  if config.accumulate not in fits:
    key = next(key for key, size in sizes.items() if size % (config.accumulate * shards))
    pieces = f'{config.accumulate} x {shards}' if config.accumulate > 1 else shards
    hint = f'; accumulate={fits[-1]} would do' if fits else ''
    raise UserError(
      f'{key}={sizes[key]} must be a multiple of the {pieces} pieces that the mesh makes of it{hint}'
    )


@contextlib.contextmanager
def name_data_option():
  """What is wrong with data, as a UserError that names the option, or at least 'data'."""
  try:
    yield
  except UserError as error:
    if error.option:
      raise type(error)(f'data.{error}') from error
    raise error.within('data') from error
  except (FileNotFoundError, ValueError) as error:
    raise UserError(f'data: {error}') from error
