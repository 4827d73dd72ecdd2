"""The golden files (specification, Golden case), converted one by one and as a folder."""

import pathlib
import shutil

import pytest
import safetensors.numpy
from nano import NANO
from torch_folders import assert_same, contents, run

from lavit_jax.models import lavit
from lavit_jax.weights.torch.api import from_torch
from lavit_jax.weights.torch.api import to_torch as write_torch

GOLDEN_FOLDER = pathlib.Path(__file__).parents[2] / 'data' / 'golden'
GOLDEN = {  # of tests/data/golden: config.json and language_model.json
  'text_vocab_size': 100,
  'unet': {**NANO['unet'], 'cross_attention_dim': 24},
  'vae': NANO['vae'],
  'uncond_rows': NANO['uncond_rows'],
  'vit': dict(
    image_size=56,
    patch_size=14,
    hidden_size=64,
    num_layers=3,
    num_heads=4,
    head_dim=16,
    mlp_dim=279,
    output_dim=32,
  ),
  'tokenizer': dict(
    hidden_size=64, num_layers=2, num_heads=4, mlp_dim=279, codebook_size=128, code_dim=8
  ),
  'decoder': dict(num_layers=2, context_dims=(24,)),
  'highres_decoder': dict(num_layers=2, context_dims=(24, 40), pooled_dim=40),
  'llama': dict(
    hidden_size=48, num_layers=3, num_heads=4, num_kv_heads=4, head_dim=12, mlp_dim=128
  ),
}
GOLDEN_FILES = {  # module: file of the published folder, its name among the golden ones
  'vit': ('visual_tokenizer/eva_vitg_psz14', 'eva_vit'),
  'tokenizer': ('visual_tokenizer/tokenizer_encoder', 'tokenizer_encoder'),
  'understanding': ('visual_tokenizer/tokenizer_encoder', 'tokenizer_encoder'),
  'decoder': ('visual_tokenizer/tokenizer_decoder', 'tokenizer_decoder'),
  'highres_decoder': ('visual_tokenizer/highres_tokenizer_decoder', 'highres_tokenizer_decoder'),
  'llama': ('language_model/model', 'language_model'),
}


@pytest.fixture(scope='module', autouse=True)
def variant():
  lavit.VARIANTS['golden'] = GOLDEN
  yield
  del lavit.VARIANTS['golden']


def test_golden_files_from_python(tmp_path):
  back = {}
  for module, (_, file) in GOLDEN_FILES.items():
    params = from_torch(GOLDEN_FOLDER / f'{file}.safetensors', module, variant='golden')
    written = write_torch(params, tmp_path / f'{module}.safetensors', module, variant='golden')
    back.setdefault(file, {}).update(safetensors.numpy.load_file(written))
  for file, state in back.items():
    assert_same(state, safetensors.numpy.load_file(GOLDEN_FOLDER / f'{file}.safetensors'))


def test_golden_files_as_a_folder(tmp_path):
  for target, file in GOLDEN_FILES.values():
    (tmp_path / 'LaVIT' / target).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(GOLDEN_FOLDER / f'{file}.safetensors', tmp_path / 'LaVIT' / f'{target}.safetensors')
  conversion = run(tmp_path / 'LaVIT', tmp_path / 'checkpoint', variant=None)
  assert conversion.variant == 'golden'
  assert {item.module for item in conversion.items} == GOLDEN_FILES.keys()
  run(tmp_path / 'checkpoint', tmp_path / 'exported')
  weights, _ = contents(tmp_path / 'exported')
  assert weights.keys() == {target for target, _ in GOLDEN_FILES.values()}
  for target, file in GOLDEN_FILES.values():
    assert_same(weights[target], safetensors.numpy.load_file(GOLDEN_FOLDER / f'{file}.safetensors'))
