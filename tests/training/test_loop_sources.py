"""The loop on a list of sources: it goes on to the bit, counts what is skipped, and tells how long it waits for data."""

import json
import shutil
import time

import jax
import jax.numpy as jnp
import nano
import pytest
from things import sample, write_tar

from lavit_jax.errors import UserError
from lavit_jax.models import lavit
from lavit_jax import sharding
from lavit_jax.training import loop, metrics

nano.install()


def lines(folder):
  return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


def test_goes_on_to_the_bit_and_counts_what_is_skipped(tmp_path, capsys, monkeypatch):
  compile_fully = jax.stages.Lowered.compile
  monkeypatch.setattr(jax.stages.Lowered, 'compile', lambda self: compile_fully(self, nano.QUICK_TO_COMPILE))
  for t in range(2):
    bad = [('x', {'png': b'no picture', 'txt': b'words'})]
    write_tar(tmp_path / f'{t}.tar', [sample(i) for i in range(20 * t, 20 * t + 20)] + bad)
  source = dict(format='tars', path=f'{tmp_path}/*.tar', window=7)
  config = nano.config('autoencoder', checkpoint_every=2, keep=3, data__sources=(source,), data__crop='random')
  loop.train(config, tmp_path / 'run')
  out, first = capsys.readouterr().out, lines(tmp_path / 'run')
  assert 'data/skipped_corrupt_image' in out and 'data_wait' in out and [row['step'] for row in first] == [1, 2, 3, 4]
  shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '4')
  loop.train(config, tmp_path / 'run')
  assert 'continuing from step 2' in capsys.readouterr().out and lines(tmp_path / 'run') == first


def test_sources_without_held_out_ones_are_told_at_once(tmp_path):
  config = nano.config('autoencoder', eval_every=4, data__sources=(dict(format='tars', path='x'),))
  with pytest.raises(UserError, match='data.sources without data.heldout'):
    loop.train(config, tmp_path / 'run')


def test_held_out_rows_are_of_the_held_out_sources(tmp_path):
  for name, start in ('a', 0), ('b', 100):
    write_tar(tmp_path / f'{name}.tar', [sample(i) for i in range(start, start + 20)])
  sources = {f'data__{key}': (dict(format='tars', path=f'{tmp_path}/{name}.tar'),) for key, name in (('sources', 'a'), ('heldout', 'b'))}
  config, model = nano.config('lm', **sources), lavit.build('nano')
  share = sharding.share(sharding.make_mesh(config.mesh), config.batch_size)
  red = {split: loop.next_batch(loop.open_data(config, model, share, split))['image'][:, 0, 0, 0] for split in ('train', 'heldout')}
  assert red['train'].max() < 20 and red['heldout'].tolist() == list(range(100, 108))


def test_waiting_is_what_the_device_waits(tmp_path, capsys):
  class Computing:
    ready = False

    def is_ready(self):
      return self.ready

  log, computing = metrics.Log(tmp_path, 0, num_steps=10, batch_size=4), Computing()
  log.pending = [(0, {'loss': computing})]
  assert log.fetch(lambda seconds: time.sleep(seconds) or 'batch', 0.1) == 'batch' and log.waited == 0
  computing.ready = True
  log.fetch(time.sleep, 0.1)
  assert 0.1 <= log.waited < 0.3
  log.restart_clock()
  assert log.waited == 0
  log.pending = []
  log.fetch(time.sleep, 0.1)
  time.sleep(0.1)
  log.step(1, {'loss': jnp.float32(1)})
  log.report({'data/skipped_no_image': 3})
  out = capsys.readouterr().out
  share = float(out.split('data_wait ')[1].split('%')[0])
  assert 25 < share < 60 and 'data/skipped_no_image 3' in out and log.waited == 0
  log.close()
