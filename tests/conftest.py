"""Fixtures of all tests.

The golden case of the visual modules (specification, Golden case) has small random weights and the
outputs of an independent forward pass.
"""

import functools
import gc
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lavit_jax.inference.generation_config import VARIANT_DEFAULTS
from lavit_jax.models import lavit
from lavit_jax.models.decoder import FeatureDecoder
from lavit_jax.models.tokenizer import DynamicTokenizer, Understanding
from lavit_jax.models.vit import ViT
from lavit_jax.weights.store.folder import save_params
from lavit_jax.weights.torch import name_tables
from lavit_jax.weights.torch import names_visual as tables
from lavit_jax.weights.torch.mapping import from_state_dict

FOLDER = pathlib.Path(__file__).parent / 'data' / 'golden'
LONG_FILES = (  # the longest first
  'test_loop.py',
  'test_distributed.py',
  'test_interface_runs.py',
  'test_pipeline.py',
  'test_pipeline_options.py',
  'test_image_generation.py',
  'test_image_decoder.py',
  'test_unet.py',
  'test_loop_sources.py',
  'test_convert.py',
  'test_convert_modules.py',
)


def pytest_configure(config):
  """Prepares what all processes of the tests share: settings of PyTorch, and compiled programs.

  PyTorch's threads wait for each other actively, which takes most of the time where there are more
  of them than cores, as with two test processes. Its models here are small: one thread is enough.

  Equal programs compile once, whichever test or process needs them. Their cache is new and empty
  in each run, so that no result comes from an earlier version of the code or of a library. Commands
  use it, too, and leave nothing in the cache of whoever runs the tests.
  """
  assert 'torch' not in sys.modules  # it reads the variable when it is imported
  os.environ.setdefault('OMP_NUM_THREADS', '1')
  if not hasattr(config, 'workerinput'):  # the process that starts the others, or the only one
    folder = tempfile.mkdtemp(prefix='lavit-compiled-')
    config.add_cleanup(functools.partial(shutil.rmtree, folder, ignore_errors=True))
    os.environ.pop('LAVIT_COMPILATION_CACHE', None)
    os.environ['JAX_COMPILATION_CACHE_DIR'] = folder
    os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
  # This process has imported jax already, which reads the environment only then.
  jax.config.update('jax_compilation_cache_dir', os.environ['JAX_COMPILATION_CACHE_DIR'])
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)


def pytest_ignore_collect(collection_path, config):
  """With `-k WORD` alone, files that have the word nowhere are not imported.

  To import all of them takes longer than most single tests.
  """
  word = config.option.keyword.lower()
  finds_all_files = config.args_source is pytest.Config.ArgsSource.TESTPATHS
  if collection_path.suffix != '.py' or not finds_all_files or not re.fullmatch(r'\w+', word):
    return None
  names = collection_path.relative_to(config.rootpath).as_posix().lower()
  return None if word in names or word in collection_path.read_text().lower() else True


def pytest_collection_modifyitems(items):
  """Long files go first: whoever began one last would keep the other processes waiting."""
  order = {name: i for i, name in enumerate(LONG_FILES)}
  items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_collection_finish():
  """What all imports made stays to the end, so the garbage collector need not look at it again.

  JAX traces make much garbage: a look at everything for each would take some percent of the time.
  """
  gc.collect()
  gc.freeze()
  gc.set_threshold(10_000)


@pytest.fixture(scope='session')
def golden():
  """By module name: `modules`, `params`; `size` the config, `io` inputs and outputs.

  `features` are those of the ViT without CLS.
  """
  size = json.loads((FOLDER / 'config.json').read_text())
  io = dict(np.load(FOLDER / 'io.npz'))
  width = size['width']
  heads = size['heads']
  patches = (size['image_size'] // size['patch_size']) ** 2
  mlp_dim = int(width * 4.3637)
  merger = (width, size['merger_depth'], heads, mlp_dim)
  decoder = (width, size['decoder_depth'], heads, mlp_dim, patches, size['code_dim'])
  modules = dict(
    vit=ViT(
      size['image_size'],
      size['patch_size'],
      width,
      size['vit_depth'],
      size['vit_heads'],
      width // size['vit_heads'],
      mlp_dim,
      size['vit_head_dim'],
    ),
    tokenizer=DynamicTokenizer(*merger, size['codebook_size'], size['code_dim']),
    understanding=Understanding(*merger, size['llm_dim']),
    decoder=FeatureDecoder(*decoder, (size['cross_attention_dim'],)),
    highres_decoder=FeatureDecoder(
      *decoder, (size['cross_attention_dim_1'], size['cross_attention_dim_2']), size['pooled_dim']
    ),
  )
  side = size['image_size']
  x = jnp.zeros((1, patches, width))
  inputs = dict(
    vit=(jnp.zeros((1, side, side, 3)),),
    tokenizer=(x,),
    understanding=(x, x[..., 0]),
    decoder=(x[..., : size['code_dim']], x[..., 0] == 0),
  )
  inputs['highres_decoder'] = inputs['decoder']
  files = dict(
    vit=('eva_vit', tables.vit_rules()),
    tokenizer=('tokenizer_encoder', tables.tokenizer_rules()),
    understanding=('tokenizer_encoder', tables.understanding_rules()),
    decoder=('tokenizer_decoder', tables.decoder_rules(1)),
    highres_decoder=('highres_tokenizer_decoder', tables.decoder_rules(2)),
  )
  params = {}
  for part, (file, rows) in files.items():
    like = jax.eval_shape(modules[part].init, jax.random.key(0), *inputs[part])['params']
    state = load_file(FOLDER / f'{file}.safetensors')
    params[part] = jax.device_put(from_state_dict(rows, state, like))
  return types.SimpleNamespace(
    modules=modules, params=params, io=io, features=io['vit_features'][:, 1:], size=size
  )


@pytest.fixture(scope='session')
def run(golden):
  """Calls `run(module, *inputs, method=None, dtype=float32)` on a module of the golden model.

  Each combination of module, method and dtype is compiled once.
  """

  @functools.cache
  def compiled(module, method, dtype):
    return jax.jit(
      functools.partial(golden.modules[module].clone(dtype=dtype).apply, method=method)
    )

  def call(module, *args, method=None, dtype=jnp.float32):
    return compiled(module, method, dtype)({'params': golden.params[module]}, *args)

  return call


@pytest.fixture(scope='session')
def shallow_parts():
  """Random weights of all modules of the variant shallow.

  It is tiny with fewer layers and channels to be compiled: decoding repeats the layers of the
  language model in its program. No module has the shapes of tiny's, so that a converter takes none
  for the other.
  """
  tiny = lavit.VARIANTS['tiny']
  lavit.VARIANTS['shallow'] = {
    **tiny,
    'vit': {**tiny['vit'], 'mlp_dim': 256},
    'tokenizer': {**tiny['tokenizer'], 'num_layers': 1, 'mlp_dim': 256},
    'decoder': {**tiny['decoder'], 'num_layers': 1},
    'llama': {**tiny['llama'], 'num_layers': 2},
    'unet': {**tiny['unet'], 'block_out_channels': (16, 24)},
    'vae': {**tiny['vae'], 'block_out_channels': (8, 16, 24)},
  }
  VARIANT_DEFAULTS['shallow'] = VARIANT_DEFAULTS['tiny']
  rng = np.random.default_rng(0)

  def draw(leaf):
    fan_in = np.prod(leaf.shape[-2:-1] if leaf.ndim < 4 else leaf.shape[:3])
    # Nothing compiles: `device_put`, unlike `jnp.asarray`, has no program.
    return jax.device_put(rng.normal(0, fan_in**-0.5, leaf.shape).astype(np.float32))

  return jax.tree.map(draw, name_tables.module_shapes(lavit.build('shallow'), name_tables.TABLES))


@pytest.fixture(scope='session')
def shallow_folder(shallow_parts, tmp_path_factory):
  """The parameters of `shallow_parts` as a checkpoint folder with the tokenizer of tiny."""
  folder = tmp_path_factory.mktemp('checkpoint') / 'shallow'
  save_params(
    folder,
    'shallow',
    shallow_parts,
    tokenizer=pathlib.Path(lavit.__file__).parents[1] / 'assets' / 'tiny' / 'language_model',
  )
  return folder
