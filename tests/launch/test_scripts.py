"""The scripts of launch/ parse, pass shellcheck, and agree with the files that they name."""

import configparser
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from launch_scripts import ROOT

from lavit_jax.training.config import load_config

SCRIPTS = sorted(
  [*(ROOT / 'launch').glob('*.sh'), *(ROOT / 'launch').glob('*.sbatch'), ROOT / '.ci' / 'run']
)
SHELLCHECK = shutil.which(
  'shellcheck', path=os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ['PATH']])
)


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script):
  subprocess.run(['bash', '-n', script], check=True)


@pytest.mark.skipif(
  SHELLCHECK is None, reason="no shellcheck; it comes with pip install -e '.[test]'"
)
@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
  result = subprocess.run(
    [SHELLCHECK, script.relative_to(ROOT)], cwd=ROOT, capture_output=True, text=True
  )
  assert result.returncode == 0, result.stdout


def test_launchers_share_one_entry():
  others = {'demo.sh', 'test.sh', 'lint.sh', 'docs.sh', 'install.sh', 'run', 'train.sh'}
  launchers = {path.name for path in SCRIPTS} - others
  assert launchers == {
    'detached.sh',
    'gpus.sh',
    'multislice.sh',
    'slurm.sbatch',
    'tpu_pod.sh',
    'xpk.sh',
  }
  for name in launchers:
    text = (ROOT / 'launch' / name).read_text()
    entry = 'detached' if name == 'tpu_pod.sh' else 'train'
    assert f'launch/{entry}.sh' in text, name
    assert '# usage: ' in text, name
    assert len(text.splitlines()) < 45, name


def test_launchers_install_bucket_support():
  setup = configparser.ConfigParser()
  setup.read(ROOT / 'setup.cfg')
  assert setup['options.extras_require']['gcs'].split() == ['gcsfs']
  pins = dict(
    line.split('==')
    for line in (ROOT / 'launch' / 'constraints.txt').read_text().splitlines()
    if '==' in line
  )
  assert {'gcsfs', 'fsspec', 'aiohttp', 'google-auth', 'google-cloud-storage'} <= set(pins)
  for name, extras in {
    'gpus.sh': '[cuda,gcs]',
    'slurm.sbatch': '[cuda,gcs]',
    'tpu_pod.sh': '[tpu,gcs]',
    'xpk.sh': '[tpu,gcs]',
  }.items():
    assert extras in (ROOT / 'launch' / name).read_text(), name


def test_an_image_holds_the_files_for_training_alone():
  lines = (ROOT / '.dockerignore').read_text().splitlines()
  first, *patterns = [line for line in lines if line and not line.startswith('#')]
  included = {pattern[1:] for pattern in patterns if pattern.startswith('!')}
  assert first == '*'
  assert included == {
    'README.md',
    'configs',
    'launch',
    'lavit_jax',
    'pyproject.toml',
    'setup.cfg',
  }
  assert all((ROOT / name).exists() for name in included)


@pytest.mark.parametrize('script', ['tpu_pod.sh', 'multislice.sh', 'xpk.sh', 'slurm.sbatch'])
def test_the_config_of_a_usage_line_fits_its_machines(script):
  text = (ROOT / 'launch' / script).read_text()
  if script == 'slurm.sbatch':
    devices = math.prod(
      int(re.search(rf'--{name}=(\d+)', text)[1]) for name in ('nodes', 'gpus-per-node')
    )
  else:
    (devices,) = {int(cores) // 2 for cores in re.findall(r'v5p-(\d+)', text)}  # two cores a chip
  for config in re.findall(r'configs/\w+\.py:\w+', text):
    mesh = load_config(f'{ROOT}/{config}').mesh
    assert devices % (mesh.fsdp * mesh.tensor) == 0, f'{config} on {devices}'
