"""The only training loop.

    lavit train --config configs/<stage>.py:<variant> --workdir DIR

A run found in the work directory is continued, to the bit. SIGTERM saves a checkpoint and ends with status 143 (128 + 15), so that
a scheduler starts it again; a finished run ends with 0 and leaves WORKDIR/export.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import pathlib
import time
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec as P

from lavit_jax import chips, sharding
from lavit_jax.data import mixtures, text
from lavit_jax.data.rows import Skipped
from lavit_jax.data.sources import check_files
from lavit_jax.errors import UserError
from lavit_jax.models import lavit
from lavit_jax.models.settings import of_parts
from lavit_jax.porting import folder
from lavit_jax.training import flops, metrics, optim, processes, stages
from lavit_jax.training.checkpoint import Checkpoints
from lavit_jax.training.checks import check_options, told_of_data
from lavit_jax.training.processes import TERMINATED, Interrupt
from lavit_jax.training.settings import of_run


class TrainState(NamedTuple):
  """All that a step changes: `step` i32[] updates made; `state` what the stage carries besides parameters; `ema` {} if it is off."""

  step: jax.Array
  params: Any
  opt_state: Any
  state: Any
  ema: Any


def train(config, workdir) -> None:
  """Trains the stage that `config` describes, from where `workdir` left off.

  Args:
    config: a page of `configs/`, locked.
    workdir: receives checkpoints/, metrics.jsonl, tensorboard/, pictures/ and, at the end, export/.
  Raises:
    UserError: anything the user can mend: earlier stages missing, another run's checkpoint, a full disk, a loss that is not finite.
    SystemExit: 143 after SIGTERM, with everything saved.
  """
  workdir = pathlib.Path(workdir)
  mesh = sharding.make_mesh(config.mesh)
  check_options(config, mesh)
  processes.check_shared(workdir)
  trace = metrics.Trace(config.profile, workdir)
  model_flops = flops.of_step(config)  # which has a mesh of its own
  with Interrupt() as interrupt, jax.set_mesh(mesh), contextlib.ExitStack() as stack:
    settings = of_run(config, split_folders(config.frozen), split_folders(config.init_from), workdir)
    model = lavit.build(config.variant, config.dtype, config.remat, settings)
    stage = stages.build(config, model, sharding.batch_shards(mesh))
    parts = load_parts(config, stage, mesh)
    frozen = {name: parts[name] for name in stage.needs}
    share, skipped = sharding.share(mesh, config.batch_size), Skipped()
    data = open_data(config, model, share, 'train', skipped)
    stack.callback(data.close)
    check_heldout(config, model, share)
    checkpoints = Checkpoints(workdir, config, config.keep, model.settings)  # the first to write: what is missing has been told by now
    stack.callback(checkpoints.close)
    interrupt.check()

    init, tx = initialiser(config, stage, parts)
    shapes = jax.eval_shape(init, jax.random.key(config.seed), parts)
    places = sharding.shardings(shapes, mesh)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places)
    first, state = checkpoints.restore_latest(abstract, data, config.skip_damaged)
    if state is None:
      once = {'xla_backend_optimization_level': 0} if jax.default_backend() == 'cpu' else None  # compiling costs more than running
      state = jax.jit(init, out_shardings=places, compiler_options=once)(jax.random.key(config.seed), parts)
    absent = [name for name in stage.zeros if config.init_from and name not in parts]
    del parts
    interrupt.check()

    peak = config.peak_tflops or chips.peak_tflops(jax.devices())
    log = metrics.Log(workdir, first, config.num_steps, config.batch_size, flops=model_flops.at, peak_tflops=peak,
                      tokens=stages.tokens(config))
    stack.callback(log.close)
    stack.callback(trace.close)
    count = sum(x.size for x in jax.tree.leaves(shapes.params))
    log.say(f'{config.stage}:{config.variant}  {count / 1e6:.2f} M parameters  mesh {dict(mesh.shape)}  '
            + (f'continuing from step {first}' if first else f'starting in {workdir}'))
    if first:
      tell_changes(log, *checkpoints.changes(first))
    elif absent:
      log.say(f'warning: init_from={config.init_from} has no {", ".join(absent)}: zeros take the place')
    if trace.last and not (first < trace.last and trace.first <= config.num_steps):
      log.say(f'warning: profile={config.profile} traces nothing: this run makes steps {first + 1} to {config.num_steps}')
    write_config(config, workdir)

    if first < config.num_steps:
      batch = sharding.put_batch(next_batch(data), mesh, share)
      train_step = make_train_step(config, stage, tx, places, mesh)
      train_step = train_step.lower(state, frozen, batch).compile()
      look = Look(config, model, stage, mesh, share, frozen)
      interrupt.check()
      log.restart_clock()

    for step in range(first + 1, config.num_steps + 1):
      if step > first + 1:
        batch = sharding.put_batch(log.fetch(next_batch, data), mesh, share)
      trace.before(step)
      state, values = train_step(state, frozen, batch)
      trace.after(step, values)
      log.step(step, values)

      last, stop = step == config.num_steps, interrupt.requested()
      if step % config.log_every == 0 or last:
        log.flush()  # waits for the steps: on CPU, exchanges between processes that overtake each other deadlock
        check_finite(log.report(skips(config, skipped, share)), step)
        checkpoints.check()
      if saved := every(config.checkpoint_every, step, last) or stop:  # first: a run that ends in what follows has missed a look, and no step
        save(checkpoints, log, step, state, data)
      if every(config.eval_every, step, last) and not stop:
        stop = look.evaluate(state, step, log, interrupt)
      if every(config.picture_every, step, last) and stage.draw and not stop:
        look.draw(state, step, log)
        stop = interrupt.requested()
      if stop:
        if not saved:
          save(checkpoints, log, step, state, data)
        checkpoints.wait()
        log.say(f'stopped at step {step} as asked; the same command goes on from here')
        raise SystemExit(TERMINATED)

    checkpoints.wait()
    export(config, stage, state, workdir, model.settings)
    before = ' before; a larger num_steps goes on' if first >= config.num_steps else ''
    log.say(f'done{before}; the weights are in {workdir / "export"}')


# --------------------------------------------------------------------------------------------------------------- the step

def initialiser(config, stage, parts):
  """-> (init(key, parts) -> TrainState, the optimizer)."""
  params, _ = jax.eval_shape(stage.init, jax.random.key(0), parts)
  tx = optim.make(config.optim, config.num_steps, params, stage.hold)

  def init(key, parts):
    params, state = stage.init(key, parts)
    ema = jax.tree.map(jnp.copy, params) if config.optim.ema_decay else {}
    return TrainState(jnp.zeros([], jnp.int32), params, tx.init(params), state, ema)

  return init, tx


def make_train_step(config, stage, tx, places, mesh):
  """jit of (TrainState, frozen parts, batch) -> (TrainState, metrics); the old state's memory becomes the new one's.

  With `config.accumulate` > 1 the batch goes through in that many pieces, whose gradients are averaged: less memory, the same update
  but that each piece's mean counts alike.
  """
  rate = optim.learning_rate(config.optim, config.num_steps)
  pieces, shards = config.accumulate, sharding.batch_shards(mesh)

  def gradient_of(params, frozen, state, batch, key):
    def loss(params):
      return stage.loss(optim.stop_frozen(config.optim, params), frozen, state, batch, key, True)

    (value, (state, values)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    gradient = jax.lax.with_sharding_constraint(gradient, places.params)
    return gradient, state, dict(loss=value, **values)

  def accumulated(params, frozen, state, batch, key):
    def add(carry, inputs):
      total, state = carry
      gradient, state, values = gradient_of(params, frozen, state, *inputs)
      return (jax.tree.map(jnp.add, total, gradient), state), values

    def split(x):
      """[B, ...] -> [pieces, B / pieces, ...]: of each shard's examples an equal share goes into each piece, so none is sent."""
      x = jnp.moveaxis(x.reshape(shards, pieces, -1, *x.shape[1:]), 1, 0)
      return jax.lax.with_sharding_constraint(x.reshape(pieces, -1, *x.shape[3:]), NamedSharding(mesh, P(None, *sharding.BATCH)))

    zeros = jax.lax.with_sharding_constraint(jax.tree.map(jnp.zeros_like, params), places.params)
    (total, state), values = jax.lax.scan(add, (zeros, state), (jax.tree.map(split, batch), jax.random.split(key, pieces)))
    # Of a kind that a piece does not hold it has no loss (nan); the loss itself must not hide one.
    values = {name: x.sum() if name in stages.COUNTS else x.mean() if name in metrics.VITAL else jnp.nanmean(x) for name, x in values.items()}
    return jax.tree.map(lambda x: x / pieces, total), state, values

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=(places, NamedSharding(mesh, P())))
  def train_step(train_state, frozen, batch):
    step, params, opt_state, state, ema = train_state
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    gradient, state, values = (gradient_of if pieces == 1 else accumulated)(params, frozen, state, batch, key)
    updates, opt_state = tx.update(gradient, opt_state, params)
    params = optax.apply_updates(params, updates)
    if config.optim.ema_decay:
      ema = optim.ema_update(ema, params, config.optim.ema_decay, step)
    values |= dict(grad_norm=optax.global_norm(gradient), learning_rate=rate(step))
    return TrainState(step + 1, params, opt_state, state, ema), values

  return train_step


class Look:
  """Held-out metrics and pictures; always of the same examples and the same noise, with the averaged weights if there are any."""

  def __init__(self, config, model, stage, mesh, share, frozen):
    self.config, self.model, self.frozen, self.mesh, self.share = config, model, frozen, mesh, share
    self.key = jax.random.key(config.seed + 1)
    jit = functools.partial(jax.jit, out_shardings=NamedSharding(mesh, P()))  # every process sees all of it

    @jit
    def metrics_of(train_state, frozen, batch, key):
      value, (_, values) = stage.loss(train_state.ema or train_state.params, frozen, train_state.state, batch, key, False)
      return dict(loss=value, **values)

    @jit
    def pictures_of(train_state, frozen, batch, key):
      return stage.draw(train_state.ema or train_state.params, frozen, train_state.state, batch, key)

    self.metrics_of, self.pictures_of = metrics_of, pictures_of

  def batches(self, count: int):
    with contextlib.closing(open_data(self.config, self.model, self.share, 'heldout')) as data:
      for i in range(count):
        yield jax.random.fold_in(self.key, i), sharding.put_batch(next(data), self.mesh, self.share)

  def evaluate(self, state, step, log, interrupt) -> bool:
    """Logs the mean over `eval_batches` held-out batches; gives up, and returns True, when the run is asked to stop."""
    start, rows = time.monotonic(), []
    for key, batch in self.batches(self.config.eval_batches):
      rows.append(jax.device_get(self.metrics_of(state, self.frozen, batch, key)))
      if interrupt.requested():
        return True
    log.evaluation(step, metrics.mean(rows))
    log.pause(time.monotonic() - start)
    return False

  def draw(self, state, step, log) -> None:
    start = time.monotonic()
    (key, batch), = self.batches(1)
    rows = jax.device_get(self.pictures_of(state, self.frozen, batch, key))
    log.pictures(step, {self.config.stage: metrics.sheet(*rows)})
    log.pause(time.monotonic() - start)


# ------------------------------------------------------------------------------------------------------------- in and out

def load_parts(config, stage, mesh) -> dict:
  """Parts of the model from the folders `frozen` (what the stage asks for) and `init_from` (all they have), on the mesh; the last one wins.

  Raises:
    UserError: a part that the stage needs is in none of the `frozen` folders.
  """
  parts, wanted = {}, stage.needs + stage.starts

  def load(path, names):
    return folder.load_parts(path, names, config.variant, lambda tree: sharding.shardings(tree, mesh))

  for path in split_folders(config.frozen):
    names = [name for name in folder.read_config(path)['parts'] if name in wanted]
    parts |= load(path, names)
  for path in split_folders(config.init_from):
    parts |= {name: tree for name, tree in load(path, None).items() if name not in stage.needs}
  missing = [name for name in wanted if name not in parts]
  if missing:
    raise UserError(f'stage {config.stage} needs {", ".join(missing)}: name the folders that earlier stages '
                    f'exported, --config.frozen=RUN/export,RUN/export (now {config.frozen!r})')
  return parts


def split_folders(text: str) -> list[str]:
  """'a,b' -> ['a', 'b'], of this machine, or a UserError."""
  found = [path.strip() for path in text.split(',') if path.strip()]
  if remote := [path for path in found if '://' in path]:
    raise UserError(f'{remote[0]} is no folder here; mount the bucket (gcsfuse), or use a disk that all machines share')
  return found


def export(config, stage, train_state, workdir, settings) -> None:
  """Writes the parts that this stage made to WORKDIR/export, averaged over the last steps if there is an average."""
  parts = processes.to_host(stage.export(train_state.ema or train_state.params, train_state.state))
  if jax.process_index() == 0:
    about = dict(stage=config.stage, steps=int(train_state.step), config=json.loads(config.to_json_best_effort()))
    folder.save_parts(workdir / 'export', config.variant, parts, metadata=about, settings=of_parts(settings, parts))
  processes.wait_for_all('exported')


def tell_changes(log, others: list[str], inexact: list[str]) -> None:
  """One line for options that have changed since the checkpoint, and a warning for those that give the run other examples."""
  if others:
    log.say(f'changed since then: {", ".join(others)}')
  if inexact:
    log.say(f'warning: changed since then, so the next examples are not those that it would have seen: {", ".join(inexact)}')


def write_config(config, workdir) -> None:
  if jax.process_index() == 0:
    (workdir / 'config.json').write_text(json.dumps(json.loads(config.to_json_best_effort()), indent=1) + '\n')


def open_data(config, model, share, split: str, skipped: Skipped | None = None):
  """An iterator over this process's share of the batches of a split.

  Raises:
    UserError: the data set or the tokenizer is not there, or is of another vocabulary than the model.
  """
  options = config.data.to_dict()
  with told_of_data():
    if options.get('tokenizer_folder'):
      text.TextTokenizer.load(options['tokenizer_folder'], model.vocabulary.text_size)
    return mixtures.batches(
        **options, split=split, seed=config.seed, batch_size=len(share.rows), shard_index=share.index, shard_count=share.count,
        rows=share.rows, skipped=skipped)


def check_heldout(config, model, share) -> None:
  """Opens held-out data as evaluation will, for what is wrong with them must not come to light at the first one."""
  if config.eval_every or config.picture_every:
    with contextlib.closing(open_data(config, model, share, 'heldout')):
      if config.data.get('sources'):
        check_files('data.heldout', config.data.heldout, config.data.max_skipped)


def skips(config, skipped: Skipped, share) -> dict[str, int]:
  """What all processes together skipped; those that read the same rows count once."""
  if not config.data.get('sources'):
    return {}
  told = {each.pop('share'): each for each in processes.gather({'share': share.index, **skipped.metrics()})}
  return dict(sum(map(Counter, told.values()), Counter()))


def next_batch(data) -> dict:
  """The next batch; a UserError if an example does not fit the options."""
  try:
    return next(data)
  except ValueError as error:
    raise UserError(f'data: {error}') from error


def save(checkpoints, log, step: int, state, data) -> None:
  """Begins to save, unless the run has lost its way."""
  check_finite(log.flush(), step)
  checkpoints.save(step, state, data)


def check_finite(means: dict[str, float], step: int) -> None:
  """Raises UserError, before a checkpoint is written, if the loss has been lost, or the gradient that made the new parameters."""
  for key in metrics.VITAL:
    if not math.isfinite(means.get(key, 0.0)):
      raise UserError(f'the {key} is {means[key]} at step {step}; lower optim.learning_rate or optim.clip_norm, and start again: '
                      'it goes on from the last checkpoint')


def every(interval: int, step: int, last: bool) -> bool:
  """Whether something due each `interval` steps (0: never), and at the last one, is due."""
  return bool(interval) and (step % interval == 0 or last)
