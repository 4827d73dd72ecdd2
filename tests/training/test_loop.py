"""The loop as users run it: in separate processes, killed, continued, on one device and eight."""

import json
import re
import signal
import time

import chex
import jax
import jax.numpy as jnp
import nano
import numpy as np
import pytest
from nano import finish, launch, rows, until

from lavit_jax.errors import UserError
from lavit_jax.training import loop
from lavit_jax.training.goodput import read_totals
from lavit_jax.training.loop import train
from lavit_jax.weights.loader import open_checkpoint
from lavit_jax.weights.store import folder
from lavit_jax.weights.store.bundle import bundle

nano.install()


OPTIONS = dict(
  num_steps=40, checkpoint_every=5, eval_every=20, eval_batches=1, optim__ema_decay=0.9
)


def test_killed_or_stopped_at_any_step_it_repeats_itself_bit_for_bit(start, tmp_path):
  """SIGKILL before the first checkpoint and between two, SIGTERM; the same losses as without."""
  whole_run = tmp_path / 'whole'
  broken_run = tmp_path / 'broken'
  finish(start('encoder', whole_run, **OPTIONS))
  # Far from the next evaluation: a run that ends between a checkpoint and that misses it.
  for step in (2, 12):
    process = start('encoder', broken_run, **OPTIONS)
    until(process, broken_run, step)
    process.kill()
    process.communicate()
  before = rows(broken_run)[-1]['step']
  process = start('encoder', broken_run, **OPTIONS)
  until(process, broken_run, max(22, before + 1))  # a step of its own: it handles the signal
  process.send_signal(signal.SIGTERM)
  out = finish(process, 143)
  last = rows(broken_run)[-1]['step']
  assert f'stopped at step {last} as asked' in out
  assert (broken_run / 'checkpoints' / str(last)).exists()
  assert not (broken_run / 'export').exists()

  out = finish(start('encoder', broken_run, **OPTIONS))
  assert f'continuing from step {last}' in out
  whole = rows(whole_run)
  broken = rows(broken_run)
  assert [row['step'] for row in whole if 'loss' in row] == list(range(1, 41))
  assert whole == broken  # all metrics, those of the held-out split among them, all digits
  assert len({row['loss'] for row in whole if 'loss' in row}) == 40
  totals = read_totals(broken_run)
  assert totals.starts == 4 and totals.seconds['down'] > 0
  assert totals.seconds['lost'] > 0  # at least steps 1 and 2 were made twice
  assert 0 < totals.goodput < 1 and min(totals.seconds.values()) >= 0
  goodput = out.splitlines()[-1]
  assert re.match(r'goodput [\d.]+% of [\d.]+ s in 4 starts: compile [\d.]+%', goodput), goodput
  exports = [
    folder.load_params(run / 'export', variant='nano')['vit'] for run in (whole_run, broken_run)
  ]
  chex.assert_trees_all_equal(*exports)


def test_sigterm_while_it_compiles(start, tmp_path):
  process = start('encoder', tmp_path, **OPTIONS)
  while not (tmp_path / 'checkpoints').exists():
    assert process.poll() is None, process.communicate()[0]
    time.sleep(0.01)
  process.send_signal(signal.SIGTERM)
  finish(process, 143)
  assert len(rows(tmp_path)) <= 2


@pytest.fixture(scope='session')
def finished(tmp_path_factory):
  """Every stage in turn; stage -> workdir."""
  runs = tmp_path_factory.mktemp('runs')
  finish(launch('all', runs))
  return {p.name: p for p in runs.iterdir()}


def test_every_stage_exports_its_parts(finished):
  parts = {
    stage: sorted(folder.load_params(run / 'export', variant='nano'))
    for stage, run in finished.items()
  }
  assert parts == dict(
    encoder=['vit'],
    autoencoder=['vae'],
    tokenizer=['decoder', 'tokenizer'],
    detokenizer=['decoder', 'uncond_embeddings', 'unet'],
    lm=['llama', 'understanding'],
  )


def test_what_is_frozen_stays(finished):
  before = folder.load_params(finished['tokenizer'] / 'export', ['decoder'])['decoder']
  after = folder.load_params(finished['detokenizer'] / 'export', ['decoder'])['decoder']
  np.testing.assert_array_equal(before['fc1']['kernel'], after['fc1']['kernel'])
  assert np.abs(before['context_proj_0']['kernel'] - after['context_proj_0']['kernel']).max() > 0
  first = folder.load_params(finished['tokenizer'] / 'export', ['tokenizer'])['tokenizer']['merger']
  copy = folder.load_params(finished['lm'] / 'export', ['understanding'])['understanding']['merger']
  difference = np.abs(
    first['blocks']['mlp']['fc1']['kernel'] - copy['blocks']['mlp']['fc1']['kernel']
  )
  assert 0 < difference.max() < 0.05  # it began as a copy and trains along


def test_a_continued_run_reads_only_what_stays_frozen(finished, reads, without_flops, capsys):
  options = nano.options_after('detokenizer', finished)
  train(nano.config('detokenizer', **options), finished['detokenizer'])
  assert 'continuing from step 4' in capsys.readouterr().out
  assert {name.split('/')[0] for name in reads} == {'vit', 'tokenizer', 'vae'}
  assert len(reads) == len(set(reads))


def test_metrics_and_pictures_are_there(finished):
  for stage, run in finished.items():
    logged = rows(run)
    assert [row['step'] for row in logged if 'loss' in row] == [1, 2, 3, 4], stage
  assert [row['step'] for row in rows(finished['tokenizer']) if 'heldout/loss' in row] == [2, 4]
  assert (finished['tokenizer'] / 'pictures' / 'tokenizer_0000004.png').exists()


def test_a_missing_stage_is_named(finished, tmp_path):
  with pytest.raises(
    UserError, match=r'stage lm needs tokenizer: name the folders .*--config.frozen='
  ):
    train(nano.config('lm', frozen=str(finished['encoder'] / 'export')), tmp_path)


def test_started_again_at_its_end_it_says_so(finished, capsys):
  train(nano.config('encoder'), finished['encoder'])
  assert 'done before; a larger num_steps goes on' in ' '.join(capsys.readouterr().out.split())


def test_fewer_steps_than_it_has_made_are_made_already(finished, capsys):
  train(nano.config('encoder', num_steps=3, profile='4:5'), finished['encoder'])
  out = ' '.join(capsys.readouterr().out.split())
  assert 'done before; a larger num_steps goes on' in out
  assert 'warning: profile=4:5 traces nothing: this run makes steps 5 to 3' in out


@pytest.mark.slow
def test_absent_null_text_embeddings_are_reported(finished, tmp_path, capsys, monkeypatch):
  def stop(*args):
    raise UserError('enough')

  exports = [
    str(finished[name] / 'export')
    for name in ('encoder', 'autoencoder', 'tokenizer', 'detokenizer')
  ]
  monkeypatch.setattr(loop, 'write_config', stop)
  for init_from, warned in ((exports[1], True), (exports[3], False)):
    with pytest.raises(UserError, match='enough'):
      train(
        nano.config('detokenizer', frozen=','.join(exports[:3]), init_from=init_from),
        tmp_path / str(len(init_from)),
      )
    out = ' '.join(capsys.readouterr().out.split())
    assert (
      (f'warning: init_from={init_from} has no uncond_embeddings: zeros take the place' in out)
      == warned
      == ('warning' in out)
    )


@pytest.mark.slow
def test_a_unet_goes_on_learning_by_its_own_scheduler(finished, tmp_path):
  """Its run keeps and exports the settings of the folder that it starts from; the loss differs."""
  scheduler = dict(
    scheduler=dict(
      prediction_type='v_prediction', rescale_betas_zero_snr=True, timestep_spacing='trailing'
    )
  )
  exports = [
    finished[name] / 'export' for name in ('encoder', 'autoencoder', 'tokenizer', 'detokenizer')
  ]
  losses = []
  for settings in ({}, scheduler):
    start = tmp_path / f'start{len(settings)}'
    run = tmp_path / f'run{len(settings)}'
    folder.save_params(start, 'nano', folder.load_params(exports[3]), settings=settings)
    train(
      nano.config(
        'detokenizer',
        frozen=','.join(map(str, exports[:3])),
        init_from=str(start),
        num_steps=1,
        checkpoint_every=1,
      ),
      run,
    )
    losses.append(json.loads((run / 'metrics.jsonl').read_text().splitlines()[0])['loss'])
    assert folder.read_settings(run / 'export') == settings
  assert abs(losses[0] - losses[1]) > 1e-3


def test_another_runs_checkpoint_is_refused(finished):
  with pytest.raises(
    UserError,
    match='checkpoint of encoder:nano, and this run is autoencoder:nano; choose another --workdir',
  ):
    train(nano.config('autoencoder'), finished['encoder'])


@pytest.mark.slow
def test_a_lost_loss_ends_the_run_and_no_checkpoint_has_its_parameters(
  finished, tmp_path, monkeypatch
):
  """An update is finite and too large, later losses are not; the run continues from before it."""
  make = loop.make_train_step

  def broken_once(*args):
    step = make(*args)

    class Broken:
      def lower(self, state, frozen, batch):
        compiled = step.lower(state, frozen, batch).compile(compiler_options=nano.QUICK_OPTIONS)

        def run(state, frozen, batch):
          number = int(state.step)
          state, values = compiled(state, frozen, batch)
          if number == 3:
            state = state._replace(
              params=jax.tree.map(lambda x: x + jnp.float32(1e30), state.params)
            )
          return state, values

        return type('Compiled', (), dict(compile=lambda _: run))()

    return Broken()

  options = dict(num_steps=20, checkpoint_every=1, optim__max_nonfinite=3)
  monkeypatch.setattr(loop, 'make_train_step', broken_once)
  with pytest.raises(
    UserError,
    match='not finite in 3 steps in a row, from step 5 on; the checkpoints 4.broken have '
    '.* it resumes from step 3',
  ):
    train(nano.config('autoencoder', **options), tmp_path)
  names = sorted(path.name for path in (tmp_path / 'checkpoints').iterdir())
  assert names == ['3', '4.broken'] or names == ['2', '3', '4.broken']
  monkeypatch.setattr(loop, 'make_train_step', make)
  train(nano.config('autoencoder', **options | dict(num_steps=5)), tmp_path)
  assert all(row['nonfinite'] == 0 for row in rows(tmp_path)[3:5])


DATA = dict(mesh__data=-1)
THREE_AXES = dict(mesh__data=2, mesh__fsdp=2, mesh__tensor=2)


@pytest.mark.parametrize(
  'mesh, stage',
  [
    (THREE_AXES, 'lm'),
    *(
      pytest.param(DATA, stage, marks=pytest.mark.slow)
      for stage in ('encoder', 'autoencoder', 'tokenizer', 'detokenizer', 'lm')
    ),
    *(
      pytest.param(THREE_AXES, stage, marks=pytest.mark.slow)
      for stage in ('encoder', 'autoencoder', 'tokenizer', 'detokenizer')
    ),
  ],
)
def test_eight_devices_give_the_losses_of_one(finished, tmp_path, stage, mesh):
  options = nano.options_after(stage, finished) | dict(checkpoint_every=0)
  out = finish(launch(stage, tmp_path, 8, **options, **mesh))
  sizes = [8, 1, 1] if len(mesh) == 1 else [2, 2, 2]
  assert (
    'mesh {'
    + ', '.join(f"'{axis}': {n}" for axis, n in zip(('data', 'fsdp', 'tensor'), sizes))
    + '}'
    in out
  )
  one, eight = (
    [row['loss'] for row in rows(workdir) if 'loss' in row]
    for workdir in (finished[stage], tmp_path)
  )
  assert len(one) == 4
  np.testing.assert_allclose(eight, one, rtol=1e-4)


@pytest.mark.slow
def test_a_tokenizer_without_a_codebook_is_reported_marked_and_refused(finished, tmp_path, capsys):
  frozen = str(finished['encoder'] / 'export')
  train(nano.config('tokenizer', frozen=frozen, num_steps=1), tmp_path / 'short')
  out = ' '.join(capsys.readouterr().out.split())
  assert (
    'warning: num_steps=1 ends before quantization begins' in out
    and 'the codebook of this run was never trained' in out
  )
  export = tmp_path / 'short' / 'export'
  assert folder.read_config(export)['metadata']['codebook'] == 'untrained'
  assert folder.read_config(finished['tokenizer'] / 'export')['metadata']['codebook'] == 'trained'
  words = f'{nano.ROOT}/lavit_jax/assets/tiny/language_model'
  for use in (
    lambda: train(nano.config('lm', frozen=f'{frozen},{export}'), tmp_path / 'lm'),
    lambda: bundle(tmp_path / 'all', [export], words),
    lambda: open_checkpoint(export, None),
  ):
    with pytest.raises(
      UserError, match='its tokenizer was never quantized, so its codes mean nothing'
    ):
      use()


@pytest.mark.slow
def test_a_trained_tokenizer_goes_on_with_its_codebook(finished, tmp_path, capsys):
  start = finished['tokenizer'] / 'export'
  train(
    nano.config(
      'tokenizer', frozen=str(finished['encoder'] / 'export'), init_from=str(start), num_steps=2
    ),
    tmp_path,
  )
  before, after = (
    folder.load_params(path, ['tokenizer'])['tokenizer']['quantizer']['embedding']
    for path in (start, tmp_path / 'export')
  )
  assert 0 < np.linalg.norm(after - before, axis=1).max() < 0.05  # two moving averages of 0.99
  assert 'the codebook of init_from goes on' in ' '.join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_a_finished_run_that_continues_warns_of_its_learning_rate(start, tmp_path):
  options = dict(
    optim__warmup_steps=2,
    optim__final_fraction=0.01,
    optim__learning_rate=1e-3,
    checkpoint_every=20,
  )
  finish(start('encoder', tmp_path, num_steps=20, **options))
  out = ' '.join(finish(start('encoder', tmp_path, num_steps=22, **options)).split())
  assert (
    'warning: at step 20 the learning rate goes from 1e-05, as this run was begun '
    '(num_steps=20), to' in out
  )
