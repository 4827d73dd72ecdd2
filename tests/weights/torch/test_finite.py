"""Numbers that a type cannot hold, and NaN: counted and named, against numpy's own count."""

import pathlib
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from tensors import save_tensors

from lavit_jax import cli
from lavit_jax.errors import UserError
from lavit_jax.porting import from_torch
from lavit_jax.weights.store import folder
from lavit_jax.weights.torch import convert, finite

TINY = pathlib.Path(cli.ASSETS) / 'tiny'
VAE = 'vae/diffusion_pytorch_model.safetensors'


@pytest.mark.parametrize('dtype', [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_nonfinite_numbers_are_counted_as_by_numpy(dtype):
  array = np.random.default_rng(0).normal(size=(300, 7)).astype(dtype)
  for row, value in ((3, np.nan), (5, np.inf), (7, -np.inf), (8, -np.nan)):
    array[row, row % 3] = value
  for view in (array, array.T, array[::2], array[:0], array[3, 0].reshape(())):
    assert (
      finite.count_nonfinite(np.asarray(view)) == (~np.isfinite(np.asarray(view, np.float64))).sum()
    )
  assert finite.count_nonfinite(np.arange(5)) == 0


def test_all_blocks_are_counted(monkeypatch):
  monkeypatch.setattr(finite, 'BLOCK', 4)
  array = np.ones(11, np.float32)
  array[[1, 9]] = np.nan
  assert finite.count_nonfinite(array) == 2


def test_what_float16_loses():
  array = np.array([1, 1e5, -7e4, 1e-9, 0, np.inf], np.float32)
  after, counts = finite.cast(array, np.float16)
  assert after.dtype == np.float16 and counts == finite.Counts(
    nonfinite=1, overflow=2, underflow=1, size=6
  )
  assert finite.cast(array, ml_dtypes.bfloat16)[1] == finite.Counts(1, 0, 0, 6)
  small = np.array([1e-9, 5e-5], ml_dtypes.bfloat16)
  assert finite.cast(small, np.float16)[1] == finite.Counts(0, 0, 1, 2)
  assert finite.cast(small[:1], np.float16)[1] == finite.Counts(0, 0, 1, 1, lost=True)
  assert finite.cast(np.array([3.4e38], np.float32), ml_dtypes.bfloat16)[1].overflow == 1


@pytest.fixture
def stable(tmp_path):
  """A Stable Diffusion folder, and how to change a tensor of its VAE."""
  for part in ('unet', 'vae'):
    shutil.copytree(TINY / 'pixel_decoding' / part, tmp_path / 'src' / part)

  def change(name, value):
    state = {key: x.astype(np.float32) for key, x in load_file(tmp_path / 'src' / VAE).items()}
    state[name] = np.ascontiguousarray(
      np.broadcast_to(value(state[name]), state[name].shape).astype(np.float32)
    )
    save_tensors(state, tmp_path / 'src' / VAE)
    return tmp_path / 'src'

  return change


def first(value):
  return lambda x: np.where(np.arange(x.size).reshape(x.shape) == 0, np.float32(value), x)


@pytest.mark.parametrize(
  ('value', 'message'),
  [
    (
      first(1e5),
      r'beyond the range of float16 in 1 tensor: vae: decoder.conv_in.bias '
      r'\(1 of 48 numbers\); choose bfloat16',
    ),
    (lambda x: x * 0 + 1e-9, r'too small for float16.* vae: decoder.conv_in.bias \(48 of 48'),
    (
      first(np.nan),
      r'NaN or infinity in 1 tensor: vae: decoder.conv_in.bias \(1 of 48.*--allow-nonfinite',
    ),
    (first(-np.inf), 'NaN or infinity'),
  ],
)
def test_a_conversion_to_float16(stable, tmp_path, capsys, value, message):
  src = stable('decoder.conv_in.bias', value)
  with pytest.raises(UserError, match=message):
    convert.plan_conversion(src, tmp_path / 'checkpoint', dtype='float16').run(lambda size: None)
  assert not (tmp_path / 'checkpoint').exists()


def test_numbers_that_vanish_beside_larger_ones_are_noted(stable, tmp_path, capsys):
  src = stable('decoder.conv_in.bias', first(1e-9))
  assert (
    cli.main(
      ['convert', '--src', str(src), '--dst', str(tmp_path / 'checkpoint'), '--dtype', 'float16']
    )
    == 0
  )
  output = capsys.readouterr().err
  assert (
    'too small for float16 became zero' in output
    and 'vae: decoder.conv_in.bias (1 of 48 numbers)' in output
  )


def test_nan_of_a_source_and_of_an_export(stable, tmp_path, capsys):
  src = stable('decoder.conv_in.bias', first(np.nan))
  with pytest.raises(UserError, match='decoder.conv_in.bias'):
    convert.plan_conversion(src, tmp_path / 'checkpoint').run(lambda size: None)
  with pytest.raises(UserError, match='decoder.conv_in.bias'):
    from_torch(src, 'vae', variant='tiny')
  assert np.isnan(
    from_torch(src, 'vae', variant='tiny', allow_nonfinite=True)['decoder']['conv_in']['bias'][0]
  )
  assert (
    cli.main(
      ['convert', '--src', str(src), '--dst', str(tmp_path / 'checkpoint'), '--allow-nonfinite']
    )
    == 0
  )
  assert 'NaN or infinity kept in 1 tensor: vae: decoder.conv_in.bias' in capsys.readouterr().err
  with pytest.raises(UserError, match='decoder.conv_in.bias'):
    convert.plan_conversion(tmp_path / 'checkpoint', tmp_path / 'back').run(lambda size: None)
  convert.plan_conversion(tmp_path / 'checkpoint', tmp_path / 'back', allow_nonfinite=True).run(
    lambda size: None
  )
  assert np.isnan(load_file(tmp_path / 'back' / VAE)['decoder.conv_in.bias'][0])


def test_an_export_to_float16(stable, tmp_path):
  src = stable('decoder.conv_in.bias', first(1e5))
  convert.plan_conversion(src, tmp_path / 'checkpoint').run(lambda size: None)
  with pytest.raises(UserError, match='decoder.conv_in.bias .1 of 48 numbers'):
    convert.plan_conversion(tmp_path / 'checkpoint', tmp_path / 'back', dtype='float16').run(
      lambda size: None
    )


def test_checkpoint_folders(tmp_path):
  with pytest.raises(UserError, match='vae/value .1 of 2 numbers'):
    folder.save_params(
      tmp_path / 'half', 'tiny', {'vae': np.array([1, 1e5], np.float32)}, dtype='float16'
    )
  folder.save_params(tmp_path / 'whole', 'tiny', {'vae': np.array([1, 1e5], np.float32)})
  with pytest.raises(UserError, match='beyond the range of float16'):
    folder.load_params(tmp_path / 'whole', dtype='float16')
