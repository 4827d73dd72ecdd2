"""Stage 2 from codes in place of images: the losses of the images, without their encoder."""

import io
import json

import jax
import nano
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numbered_images import FOLDER, write_tar
from PIL import Image

from lavit_jax.apps import batch as batch_app
from lavit_jax.data import loader
from lavit_jax.data.skips import SkipCounter
from lavit_jax.data.transforms import CodeSizes
from lavit_jax.errors import UserError
from lavit_jax.inference.pipeline import Lavit
from lavit_jax.models import lavit
from lavit_jax.training import flops, loop
from lavit_jax.training.run_config import check_config, read_config
from lavit_jax.training.stages import language_model
from lavit_jax.weights.store import folder

nano.install()
MODEL = lavit.build('nano')
CODES = dict(format='codes', path='codes', use='draw')
TEXT = dict(format='parquet', path='words', use='text')


@pytest.fixture(scope='module')
def parts(parts):
  """Random weights, with which the selector keeps about half of the patches."""
  selector = parts['tokenizer']['selector']
  last = {
    'kernel': 0.1 * np.asarray(selector['fc_out']['kernel']),
    'bias': np.zeros(2, np.float32),
  }
  selector = selector | {'fc_out': jax.device_put(last)}
  return parts | {'tokenizer': parts['tokenizer'] | {'selector': selector}}


@pytest.fixture
def codes(tmp_path):
  """A source with the codes of five images, of which one could not be read."""
  rows = [dict(text=['a'], codes=list(range(10, 16 - i)), error=None) for i in range(5)]
  rows[2] |= dict(codes=None, error='not an image')
  (tmp_path / 'codes').mkdir()
  pq.write_table(pa.Table.from_pylist(rows), tmp_path / 'codes' / '0.parquet')
  return dict(CODES, path=str(tmp_path / 'codes'))


def test_the_loss_is_that_of_the_images_with_these_codes(parts, batch):
  batch = dict(batch, kind=np.array([1, 1, 2, 1, 1, 1, 1, 2], np.int32))
  texts = {name: values for name, values in batch.items() if name.startswith(('text', 'kind'))}
  from_images = nano.run('lm').stage
  from_codes = nano.run('lm', data__sources=(CODES,)).stage

  key = jax.random.key(1)

  @nano.jit
  def measure(params, batch, texts):
    visual = language_model._encode_by_tokenizer(MODEL, params, parts, batch, key)
    coded = dict(texts, codes=visual.codes, code_length=visual.lengths)
    llama = {'llama': params['llama']}
    losses = (
      from_images.loss(params, parts, {}, batch, key, True)[0],
      from_codes.loss(llama, {}, {}, coded, key, True)[0],
    )
    return losses, visual.codes

  own = {name: parts[name] for name in ('llama', 'understanding')}
  (expected, loss), found = measure(own, batch, texts)
  assert len(np.unique(found)) > 4 and (found > 0).sum() > 16
  assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def png(rng):
  buffer = io.BytesIO()
  Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, 'PNG')
  return buffer.getvalue()


@pytest.fixture
def tokenized(parts, tmp_path):
  """{format: source} of two tars with 24 images, and of their most probable codes."""
  rng = np.random.default_rng(0)
  for t in range(2):
    records = [(f'{i}', {'png': png(rng), 'txt': b'noise'}) for i in range(12)]
    if t:
      records.append(('bad', {'png': b'words', 'txt': b'words'}))
    write_tar(tmp_path / f'{t}.tar', records)
  request = batch_app.ShardRequest(f'{tmp_path}/{{0..1}}.tar', f'{tmp_path}/tokens')
  batch_app.ShardRun('tokenize', request, {}).run(Lavit(MODEL, parts, FOLDER), None, {})
  return dict(
    tars=dict(format='tars', path=request.inputs, use='draw'),
    codes=dict(CODES, path=request.out),
  )


@pytest.mark.slow
def test_a_run_from_codes_has_the_losses_of_one_from_images(
  parts, tokenized, tmp_path, monkeypatch
):
  compile_fully = jax.stages.Lowered.compile
  monkeypatch.setattr(
    jax.stages.Lowered, 'compile', lambda self: compile_fully(self, nano.QUICK_OPTIONS)
  )
  monkeypatch.setattr(flops, 'step_flops', lambda run: flops.StepFlops(1.0))
  monkeypatch.setattr(language_model, 'row_keys', lambda *_: None)  # the most probable patches
  for names in (('vit', 'tokenizer'), ('llama',)):
    folder.save_params(tmp_path / names[0], 'nano', {name: parts[name] for name in names})
  losses = {}
  for kind, source in tokenized.items():
    config = nano.config(
      'lm',
      init_from=str(tmp_path / 'llama'),
      frozen=str(tmp_path / 'vit') if kind == 'tars' else '',
      num_steps=3,
      data__sources=(source,),
      data__shares=dict(draw=1.0),
      data__drop_text=0.0,
      data__max_skipped=0.5,
      data__shards=1,
      optim__learning_rate=0.01,
    )
    loop.train(config, tmp_path / kind)
    lines = [json.loads(line) for line in open(tmp_path / kind / 'metrics.jsonl')]
    losses[kind] = [line['loss'] for line in lines if 'loss' in line]
    assert lines[-1]['loss_tokens'] > 0
  assert len(losses['tars']) == 3
  assert losses['codes'] == pytest.approx(losses['tars'], rel=1e-5)
  assert losses['codes'][2] < losses['codes'][0] - 0.01
  assert list(folder.read_config(tmp_path / 'codes' / 'export')['parts']) == ['llama']


def test_codes_and_texts_make_one_batch(codes, tmp_path):
  """Rows with codes, beside rows of plain text without; the record without codes is skipped."""
  pq.write_table(pa.table({'text': ['many words'] * 4}), tmp_path / 'words.parquet')
  sources = (codes, dict(TEXT, path=f'{tmp_path}/words.parquet'))
  skipped = SkipCounter()
  rows = next(
    loader.batches(
      'lm',
      sources=sources,
      batch_size=8,
      text_length=16,
      tokenizer_folder=FOLDER,
      drop_text=0.0,
      num_threads=0,
      skipped=skipped,
      code_sizes=CodeSizes(16, 16),
    )
  )
  assert 'image' not in rows
  is_text = rows['kind'] == 2
  assert 0 < is_text.sum() < 8
  assert (rows['code_length'][is_text] == 0).all()
  lengths = rows['code_length'][~is_text]
  assert set(lengths.tolist()) == {6, 5, 3, 2}
  for length, row in zip(lengths, rows['codes'][~is_text], strict=True):
    np.testing.assert_array_equal(row, [*range(10, 10 + length), *[0] * (16 - length)])
  assert skipped.reasons == {'no codes': 1}
  shapes = loader.batch_shapes('lm', 8, 32, 16, code_sizes=CodeSizes(16, 16))
  assert {name: (a.shape, a.dtype) for name, a in rows.items()} == shapes


def test_codes_of_another_tokenizer_are_refused(codes):
  for sizes, message in (
    (CodeSizes(16, 12), 'has code 12, but the variant of this run has 12 codes'),
    (CodeSizes(1, 16), r'has \d+ codes, but .* at most 1 of an image'),
  ):
    rows = loader.batches(
      'lm',
      sources=(codes,),
      batch_size=8,
      tokenizer_folder=FOLDER,
      num_threads=0,
      code_sizes=sizes,
    )
    with pytest.raises(UserError, match=message):
      next(rows)


def test_operations_are_those_of_the_language_model_alone():
  """Of the image's encoder, the selector and the merger, none remains."""
  assert nano.run('lm', data__sources=(TEXT,), data__heldout=(CODES,)).code_sizes
  run = nano.run('lm', data__sources=(CODES,))
  count = flops.step_flops(run)
  assert count.fixed == 0 < count.slots
  assert run.stage.modules.required == ()
  assert run.vit_size is None


@pytest.mark.parametrize(
  'options, message',
  [
    (dict(sources=(dict(CODES, use=''),)), r"sources\[0\] has format 'codes' and use ''.* 'draw'"),
    (dict(sources=(dict(CODES, use='caption'),)), "use 'caption': captions and answers are"),
    (
      dict(sources=(dict(format='tars', path='x'), CODES)),
      r"data.sources\[1\] has format 'codes', but data.sources\[0\] has images",
    ),
    (
      dict(sources=(TEXT, CODES), heldout=(dict(format='tars', path='x', use='draw'),)),
      r"data.sources\[1\] has format 'codes', but data.heldout\[0\] has images",
    ),
    (dict(sources=(CODES,), lora__rank=4), 'adapters cannot train .lora.rank=4.'),
    (dict(sources=(CODES,), interface='linear'), "draws no images|interface='linear' reads"),
  ],
)
def test_what_codes_do_not_give_is_refused(options, message):
  changes = {
    key if '__' in key or key == 'interface' else f'data__{key}': value
    for key, value in options.items()
  }
  with pytest.raises(UserError, match=message):
    check_config(read_config(nano.config('lm', **changes)), 1)


def test_stages_that_read_images_refuse_codes():
  config = nano.config('autoencoder', data__sources=(CODES,))
  with pytest.raises(UserError, match='stage autoencoder reads images'):
    check_config(read_config(config), 1)
