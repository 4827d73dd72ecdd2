"""Scripts of launch/ as processes, in a folder that stands for a checkout."""

import os
import pathlib
import signal
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def write_script(path, text):
  path.write_text(text)
  path.chmod(0o755)
  return path


def start_script(checkout, script, *arguments, **env):
  env = {'PYTHON': sys.executable, 'PATH': f'{checkout}/.venv/bin:{os.environ["PATH"]}', **env}
  env = {
    name: value
    for name, value in os.environ.items()
    if name not in ('REPOSITORY', 'CUDA_VISIBLE_DEVICES')
  } | env
  # A shell has its processes in the background ignore these signals. They are default here, and so
  # in the script, without a `preexec_fn`: that would copy the memory map of all tests.
  ours = {
    number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)
  }
  try:
    return subprocess.Popen(
      ['bash', checkout / 'launch' / script, *arguments],
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      start_new_session=True,
    )
  finally:
    for number, handler in ours.items():
      signal.signal(number, handler)


def commit(checkout):
  git = ['git', '-C', str(checkout), '-c', 'user.name=x', '-c', 'user.email=x']
  for command in (['init', '--quiet'], ['add', '--all'], ['commit', '--quiet', '--message', 'x']):
    subprocess.run([*git, *command], check=True)


def wait_for(run, text):
  """Reads the output until a line has `text`."""
  line = run.stdout.readline()
  while text not in line:
    assert line, f'the script ended without {text!r}'
    line = run.stdout.readline()
