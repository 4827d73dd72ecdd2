"""The training loop, the same for all stages.

    lavit train --config configs/<stage>.py:<variant> --workdir DIR

A run in the work directory is continued, to the bit. SIGTERM saves a checkpoint and ends with
status 143 (128 + 15), so that a scheduler starts the run again; a finished run ends with 0 and
leaves WORKDIR/export.
"""

from __future__ import annotations

import contextlib
import pathlib

import jax
from ml_collections import ConfigDict

from lavit_jax import accelerators, sharding
from lavit_jax.data.skips import SkipCounter
from lavit_jax.training import distributed, flops, parameters
from lavit_jax.training.batches import check_heldout, count_skipped, next_batch, open_batches
from lavit_jax.training.checkpoint import Checkpoints
from lavit_jax.training.distributed import InterruptHandler
from lavit_jax.training.evaluator import Evaluator
from lavit_jax.training.export import export, write_config
from lavit_jax.training.keys import Purpose, key_for
from lavit_jax.training.lock import WorkdirLock, refuse_if_running
from lavit_jax.training.metrics import MetricLogger
from lavit_jax.training.profiler import ProfilerTrace
from lavit_jax.training.run import Run, resolve
from lavit_jax.training.saver import Saver, is_due
from lavit_jax.training.startup import log_start, option_warnings
from lavit_jax.training.train_step import TrainState, make_init, make_train_step
from lavit_jax.training.watch import MetricWatch


def train(config: ConfigDict, workdir: str | pathlib.Path) -> None:
  """Trains the stage that `config` describes, from where `workdir` left off.

  Args:
    config: a page of `configs/`, locked.
    workdir: receives checkpoints/, metrics.jsonl, tensorboard/, pictures/ and, at the end, export/.

  Raises:
    UserError: anything that the user can correct: earlier stages missing, another run's checkpoint,
      a full disk, a loss that is not finite.
    SystemExit: 143 after SIGTERM, with everything saved.
  """
  run = resolve(config, workdir)
  distributed.check_shared(run.workdir)
  refuse_if_running(run.workdir)
  trace = ProfilerTrace(run.profile, run.workdir)
  step_flops = flops.step_flops(run)
  with InterruptHandler() as interrupt, jax.set_mesh(run.mesh), contextlib.ExitStack() as stack:
    # --- Inputs: nothing is written before all of them are there ---
    loaded = parameters.load_params(run.variant, run.folders, run.mesh)
    frozen = {name: loaded[name] for name in run.stage.modules.needs}
    skipped = SkipCounter(jax.process_count() == 1)
    batches = open_batches(run, 'train', skipped)
    stack.callback(batches.close)
    check_heldout(run)
    lock = stack.enter_context(WorkdirLock(run.workdir))
    checkpoints = Checkpoints(run.workdir, run.page, run.keep, run.model.settings)
    stack.callback(checkpoints.close)
    interrupt.check()

    # --- Train state ---
    init, tx = make_init(run, loaded)
    key = key_for(run.seed, Purpose.WEIGHTS)
    abstract = _abstract_state(jax.eval_shape(init, key, loaded), run)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    first, state = checkpoints.restore_latest(abstract, batches, run.skip_damaged)
    if state is None:
      options = accelerators.run_once_compiler_options()
      state = jax.jit(init, out_shardings=shardings, compiler_options=options)(key, loaded)
    warnings = option_warnings(run, loaded, trace, first)
    del loaded
    interrupt.check()

    # --- Log ---
    log = MetricLogger(
      run.workdir,
      first,
      run.num_steps,
      run.batch_size,
      flops=step_flops.at,
      peak_tflops=run.peak_tflops or accelerators.peak_tflops(jax.devices()),
      tokens=run.tokens_per_step,
    )
    stack.callback(log.close)
    stack.callback(trace.close)
    log_start(run, log, checkpoints, abstract, first)
    for warning in warnings:
      log.say(f'warning: {warning}')
    write_config(run)
    watch = MetricWatch(run, log, checkpoints)
    saver = Saver(run, log, watch, checkpoints, lock, batches)

    # --- Steps ---
    if first < run.num_steps:
      batch = sharding.put_batch(next_batch(batches), run.mesh, run.share)
      train_step = make_train_step(run, tx, shardings).lower(state, frozen, batch).compile()
      evaluator = Evaluator(run, frozen, log)
      interrupt.check()
      log.restart_clock()

    every = run.intervals
    for step in range(first + 1, run.num_steps + 1):
      if step > first + 1:
        batch = sharding.put_batch(log.fetch(next_batch, batches), run.mesh, run.share)
      trace.before(step)
      state, values = train_step(state, frozen, batch)
      trace.after(step, values)
      log.step(step, values)

      last = step == run.num_steps
      stop = interrupt.requested()
      if is_due(every.log_every, step, last):
        # This waits for the steps: on CPU, exchanges between processes that overtake each other
        # deadlock.
        log.flush()
        watch.check_steps(last)
        watch.check_packing(log.report(count_skipped(run, skipped)), step)
        checkpoints.check()
      # A step is saved before it is evaluated, so that a failing evaluation loses none.
      saver.save_if_due(step, state, stop)
      if is_due(every.eval_every, step, last) and not stop:
        stop = not evaluator.evaluate(state, step, interrupt)
      if is_due(every.picture_every, step, last) and run.stage.draw and not stop:
        evaluator.draw(state, step)
        stop = interrupt.requested()
      if stop:
        saver.stop(step, state)

    # --- End ---
    checkpoints.wait()
    lock.check()
    metadata = export(run, state)
    if metadata.get('codebook') == 'untrained':
      log.say(
        'warning: the codebook of this run was never trained, so its codes mean nothing: the '
        'export says so, and is only for init_from'
      )
    before = ' before; a larger num_steps goes on' if first >= run.num_steps else ''
    log.say(f'done{before}; the weights are in {run.workdir / "export"}')


def _abstract_state(shapes: TrainState, run: Run) -> TrainState:
  """The train state as ShapeDtypeStructs with their shardings."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    sharding.shardings(shapes, run.mesh),
  )
