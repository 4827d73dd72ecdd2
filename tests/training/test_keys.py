"""Random keys: no two of a run, and no two of a call at inference, are the same."""

import dataclasses
import itertools
import pathlib

import jax
import jax.numpy as jnp
import nano
import numpy as np

import lavit_jax
from lavit_jax import sharding
from lavit_jax.inference import rng
from lavit_jax.training.keys import Purpose, key_for
from lavit_jax.training.stages.base import ModuleNames, Stage
from lavit_jax.training.train_step import make_init, make_train_step

nano.install()
STEPS = 12
PARTS = 16
SPLIT = 5  # no stage has more parts, and none splits a step's key in more


def data_of(key) -> tuple[int, ...]:
  return tuple(np.asarray(jax.random.key_data(key)).tolist())


def test_split_is_fold_in():
  """What makes a purpose necessary, in this version of JAX."""
  key = jax.random.key(3)
  assert data_of(jax.random.split(key, 4)[2]) == data_of(jax.random.fold_in(key, 2))


def step_keys(**changes) -> list:
  """The keys that `make_train_step` hands to the loss, by their data."""

  def loss(params, frozen, state, batch, key, train):
    first, second = jax.random.key_data(key)
    return params['w'].sum(), (state, dict(first=first, second=second))

  stage = Stage(ModuleNames(), lambda key, loaded: (dict(w=jnp.ones(2)), {}), loss, None)
  mesh = sharding.make_mesh(dict(data=1, fsdp=1, tensor=1), jax.devices()[:1])
  run = dataclasses.replace(nano.run('autoencoder', mesh, **changes), stage=stage)
  init, tx = make_init(run, {})
  state = init(jax.random.key(0), {})
  step = make_train_step(run, tx, sharding.shardings(state, mesh))
  keys = []
  with jax.set_mesh(mesh):
    for _ in range(STEPS):
      state, values = step(state, {}, {'x': jnp.zeros((8, 1))})
      keys.append((int(values['first']), int(values['second'])))
  return keys


def test_the_keys_of_a_run_are_distinct():
  steps = [jax.random.fold_in(key_for(7, Purpose.STEPS), step) for step in range(STEPS)]
  assert [data_of(key) for key in steps] == step_keys(seed=7)
  weights = jax.random.split(key_for(7, Purpose.WEIGHTS), PARTS)
  heldout = [jax.random.fold_in(key_for(7, Purpose.HELDOUT), i) for i in range(STEPS)]
  keys = [
    jax.random.key(7),
    *(key_for(7, purpose) for purpose in Purpose),
    *weights,
    *steps,
    *heldout,
  ]
  for key in (*weights, *steps, *heldout):
    keys.extend(jax.random.split(key, SPLIT))
  assert len(set(map(data_of, keys))) == len(keys)


def test_no_key_of_a_run_is_made_elsewhere():
  """A key of the bare seed, in training, would be split or folded into one of those."""
  folder = pathlib.Path(lavit_jax.__file__).parent / 'training'
  texts = {file.name: file.read_text() for file in folder.rglob('*.py')}
  assert [name for name, text in texts.items() if 'random.key(run.seed' in text] == []
  assert 'random.key(seed)' in texts['keys.py']


def test_the_keys_of_a_call_at_inference_are_distinct():
  """By row, purpose, number of the image or sample, and step of a sample."""
  rows = rng.example_keys(7, 4)
  keys = [jax.random.key(7), *rows]
  for purpose, number in itertools.product(rng.Purpose, range(4)):
    of_rows = rng.purpose_keys(purpose, rows, number)
    keys.extend(of_rows)
    for key in of_rows:
      keys += [jax.random.fold_in(key, step) for step in range(8)]
  assert len(set(map(data_of, keys))) == len(keys)
