"""`lavit COMMAND`: the whole project from the shell.

A command parses its options, imports what it needs, calls one function of the package, and prints. Whatever goes wrong by
the user's doing arrives here as a `UserError` (or as a full disk) and leaves as one line on stderr with an exit status of errors.py.

Imports wait inside the commands, so that `lavit --help` answers at once; and the syntax of this file is plain, so that an
old Python gets as far as `check_python`, which says what is wrong with it.
"""

import argparse
import errno
import os
import sys

MIN_PYTHON = (3, 11)
ASSETS = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'assets')
TINY = os.path.relpath(os.path.join(ASSETS, 'tiny'))
DEMO = os.path.relpath(os.path.join(ASSETS, 'demo'))
LOADING = ('folder', 'dtype', 'weights', 'cache', 'safety_checker', 'seed')  # options that every result depends on
PLUMBING = ('command', 'run', 'inputs', 'input', 'out', 'json', 'tensor', *LOADING)  # of `task`


def main(argv=None):
  """Runs one command; returns its exit status: 0, or one of errors.py after one line on stderr that names the fault and the remedy."""
  check_python()
  from lavit_jax.errors import UserError
  try:
    args, rest = build_parser().parse_known_args(argv)
    if args.run in (train, compile_step):
      from lavit_jax.training.config import split_overrides
      args.overrides, rest = split_overrides(rest)
    if rest:
      raise UserError('lavit %s does not know %s; see lavit %s --help' % (args.command, ' '.join(rest), args.command))
    args.run(args)
  except UserError as error:
    return _fail(error, error.status)
  except OSError as error:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
      return _fail('the disk is full%s; free some space or write elsewhere' % (' at %s' % error.filename if error.filename else ''))
    if error.filename:
      return _fail('%s: %s; choose another path or mend this one' % (error.filename, error.strerror))
    if error.errno is not None:
      raise
    return _fail(error)  # raised by the data package with the remedy
  except KeyboardInterrupt:
    return _fail('interrupted', 130)
  return 0


def check_python(version=None):
  """Exits with one line when this interpreter is older than the package supports."""
  version = tuple(version or sys.version_info)[:2]
  if version < MIN_PYTHON:
    raise SystemExit(_fail('Python %d.%d is too old; make the virtual environment with Python %d.%d or newer' % (version + MIN_PYTHON)))


def _fail(message, status=2):
  print('lavit: error: ' + ' '.join(str(message).split()), file=sys.stderr)
  return status


# --------------------------------------------------------------------------------------------------------------- commands

def train(args):
  from lavit_jax.training.config import load_config
  config = load_config(args.config, args.overrides)
  from lavit_jax.training import processes
  processes.connect(args.coordinator, args.processes, args.process, args.timeout)
  from lavit_jax.training.loop import train as run
  with processes.together():
    run(config, args.workdir)


def compile_step(args):
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # the pod's chips are elsewhere
  from lavit_jax.errors import UserError
  if (args.config is None) == (args.decode is None):
    raise UserError('give either --config PAGE.py:VARIANT, for its train step, or --decode VARIANT, for its language model')
  if args.decode:
    from lavit_jax.aot.decode import run
    return run(args.decode, args.topology, args.batch, args.prompt, args.new_tokens, args.weights, args.cache, args.json)
  from lavit_jax.training.config import load_config
  config = load_config(args.config, args.overrides)
  from lavit_jax.aot.train import run
  run(config, os.path.basename(args.config), args.topology, args.slices, args.json)


def bundle(args):
  from lavit_jax.porting.folder import bundle as run
  print(run(args.out, args.exports, args.tokenizer, args.dtype))


def demo(args):
  from lavit_jax.inference.demo import run
  run(_model(args), args.inputs, args.out, seed=args.seed)


def task(args):
  """caption, answer, generate, synthesize, reconstruct and tokenize; an option not of PLUMBING goes to the model's method by its name."""
  from lavit_jax.inference import batch
  chosen = batch.TASKS[args.command]
  rows, base, many = batch.find_rows(chosen, args.inputs, args.input, args.out)
  options = {key: value for key, value in vars(args).items() if key not in PLUMBING and value is not None}
  settings = dict(options, command=args.command, **{key: getattr(args, key) for key in LOADING if getattr(args, key) is not None})
  from lavit_jax.local_paths import expand_home
  for key in ('folder', 'start'):  # however they are spelled, and from wherever
    if key in settings:
      settings[key] = os.path.realpath(expand_home(settings[key]))
  samples = options.pop('samples', 1)
  if args.seed is None and (options.get('sample') or samples > 1):
    from lavit_jax.errors import UserError
    raise UserError('--most-probable has no seed, by which %s; leave it out' % (
        '--sample chooses words' if options.get('sample') else '--samples %d would differ' % samples))
  rows = [row for row in rows for _ in range(samples)]  # each has the keys of its own place
  results, pictures = args.out, None
  if 'file' in chosen.gives:
    results, pictures = os.path.join(args.out, 'manifest.jsonl') if many else None, args.out
  known = batch.Results(results, chosen.gives, settings) if results else None
  batch.run(chosen, _model(args), rows, args.seed, options, base=base, many=many, as_json=args.json, results=known, pictures=pictures)


def app(args):
  try:
    from lavit_jax.inference.app import serve
  except ImportError as error:
    if (error.name or '').split('.')[0] != 'gradio':
      raise
    from lavit_jax.errors import UserError
    raise UserError("the page needs Gradio; pip install -e '.[app]' -c launch/constraints.txt") from None
  serve(_model(args), args.host, args.port)


def convert(args):
  from lavit_jax.porting.convert import prepare
  from lavit_jax.porting.show import run
  job = prepare(args.src, args.dst, variant=args.variant, dtype=args.dtype, allow_missing=args.allow_missing, force=args.force,
                pickles=args.bin, grow=not args.keep_vocabulary, weights_variant=args.weights_variant, allow_nonfinite=args.allow_nonfinite)
  run(job, args.dry_run)


def inspect(args):
  from lavit_jax.porting.show import inspect as run
  run(args.folder)


def data_build(args):
  from lavit_jax.data.emoji import build
  from lavit_jax.errors import UserError
  try:
    print(build(args.data_dir, args.sample))
  except ImportError as error:
    raise UserError(error) from error


def data_pack(args):
  from lavit_jax.data.packing import pack
  options = {'image': args.image} if args.image else {}
  packed = pack(args.sources, args.out, args.workers, **options)
  reasons = ''.join(', %s %d' % pair for pair in sorted(packed.skipped.items()))
  print('%d records in %s; skipped: %d%s; tars done before: %d' % (
      packed.records, args.out, sum(packed.skipped.values()), reasons, packed.found))
  if packed.failed:
    from lavit_jax.errors import UserError
    raise UserError('%d tars are not packed: %s; the same command tries them again' % (
        len(packed.failed), packed.failed[0] + (', and others' if len(packed.failed) > 1 else '')))


def evaluate(args):
  from lavit_jax.evaluation.report import evaluate as run
  run(_model(args), args.source, args.count, args.out, drawn=args.drawn, seed=args.seed)


def variants(args):
  from rich.console import Console
  from rich.table import Table
  from lavit_jax.models import lavit
  table = Table('variant', 'pixels', 'patches', 'codes', 'text ids', 'language model')
  for name in lavit.VARIANTS:
    model = lavit.build(name)
    table.add_row(name, str(model.image_size), str(model.num_patches), str(model.vocabulary.codebook_size),
                  str(model.vocabulary.text_size), '%d layers of %d' % (model.llama.num_layers, model.llama.hidden_size))
  Console().print(table)


# ------------------------------------------------------------------------------------------------- what the commands share

def _model(args):
  from lavit_jax.inference.pipeline import Lavit
  mesh = {'tensor': args.tensor} if args.tensor > 1 else None
  return Lavit.from_pretrained(args.folder, mesh=mesh, dtype=args.dtype, weights=args.weights, cache=args.cache, safety_checker=args.safety_checker)


# ----------------------------------------------------------------------------------------------------------------- options

class Parser(argparse.ArgumentParser):
  """Says what is wrong in one line, as everything here does."""

  def error(self, message):
    from lavit_jax.errors import UserError
    raise UserError('%s; see %s --help' % (message, self.prog))


def number(kind, low, high=float('inf')):
  """The type of an option: an int or a float from `low` to `high`."""
  def parse(text):
    try:
      value = kind(text)
    except ValueError:
      value = float('nan')
    if not low <= value <= high:
      raise argparse.ArgumentTypeError('%r is not %s from %g%s' % (
          text, 'an integer' if kind is int else 'a number', low, ' to %g' % high if high < float('inf') else ' up'))
    return value
  return parse


def local(text):
  """The type of an option: a path of this machine, or one that is mounted; for a path `gs://B/run` would be ./gs:/B/run.

  '~' is the home folder, which shells leave as it is in --folder=~/x.
  """
  if '://' in text:
    raise argparse.ArgumentTypeError('%r is no path here; mount the bucket (gcsfuse), or use a disk that all machines share' % text)
  from lavit_jax.local_paths import expand_home
  return expand_home(text)


def size(text):
  """The type of an option: HEIGHTxWIDTH as [height, width]."""
  sides = text.lower().split('x')
  if len(sides) != 2 or not all(side.isdigit() for side in sides):
    raise argparse.ArgumentTypeError('%r is not HEIGHTxWIDTH, such as 1024x1024' % text)
  return [int(side) for side in sides]


def build_parser():
  """The options of every command."""
  parser = Parser(prog='lavit', description='LaVIT in JAX: one language model that reads and draws pictures.')
  commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')

  def command(name, run, text, parent=commands):
    sub = parent.add_parser(name, help=text, description=text[0].upper() + text[1:] + '.', allow_abbrev=False)
    sub.set_defaults(run=run)
    return sub

  def model_command(name, run, text):
    sub = command(name, run, text)
    sub.add_argument('--folder', type=local, default=TINY, metavar='DIR', help='the checkpoint (default: %(default)s)')
    sub.add_argument('--dtype', choices=('float32', 'bfloat16'), help='compute dtype (default: bfloat16 on accelerators, float32 on CPUs)')
    sub.add_argument('--weights-dtype', '--weights', dest='weights', choices=('int8',), help='of the language model, a byte a weight (default: as stored)')
    sub.add_argument('--cache-dtype', '--cache', dest='cache', choices=('bfloat16', 'int8'), help='keys and values of the language model (default: the compute dtype)')
    sub.add_argument('--tensor', type=number(int, 1), default=1, metavar='N', help='devices to split the model over (default: %(default)s)')
    sub.add_argument('--no-safety-checker', dest='safety_checker', action='store_false', help='do not look at what is drawn')
    return sub

  def seeded_command(name, run, text):
    sub = model_command(name, run, text)
    sub.add_argument('--seed', default=0, type=number(int, 0, 2**32 - 1), help='of all random choices (default: %(default)s)')
    return sub

  def task_command(name, text, metavar, row):
    sub = seeded_command(name, task, text)
    sub.add_argument('inputs', nargs='*', metavar=metavar)
    sub.add_argument('--input', type=local, metavar='ROWS.jsonl', help='a row a line: %s; relative pictures are beside it' % row)
    sub.add_argument('--json', action='store_true', help='print one JSON object a result')
    return sub

  def writing_options(sub, samples):
    sub.add_argument('--top-p', type=number(float, 0.001, 1), metavar='P', help='the likeliest that together reach this probability (default: all)')
    sub.add_argument('--repetition-penalty', type=number(float, 0.01), metavar='R', help='of tokens written before, above 1 (default: 1)')
    sub.add_argument('--min-new-tokens', '--min-tokens', dest='min_tokens', type=number(int, 0), metavar='N', help='fewest to write (default: as published)')
    sub.add_argument('--max-new-tokens', '--max-tokens', dest='max_tokens', type=number(int, 1), metavar='N', help='most to write (default: as published)')
    sub.add_argument('--num-return-sequences', '--samples', dest='samples', type=number(int, 1), metavar='N', help=samples)

  def telling_command(name, text, metavar, beams, penalty, **row):
    sub = reading_command(name, text, metavar, **row)
    sub.add_argument('--num-beams', '--beams', dest='beams', type=number(int, 1), metavar='N', help='of the search (default: %d)' % beams)
    sub.add_argument('--length-penalty', type=number(float, -100, 100), metavar='L', help='of the search (default: %d)' % penalty)
    sub.add_argument('--do-sample', '--sample', dest='sample', action='store_const', const=True, help='sample in place of the search')
    sub.add_argument('--top-k', type=number(int, 1), metavar='K', help='with --do-sample: tokens to choose among (default: 50)')
    sub.add_argument('--temperature', type=number(float, 1e-3), metavar='T', help='with --do-sample (default: 1)')
    writing_options(sub, 'of each, by other patches and, with --do-sample, words (default: 1)')
    return sub

  def reading_command(name, text, metavar, row='{"image": "cat.png"}'):
    sub = task_command(name, text, metavar, row)
    sub.add_argument('--most-probable', dest='seed', action='store_const', const=None,
                     help='keep the most probable patches instead of sampling which become tokens')
    sub.add_argument('--out', type=local, metavar='FILE.jsonl', help='results are added to it, a line each; started again, the command goes on')
    return sub

  def drawing_command(name, text, metavar, row='{"image": "cat.png"}'):
    sub = task_command(name, text, metavar, row)
    sub.add_argument('--out', type=local, default='drawn', metavar='DIR', help='where the PNGs go (default: %(default)s); of several '
                     'pictures, a folder or --input also manifest.jsonl, by which the command goes on when started again')
    sub.add_argument('--size', type=size, metavar='HxW', help="one of SDXL's, such as 1024x1024 (default: Stable Diffusion's square)")
    sub.add_argument('--num-inference-steps', '--steps', dest='steps', type=number(int, 1, 999), help='of the sampler (default: 50, of SDXL 25)')
    sub.add_argument('--decoder-guidance-scale', '--decoder-guidance', dest='decoder_guidance', type=number(float, 0), metavar='G', help='of the U-Net (default: 5, of SDXL 7)')
    sub.add_argument('--sampler', choices=('ddim', 'euler', 'dpm++2m'), default='ddim', help='(default: %(default)s)')
    sub.add_argument('--guidance-rescale', '--rescale', dest='rescale', type=number(float, 0, 1), default=0.0, metavar='R', help='share of rescaled guidance (default: %(default)s)')
    sub.add_argument('--vae-tile-size', '--tile', dest='tile', type=number(int, 64), metavar='PIXELS', help='decode in tiles, for less memory (default: above a megapixel)')
    return sub

  def sampling_command(name, text, metavar, row, guidance):
    sub = drawing_command(name, text, metavar, row)
    sub.add_argument('--guidance-scale', '--guidance', dest='guidance', type=number(float, 0), default=guidance, metavar='G', help='of the language model (default: %(default)s)')
    sub.add_argument('--top-k', type=number(int, 1), default=50, metavar='K', help='codes to choose among (default: %(default)s)')
    sub.add_argument('--temperature', type=number(float, 1e-3), default=1.0, metavar='T', help='(default: %(default)s)')
    writing_options(sub, 'pictures of each (default: 1)')
    sub.add_argument('--negative-prompt', '--negative', dest='negative', default='', metavar='TEXT', help='what not to draw')
    sub.add_argument('--init-image', '--start', dest='start', metavar='IMAGE', help='begin from this picture in place of noise')
    sub.add_argument('--strength', type=number(float, 0.01, 1), default=0.8, metavar='S',
                     help='of the change to --init-image, of which even 1 keeps a trace (default: %(default)s)')
    return sub

  sub = command('train', train, 'train one stage; every value of its page can be set with --config.KEY=VALUE')
  sub.add_argument('--config', required=True, metavar='PAGE.py:VARIANT', help='such as configs/tokenizer.py:tiny')
  sub.add_argument('--workdir', required=True, type=local, metavar='DIR', help='checkpoints, logs, exports; a run found there goes on')
  several = sub.add_argument_group('several processes', 'TPU pods, GKE and SLURM need none of these')
  several.add_argument('--coordinator', metavar='HOST:PORT', help='where process 0 listens (default: $JAX_COORDINATOR_ADDRESS)')
  several.add_argument('--processes', type=number(int, 1), metavar='N', help='how many there are (default: $JAX_NUM_PROCESSES)')
  several.add_argument('--process', type=number(int, 0), metavar='I', help='which this is, from 0 (default: $JAX_PROCESS_ID)')
  several.add_argument('--timeout', type=number(int, 1), metavar='SECONDS', help='after which a silent process ends the others (default: 60)')

  sub = command('compile', compile_step, 'compile a train step, or decoding, for TPUs that are not there: memory, operations, traffic')
  sub.add_argument('--config', metavar='PAGE.py:VARIANT', help='as for train; --config.KEY=VALUE too')
  sub.add_argument('--decode', metavar='VARIANT', help="its language model: reading a prompt, writing a token")
  sub.add_argument('--topology', required=True, metavar='CHIP:SHAPE', help='such as v5e:16x16 or v5p:4x4x8')
  sub.add_argument('--slices', type=number(int, 1), default=1, metavar='N', help='pods of that shape, joined (default: %(default)s)')
  decoding = sub.add_argument_group('with --decode')
  decoding.add_argument('--batch', type=number(int, 1), default=8, metavar='N', help='rows (default: %(default)s)')
  decoding.add_argument('--prompt', type=number(int, 1), default=512, metavar='N', help='tokens of a prompt (default: %(default)s)')
  decoding.add_argument('--new-tokens', type=number(int, 1), default=256, metavar='N', help='(default: %(default)s)')
  decoding.add_argument('--weights-dtype', '--weights', dest='weights', choices=('int8',), help='(default: bfloat16)')
  decoding.add_argument('--cache-dtype', '--cache', dest='cache', choices=('int8',), help='(default: bfloat16)')
  sub.add_argument('--json', action='store_true', help='print one JSON object')

  sub = command('bundle', bundle, 'make one checkpoint of what the stages exported')
  sub.add_argument('exports', nargs='+', type=local, metavar='RUN/export', help='of a part that several hold, the last one counts')
  sub.add_argument('--tokenizer', type=local, default=os.path.join(TINY, 'language_model'), metavar='DIR', help='(default: %(default)s)')
  sub.add_argument('--dtype', default='bfloat16', choices=('float32', 'float16', 'bfloat16'), help='(default: %(default)s)')
  sub.add_argument('--out', type=local, required=True, metavar='DIR', help='a checkpoint there is replaced')

  sub = command('convert', convert, 'turn a PyTorch folder into one of ours, or one of ours into a PyTorch folder')
  sub.add_argument('--src', required=True, type=local, metavar='DIR',
                   help='LaVIT, LLaMA, Stable Diffusion, SDXL, an EVA-CLIP file, or a folder of ours')
  sub.add_argument('--dst', required=True, type=local, metavar='DIR')
  sub.add_argument('--dry-run', action='store_true', help='print the plan, write nothing')
  sub.add_argument('--variant', metavar='NAME', help='(default: the largest whose shapes the files have)')
  sub.add_argument('--dtype', choices=('float32', 'float16', 'bfloat16'), help='of the result (default: as in the source)')
  sub.add_argument('--allow-missing', default='', metavar='REGEX', help='names that may be missing; recorded in the result')
  sub.add_argument('--force', action='store_true', help='replace what an earlier conversion left at --dst')
  sub.add_argument('--bin', action='store_true', help='write .bin files, which the published inference code asks for, in place of safetensors')
  sub.add_argument('--weights-variant', metavar='NAME', help='such as fp16, of the folders that hold several (default: the full precision)')
  sub.add_argument('--allow-nonfinite', action='store_true', help='take NaN and infinity in the source along')
  sub.add_argument('--keep-vocabulary', action='store_true', help='do not give a LLaMA the rows of the visual tokens')

  sub = command('inspect', inspect, 'print what a folder of weights holds and where it is from')
  sub.add_argument('folder', type=local, metavar='DIR')

  sub = seeded_command('demo', demo, 'caption, answer, draw and reconstruct, with the tiny checkpoint, into one HTML page')
  sub.add_argument('--inputs', type=local, default=DEMO, metavar='DIR', help='pictures and their manifest (default: %(default)s)')
  sub.add_argument('--out', type=local, default='demo_out', metavar='DIR', help='gets index.html (default: %(default)s)')

  sub = model_command('app', app, 'serve a web page on which all of it can be tried')
  sub.add_argument('--host', default='127.0.0.1', help='0.0.0.0 lets other machines in (default: %(default)s)')
  sub.add_argument('--port', type=number(int, 1, 65535), default=7860, help='(default: %(default)s)')

  sub = telling_command('caption', 'say what is in pictures', 'IMAGE|DIR', 2, 1)
  sub.add_argument('--prompt', metavar='TEXT', help='that the captions go on from (default: none)')
  sub = telling_command('answer', 'answer questions about a picture, or about each of a folder', 'IMAGE|DIR QUESTION', 5, 0,
                        row='{"image": "cat.png", "question": "What is this?"}')
  sub.add_argument('--judge', action='store_const', const=True, help="ask first whether the picture tells, and answer 'unanswerable' if not")
  sampling_command('generate', 'draw a picture from each text', 'TEXT', '{"prompt": "a cat"}', 4.0)
  sampling_command('synthesize', 'draw one picture from pictures and words, in any order, or one with each picture of a folder',
                   'IMAGE|DIR|TEXT', '{"parts": ["cat.png", "on a red background"]}', 5.0)
  drawing_command('reconstruct', 'draw pictures again from their visual tokens alone', 'IMAGE|DIR')
  reading_command('tokenize', 'print the visual tokens of pictures', 'IMAGE|DIR')

  data = commands.add_parser('data', help='build or pack data sets').add_subparsers(dest='action', required=True, metavar='ACTION')
  sub = command('build', data_build, 'draw and write the emoji data set (needs the extra [emoji])', data)
  sub.add_argument('--data_dir', required=True, type=local, metavar='DIR', help='gets DIR/emoji/...')
  sub.add_argument('--sample', action='store_true', help='only the two dozen concepts that travel with the package')

  sub = command('pack', data_pack, 'turn WebDataset or img2dataset tars into ArrayRecord; started again, it goes on', data)
  sub.add_argument('sources', nargs='+', metavar='TAR', help="a path, a glob or braces, local or remote: 'gs://BUCKET/{00000..00999}.tar'")
  sub.add_argument('--out', type=local, required=True, metavar='DIR', help='gets one file a tar')
  sub.add_argument('--workers', type=number(int, 1), default=1, metavar='N', help='processes (default: %(default)s)')
  sub.add_argument('--image', nargs='+', metavar='EXTENSION', help="of the pictures, where it is none that is known: 'input.png'")

  sub = seeded_command('evaluate', evaluate, 'measure a checkpoint on the held-out splits')
  sub.add_argument('--source', required=True, type=local, metavar='DIR', help='the data set that `lavit data build` wrote')
  sub.add_argument('--count', type=number(int, 2), default=512, metavar='N', help='examples a split (default: %(default)s)')
  sub.add_argument('--drawn', type=number(int, 1), default=256, metavar='N', help='texts drawn a split (default: %(default)s)')
  sub.add_argument('--out', type=local, default='report.json', metavar='FILE.json', help='(default: %(default)s)')

  command('variants', variants, 'list the model sizes')
  return parser


if __name__ == '__main__':
  raise SystemExit(main())
