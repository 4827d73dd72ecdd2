"""The benchmarks fit the package: the names they use exist, and PyTorch computes the same."""

import ast
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax import Lavit
from lavit_jax.data.emoji import corpus
from lavit_jax.models import lavit
from lavit_jax.models.initialization import init_params
from lavit_jax.models.llama import Llama
from lavit_jax.training.config import load_config
from lavit_jax.weights.store.folder import save_params

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / 'benchmarks'
NEED_TORCH = ('inference', 'peers')
# Benchmarks that other benchmarks import.
SIBLINGS = ('curves', 'ours', 'peers', 'quantizer_training', 'quantizers', 'weights')


@pytest.fixture
def load(monkeypatch):
  """load(name): a benchmark as a module; its imports of other benchmarks are undone afterwards."""
  monkeypatch.syspath_prepend(FOLDER)
  for sibling in SIBLINGS:
    monkeypatch.delitem(sys.modules, sibling, raising=False)

  def load(name):
    if name in NEED_TORCH:
      pytest.importorskip(
        'diffusers', reason="needs PyTorch; pip install -e '.[torch]' -c launch/constraints.txt"
      )
    spec = importlib.util.spec_from_file_location(f'benchmark_{name}', FOLDER / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look it up
    spec.loader.exec_module(module)
    return module

  yield load
  for sibling in SIBLINGS:
    sys.modules.pop(sibling, None)


@pytest.mark.parametrize('name', sorted(path.stem for path in FOLDER.glob('*.py')))
def test_names_of_the_package_exist(name, load):
  """It can be imported, and each `module.name` of a module of the package exists."""
  module = load(name)
  for node in ast.walk(ast.parse((FOLDER / f'{name}.py').read_text())):
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
      value = getattr(module, node.value.id, None)
      if (
        value is Lavit
        or isinstance(value, types.ModuleType)
        and value.__name__.startswith('lavit_jax')
      ):
        assert hasattr(value, node.attr), f'line {node.lineno}: {node.value.id}.{node.attr}'


def test_tokenize_and_decode_agree_with_pytorch(load, monkeypatch):
  benchmark = load('inference')
  monkeypatch.setattr(benchmark.jax_side, 'SMALL', lavit.build('tiny'))
  monkeypatch.setattr(benchmark, 'PICTURES', 2)
  monkeypatch.setattr(benchmark, 'NEW', 4)
  monkeypatch.setattr(
    benchmark,
    'LLAMA',
    Llama(
      vocab_size=300,
      hidden_size=64,
      num_layers=2,
      num_heads=2,
      num_kv_heads=2,
      head_dim=32,
      mlp_dim=96,
    ),
  )
  result = benchmark.compare_tokenizing(1)
  assert result['same'] == result['same_keep'] == 1
  assert 0 < result['kept'] < 1
  # With float weights they compare the tokens themselves.
  for case in ('decode_b1', 'decode_b8_cfg', 'decode_b1_int8'):
    assert benchmark.CASES[case](1)['ratio'] > 0


@pytest.mark.parametrize('file', [None, 'all.json'])
def test_json_ends_with_the_ratios(file, load, monkeypatch, capsys, tmp_path):
  benchmark = load('inference')

  def case(ratio):
    return lambda repeats: dict(ratio=ratio, seconds=1.0)

  cases = {name: case(n + 0.5) for n, name in enumerate(benchmark.CASES)}
  monkeypatch.setattr(benchmark, 'CASES', cases)
  only = 'decode_b1,decode_b8,decode_b8_cfg,tokenize,unet'
  paths = [] if file is None else [str(tmp_path / file)]
  monkeypatch.setattr(sys, 'argv', ['inference.py', '--only', only, '--json', *paths])
  benchmark.main()
  last = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert last == dict(decode_b1=0.5, decode_b8=1.5, decode_b8_cfg=2.5, tokenize=4.5, unet=5.5)
  if file:
    assert json.loads((tmp_path / file).read_text())['unet'] == dict(ratio=5.5, seconds=1.0)


@pytest.mark.slow
def test_a_run_on_a_device_keeps_the_other_cases(tmp_path):
  """A case that fails, here for lack of time, leaves its error."""
  script = [FOLDER / 'device.sh', '--tiny', '--only', 'attention,train_wide', '--seconds', '300']
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHON': sys.executable, 'OUT': str(tmp_path)}
  subprocess.run(['bash', *script], env=env, check=True)
  subprocess.run(
    ['bash', *script[:-1], '1'], env={**env, 'OUT': str(tmp_path / 'late')}, check=True
  )
  cases = json.loads((tmp_path / 'device.json').read_text())['cases']
  for kernel in ('plain', 'pallas'):
    assert max(cases['attention'][kernel]['max_relative_errors'].values()) < 2**-6  # bfloat16
  assert cases['attention']['cudnn'] == 'no GPU'
  assert cases['train_wide']['tokens_per_second'] > 0
  late = json.loads((tmp_path / 'late' / 'device.json').read_text())['cases']
  assert [case['error'] for case in late.values()] == ['no time was left'] * 2


def read_records(folder):
  """{run: its records without the times}."""
  runs = {}
  for path in folder.glob('*.jsonl'):
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
      del record['seconds'], record['milliseconds_per_step']
    runs[path.stem] = records
  return runs


@pytest.mark.slow
def test_codebook_study_resumes_and_reports(load, monkeypatch, capsys, tmp_path):
  benchmark = load('codebook')
  options = ['--codes', '64', '--code_dim', '8', '--steps', '6', '--quantize_from', '2']
  options += ['--record_every', '2', '--evaluate_every', '4', '--batch_size', '4']
  options += ['--train_images', '12', '--heldout_images', '6']

  def study(folder, *variants):
    benchmark.main(['--workdir', str(tmp_path / folder), *options, '--variants', *variants])
    return read_records(tmp_path / folder)

  runs = study('whole', *benchmark.VARIANTS)
  assert sorted(runs) == sorted(f'{name}-seed0' for name in benchmark.VARIANTS)
  for records in runs.values():
    assert [record['step'] for record in records] == [2, 4, 6]
    assert 'usage' not in records[0]
    assert records[-1]['cosine'] < records[0]['cosine']
    assert 0 < records[-1]['usage'] <= 100
    assert 1 < records[-1]['heldout/perplexity'] <= 64

  def stop_at_the_end(path, state, seconds):
    if state.step == 6:  # its record is written, the state is not
      raise KeyboardInterrupt
    save_state(path, state, seconds)

  save_state = benchmark.save_state
  for name in ('ours', 'gradient'):
    monkeypatch.setattr(benchmark, 'save_state', stop_at_the_end)
    with pytest.raises(KeyboardInterrupt):
      study('resumed', name)
    monkeypatch.setattr(benchmark, 'save_state', save_state)
    capsys.readouterr()
    resumed = study('resumed', name)
    assert resumed[f'{name}-seed0'] == runs[f'{name}-seed0']
    assert capsys.readouterr().out.count('"step"') == 1  # the last two steps
    study('resumed', name)
    assert capsys.readouterr().out == ''  # finished

  figure = tmp_path / 'codebook.svg'
  benchmark.main(['--workdir', str(tmp_path / 'whole'), '--report', '--out', str(figure)])
  rows = capsys.readouterr().out.splitlines()
  assert [row.split('|')[1].strip() for row in rows[2:]] == list(benchmark.VARIANTS)
  assert all(f'>{name}</text>' in figure.read_text() for name in benchmark.VARIANTS)

  options[options.index('--codes') + 1] = '16'
  with pytest.raises(SystemExit):
    study('whole', 'ours')
  assert 'use another --workdir' in capsys.readouterr().err


def test_codes_without_a_codebook(load):
  quantizers = load('quantizers')
  assert quantizers.code_width('fsq', 16384, 32) == 7
  assert quantizers.code_width('lfq', 16384, 32) == 14
  with pytest.raises(ValueError, match='power of 4'):
    quantizers.code_width('fsq', 32, 32)
  ids = jnp.arange(64)
  for kind, base, width in (('fsq', 4, 3), ('lfq', 2, 6)):
    digits = quantizers.split_digits(ids, base, width)
    codes = quantizers.fsq_codes(digits) if kind == 'fsq' else 2.0 * digits - 1
    assert len(np.unique(codes, axis=0)) == 64
    # Each code is chosen by what lies near it; atanh undoes the tanh of fsq.
    encoded = jnp.arctanh(0.9 * codes) if kind == 'fsq' else 0.9 * codes
    quantized = quantizers.quantize(kind, encoded, None, 1.0)
    np.testing.assert_array_equal(quantized.ids, ids)
    np.testing.assert_allclose(quantized.codes, codes, atol=1e-6)

  weight = jax.random.normal(jax.random.key(0), (64, 3))
  x = jax.random.normal(jax.random.key(1), (64, 3))

  def loss(x):
    quantized = quantizers.quantize('fsq', x, None, 1.0)
    return (weight * quantizers.straight_through(quantized.z, quantized.codes)).sum()

  gradient = jax.grad(loss)(x)
  np.testing.assert_allclose(gradient, weight * (1 - jnp.tanh(x) ** 2), rtol=1e-5, atol=1e-6)


def test_lfq_entropy_is_that_of_all_codes(load):
  quantizers = load('quantizers')
  z = np.random.default_rng(0).normal(size=(10, 3))
  codes = np.array([[2 * (i >> bit & 1) - 1 for bit in range(3)] for i in range(8)])
  share = np.exp(-np.square(z[:, None] - codes).sum(-1))
  share /= share.sum(-1, keepdims=True)

  def entropy(share):
    return -(share * np.log(share)).sum(-1)

  expected = entropy(share).mean() - entropy(share.mean(0))
  np.testing.assert_allclose(quantizers.lfq_entropy(jnp.asarray(z)), expected, rtol=1e-4)


@pytest.mark.slow
def test_agreement_measures_losses(load):
  """On the tiny checkpoint: far below the loss of a uniform guess, and the golden captions."""
  benchmark = load('agreement')
  examples = corpus.examples('embedded', 'heldout/pair', 0, 4)
  losses = benchmark.losses(Lavit.from_pretrained(benchmark.TINY), examples)
  assert 0 < losses['caption_loss'] < 0.5 * np.log(2048)
  assert 0 < losses['code_loss'] < 0.9 * np.log(1024)
  exact = benchmark.golden_model()
  quantized = benchmark.golden_model(weights_dtype='int8')
  assert exact['golden_tokens_alike'] == 1
  assert exact['golden_error'] < 1e-5
  assert 1e-3 < quantized['golden_error'] < 0.03


def test_ablations_have_options_of_the_config(load):
  benchmark = load('ablations')
  config = load_config(f'{ROOT}/{benchmark.CONFIG}')
  for name, options in benchmark.ROWS.items():
    changed = load_config(
      f'{ROOT}/{benchmark.CONFIG}', [tuple(option.split('=', 1)) for option in options]
    )
    assert (changed.to_dict() != config.to_dict()) == (name != benchmark.LEARNED), name


@pytest.mark.slow
def test_ablations_measure_and_report(load, monkeypatch, tmp_path):
  """The measures of runs that were not trained; a finished run is not trained again."""
  benchmark = load('ablations')
  rows = {name: benchmark.ROWS[name] for name in ('cross_attention', 'shuffled', 'fixed')}
  model = lavit.build('tiny')
  params = init_params(model, jax.random.key(0), ('vit', 'tokenizer', 'decoder'))
  save_params(tmp_path / 'vit', 'tiny', {'vit': params.pop('vit')})
  commands = []

  def train(command, check):
    commands.append(command)
    workdir = pathlib.Path(command[command.index('--workdir') + 1])
    save_params(workdir / 'export', 'tiny', params)

  monkeypatch.setattr(benchmark, 'ROWS', rows)
  monkeypatch.setattr(benchmark.subprocess, 'run', train)
  monkeypatch.setattr(benchmark, 'TRAIN_IMAGES', 16)
  arguments = [f'--workdir={tmp_path}', f'--frozen={tmp_path / "vit"}', '--source=embedded']
  arguments += [f'--rows={",".join(rows)}', '--seeds=1', '--images=8']
  monkeypatch.setattr(sys, 'argv', ['ablations', *arguments])
  monkeypatch.chdir(ROOT)
  benchmark.main()
  assert len(commands) == 3
  assert any('init_from' in option for option in commands[1])  # shuffled: a learned selector
  benchmark.main()
  assert len(commands) == 3
  report = benchmark.table(tmp_path)
  assert all(f'| {name} | 1 | ' in report for name in rows)
  fixed = json.loads((tmp_path / 'fixed-0' / 'measures.json').read_text())
  assert fixed['tokens'] == round(64 / 3) and fixed['count_std_ratio'] == 0
