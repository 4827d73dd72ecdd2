"""The training loop, the same for all stages.

    lavit train --config configs/<stage>.py:<variant> --workdir WORKDIR

A run in the work directory is continued, to the bit. SIGTERM saves a checkpoint and ends with
status 143 (128 + 15), so that a scheduler starts the run again; a finished run ends with 0 and
leaves WORKDIR/export.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import warnings
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import optax
from jax import Array
from ml_collections import ConfigDict

from lavit_jax import accelerators, sharding
from lavit_jax.data.loader import BatchIterator
from lavit_jax.data.skips import SkipCounter
from lavit_jax.training import distributed, flops, parameters
from lavit_jax.training.batches import check_heldout, count_skipped, next_batch, open_batches
from lavit_jax.training.checkpoint import Checkpoints
from lavit_jax.training.distributed import InterruptHandler
from lavit_jax.training.evaluator import Evaluator
from lavit_jax.training.export import export, write_config
from lavit_jax.training.goodput import Goodput
from lavit_jax.training.keys import Purpose, key_for
from lavit_jax.training.lock import WorkdirLock, refuse_if_running
from lavit_jax.training.messages import log_end, log_start, option_warnings
from lavit_jax.training.metrics import MetricLogger
from lavit_jax.training.profiler import ProfilerTrace
from lavit_jax.training.run import Run, resolve
from lavit_jax.training.saver import Saver, is_due
from lavit_jax.training.stages.base import Tree, frozen_params
from lavit_jax.training.train_step import TrainState, make_init, make_train_step
from lavit_jax.training.watch import MetricWatch
from lavit_jax.training.workdir import Mirror, records_folder
from lavit_jax.weights.store.arrays import ParameterSource


class _Inputs(NamedTuple):
  """What a run reads and writes."""

  sources: dict[str, ParameterSource]  # the modules in the run's folders
  frozen: dict[str, Tree]  # the params of those that the stage needs
  batches: BatchIterator
  skipped: SkipCounter
  lock: WorkdirLock
  mirror: Mirror
  checkpoints: Checkpoints


class _Start(NamedTuple):
  """Where a run begins."""

  step: int  # the steps made so far
  state: TrainState
  abstract: TrainState  # ShapeDtypeStructs with shardings
  tx: optax.GradientTransformation


def train(
  config: ConfigDict,
  workdir: str | os.PathLike[str],
  began: float | None = None,
  before_compiling: Callable[[], None] | None = None,
) -> None:
  """Trains the stage that `config` describes, from where `workdir` left off.

  Args:
    config: as the files in `configs/` define it, locked.
    workdir: a folder, or gs://BUCKET/PATH; receives checkpoints/, metrics.jsonl, goodput.jsonl,
      tensorboard/, pictures/ and, at the end, export/.
    began: when the process began, by `time.monotonic`; None is now.
    before_compiling: called when the work directory is this run's, before programs are compiled.

  Raises:
    UserError: anything that the user can correct: earlier stages missing, another run's checkpoint,
      a full disk, a loss that is not finite.
    SystemExit: 143 after SIGTERM, with everything saved.
  """
  run = resolve(config, workdir)
  distributed.check_shared(run.workdir)
  refuse_if_running(run.workdir)
  records = records_folder(run.workdir)
  trace = ProfilerTrace(run.profile, records)
  step_flops = flops.step_flops(run)
  with InterruptHandler() as interrupt, jax.set_mesh(run.mesh), contextlib.ExitStack() as stack:
    goodput = Goodput(began)
    stack.callback(goodput.close)
    inputs = _open_inputs(run, records, stack, goodput)
    interrupt.check()
    if before_compiling is not None:
      before_compiling()
    if jax.process_index() == 0:
      goodput.open(records)
      stack.callback(goodput.close)  # while the directory is this run's
    with goodput.phase('restore'):
      start = _restore_or_init(run, inputs)
    goodput.resume(start.step)
    notes = option_warnings(run, _loaded_shapes(inputs), trace, start.step)
    inputs = inputs._replace(frozen=frozen_params(run.stage, inputs.frozen))
    interrupt.check()

    log = MetricLogger(
      records,
      start.step,
      run.num_steps,
      run.batch_size,
      flops=step_flops.at,
      peak_tflops=run.peak_tflops or accelerators.peak_tflops(jax.devices()),
      tokens=run.tokens_per_step,
      goodput=goodput,
    )
    stack.callback(log.close)
    stack.callback(trace.close)
    log_start(run, log, inputs.checkpoints, start.abstract, start.step)
    for note in notes:
      log.print_line(f'warning: {note}')
    write_config(run, records)

    state = start.state
    if start.step < run.num_steps:
      state = _train_steps(run, inputs, start, log, goodput, trace, interrupt)
    with goodput.phase('saving'):
      inputs.checkpoints.wait()
      inputs.lock.check()
      metadata = export(run, state)
    log_end(run, log, metadata, start.step, goodput)


def _open_inputs(
  run: Run, records: pathlib.Path, stack: contextlib.ExitStack, goodput: Goodput
) -> _Inputs:
  """Opens everything that the run reads, and then what it writes; `stack` closes it."""
  with goodput.phase('restore'):
    sources = parameters.open_modules(run.variant, run.folders)
    frozen = parameters.read_frozen(sources, run.folders, run.stage, run.mesh)
  skipped = SkipCounter(jax.process_count() == 1)
  batches = open_batches(run, 'train', skipped)
  stack.callback(batches.close)
  check_heldout(run)
  # These are the first to write: whatever is missing has been reported by now.
  lock = stack.enter_context(WorkdirLock(run.workdir))
  mirror = stack.enter_context(Mirror(run.workdir, records, lambda: not lock.lost))
  checkpoints = Checkpoints(run.workdir, run.config, run.keep, run.model.settings)
  stack.callback(checkpoints.close)
  return _Inputs(sources, frozen, batches, skipped, lock, mirror, checkpoints)


def _restore_or_init(run: Run, inputs: _Inputs) -> _Start:
  """The train state of the last checkpoint, or a fresh one."""
  loaded_shapes = _loaded_shapes(inputs)
  init, tx = make_init(run, loaded_shapes)
  key = key_for(run.seed, Purpose.WEIGHTS)
  shapes = jax.eval_shape(init, key, loaded_shapes)
  shardings = sharding.shardings(shapes, run.mesh)
  abstract = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
  )
  step, state = inputs.checkpoints.restore_latest(abstract, inputs.batches, run.skip_damaged)
  if state is None:
    # What a later start finds in its checkpoint is not read from the folders again.
    own = [name for name in inputs.sources if name not in inputs.frozen]
    loaded = parameters.read_modules(inputs.sources, own, run.mesh)
    state = _first_state(init, shardings, key, loaded, inputs.frozen)
  return _Start(step, state, abstract, tx)


def _loaded_shapes(inputs: _Inputs) -> dict[str, Tree]:
  """The parameters of the run's folders, the frozen ones in their dtypes."""
  return {**parameters.module_shapes(inputs.sources), **jax.eval_shape(lambda: inputs.frozen)}


def _first_state(
  init: Callable[[Array, Mapping[str, Tree]], TrainState],
  shardings: TrainState,
  key: Array,
  loaded: dict[str, Tree],
  frozen: Mapping[str, Tree],
) -> TrainState:
  """The train state of a new run; the memory of `loaded` becomes that of its parameters."""

  def first_state(loaded, key, frozen):
    return init(key, {**frozen, **loaded})

  options = accelerators.run_once_compiler_options()
  program = jax.jit(
    first_state, donate_argnums=0, out_shardings=shardings, compiler_options=options
  )
  with warnings.catch_warnings():
    # Embeddings of a smaller vocabulary are copied.
    warnings.filterwarnings('ignore', 'Some donated buffers were not usable')
    return program(loaded, key, frozen)


def _train_steps(
  run: Run,
  inputs: _Inputs,
  start: _Start,
  log: MetricLogger,
  goodput: Goodput,
  trace: ProfilerTrace,
  interrupt: InterruptHandler,
) -> TrainState:
  """Makes the remaining steps, of which there is at least one.

  Returns:
    The last train state.

  Raises:
    SystemExit: 143 after SIGTERM, with everything saved.
  """
  state = start.state
  watch = MetricWatch(run, log, inputs.checkpoints)
  saver = Saver(
    run, log, watch, inputs.checkpoints, inputs.lock, inputs.mirror, inputs.batches, goodput
  )
  with goodput.phase('data_wait'):
    batch = sharding.put_batch(next_batch(inputs.batches), run.mesh, run.share)
  shardings = jax.tree.map(lambda x: x.sharding, start.abstract)
  with goodput.phase('compile'):
    train_step = (
      make_train_step(run, start.tx, shardings).lower(state, inputs.frozen, batch).compile()
    )
  evaluator = Evaluator(run, inputs.frozen, log)
  interrupt.check()
  log.restart_clock()
  goodput.begin_steps()

  every = run.intervals
  for step in range(start.step + 1, run.num_steps + 1):
    if step > start.step + 1:
      batch = sharding.put_batch(log.fetch(next_batch, inputs.batches), run.mesh, run.share)
    trace.before(step)
    state, values = train_step(state, inputs.frozen, batch)
    trace.after(step, values)
    log.step(step, values)

    last = step == run.num_steps
    stop = interrupt.requested()
    if is_due(every.log_every, step, last):
      # This waits for the steps: on CPU, exchanges between processes that overtake each other
      # deadlock.
      log.flush()
      watch.check_steps(last)
      watch.check_packing(log.report(count_skipped(run, inputs.skipped)), step)
      inputs.checkpoints.check()
    # A step is saved before it is evaluated, so that a failing evaluation loses none.
    saver.save_if_due(step, state, stop)
    if is_due(every.eval_every, step, last) and not stop:
      log.flush()  # steps that are under way are not evaluation
      with goodput.phase('evaluation'):
        stop = not evaluator.evaluate(state, step, interrupt)
        inputs.mirror.copy()
      goodput.record(step)
    if is_due(every.picture_every, step, last) and run.stage.draw and not stop:
      log.flush()
      with goodput.phase('evaluation'):
        evaluator.draw(state, step)
      goodput.record(step)
      stop = interrupt.requested()
    if stop:
      saver.stop(step, state)
  return state
