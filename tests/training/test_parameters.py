"""A run trains with the settings of the checkpoints that it starts from, and exports them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import nano
import numpy as np
import pytest

from lavit_jax import sharding
from lavit_jax.errors import UserError
from lavit_jax.models import lavit
from lavit_jax.models.initialization import init_params
from lavit_jax.training import flops, loop, parameters
from lavit_jax.training.checkpoint import Checkpoints
from lavit_jax.training.parameters import find_modules
from lavit_jax.training.run import resolve
from lavit_jax.training.stages import build_stage
from lavit_jax.training.stages.base import ModuleNames
from lavit_jax.weights.store import folder
from lavit_jax.weights.torch import mapping
from lavit_jax.weights.torch.names_llama import llama_rules

nano.install()
ONE = dict(data=1, fsdp=1, tensor=1)
OTHER = dict(
  rope_theta=100.0,
  rope_scaling=dict(rope_type='linear', factor=4.0),
  rms_norm_eps=1e-2,
  max_position_embeddings=256,
)


@pytest.fixture(scope='module')
def parts():
  """Of a model whose keys and queries are large enough for positions to matter."""
  model = lavit.build('nano')
  trees = nano.jit(lambda key: init_params(model, key, ('vit', 'tokenizer', 'llama')))(
    jax.random.key(0)
  )
  attention = trees['llama']['layers']['attention']
  for name in ('query', 'key'):
    attention[name]['kernel'] = 3 * attention[name]['kernel']
  return trees


@pytest.fixture(scope='module')
def folders(parts, tmp_path_factory):
  """`towers`: what the stage needs; `other`, `own`: language models with and without settings."""
  root = tmp_path_factory.mktemp('folders')
  folder.save_params(root / 'towers', 'nano', {name: parts[name] for name in ('vit', 'tokenizer')})
  folder.save_params(root / 'other', 'nano', {'llama': parts['llama']}, settings={'llama': OTHER})
  folder.save_params(root / 'own', 'nano', {'llama': parts['llama']})
  return root


def make_config(folders, *init_from, **changes):
  names = ','.join(str(folders / name) for name in init_from)
  return nano.config('lm', frozen=str(folders / 'towers'), init_from=names, **changes)


def as_json(config):
  return json.loads(config.to_json_best_effort())


def of_run(config, workdir):
  return resolve(config, workdir).model.settings


def build(settings):
  """The language model's stage with the settings of a checkpoint."""
  run = nano.run('lm')
  model = lavit.build('nano', settings=settings)
  return build_stage(run.stage_name, run.options, model, run.layout)


def test_a_step_has_the_loss_that_transformers_computes(parts):
  """Of plain texts, several in a row: each alone in transformers, the mean over all its targets."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  rng = np.random.default_rng(0)
  length = np.array([3, 20, 44, 30, 17, 1, 40, 25], np.int32)
  inside = np.arange(48) < length[:, None]
  text = np.where(inside, rng.integers(3, 2048, inside.shape), 0).astype(np.int32)
  batch = dict(
    image=np.zeros((8, 32, 32, 3), np.uint8),
    text=text,
    text_length=length,
    text_weight=inside.astype(np.float32),
    kind=np.full(8, 2, np.int32),
  )

  def step(own):
    stage = build(own)
    params, state = nano.jit(stage.init)(jax.random.key(0), parts)
    return params['llama'], nano.jit(
      lambda params, batch: stage.loss(params, parts, state, batch, jax.random.key(1), True)[0]
    )(params, batch)

  llama, value = step({'llama': OTHER})
  sizes = nano.NANO['llama']
  config = transformers.LlamaConfig(
    vocab_size=len(llama['embedding']),
    hidden_size=sizes['hidden_size'],
    intermediate_size=sizes['mlp_dim'],
    num_hidden_layers=sizes['num_layers'],
    num_attention_heads=sizes['num_heads'],
    head_dim=sizes['head_dim'],
    rms_norm_eps=OTHER['rms_norm_eps'],
    max_position_embeddings=256,
    rope_parameters=dict(rope_type='linear', factor=4.0, rope_theta=100.0),
    tie_word_embeddings=False,
  )
  peer = transformers.LlamaForCausalLM(config).eval()
  peer.load_state_dict(
    {
      name: torch.from_numpy(x)
      for name, x in mapping.to_torch(llama_rules(), jax.device_get(llama)).items()
    }
  )
  costs = []
  for row, count in zip(text, length):
    ids = torch.tensor([1, *row[:count], 2])[None]
    with torch.no_grad():
      costs.append(
        torch.nn.functional.cross_entropy(
          peer(ids).logits[0, :-1], ids[0, 1:], reduction='none'
        ).numpy()
      )
  costs = np.concatenate(costs)
  # Of a float32 sum of so many terms, each the logarithm of a sum over the vocabulary.
  bound = np.finfo(np.float32).eps * (len(costs) + len(llama['embedding'])) * costs.mean()
  np.testing.assert_allclose(value, costs.mean(), atol=bound, rtol=0)
  assert abs(step(None)[1] - costs.mean()) > 2 * bound


def test_settings_come_from_the_folders_of_the_parts_that_are_used(folders, tmp_path):
  assert of_run(make_config(folders, 'other'), tmp_path) == {'llama': OTHER}
  assert of_run(make_config(folders, 'own'), tmp_path) == {}
  assert of_run(make_config(folders), tmp_path) == {}
  with pytest.raises(
    UserError,
    match='other has rope_theta=100.0 of llama, and .*own has rope_theta=10000.0; '
    'name one of the two alone',
  ):
    of_run(make_config(folders, 'other', 'own'), tmp_path)
  config = nano.config('tokenizer', frozen=f'{folders / "towers"},{folders / "other"}')
  assert of_run(config, tmp_path) == {}  # of `frozen` it does not take a language model


def test_checkpoints_keep_them(folders, tmp_path):
  config = as_json(make_config(folders, 'other'))
  state = {'x': jnp.zeros(3)}
  checkpoints = Checkpoints(tmp_path, config, 1, {'llama': OTHER})
  checkpoints.save(1, state, loop_data())
  checkpoints.wait()
  checkpoints.close()
  # The weights are in the checkpoint, and so are the settings.
  assert of_run(make_config(folders), tmp_path) == {'llama': OTHER}
  assert of_run(make_config(folders, 'own'), tmp_path) == {}
  again = Checkpoints(tmp_path, config, 1, {'llama': OTHER})
  assert again.latest() == 1
  again.close()
  for now, message in (
    (
      {},
      'trained with rope_theta=100.0 of llama, and the folders of this run have rope_theta=10000.0',
    ),
    (
      {'llama': {**OTHER, 'max_position_embeddings': 512}},
      'max_position_embeddings=256 of llama, .* have max_position_embeddings=512',
    ),
  ):
    other = Checkpoints(tmp_path, config, 1, now)
    with pytest.raises(UserError, match=message):
      other.latest()
    other.close()


def test_checkpoints_of_before_there_were_settings(folders, tmp_path, monkeypatch):
  config = as_json(make_config(folders))
  checkpoints = Checkpoints(tmp_path, config, 1)
  real = checkpoints._read_metadata
  monkeypatch.setattr(
    checkpoints,
    '_read_metadata',
    lambda step: {key: value for key, value in real(step).items() if key != 'settings'},
  )
  checkpoints.save(1, {'x': jnp.zeros(3)}, loop_data())
  checkpoints.wait()
  checkpoints.settings = {'llama': {'max_position_embeddings': 2048}}
  assert checkpoints.latest() == 1  # the same numbers
  checkpoints.settings = {'llama': {'rope_theta': 1e6}}
  with pytest.raises(
    UserError,
    match='was trained with rope_theta=10000.0 of llama, and the folders of this run have '
    'rope_theta=1000000.0',
  ):
    checkpoints.latest()
  checkpoints.close()


def loop_data():
  import grain

  from lavit_jax.data.loader import Batches

  return Batches(lambda first: iter(grain.MapDataset.range(first, 100).to_iter_dataset().batch(1)))


def test_pairs_longer_than_the_language_model_reads_are_refused():
  with pytest.raises(
    UserError,
    match='data.text_length=64: with 16 visual tokens, 3 special tokens and data.max_images=1 a '
    'pair may have 83 tokens, but .*max_position_embeddings=64',
  ):
    build({'llama': {'max_position_embeddings': 64}})


def test_settings_change_no_flops():
  plain = nano.run('lm')
  other = dataclasses.replace(plain, model=lavit.build('nano', settings={'llama': OTHER}))
  assert flops.pair_flops(plain).row == pytest.approx(flops.pair_flops(other).row)


@pytest.mark.slow
def test_a_run_exports_what_it_trained_with(folders, tmp_path):
  changes = dict(checkpoint_every=1)
  loop.train(make_config(folders, 'other', num_steps=1, **changes), tmp_path)
  assert folder.read_settings(tmp_path / 'export') == {'llama': OTHER}
  # Without the folder: as the checkpoint says.
  loop.train(make_config(folders, num_steps=2, **changes), tmp_path)
  assert folder.read_settings(tmp_path / 'export') == {'llama': OTHER}
  with pytest.raises(UserError, match='was trained with rope_theta=100.0 of llama'):
    loop.train(make_config(folders, 'own', num_steps=3, **changes), tmp_path)
  loop.train(make_config(folders, 'own', num_steps=1), tmp_path / 'own')
  first, second = (
    json.loads((where / 'metrics.jsonl').read_text().splitlines()[0])['loss']
    for where in (tmp_path, tmp_path / 'own')
  )
  assert first != second


def test_a_run_reads_once_what_its_stage_uses(tmp_path, reads):
  stored = ('vit', 'llama', 'understanding', 'vae')
  for name in ('early', 'late'):
    saved = {module: {'a': np.full((2, 2), len(name), np.float32)} for module in stored}
    folder.save_params(tmp_path / name, 'nano', saved, dtype='bfloat16')
  modules = ModuleNames(needs=('vit',), takes=('llama', 'understanding'))
  paths = [str(tmp_path / name) for name in ('early', 'late')]
  found = find_modules(modules, paths, paths)
  loaded = parameters.load_params('nano', found, sharding.make_mesh(ONE))
  assert sorted(reads) == ['llama/a', 'understanding/a', 'vit/a']
  for tree in loaded.values():
    assert tree['a'].dtype == np.float32
    np.testing.assert_array_equal(tree['a'], np.full((2, 2), len('late')))
