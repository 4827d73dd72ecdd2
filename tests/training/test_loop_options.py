"""Options that contradict each other are refused before anything is traced or written."""

import nano
import pytest

from lavit_jax.errors import UserError
from lavit_jax.training.loop import train

nano.install()


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(data__source='/nowhere'), 'data: /nowhere has no emoji data set'),
    (dict(data__tokenizer_folder='/nowhere'), 'data: /nowhere/tokenizer.json does not exist'),
    (dict(data__text_length=8), 'data: text_length is 8, but this text has'),
    (dict(dtype='float33'), "dtype='float33' is unknown; choose float32 or bfloat16"),
    (dict(remat='most'), "remat='most' is unknown; choose none or"),
    (dict(log_every=0), 'log_every=0 must be an integer of at least 1'),
    (dict(profile='5'), "profile='5' must give the first and the last step"),
    (
      dict(eval_every=1, eval_batches=0),
      'eval_batches=0 with eval_every=1: give at least 1, or eval_every=0',
    ),
    (dict(peak_tflops=-1.0), 'peak_tflops=-1.0 must be a number of at least 0'),
    (dict(data__text_length=0), 'data.text_length=0 must be an integer of at least 1'),
    (
      dict(data__image_size=48),
      'data.image_size=48: the encoder of variant nano learns from 32 pixels a side',
    ),
    (
      dict(variant='lavit_7b'),
      'data.image_size=32: the encoder of variant lavit_7b learns from 224 pixels a side',
    ),
    (
      dict(data__task='images'),
      "stage='encoder' needs data.task='contrastive' .now 'images'. .*; take configs/encoder.py",
    ),
    (dict(mesh__tensor=3), 'mesh: data=-1, fsdp=1, tensor=3 does not fit'),
  ],
)
def test_bad_options_are_named(changes, message, tmp_path):
  with pytest.raises(UserError, match=message):
    train(nano.config('encoder', **changes), tmp_path)


TARS = dict(format='tars', path='x.tar')


@pytest.mark.parametrize(
  'stage, changes, message',
  [
    ('lm', dict(lm__num_rows=0), 'lm.num_rows=0 must be an integer of at least 1'),
    ('lm', dict(lm__row_length=0), 'lm.row_length=0 must be an integer of at least 1'),
    ('lm', dict(lm__loss_chunks=0), 'lm.loss_chunks=0 must be an integer of at least 1'),
    (
      'lm',
      dict(data__shares=dict(caption=-1.0)),
      'data.shares.caption=-1.0 must be a number of at least 0',
    ),
    (
      'lm',
      dict(data__sources=('/a.tar',)),
      r"data.sources\[0\] is '/a.tar'; give {'format': ..., 'path': ...}",
    ),
    (
      'lm',
      dict(data__sources=(TARS, TARS | dict(weight='3'))),
      r"data.sources\[1\] has weight '3', which is no float",
    ),
    (
      'lm',
      dict(data__sources=(TARS,), data__heldout=(TARS | dict(window=0.5),)),
      r'data.heldout\[0\] has window 0.5, which is no int',
    ),
    (
      'autoencoder',
      dict(data__crop='centre'),
      "data.crop='centre' is unknown; choose none or center or random",
    ),
    (
      'autoencoder',
      dict(data__image_size=31),
      'data.image_size=31 must be a multiple of 2 for stage autoencoder of variant nano',
    ),
    (
      'tokenizer',
      dict(data__image_size=30, picture_every=1),
      'data.image_size=30 must be a multiple of 4 for stage tokenizer',
    ),
    (
      'lm',
      dict(lm__num_rows=6, accumulate=4),
      'lm.num_rows=6 must be a multiple of the 4 x 1 pieces .*; accumulate=2 would do',
    ),
    (
      'autoencoder',
      dict(batch_size=12, accumulate=8),
      'batch_size=12 must be a multiple of the 8 x 1 pieces .*; accumulate=6 would do',
    ),
  ],
)
def test_options_are_checked_before_anything_is_traced(stage, changes, message, tmp_path):
  with pytest.raises(UserError, match=message):
    train(nano.config(stage, **changes), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  'config_stage, stage, lacks',
  [
    ('encoder', 'lm', 'lm'),
    ('tokenizer', 'detokenizer', 'detokenizer'),
    ('lm', 'autoencoder', 'kl_weight'),
  ],
)
def test_a_stage_with_the_config_of_another(config_stage, stage, lacks, tmp_path):
  config = nano.config(config_stage)
  with config.unlocked():
    config.stage = stage
  with pytest.raises(
    UserError,
    match=f"stage='{stage}' needs data.task=.* and '{lacks}' in the config; "
    f'take configs/{stage}.py',
  ):
    train(config, tmp_path)
