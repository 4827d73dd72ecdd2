"""Settings of a LLaMA folder: read as by transformers, stored with the weights, and exported."""

import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.apps import conversion
from lavit_jax.errors import UserError
from lavit_jax.models import lavit
from lavit_jax.models.llama import Llama
from lavit_jax.models.rope import Rope
from lavit_jax.models.sequence import prompt_mask, prompt_positions
from lavit_jax.porting import from_torch, to_torch, torch_settings
from lavit_jax.weights.loader import open_checkpoint
from lavit_jax.weights.store import folder
from lavit_jax.weights.store.bundle import bundle
from lavit_jax.weights.torch import configs, convert
from lavit_jax.weights.torch.configs import llama as llama_files

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

SIZES = dict(
  model_type='llama',
  vocab_size=100,
  hidden_size=64,
  intermediate_size=96,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=4,
  head_dim=16,
)
PLAIN = dict(SIZES, rms_norm_eps=1e-5, max_position_embeddings=4096, rope_theta=1e4)
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = dict(factor=16.0, original_max_position_embeddings=64)


@pytest.fixture(scope='module', autouse=True)
def variant():
  lavit.VARIANTS['letters'] = {
    **lavit.VARIANTS['tiny'],
    'text_vocab_size': 100,
    'llama': dict(
      hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=16, mlp_dim=96
    ),
  }
  yield
  del lavit.VARIANTS['letters']


def write(folder: pathlib.Path, file: str = 'config.json', **content) -> pathlib.Path:
  folder.mkdir(parents=True, exist_ok=True)
  (folder / file).write_text(json.dumps(content))
  return folder


def read(folder: pathlib.Path) -> dict:
  return configs.read_settings(folder, {'llama': ''}, ['llama'], 'letters').get('llama', {})


# --- Spellings -------------------------------------------------------------------------------

SPELLINGS = {
  'none': {},
  'theta on top': dict(rope_theta=1e6),
  'theta in parameters': dict(rope_parameters=dict(rope_type='default', rope_theta=5e5)),
  'theta in both': dict(rope_theta=3e4, rope_parameters=dict(rope_type='default', rope_theta=5e5)),
  'old linear': dict(rope_theta=1e6, rope_scaling=dict(type='linear', factor=4.0)),
  'new linear': dict(rope_parameters=dict(rope_type='linear', factor=4.0, rope_theta=2e4)),
  'scaling before parameters': dict(
    rope_scaling=dict(type='linear', factor=4.0),
    rope_parameters=dict(rope_type='linear', factor=2.0, rope_theta=5e5),
  ),
  'a factor without a type': dict(rope_scaling=dict(factor=4.0)),
  'llama3': dict(
    rope_theta=5e5,
    rope_scaling=dict(rope_type='llama3', original_max_position_embeddings=64, **LLAMA3),
  ),
  'llama3 by its positions': dict(
    max_position_embeddings=256, rope_scaling=dict(rope_type='llama3', **LLAMA3)
  ),
  'llama3, length on top': dict(
    original_max_position_embeddings=128,
    rope_scaling=dict(rope_type='llama3', original_max_position_embeddings=64, **LLAMA3),
  ),
  'yarn': dict(rope_scaling=dict(type='yarn', finetuned=True, **YARN)),
  'yarn by its positions': dict(
    max_position_embeddings=1024, rope_scaling=dict(type='yarn', **YARN | dict(factor=None))
  ),
  'yarn, truncate null': dict(rope_scaling=dict(type='yarn', truncate=None, **YARN)),
  'dynamic': dict(max_position_embeddings=128, rope_scaling=dict(type='dynamic', factor=2.0)),
}


@pytest.mark.parametrize('spelling', SPELLINGS)
def test_a_config_is_read_as_by_transformers(spelling, tmp_path):
  from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

  config = transformers.LlamaConfig.from_pretrained(write(tmp_path, **SIZES, **SPELLINGS[spelling]))
  length = 200
  reference = LlamaRotaryEmbedding(config)
  reference(torch.zeros(1), torch.arange(length)[None])
  llama: Llama = lavit.build('letters', settings={'llama': read(tmp_path)}).llama
  rope = Rope(llama.rope_theta, llama.rope_scaling, llama.max_position_embeddings)
  frequency = np.asarray(rope.frequency(llama.head_dim, np.arange(length)[None])).reshape(-1)
  np.testing.assert_allclose(
    frequency, reference.inv_freq.numpy(), rtol=16 * np.finfo(np.float32).eps
  )
  assert rope.magnitude == pytest.approx(reference.attention_scaling)
  assert llama.rms_norm_eps == config.rms_norm_eps == 1e-6  # the class's default
  assert llama.max_position_embeddings == config.max_position_embeddings


def test_every_key_of_the_class_has_a_rule():
  rules = set(llama_files.RULES) | {'rope_parameters'}  # which `complete` splits
  config = transformers.LlamaConfig().to_dict()
  assert not [key for key in config if key not in rules and not key.startswith('_')]


def test_the_page_lists_every_key():
  page = (pathlib.Path(__file__).parents[3] / 'docs' / 'checkpoints-language-model.md').read_text()
  config_section, other_section = page.split('## generation_config.json')
  for section, config_file in (
    (config_section, llama_files.CONFIG),
    (other_section, llama_files.GENERATION_CONFIG),
    (other_section, llama_files.TOKENIZER_CONFIG),
  ):
    table_rows = [line for line in section.splitlines() if line.startswith('|')]
    for key, rule in config_file.rules.items():
      kind = type(rule).__name__.lower()
      if kind != 'harmless' or config_file is llama_files.CONFIG:
        row = next((line for line in table_rows if f'`{key}`' in line), '')
        assert kind in row, key


@pytest.mark.parametrize(
  'file, keys, message',
  [
    (
      'config.json',
      dict(hidden_act='gelu'),
      'hidden_act="gelu", but the variant \'letters\' computes with "silu"',
    ),
    (
      'config.json',
      dict(num_attention_heads=8, head_dim=8, num_key_value_heads=8),
      'num_attention_heads=8, but',
    ),
    ('config.json', dict(num_key_value_heads=2), 'num_key_value_heads=2, but'),
    ('config.json', dict(head_dim=None, num_attention_heads=8), 'num_attention_heads=8, but'),
    ('config.json', dict(head_dim=32), 'head_dim=32, but'),
    ('config.json', dict(attention_bias=True), 'attention_bias=true'),
    ('config.json', dict(mlp_bias=True), 'mlp_bias=true'),
    ('config.json', dict(partial_rotary_factor=0.5), 'partial_rotary_factor=0.5'),
    (
      'config.json',
      dict(rope_parameters=dict(rope_type='default', partial_rotary_factor=0.5)),
      'partial_rotary_factor=0.5',
    ),
    ('config.json', dict(rope_scaling=dict(type='ntk', factor=2.0)), "type 'ntk' is not computed"),
    (
      'config.json',
      dict(rope_scaling=dict(rope_type='longrope', short_factor=[1], long_factor=[2])),
      "type 'longrope'",
    ),
    ('config.json', dict(rope_scaling=[4]), 'rope_scaling=[4] is not an object'),
    (
      'config.json',
      dict(rope_scaling=dict(type='linear', factor='4')),
      'factor of the type linear must be a number',
    ),
    ('config.json', dict(rope_scaling=dict(type='linear', factor=4, twist=1)), 'twist'),
    ('config.json', dict(rope_theta=-1), 'rope_theta=-1 cannot be followed'),
    ('config.json', dict(rms_norm_eps='small'), 'rms_norm_eps="small" cannot be followed'),
    ('config.json', dict(max_position_embeddings=0), 'max_position_embeddings=0 cannot'),
    ('config.json', dict(hidden_size='wide', head_dim=None), 'hidden_size="wide"'),
    ('config.json', dict(model_type='mistral'), 'model_type="mistral"'),
    ('config.json', dict(sliding_window=512), 'sliding_window=512 is not a known key of'),
    ('config.json', dict(hiden_act='silu'), 'nearest known: hidden_act'),
    ('config.json', dict(quantization_config=dict(bits=4)), 'quantization_config'),
    ('config.json', dict(eos_token_id=[2, 7]), 'eos_token_id=[2, 7], but'),
    ('generation_config.json', dict(eos_token_id=7), 'eos_token_id=7, but'),
    ('tokenizer_config.json', dict(eos_token=dict(content='<|im_end|>')), 'eos_token="<|im_end|>"'),
    ('tokenizer_config.json', dict(add_prefix_space=False), 'add_prefix_space=false'),
  ],
)
def test_other_computations_are_refused(file, keys, message, tmp_path):
  write(tmp_path, **PLAIN)
  write(tmp_path, file, **(PLAIN if file == 'config.json' else {}) | keys)
  with pytest.raises(UserError) as caught:
    read(tmp_path)
  assert message in str(caught.value)
  assert file in str(caught.value)
  assert '\n' not in str(caught.value)


def test_harmless_keys_are_accepted(tmp_path):
  write(
    tmp_path,
    **PLAIN,
    pretraining_tp=2,
    tie_word_embeddings=True,
    use_cache=False,
    torch_dtype='float16',
    eos_token_id=[2],
  )
  write(
    tmp_path,
    'generation_config.json',
    eos_token_id=2,
    temperature=0.6,
    top_p=0.9,
    do_sample=True,
    new_option=1,
  )
  write(
    tmp_path,
    'tokenizer_config.json',
    eos_token='</s>',
    model_max_length=10**30,
    chat_template='...',
    legacy=False,
  )
  assert read(tmp_path) == {}


def test_the_longest_sequence(tmp_path):
  """By max_position_embeddings, by Vicuna's max_sequence_length, and by dynamic scaling."""
  for keys, expected in (
    (dict(max_position_embeddings=300), 300),
    (dict(rope_scaling=dict(type='linear', factor=4.0), max_sequence_length=16384), 16384),
    (dict(rope_scaling=dict(type='dynamic', factor=4.0)), 16384),
  ):
    write(tmp_path, **PLAIN | keys)
    assert lavit.build('letters', settings={'llama': read(tmp_path)}).llama.longest == expected


# --- With weights, in both directions --------------------------------------------------------

SCALED = dict(
  rope_theta=1e6,
  rope_scaling=dict(type='linear', factor=4.0),
  rms_norm_eps=1e-3,
  max_position_embeddings=512,
)
IDS = np.random.default_rng(0).integers(3, 100, (1, 60))


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  """A LLaMA folder by transformers, with settings of its own, and its logits of IDS."""
  src = tmp_path_factory.mktemp('llama') / 'src'
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | SCALED)).float().eval()
  with torch.no_grad():
    for x in model.parameters():
      if x.ndim == 2:
        x.normal_(0, 1.5 / x.shape[1] ** 0.5)
  model.save_pretrained(src)
  return src, transformers_logits(src)


def transformers_logits(src) -> np.ndarray:
  model = transformers.LlamaForCausalLM.from_pretrained(src).eval()
  with torch.no_grad():
    return model(torch.from_numpy(IDS)).logits[..., :100].numpy()


def flax_logits(settings: dict, params: dict) -> np.ndarray:
  llama = lavit.build('letters', settings=settings).llama
  mask = jnp.ones(IDS.shape, bool)
  x = llama.apply({'params': params}, jnp.asarray(IDS), method='embed')
  x, _ = llama.apply({'params': params}, x, prompt_positions(mask), prompt_mask(mask))
  return np.asarray(llama.apply({'params': params}, x, method='logits'))[..., :100]


def assert_close(logits, expected):
  """Within float32's rounding of sums of 96 terms and angles of 60, times the gains of layers."""
  tolerance = 100 * (96 + 18 * 60) * np.finfo(np.float32).eps * expected.std()
  assert np.abs(logits - expected).max() < tolerance


def test_there_and_back(source, tmp_path, capsys):
  """With the description of the source, and without it, as an export of a training is."""
  src, expected = source
  convert.plan_conversion(src, tmp_path / 'checkpoint', variant='letters').run(lambda size: None)
  settings = folder.read_settings(tmp_path / 'checkpoint')
  assert settings == {
    'llama': dict(
      rope_theta=1e6,
      rope_scaling=dict(rope_type='linear', factor=4.0),
      rms_norm_eps=1e-3,
      max_position_embeddings=512,
    )
  }
  conversion.inspect(tmp_path / 'checkpoint')
  output = ' '.join(capsys.readouterr().out.split())
  assert 'settings of llama: rope_theta=1000000.0, rope_scaling={"rope_type": "linear"' in output
  params = folder.load_params(tmp_path / 'checkpoint')
  assert_close(flax_logits(settings, params['llama']), expected)
  # Without the settings, the logits differ.
  plain = flax_logits({}, params['llama'])
  assert np.abs(plain - expected).max() > 0.1 * expected.std()

  back = convert.plan_conversion(tmp_path / 'checkpoint', tmp_path / 'back')
  assert any('llama: config.json sets rope_theta=1000000.0' in note for note in back.notes)
  back.run(lambda size: None)
  assert_close(transformers_logits(tmp_path / 'back'), expected)
  folder.save_params(tmp_path / 'export', 'letters', dict(llama=params['llama']), settings=settings)
  convert.plan_conversion(tmp_path / 'export', tmp_path / 'exported').run(lambda size: None)
  assert_close(transformers_logits(tmp_path / 'exported' / 'language_model'), expected)
  assert open_checkpoint(tmp_path / 'export', None).settings == settings


def test_a_bundle_has_the_settings_of_each_module(tmp_path):
  tokenizer = pathlib.Path(lavit.__file__).parents[1] / 'assets' / 'tiny' / 'language_model'
  tree = {'embedding': np.zeros((3, 2), np.float32)}
  first = {'llama': dict(rope_theta=1e6)}
  second = {'llama': dict(rms_norm_eps=1e-6)}
  folder.save_params(tmp_path / 'a', 'tiny', dict(llama=tree), settings=first)
  folder.save_params(tmp_path / 'b', 'tiny', dict(llama=tree), settings=second)
  folder.save_params(tmp_path / 'c', 'tiny', dict(decoder=tree))
  for sources, expected in (('abc', second), ('bac', first), ('ca', first)):
    bundled = bundle(tmp_path / 'bundle', [tmp_path / name for name in sources], tokenizer)
    assert folder.read_settings(bundled) == expected


def test_a_conversion_notes_the_settings_that_it_follows(source, tmp_path):
  """Those that differ from the variant's own with that value; base, eps and positions always."""
  src, _ = source
  notes = convert.plan_conversion(src, tmp_path / 'checkpoint', variant='letters').notes
  assert (
    'llama: config.json sets rope_theta=1000000.0 (the variant: 10000.0), '
    'rope_scaling={"rope_type": "linear", "factor": 4.0} (the variant: null), '
    'rms_norm_eps=0.001 (the variant: 1e-05), max_position_embeddings=512 (the variant: 4096)'
  ) in notes
  shutil.copytree(src, tmp_path / 'plain')
  write(tmp_path / 'plain', **PLAIN)
  notes = convert.plan_conversion(
    tmp_path / 'plain', tmp_path / 'checkpoint', variant='letters'
  ).notes
  assert (
    'llama: config.json sets rope_theta=10000.0, rms_norm_eps=1e-05, max_position_embeddings=4096'
  ) in notes


def test_scripts_name_the_settings(source, tmp_path):
  src, expected = source
  with pytest.raises(
    UserError,
    match=r'rope_theta=1000000.0 of llama, not rope_theta=10000.0; take settings = torch_settings',
  ):
    from_torch(src, 'llama', variant='letters', grow=True)
  settings = torch_settings(src, 'llama', variant='letters')
  params = from_torch(src, 'llama', variant='letters', grow=True, settings=settings)
  assert_close(flax_logits(settings, params), expected)
  to_torch(params, tmp_path / 'back', 'llama', variant='letters', settings=settings)
  assert_close(transformers_logits(tmp_path / 'back'), expected)
  assert torch_settings(tmp_path / 'back', 'llama', variant='letters') == settings


def test_a_description_that_disagrees_with_the_settings_is_not_written(source, tmp_path):
  convert.plan_conversion(source[0], tmp_path / 'checkpoint', variant='letters').run(
    lambda size: None
  )
  file = tmp_path / 'checkpoint' / 'torch' / 'config.json'
  file.write_text(json.dumps(json.loads(file.read_text()) | dict(rms_norm_eps=1e-6)))
  with pytest.raises(
    UserError, match='rms_norm_eps=1e-06, but the settings .* say rms_norm_eps=0.001 of llama'
  ):
    convert.plan_conversion(tmp_path / 'checkpoint', tmp_path / 'back')


def test_an_old_checkpoint_has_the_settings_of_its_descriptions(source, tmp_path):
  convert.plan_conversion(source[0], tmp_path / 'checkpoint', variant='letters').run(
    lambda size: None
  )
  file = tmp_path / 'checkpoint' / 'config.json'
  config = json.loads(file.read_text())
  settings = config.pop('settings')
  file.write_text(json.dumps(config))
  assert folder.read_settings(tmp_path / 'checkpoint') == settings != {}
  shutil.rmtree(tmp_path / 'checkpoint' / 'torch')
  assert folder.read_settings(tmp_path / 'checkpoint') == {}
