"""The only training loop.

    lavit train --config configs/<stage>.py:<variant> --workdir DIR

A run found in the work directory is continued, to the bit. SIGTERM saves a checkpoint and ends with status 143 (128 + 15), so that
a scheduler starts it again; a finished run ends with 0 and leaves WORKDIR/export.
"""

from __future__ import annotations

import contextlib
import functools
import json
import pathlib
import time
from collections import Counter

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lavit_jax import accelerators, sharding
from lavit_jax.data import loader, text
from lavit_jax.data.row_workers import SkipCounter
from lavit_jax.data.sources import check_files
from lavit_jax.errors import UserError
from lavit_jax.local_paths import expand_home
from lavit_jax.models import lavit
from lavit_jax.models.settings import for_modules
from lavit_jax.training import codebook, distributed, flops, metrics, stages
from lavit_jax.training.checkpoint import Checkpoints
from lavit_jax.training.distributed import TERMINATED, InterruptHandler
from lavit_jax.training.keys import Purpose, key_for
from lavit_jax.training.lock import WorkdirLock, refuse_if_running
from lavit_jax.training.schedule import warn_of_schedule
from lavit_jax.training.settings import run_settings
from lavit_jax.training.train_step import averaged, loss_and_metrics, make_init, make_train_step
from lavit_jax.training.validation import check_options, check_values, name_data_option
from lavit_jax.training.watch import MetricWatch
from lavit_jax.weights.store import folder
from lavit_jax.weights.store.metadata import check_codebook, has_codebook


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
  check_values(config)
  mesh = sharding.make_mesh(config.mesh)
  check_options(config, mesh)
  distributed.check_shared(workdir)
  refuse_if_running(workdir)
  trace = metrics.ProfilerTrace(config.profile, workdir)
  model_flops = flops.step_flops(config)  # which has a mesh of its own
  with InterruptHandler() as interrupt, jax.set_mesh(mesh), contextlib.ExitStack() as stack:
    settings = run_settings(
      config, split_folders(config.frozen), split_folders(config.init_from), workdir
    )
    model = lavit.build(config.variant, config.dtype, config.remat, settings)
    stage = stages.build_stage(config, model, sharding.batch_shards(mesh))
    parts = load_parts(config, stage, mesh)
    frozen = {name: parts[name] for name in stage.needs}
    share, skipped = (
      sharding.process_share(mesh, config.batch_size),
      SkipCounter(jax.process_count() == 1),
    )
    data = open_data(config, model, share, 'train', skipped)
    stack.callback(data.close)
    check_heldout(config, model, share)
    lock = stack.enter_context(WorkdirLock(workdir))
    checkpoints = Checkpoints(
      workdir, config, config.keep, model.settings
    )  # the first to write: what is missing has been told by now
    stack.callback(checkpoints.close)
    interrupt.check()

    init, tx = make_init(config, stage, parts)
    weights_key = key_for(config.seed, Purpose.WEIGHTS)
    shapes = jax.eval_shape(init, weights_key, parts)
    places = sharding.shardings(shapes, mesh)
    abstract = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places
    )
    first, state = checkpoints.restore_latest(abstract, data, config.skip_damaged)
    if state is None:
      once = (
        {'xla_backend_optimization_level': 0} if jax.default_backend() == 'cpu' else None
      )  # compiling costs more than running
      state = jax.jit(init, out_shardings=places, compiler_options=once)(weights_key, parts)
    absent = [name for name in stage.zeros if config.init_from and name not in parts]
    warnings = stages.warnings(config, stage, parts)
    del parts
    interrupt.check()

    peak = config.peak_tflops or accelerators.peak_tflops(jax.devices())
    log = metrics.MetricLogger(
      workdir,
      first,
      config.num_steps,
      config.batch_size,
      flops=model_flops.at,
      peak_tflops=peak,
      tokens=stages.tokens_per_step(config),
    )
    stack.callback(log.close)
    stack.callback(trace.close)
    count = sum(x.size for x in jax.tree.leaves(shapes.params))
    log.say(
      f'{config.stage}:{config.variant}  {count / 1e6:.2f} M parameters  mesh {dict(mesh.shape)}  '
      + (f'continuing from step {first}' if first else f'starting in {workdir}')
    )
    if first:
      tell_changes(log, *checkpoints.changes(first))
      warn_of_schedule(log, config, checkpoints.saved_config(first), first)
    elif absent:
      log.say(
        f'warning: init_from={config.init_from} has no {", ".join(absent)}: zeros take the place'
      )
    for line in warnings:
      log.say(f'warning: {line}')
    if trace.last and not (first < trace.last and trace.first <= config.num_steps):
      log.say(
        f'warning: profile={config.profile} traces nothing: this run makes steps {first + 1} to {config.num_steps}'
      )
    write_config(config, workdir)
    watch, due = MetricWatch(config, log, checkpoints, sharding.batch_shards(mesh)), False

    if first < config.num_steps:
      batch = sharding.put_batch(next_batch(data), mesh, share)
      train_step = make_train_step(config, stage, tx, places, mesh)
      train_step = train_step.lower(state, frozen, batch).compile()
      look = Evaluator(config, model, stage, mesh, share, frozen)
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
        watch.check_steps(last)
        watch.check_packing(log.report(skips(config, skipped, share)), step)
        checkpoints.check()
      due, saved = due or every(config.checkpoint_every, step, last), False
      if due or stop:  # first: a run that ends in what follows has missed a look, and no step
        log.flush()
        watch.check_steps(last)
        if watch.is_sound():  # else later, or never
          lock.check()
          checkpoints.save(step, state, data)
          due, saved = False, True
      if every(config.eval_every, step, last) and not stop:
        stop = look.evaluate(state, step, log, interrupt)
      if every(config.picture_every, step, last) and stage.draw and not stop:
        look.draw(state, step, log)
        stop = interrupt.requested()
      if stop:
        if not saved:
          log.flush()
          watch.check_steps(last)
          if watch.is_sound():
            checkpoints.save(step, state, data)
            saved = True
        checkpoints.wait()
        place = 'here' if saved else 'the last checkpoint, for the last updates were skipped'
        log.say(f'stopped at step {step} as asked; the same command goes on from {place}')
        raise SystemExit(TERMINATED)

    checkpoints.wait()
    lock.check()
    about = export(config, stage, state, workdir, model.settings)
    if about.get('codebook') == 'untrained':
      log.say(
        'warning: the codebook of this run was never trained, so its codes mean nothing: the export says so, and is only for init_from'
      )
    before = ' before; a larger num_steps goes on' if first >= config.num_steps else ''
    log.say(f'done{before}; the weights are in {workdir / "export"}')


# ----------------------------------------------------------------------------------------------------------- looking at it


class Evaluator:
  """Held-out metrics and pictures; always of the same examples and the same noise, with the averaged weights if there are any."""

  def __init__(self, config, model, stage, mesh, share, frozen):
    self.config, self.model, self.frozen, self.mesh, self.share = config, model, frozen, mesh, share
    self.key = key_for(config.seed, Purpose.HELDOUT)
    jit = functools.partial(
      jax.jit, out_shardings=NamedSharding(mesh, P())
    )  # every process sees all of it

    measure = loss_and_metrics(stage, config.accumulate, sharding.batch_shards(mesh), mesh)

    @jit
    def metrics_of(train_state, frozen, batch, key):
      params, state = averaged(stage, train_state)
      return measure(params, frozen, state, batch, key)

    @jit
    def pictures_of(train_state, frozen, batch, key):
      params, state = averaged(stage, train_state)
      return stage.draw(params, frozen, state, batch, key)

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
    log.evaluation(step, metrics.mean_metrics(rows))
    log.pause(time.monotonic() - start)
    return False

  def draw(self, state, step, log) -> None:
    start = time.monotonic()
    ((key, batch),) = self.batches(1)
    rows = jax.device_get(self.pictures_of(state, self.frozen, batch, key))
    log.pictures(step, {self.config.stage: metrics.image_grid(*rows)})
    log.pause(time.monotonic() - start)


# ------------------------------------------------------------------------------------------------------------- in and out


def load_parts(config, stage, mesh) -> dict:
  """Parts of the model from the folders `frozen` and `init_from`, of each what the stage uses, on the mesh; the last one wins.

  Those of `init_from` come in the type in which they are stored: the stage's own begin as copies of them.

  Raises:
    UserError: a part that the stage needs is in none of the `frozen` folders, or is a tokenizer whose codebook was never trained.
  """
  parts, wanted = {}, stage.needs + stage.starts

  def load(path, names, dtype):
    return folder.load_params(
      path, names, config.variant, lambda tree: sharding.shardings(tree, mesh), dtype
    )

  for path in split_folders(config.frozen):
    names = [name for name in folder.read_config(path)['parts'] if name in wanted]
    if 'tokenizer' in names:
      check_codebook(path)
    parts |= load(path, names, 'float32')
  for path in split_folders(config.init_from):
    names = [name for name in folder.read_config(path)['parts'] if name in stage.takes]
    offered = load(path, names, None)
    if 'tokenizer' in offered and not has_codebook(path):
      offered, _ = codebook.take_out(offered)
    parts |= offered
  missing = [name for name in wanted if name not in parts]
  if missing:
    raise UserError(
      f'stage {config.stage} needs {", ".join(missing)}: name the folders that earlier stages '
      f'exported, --config.frozen=RUN/export,RUN/export (now {config.frozen!r})'
    )
  return parts


def split_folders(text: str) -> list[str]:
  """'a,b' -> ['a', 'b'], of this machine, or a UserError."""
  found = [path.strip() for path in text.split(',') if path.strip()]
  if remote := [path for path in found if '://' in path]:
    raise UserError(
      f'{remote[0]} is no folder here; mount the bucket (gcsfuse), or use a disk that all machines share'
    )
  return [expand_home(path) for path in found]


def export(config, stage, train_state, workdir, settings) -> dict:
  """Writes the parts that this stage made to WORKDIR/export, averaged over the last steps if there is an average; -> its metadata."""
  params, state = averaged(stage, train_state)
  parts = distributed.to_host(stage.export(params, state))
  about = dict(
    stage=config.stage, steps=int(train_state.step), config=json.loads(config.to_json_best_effort())
  )
  if stage.about is not None:
    about |= stage.about(state)
  if jax.process_index() == 0:
    folder.save_params(
      workdir / 'export',
      config.variant,
      parts,
      metadata=about,
      settings=for_modules(settings, parts),
    )
  distributed.wait_for_all('exported')
  return about


def tell_changes(log, others: list[str], inexact: list[str]) -> None:
  """One line for options that have changed since the checkpoint, and a warning for those that give the run other examples."""
  if others:
    log.say(f'changed since then: {", ".join(others)}')
  if inexact:
    log.say(
      f'warning: changed since then, so the next examples are not those that it would have seen: {", ".join(inexact)}'
    )


def write_config(config, workdir) -> None:
  if jax.process_index() == 0:
    (workdir / 'config.json').write_text(
      json.dumps(json.loads(config.to_json_best_effort()), indent=1) + '\n'
    )


def open_data(config, model, share, split: str, skipped: SkipCounter | None = None):
  """An iterator over this process's share of the batches of a split.

  Raises:
    UserError: the data set or the tokenizer is not there, or is of another vocabulary than the model.
  """
  options = config.data.to_dict()
  with name_data_option():
    if options.get('tokenizer_folder'):
      text.TextTokenizer.load(options['tokenizer_folder'], model.vocabulary.text_size)
    return loader.batches(
      **options,
      split=split,
      seed=config.seed,
      batch_size=len(share.rows),
      shard_index=share.index,
      shard_count=share.count,
      rows=share.rows,
      skipped=skipped,
      vit_size=stages.vit_size(config, model),
    )


def check_heldout(config, model, share) -> None:
  """Opens held-out data as evaluation will, for what is wrong with them must not come to light at the first one."""
  if config.eval_every or config.picture_every:
    with contextlib.closing(open_data(config, model, share, 'heldout')):
      if config.data.get('sources'):
        check_files('data.heldout', config.data.heldout, config.data.max_skipped)


def skips(config, skipped: SkipCounter, share) -> dict[str, int]:
  """What all processes together skipped; those that read the same rows count once.

  Raises:
    UserError: of a source more than data.max_skipped, over all processes.
  """
  if not config.data.get('sources'):
    return {}
  for source in range(len(config.data.sources) if jax.process_count() > 1 else 0):
    known = distributed.gather({'share': share.index, 'account': skipped.account_of(source)})
    skipped.check(
      source, {each['share']: each['account'] for each in known}.values(), config.data.max_skipped
    )
  told = {
    each.pop('share'): each
    for each in distributed.gather({'share': share.index, **skipped.metrics()})
  }
  return dict(sum(map(Counter, told.values()), Counter()))


def next_batch(data) -> dict:
  """The next batch; a UserError if an example does not fit the options."""
  try:
    return next(data)
  except ValueError as error:
    raise UserError(f'data: {error}') from error


def every(interval: int, step: int, last: bool) -> bool:
  """Whether something due each `interval` steps (0: never), and at the last one, is due."""
  return bool(interval) and (step % interval == 0 or last)
