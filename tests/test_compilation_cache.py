"""The compilation cache: where it is, what stays in it, and what a second start reads from it."""

import json
import os
import pathlib
import subprocess
import sys
import warnings
import zlib

import jax
import pytest

from lavit_jax import cli, compilation_cache
from lavit_jax.compilation_cache import INDEX, default_folder, enable, tidy

ROOT = pathlib.Path(cli.__file__).parents[2]
SETTINGS = (
  'jax_enable_compilation_cache',
  'jax_compilation_cache_dir',
  'jax_compilation_cache_max_size',
  'jax_persistent_cache_min_compile_time_secs',
)
# Runs a command and prints how often JAX looked for a program, and how often it was there.
COUNTED = """
import collections, sys
import jax
from lavit_jax.cli import main
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event.split('/')[-1]]))
status = main(sys.argv[1:])
print('counts', events['compile_requests_use_cache'], events['cache_hits'], file=sys.stderr)
raise SystemExit(status)
"""
PROGRAM = """
import jax, sys
from lavit_jax import compilation_cache
compilation_cache.enable()
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.split('/')[-1]))
x = jax.random.normal(jax.random.key(1), (64, 64))
print(float(jax.jit(lambda x: jax.numpy.sin(x @ x).sum())(x)).hex())
print(events.count('compile_requests_use_cache'), events.count('cache_hits'))
"""
FINGERPRINT = """
import jax
from jax._src.lib import xla_client
print(xla_client.get_topology_for_devices(jax.devices()).fingerprint())
"""


@pytest.fixture(autouse=True)
def settings(monkeypatch):
  """No setting of JAX outlives a test, and none comes from whoever runs it."""
  before = {name: getattr(jax.config, name) for name in SETTINGS}
  monkeypatch.setattr(warnings, 'showwarning', warnings.showwarning)
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR')
  monkeypatch.delenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS')
  jax.config.update('jax_compilation_cache_dir', None)
  yield
  for name, value in before.items():
    jax.config.update(name, value)


def run(code, *arguments, check=True, **env):
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT), **env}
  command = [sys.executable, '-c', code, *map(str, arguments)]
  return subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT, check=check)


def write_program(folder, name, size, used):
  """A file like those of JAX, last used at a time; returns its size."""
  path = folder / f'{name}-cache'
  path.write_bytes(zlib.compress(os.urandom(size), 0))
  os.utime(path, (used, used))
  return path.stat().st_size


def test_the_folder_is_that_of_the_user(monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', '/somewhere')
  assert default_folder() == pathlib.Path('/somewhere/lavit_jax/compiled')
  monkeypatch.setenv('HOME', '/home/me')
  for value in ('', 'relative'):  # the specification ignores these
    monkeypatch.setenv('XDG_CACHE_HOME', value)
    assert default_folder() == pathlib.Path('/home/me/.cache/lavit_jax/compiled')


def test_which_folder_wins(tmp_path, monkeypatch):
  def folder():
    return jax.config.jax_compilation_cache_dir

  enable(None, tmp_path / 'default')
  assert folder() == str(tmp_path / 'default') and (tmp_path / 'default').is_dir()
  assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
  jax.config.update('jax_compilation_cache_dir', str(tmp_path / 'of_jax'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 7.0)
  enable(None, tmp_path / 'default')
  assert folder() == str(tmp_path / 'of_jax')
  assert jax.config.jax_persistent_cache_min_compile_time_secs == 7
  monkeypatch.setenv('LAVIT_COMPILATION_CACHE', str(tmp_path / 'variable'))
  enable(None, tmp_path / 'default')
  assert folder() == str(tmp_path / 'variable')
  enable(str(tmp_path / 'option'), tmp_path / 'default')
  assert folder() == str(tmp_path / 'option')
  assert jax.config.jax_enable_compilation_cache
  monkeypatch.setenv('LAVIT_COMPILATION_CACHE', 'off')
  enable(None, tmp_path / 'default')
  assert not jax.config.jax_enable_compilation_cache


def test_off_as_an_option(tmp_path):
  enable('off', tmp_path / 'default')
  assert not jax.config.jax_enable_compilation_cache and not (tmp_path / 'default').exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
  (tmp_path / 'file').write_text('')
  enable(None, tmp_path / 'file' / 'compiled')
  error = capsys.readouterr().err
  assert error.startswith('lavit: warning: ') and error.count('\n') == 1
  assert str(tmp_path / 'file') in error and '--compilation-cache' in error
  assert jax.config.jax_compilation_cache_dir is None
  enable(None, tmp_path / 'file' / 'compiled', writes=False)  # process 0 has said it
  assert not capsys.readouterr().err


def test_failures_while_it_runs_are_one_line(tmp_path, capsys):
  enable(None, tmp_path)
  for program in ('jit_read', 'jit_embed'):
    message = f"Error writing persistent compilation cache entry for '{program}': OSError: full"
    warnings.showwarning(UserWarning(message), UserWarning, 'compiler.py', 1)
  warnings.showwarning(UserWarning('another'), UserWarning, 'compiler.py', 1)
  error = capsys.readouterr().err
  assert error.count('OSError: full') == 1 and 'another' in error


def test_the_least_recently_used_programs_go(tmp_path):
  sizes = [write_program(tmp_path, f'p{i}', 1000, 1e9 + i) for i in range(5)]
  (tmp_path / 'unrelated').write_text('x' * 10_000)
  os.utime(tmp_path / 'p0-cache', (2e9, 1e9))  # it was read again
  tidy(tmp_path, sum(sizes[:3]))
  assert {path.name for path in tmp_path.glob('*-cache')} == {'p0-cache', 'p3-cache', 'p4-cache'}
  tidy(tmp_path, 1 << 30, max_programs=1)
  assert [path.name for path in tmp_path.glob('*-cache')] == ['p0-cache']
  assert (tmp_path / 'unrelated').exists()


def test_a_program_that_was_cut_short_goes(tmp_path):
  """JAX would read it at every start, fail, compile, and not write it again."""
  write_program(tmp_path, 'whole', 1000, 1e9)
  write_program(tmp_path, 'cut', 1000, 1e9)
  write_program(tmp_path, 'empty', 1000, 1e9)
  cut = tmp_path / 'cut-cache'
  cut.write_bytes(cut.read_bytes()[:-1])
  (tmp_path / 'empty-cache').write_bytes(b'')
  tidy(tmp_path, 1 << 30)
  assert [path.name for path in tmp_path.glob('*-cache')] == ['whole-cache']
  assert list(json.loads((tmp_path / INDEX).read_text())) == ['whole-cache']
  (tmp_path / INDEX).write_text('{')  # cut short, too
  tidy(tmp_path, 1 << 30)
  assert list(json.loads((tmp_path / INDEX).read_text())) == ['whole-cache']


def test_a_program_that_this_python_cannot_decompress_stays(tmp_path, monkeypatch):
  """Another environment with zstandard has written it, and reads it."""
  monkeypatch.setitem(sys.modules, 'zstandard', None)
  monkeypatch.setitem(sys.modules, 'compression', None)
  (tmp_path / 'other-cache').write_bytes(compilation_cache.ZSTD + bytes(10))
  tidy(tmp_path, 1 << 30)
  assert (tmp_path / 'other-cache').exists()


def test_programs_that_are_known_are_not_read_again(tmp_path, monkeypatch):
  write_program(tmp_path, 'known', 1000, 1e9)
  tidy(tmp_path, 1 << 30)
  read = []
  monkeypatch.setattr(compilation_cache, '_is_whole', lambda path: read.append(path.name) or True)
  write_program(tmp_path, 'new', 2000, 1e9)
  tidy(tmp_path, 1 << 30)
  assert read == ['new-cache']


def test_the_next_process_compiles_nothing(tmp_path):
  """Two that start at once with an empty folder, and a third; without a cache the same number."""
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
  env['XDG_CACHE_HOME'] = str(tmp_path)
  command = [sys.executable, '-c', PROGRAM]
  both = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
  numbers = {process.communicate()[0].split()[0] for process in both}
  assert [process.returncode for process in both] == [0, 0] and len(numbers) == 1
  third = run(PROGRAM, XDG_CACHE_HOME=str(tmp_path))
  number, requests, hits = third.stdout.split()
  assert int(hits) == int(requests) > 0 and {number} == numbers and not third.stderr
  off = run(PROGRAM, LAVIT_COMPILATION_CACHE='off').stdout.split()
  assert off == [number, '0', '0']


def test_the_key_of_a_cpu_program_depends_on_its_instructions():
  """So that machines of different CPUs may share a folder; the flag itself is not in it."""
  flags = os.environ.get('XLA_FLAGS', '').split()
  flags = ' '.join(flag for flag in flags if 'max_isa' not in flag)
  host = run(FINGERPRINT, XLA_FLAGS=flags).stdout
  assert host == run(FINGERPRINT, XLA_FLAGS=f'{flags} --xla_backend_optimization_level=1').stdout
  if os.uname().machine == 'x86_64':
    assert host != run(FINGERPRINT, XLA_FLAGS=f'{flags} --xla_cpu_max_isa=SSE4_2').stdout


def test_training_keeps_its_programs_beside_the_run(tmp_path, monkeypatch):
  from lavit_jax.training import loop

  calls = []
  monkeypatch.setattr(loop, 'train', lambda config, workdir, began, before: before())
  monkeypatch.setattr(compilation_cache, 'enable', lambda *arguments: calls.append(arguments))
  command = ['train', '--config', str(ROOT / 'configs/encoder.py:tiny'), '--workdir', str(tmp_path)]
  assert cli.main(command) == 0
  assert cli.main([*command, '--compilation-cache', 'off']) == 0
  assert calls == [(None, tmp_path / 'compiled', True), ('off', tmp_path / 'compiled', True)]


def test_the_help_says_it(capsys, monkeypatch):
  monkeypatch.setenv('COLUMNS', '1000')  # no option is broken over two lines
  for command in ([], ['caption'], ['app'], ['train']):
    with pytest.raises(SystemExit):
      cli.main([*command, '--help'])
    shown = ' '.join(capsys.readouterr().out.split())
    assert '--compilation-cache' in shown and 'LAVIT_COMPILATION_CACHE' in shown


@pytest.mark.slow
def test_the_second_start_of_a_command_compiles_nothing(tmp_path, demo_image):
  arguments = ('caption', demo_image, '--compilation-cache')
  first = run(COUNTED, *arguments, tmp_path)
  second = run(COUNTED, *arguments, tmp_path)
  off = run(COUNTED, *arguments, 'off')
  assert first.stdout == second.stdout == off.stdout
  requests, hits = map(int, second.stderr.split()[-2:])
  assert requests == hits > 5
  assert first.stderr.split()[-2:] == [str(requests), '0']
  assert off.stderr.split()[-2:] == ['0', '0']


@pytest.fixture
def demo_image():
  return ROOT / 'lavit_jax/assets/demo/00.png'
