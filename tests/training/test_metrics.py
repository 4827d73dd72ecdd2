import json
import math
import os
import types

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lavit_jax import accelerators
from lavit_jax.errors import UserError
from lavit_jax.training import flops, metrics
from lavit_jax.training.profiler import ProfilerTrace
from lavit_jax.visualization import image_grid


def lines(folder):
  return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


def test_every_step_is_in_the_jsonl_and_the_terminal_shows_means(tmp_path, capsys):
  log = metrics.MetricLogger(
    tmp_path, 0, num_steps=10, batch_size=4, flops=lambda share: 2e9, peak_tflops=1.0, tokens=7
  )
  for step in (1, 2, 3):
    log.step(step, {'keep_ratio': jnp.float32(0.1), 'loss': jnp.float32(step)})
  means = log.report()
  log.step(4, {'keep_ratio': jnp.float32(0.1), 'loss': jnp.float32(7)})
  log.evaluation(4, {'loss': 0.5})
  log.close()
  assert means == {'loss': 2.0, 'keep_ratio': pytest.approx(0.1)}
  assert [(row['step'], row.get('loss'), row.get('heldout/loss')) for row in lines(tmp_path)] == [
    (1, 1, None),
    (2, 2, None),
    (3, 3, None),
    (4, 7, None),
    (4, None, 0.5),
  ]
  assert lines(tmp_path)[0]['keep_ratio'] == float(np.float32(0.1))  # all digits
  out = capsys.readouterr().out
  assert (
    'step 3/10' in out
    and 'loss 2 ' in out
    and 'ETA' in out
    and 'examples/s' in out
    and 'tokens/s' in out
    and 'MFU' in out
    and 'step 4 held-out  loss 0.5' in out
  )
  assert list((tmp_path / 'tensorboard').iterdir())


def test_padding_lowers_the_mfu_and_the_speed(tmp_path, monkeypatch):
  """Of a quarter of the slots that are filled, as the metric says."""
  shown = {}
  log = metrics.MetricLogger(
    tmp_path, 0, 10, 4, flops=flops.StepFlops(1e12, 4e12).at, peak_tflops=8.0, tokens=1000
  )
  monkeypatch.setattr(log, 'scalars', lambda step, values: shown.update(values))
  for step, share in ((1, 0.2), (2, 0.3)):
    log.step(step, {'loss': jnp.float32(1), 'packed_share': jnp.float32(share)})
  log.report()
  speed = shown['steps_per_s']
  assert (
    speed > 0
    and shown['tokens_per_s'] == pytest.approx(250 * speed)
    and shown['mfu'] == pytest.approx(2 / 8 * speed)
  )
  log.close()


def test_a_run_goes_on_when_nobody_reads_what_it_says(tmp_path, monkeypatch):
  read, write = os.pipe()
  os.close(read)
  monkeypatch.setattr(metrics.sys, 'stdout', os.fdopen(write, 'w'))
  log = metrics.MetricLogger(tmp_path, 0, 2, 4)
  for step in (1, 2):
    log.step(step, {'loss': jnp.float32(step)})
    log.report()
  log.close()
  assert [row['step'] for row in lines(tmp_path)] == [1, 2]


def test_a_continued_run_drops_the_steps_that_it_makes_again(tmp_path):
  log = metrics.MetricLogger(tmp_path, 0, 10, 4)
  for step in range(1, 6):
    log.step(step, {'loss': jnp.float32(step)})
  log.close()
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 6, "los')  # killed in the middle of a line
  log = metrics.MetricLogger(tmp_path, 3, 10, 4)
  log.step(4, {'loss': jnp.float32(40)})
  log.close()
  assert [(row['step'], row['loss']) for row in lines(tmp_path)] == [
    (1, 1),
    (2, 2),
    (3, 3),
    (4, 40),
  ]


def test_the_jsonl_is_json_even_where_nothing_was_measured(tmp_path):
  log = metrics.MetricLogger(tmp_path, 0, 10, 4)
  log.step(1, {'loss': jnp.float32(1), 'accuracy_text_only': jnp.float32(math.nan)})
  log.evaluation(1, {'loss': math.inf})
  log.close()
  assert 'NaN' not in (tmp_path / 'metrics.jsonl').read_text()
  assert lines(tmp_path) == [
    {'step': 1, 'loss': 1, 'accuracy_text_only': None},
    {'step': 1, 'heldout/loss': None},
  ]


def test_metrics_that_were_not_measured_are_not_shown(tmp_path, monkeypatch, capsys):
  log = metrics.MetricLogger(tmp_path, 0, 10, 4)
  shown = []
  monkeypatch.setattr(log.board, 'add_scalar', lambda name, value, step: shown.append(name))
  log.step(1, {'loss': jnp.float32(1), 'loss_text_only': jnp.float32(math.nan)})
  log.report()
  log.close()
  assert (
    'loss' in shown
    and 'loss_text_only' not in shown
    and 'loss_text_only' not in capsys.readouterr().out
  )


def test_mean_skips_what_was_not_measured_but_shows_a_lost_loss():
  rows = [{'loss': 1.0, 'a': math.nan, 'b': math.nan}, {'loss': math.nan, 'a': 2.0, 'b': math.nan}]
  mean = metrics.mean_metrics(rows)
  assert math.isnan(mean['loss']) and mean['a'] == 2.0 and math.isnan(mean['b'])
  assert metrics.mean_metrics([]) == {}


def test_steps_that_were_skipped_are_counted_and_leave_the_means_alone(tmp_path, capsys):
  log = metrics.MetricLogger(tmp_path, 0, 10, 4)
  for step, loss in enumerate((1.0, math.nan, 3.0), 1):
    log.step(step, {'loss': jnp.float32(loss), 'nonfinite': jnp.float32(math.isnan(loss))})
  assert log.report()['loss'] == 2.0
  assert [row['nonfinite'] for row in log.take_new()] == [0, 1, 0] and log.take_new() == []
  log.close()
  assert 'warning: 1 updates were skipped' in capsys.readouterr().out


def test_pictures(tmp_path):
  rows = [np.full((3, 4, 4, 3), value, np.uint8) for value in (10, 200)]
  log = metrics.MetricLogger(tmp_path, 0, 10, 4)
  log.images(5, {'tokenizer': image_grid(*rows)})
  log.close()
  with Image.open(tmp_path / 'pictures' / 'tokenizer_0000005.png') as image:
    pixels = np.asarray(image)
  assert pixels.shape == (8, 12, 3) and (pixels[:4] == 10).all() and (pixels[4:] == 200).all()


class Device:
  def __init__(self, stats):
    self.memory_stats = lambda: stats


def test_memory_in_use_is_that_of_the_fullest_device(monkeypatch):
  one = dict(bytes_in_use=2**30, peak_bytes_in_use=2**31)
  other = dict(bytes_in_use=3 * 2**30, peak_bytes_in_use=0)
  monkeypatch.setattr(metrics.jax, 'local_devices', lambda: [Device(one), Device(other)])
  assert metrics.memory_in_use() == {'hbm_gib': 3.0, 'hbm_peak_gib': 2.0}
  monkeypatch.setattr(metrics.jax, 'local_devices', lambda: [Device(None)])
  assert metrics.memory_in_use() == {}


@pytest.mark.parametrize(
  'kinds, peak',
  [
    (['TPU v5 lite'] * 4, 788),
    (['NVIDIA A100-SXM4-80GB'] * 2, 624),
    (['NVIDIA H100 80GB HBM3'], 989),
    (['NVIDIA H100 PCIe'], 756),
    (['TPU v5', 'TPU v5p'], 918),
    (['TPU v5e'], 197),
    (['TPU v6 lite', 'TPU v6e'], 1836),
    (['TPU v4'], 275),
    (['TPU v4 lite'], 0),
    (['NVIDIA L4'], 121),
    (['NVIDIA L40S'], 0),
    (['cpu'], 0),
    (['NVIDIA L4', 'NVIDIA L40S'], 0),
  ],
)
def test_the_peak_of_known_accelerators(kinds, peak):
  assert (
    accelerators.peak_tflops([types.SimpleNamespace(device_kind=kind) for kind in kinds]) == peak
  )


def test_a_trace_of_chosen_steps(tmp_path):
  trace = ProfilerTrace('2:3', tmp_path)
  for step in range(1, 5):
    trace.before(step)
    assert trace.running == (step in (2, 3))
    trace.after(step, jnp.ones(3) + step)
  assert not trace.running and len(list((tmp_path / 'profile').rglob('*.xplane.pb'))) == 1
  trace = ProfilerTrace('', tmp_path / 'other')
  trace.before(1)
  trace.after(1, None)
  assert not (tmp_path / 'other').exists()


@pytest.mark.parametrize('steps', ['3', '3:2', '0:1', 'a:b', '1:', '-1:2'])
def test_steps_that_cannot_be_traced(steps, tmp_path):
  with pytest.raises(
    UserError, match=f"profile='{steps}': give the first and the last step to trace, such as 10:12"
  ):
    ProfilerTrace(steps, tmp_path)


def test_duration():
  assert [metrics.duration(s) for s in (5, 3725, 90061)] == ['0:00:05', '1:02:05', '25:01:01']
