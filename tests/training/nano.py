"""A variant that trains in a second, its config for each stage, and runs as separate processes.

As a script it makes one run, `nano.py STAGE WORKDIR [key=value ...]`, or all five,
`nano.py all FOLDER`.
"""

import ast
import functools
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import time

import jax

ROOT = pathlib.Path(__file__).parents[2]
NANO = dict(
  text_vocab_size=2048,
  vit=dict(
    image_size=32,
    patch_size=8,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    head_dim=16,
    mlp_dim=64,
    output_dim=16,
  ),
  tokenizer=dict(
    hidden_size=32, num_layers=1, num_heads=2, mlp_dim=64, codebook_size=16, code_dim=8
  ),
  decoder=dict(num_layers=1, context_dims=(16,)),
  llama=dict(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, mlp_dim=64),
  unet=dict(
    block_out_channels=(16,),
    layers_per_block=1,
    down_block_attention=(False,),  # the block in the middle has some
    transformer_layers=(1,),
    num_heads=(2,),
    cross_attention_dim=16,
    norm_num_groups=4,
  ),
  vae=dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, scaling_factor=1.0),
  uncond_rows=1,
)
INTERFACES = dict(
  linear={},
  mlp={},
  resampler=dict(num_latents=4, num_layers=1, num_heads=2, head_dim=16, mlp_dim=64),
  flamingo=dict(num_latents=4, num_layers=1, num_heads=2, head_dim=16, mlp_dim=64, every=1),
  qformer=dict(num_queries=4, hidden_size=32, num_layers=2, num_heads=2, mlp_dim=64),
  emu=dict(num_tokens=4, hidden_size=32, num_layers=2, num_heads=2, head_dim=16, mlp_dim=64),
)


# Nearly everything here is compiled to run once, as all tests are by launch/test.sh.
QUICK_TO_COMPILE = dict(
  xla_backend_optimization_level=0,
  xla_cpu_use_fusion_emitters=False,
  xla_cpu_opt_preset='CPU_OPT_PRESET_FAST_COMPILE',
  xla_cpu_parallel_codegen_split_count=1,
)
# Those that XLA_FLAGS do not have: equal programs of several processes are compiled once only if
# their flags and options are equal, too.
QUICK_OPTIONS = {
  name: value
  for name, value in QUICK_TO_COMPILE.items()
  if f'--{name}=' not in os.environ.get('XLA_FLAGS', '')
}
jit = functools.partial(jax.jit, compiler_options=QUICK_OPTIONS)


def install() -> None:
  """Adds the variant to the tables."""
  from lavit_jax.models import lavit
  from lavit_jax.models.interfaces import variants

  lavit.VARIANTS['nano'] = NANO
  variants.SIZES['nano'] = INTERFACES


def config(stage: str, **changes):
  """The config of a stage for this variant; `changes` by dotted key with '__' for the dot."""
  from lavit_jax.training.config import load_config

  config = load_config(f'{ROOT}/configs/{stage}.py:tiny')
  data = dict(data__source='embedded', data__image_size=32)
  if config.data.task != 'images':
    data['data__tokenizer_folder'] = f'{ROOT}/lavit_jax/assets/tiny/language_model'
  small = dict(
    variant='nano',
    batch_size=8,
    num_steps=4,
    log_every=1,
    eval_every=0,
    picture_every=0,
    checkpoint_every=0,
    optim__warmup_steps=2,
    **data,
  )
  if stage == 'encoder':
    small['text_tower'] = dict(
      hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16, mlp_dim=64
    )
  if stage == 'lm':
    small |= dict(lm__num_rows=8, lm__row_length=128)
  with config.unlocked():
    config.update_from_flattened_dict(
      {key.replace('__', '.'): value for key, value in {**small, **changes}.items()}
    )
  return config


def run(stage: str, mesh=None, **changes):
  """The run of a config for this variant, on an abstract device if there is no mesh."""
  from lavit_jax.training.run import resolve_abstract

  return resolve_abstract(config(stage, **changes), mesh)


def init_stage(stage, params):
  """`stage.init`, of which little is computed where `params` has it all."""
  return jit(stage.init)(jax.random.key(0), params)


@functools.partial(jit, static_argnames=('module', 'method'))
def apply_module(module, params, *args, method=None):
  """`module.apply` on a bare tree of parameters, as one program."""
  return module.apply({'params': params}, *args, method=method)


def optimizer_config(num_steps: int = 10, **changes):
  """Options of a plain optimizer: no warmup, decay, clipping or averages."""
  from lavit_jax.training.optimizer import OptimizerConfig

  optim = dict(
    learning_rate=0.1,
    warmup_steps=0,
    final_fraction=1.0,
    weight_decay=0.0,
    b1=0.9,
    b2=0.99,
    mu_dtype='float32',
    nu_dtype='float32',
    clip_norm=0.0,
    ema_decay=0.0,
    freeze=(),
    lr_scale=(),
  )
  return OptimizerConfig.from_config(dict(num_steps=num_steps, optim={**optim, **changes}))


EARLIER = {  # by stage: those that it starts from
  'tokenizer': ('encoder',),
  'detokenizer': ('encoder', 'autoencoder', 'tokenizer'),
  'lm': ('encoder', 'tokenizer'),
}


def options_after(stage, runs):
  """The options of a stage's run of four steps; `runs` has the workdirs of those before it."""
  exports = [str(runs[name] / 'export') for name in EARLIER.get(stage, ())]
  options = dict(checkpoint_every=4, frozen=','.join(exports))
  if stage == 'tokenizer':
    options |= dict(tokenizer__quantize_from=2, eval_every=2, eval_batches=1, picture_every=4)
  return options


def train_all(folder: pathlib.Path) -> None:
  """Every stage in turn, each from the exports of those before it, into folder/STAGE."""
  from lavit_jax.training.loop import train

  stages = ('encoder', 'autoencoder', 'tokenizer', 'detokenizer', 'lm')
  runs = {stage: folder / stage for stage in stages}
  for stage in stages:
    train(config(stage, **options_after(stage, runs)), runs[stage])


def launch(stage, workdir, devices=1, env=(), **changes):
  """One training as a process of its own, with the tests' cache of compiled programs."""
  flags = {'xla_force_host_platform_device_count': devices, **QUICK_TO_COMPILE}
  if isa := re.search(r'xla_cpu_max_isa=(\w+)', os.environ.get('XLA_FLAGS', '')):
    flags['xla_cpu_max_isa'] = isa[1]  # a CPU that is imitated is so here too
  flags = ' '.join(f'--{key}={value}' for key, value in flags.items()).replace('False', 'false')
  env = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': flags,
    'PYTHONPATH': str(ROOT),
    'TF_CPP_MIN_LOG_LEVEL': '3',
    **dict(env),
  }
  command = [
    sys.executable,
    __file__,
    stage,
    str(workdir),
    *(f'{key}={value!r}' for key, value in changes.items()),
  ]
  return subprocess.Popen(
    command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )


def job_environments(processes: int, timeout: int) -> list[dict[str, str]]:
  """What tells each process of a job where the others are.

  They give up a process that is silent for `timeout` seconds.
  """
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    address = '127.0.0.1:%d' % free.getsockname()[1]
  env = dict(
    JAX_COORDINATOR_ADDRESS=address,
    JAX_NUM_PROCESSES=str(processes),
    JAX_HEARTBEAT_TIMEOUT=str(timeout),
  )
  return [{**env, 'JAX_PROCESS_ID': str(i)} for i in range(processes)]


def launch_job(stage, workdir, processes, devices, timeout=5, own=(), **changes):
  """One run as a job of several processes, which have `devices` each.

  `own`: process -> changes for it alone, of the workdir and of `env` too.
  """
  job = []
  for i, env in enumerate(job_environments(processes, timeout)):
    options = {'workdir': workdir, **changes, **dict(own).get(i, {})}
    env |= options.pop('env', {})
    job.append(launch(stage, devices=devices, env=env, **options))
  return job


def finish(process, status=0):
  """What the process printed, when it has ended as it should."""
  out, _ = process.communicate()
  assert process.returncode == status, out
  return out


def rows(workdir):
  """The lines of metrics.jsonl."""
  file = workdir / 'metrics.jsonl'
  records = []
  for line in file.read_text().splitlines() if file.exists() else ():
    try:
      records.append(json.loads(line))
    except ValueError:
      pass  # being written
  return records


def until(process, workdir, step):
  """Waits for the process to log a step."""
  while process.poll() is None and not any(row['step'] >= step for row in rows(workdir)):
    time.sleep(0.01)
  assert process.poll() is None, process.communicate()[0]


def share_compiled_programs() -> None:
  """Lets all processes of a job read what process 0 has compiled.

  It alone writes to the cache. On CPUs the key of a program holds the process, so that the others
  would compile everything in each run (findings/jax-cache-key-of-a-process.sh).
  """
  from jax._src import cache_key

  cache_key._hash_accelerator_config = cache_key._hash_devices


def main() -> None:
  # tensorboardX imports torch where it is installed; training does not need it, and it takes a
  # second.
  sys.modules['torch'] = None
  from lavit_jax.training import distributed as processes

  processes.connect()  # by the environment
  if jax.process_count() > 1:
    share_compiled_programs()
  from lavit_jax.training import flops
  from lavit_jax.training.loop import train

  # The count traces the whole step once more. test_flops.py tests it, and some runs in the tests'
  # own process have it.
  flops.step_flops = lambda run: flops.StepFlops(1.0)

  install()
  stage, workdir, *pairs = sys.argv[1:]
  if stage == 'all':
    return train_all(pathlib.Path(workdir))
  changes = {}
  for pair in pairs:
    key, _, value = pair.partition('=')
    changes[key] = ast.literal_eval(value)
  with processes.exit_together():
    train(config(stage, **changes), workdir)


if __name__ == '__main__':
  main()
