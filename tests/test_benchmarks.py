"""The benchmarks still fit the package: every name of it that they use is there, and those beside PyTorch find the same at tiny size."""

import ast
import importlib.util
import json
import pathlib
import sys
import types

import numpy as np
import pytest

from lavit_jax import Lavit
from lavit_jax.data.emoji import corpus
from lavit_jax.models import lavit
from lavit_jax.models.llama import Llama

FOLDER = pathlib.Path(__file__).parents[1] / 'benchmarks'
NEED_TORCH = ('inference', 'peers')


@pytest.fixture
def load(monkeypatch):
  """load(name): a benchmark as a module; what it imports of its neighbours is forgotten afterwards."""
  monkeypatch.syspath_prepend(FOLDER)
  for neighbour in ('ours', 'peers', 'weights'):
    monkeypatch.delitem(sys.modules, neighbour, raising=False)

  def load(name):
    if name in NEED_TORCH:
      pytest.importorskip(
        'diffusers', reason="needs PyTorch; pip install -e '.[torch]' -c launch/constraints.txt"
      )
    spec = importlib.util.spec_from_file_location(f'benchmark_{name}', FOLDER / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

  yield load
  for neighbour in ('ours', 'peers', 'weights'):
    sys.modules.pop(neighbour, None)


@pytest.mark.parametrize('name', sorted(path.stem for path in FOLDER.glob('*.py')))
def test_what_it_calls_is_there(name, load):
  """It can be imported, and `module.name` is there for each module of ours that it names."""
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


def test_tokenize_and_decode_find_what_pytorch_finds(load, monkeypatch):
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
  found = benchmark.tokenizing(1)
  assert found['same'] == found['same_keep'] == 1 and 0 < found['kept'] < 1
  for case in (
    'decode_b1',
    'decode_b8_cfg',
    'decode_b1_int8',
  ):  # with float weights they compare the tokens themselves
    assert benchmark.CASES[case](1)['ratio'] > 0


@pytest.mark.parametrize('file', [None, 'all.json'])
def test_json_ends_with_the_ratios(file, load, monkeypatch, capsys, tmp_path):
  benchmark, asked = load('inference'), [] if file is None else [str(tmp_path / file)]
  monkeypatch.setattr(
    benchmark,
    'CASES',
    {
      name: lambda repeats, ratio=n + 0.5: dict(ratio=ratio, seconds=1.0)
      for n, name in enumerate(benchmark.CASES)
    },
  )
  monkeypatch.setattr(
    sys,
    'argv',
    ['inference.py', '--only', 'decode_b1,decode_b8,decode_b8_cfg,tokenize,unet', '--json', *asked],
  )
  benchmark.main()
  last = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert last == dict(decode_b1=0.5, decode_b8=1.5, decode_b8_cfg=2.5, tokenize=4.5, unet=5.5)
  if file:
    assert json.loads((tmp_path / file).read_text())['unet'] == dict(ratio=5.5, seconds=1.0)


@pytest.mark.slow
def test_agreement_measures_losses(load):
  """On the tiny checkpoint: far below the logarithm of what could come, and the golden captions."""
  benchmark = load('agreement')
  examples = corpus.examples('embedded', 'heldout/pair', 0, 4)
  found = benchmark.losses(Lavit.from_pretrained(benchmark.TINY), examples)
  assert 0 < found['caption_loss'] < 0.5 * np.log(2048) and 0 < found['code_loss'] < 0.9 * np.log(
    1024
  )
  exact, rounded = benchmark.golden_model(), benchmark.golden_model(weights='int8')
  assert (
    exact['golden_tokens_alike'] == 1
    and exact['golden_error'] < 1e-5
    and 1e-3 < rounded['golden_error'] < 0.03
  )
