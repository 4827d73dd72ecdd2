"""The scripts for pods and clusters, whose commands are stand-ins."""

import os
import signal

import pytest
from launch_scripts import commit, start_script, wait_for

WORKER = """#!/usr/bin/env bash
[[ $* = *' ssh mine --zone z --worker=all --command '* ]] && cd "$WORKER" && exec bash -c "${@: -1}"
"""


def test_commands_of_a_cluster(checkout):
  run = start_script(
    checkout, 'xpk.sh', 'mine', '--config', 'a b', CLUSTER='c', ZONE='z', TPU='v5p-128'
  )
  out, _ = run.communicate()
  assert '--num-slices 1' in out
  assert r"--command exec env EXTRAS='[tpu,gcs]' bash launch/train.sh --config a\ b" in out
  commit(checkout)
  out, _ = start_script(
    checkout, 'multislice.sh', 'mine', '--config', 'a b', SLICES='2', ZONE='z', REPOSITORY='r'
  ).communicate()
  assert 'ssh mine-0 --zone z --worker=all' in out
  assert 'ssh mine-1' in out
  assert out.count(r'bash launch/detached.sh --config a\ b') == 2


@pytest.mark.parametrize(
  'tasks, status, queued_again',
  [
    ('143 143', 143, True),
    ('134 200', 200, True),
    ('137 134', 137, True),
    ('0 0', 0, False),
    ('2 200', 2, False),
    ('134 1', 1, False),
  ],
)
def test_slurm_queues_a_job_again_unless_it_has_an_error(checkout, tasks, status, queued_again):
  env = dict(SLURM_SUBMIT_DIR=str(checkout), SLURM_JOB_ID='7', TASKS=tasks)
  run = start_script(checkout, 'slurm.sbatch', **env)
  assert ('requeue 7' in run.communicate()[0]) == queued_again
  assert run.returncode == status
  run = start_script(checkout, 'slurm.sbatch', SLURM_RESTART_COUNT='3', RESTARTS='3', **env)
  assert 'requeue' not in run.communicate()[0]
  assert run.returncode == status


@pytest.fixture
def pod(checkout, tmp_path_factory):
  """pod(argument, ...): starts launch/tpu_pod.sh for a pod with one worker."""
  (checkout / '.venv' / 'bin' / 'gcloud').write_text(WORKER)
  commit(checkout)
  worker = tmp_path_factory.mktemp('worker')
  runs = []

  def start(*arguments, **env):
    runs.append(
      start_script(
        checkout,
        'tpu_pod.sh',
        'mine',
        *arguments,
        ZONE='z',
        REPOSITORY=str(checkout),
        WORKER=str(worker),
        **env,
      )
    )
    return runs[-1]

  yield start
  start('stop').communicate(timeout=30)
  for run in runs:
    run.kill()


def test_training_on_a_pod_outlives_the_terminal(pod):
  first = pod('--config', 'a b')
  wait_for(first, 'train --config a b')
  os.killpg(first.pid, signal.SIGKILL)  # the connection is lost
  again = pod('--config', 'a b')
  other = pod('--config', 'c')
  no_arguments = pod()
  for run in (again, no_arguments):
    wait_for(run, 'train --config a b')
  assert 'is training with --config a\\ b; stop that first' in other.communicate(timeout=30)[0]
  assert other.returncode == 2
  stop = pod('stop')
  for run in (again, no_arguments, stop):
    assert 'saved' in run.communicate(timeout=30)[0]
    assert run.returncode == 143
  later = pod()
  assert 'saved' in later.communicate(timeout=30)[0]
  assert later.returncode == 143


def test_a_pod_returns_the_status(pod):
  for status in (0, 200):
    run = pod('--config', 'a', STATUS=str(status))
    assert 'train --config a' in run.communicate(timeout=30)[0]
    assert run.returncode == status


def test_a_pod_is_stopped_during_the_installation_and_started_again(pod):
  first = pod('--config', 'a', SLOW='yes')
  wait_for(first, 'its child waits')
  stop = pod('stop')
  for run in (first, stop):
    run.communicate(timeout=30)
    assert run.returncode == 143
  again = pod('--config', 'a', STATUS='0')
  assert 'train --config a' in again.communicate(timeout=30)[0]
  assert again.returncode == 0


def test_a_checkout_without_origin_leaves_the_workers_alone(checkout):
  commit(checkout)
  run = start_script(checkout, 'tpu_pod.sh', 'mine', '--config', 'a', ZONE='z')
  out, _ = run.communicate()
  assert out.startswith('lavit: error: git has no remote named origin')
  assert out.count('\n') == 1
  assert run.returncode == 2
  run = start_script(checkout, 'tpu_pod.sh', 'mine', 'stop', ZONE='z')  # needs no origin
  assert 'bash launch/detached.sh stop' in run.communicate()[0]
  assert run.returncode == 0
