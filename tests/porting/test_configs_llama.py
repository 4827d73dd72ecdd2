"""The description of a LLaMA: read as transformers reads it, carried along, and written so that transformers computes the same."""

import copy
import dataclasses
import json
import logging
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lavit_jax
from lavit_jax.errors import UserError
from lavit_jax.inference.parts import open_checkpoint
from lavit_jax.models import lavit
from lavit_jax.models import settings as checkpoint_settings
from lavit_jax.models.rope import Rope
from lavit_jax.models.sequence import prompt_mask, prompt_positions
from lavit_jax.porting import configs, convert, folder, from_torch, layouts, show, to_torch, torch_settings
from lavit_jax.porting.configs import llama, rules

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # noqa: E402

ROOT = pathlib.Path(__file__).parents[2]
WORDS = pathlib.Path(lavit_jax.__file__).parent / 'assets' / 'tiny' / 'language_model'
TOTAL, IDS = 103, np.random.default_rng(0).integers(3, 80, (1, 96))
SMALL = dict(
    text_vocab_size=81,
    vit=dict(image_size=32, patch_size=8, hidden_size=16, num_layers=1, num_heads=2, head_dim=8, mlp_dim=32, output_dim=16),
    tokenizer=dict(hidden_size=16, num_layers=1, num_heads=2, mlp_dim=32, codebook_size=20, code_dim=8),
    decoder=dict(num_layers=1, context_dims=(16,)),
    llama=dict(hidden_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=12, mlp_dim=64),
    unet=dict(block_out_channels=(16,), layers_per_block=1, down_block_attention=(True,), transformer_layers=(1,), num_heads=(2,),
              cross_attention_dim=16, norm_num_groups=4),
    vae=dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, scaling_factor=1.0),
    uncond_rows=1,
)
SIZES = dict(vocab_size=81, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=12)
LLAMA3 = dict(rope_type='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
OTHER = dict(rope_theta=1e6, rms_norm_eps=1e-2, max_position_embeddings=512, rope_scaling=LLAMA3)  # none of them the variant's own


@pytest.fixture(scope='module', autouse=True)
def variant():
  lavit.VARIANTS['narrow'] = SMALL
  yield
  del lavit.VARIANTS['narrow']


def source(where, **over):
  """transformers' model of the variant's sizes, saved by itself; its weights are large enough for settings to matter."""
  torch.manual_seed(0)
  about = SIZES | dict(rms_norm_eps=1e-5, max_position_embeddings=4096) | copy.deepcopy(over)  # transformers writes into what it is given
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**about)).eval()
  with torch.no_grad():
    for name, x in model.named_parameters():
      if x.ndim == 2:
        x.normal_(0, 0.1 if 'embed' in name else 1.5 / x.shape[1] ** 0.5)
  model.save_pretrained(where)
  return model


def theirs(model):
  with torch.no_grad():
    return model(torch.from_numpy(IDS)).logits[..., :81].numpy()


def ours(model, params):
  """Logits of the text's rows, by a model built with settings."""
  @jax.jit
  def forward(params):
    mask, apply = jnp.ones(IDS.shape, bool), lambda *args, **kwargs: model.llama.apply({'params': params}, *args, **kwargs)
    hidden, _ = apply(apply(jnp.asarray(IDS), method='embed'), prompt_positions(mask), prompt_mask(mask))
    return apply(hidden, method='logits')[..., :81]

  return np.asarray(forward(jax.tree.map(jnp.asarray, params)))


def limit(expected, theta=1e6):
  """As far as float32 leaves two programs: a few ulps of a power of theta, times 96 positions, in 2 layers (tests/models/test_rope.py)."""
  return 8 * (np.log(theta) + 8) * np.finfo(np.float32).eps * IDS.shape[1] * np.abs(expected).max()


def write(where, **over):
  """A description alone, as config.json; None leaves a key out."""
  about = {'model_type': 'llama', **SIZES, 'rms_norm_eps': 1e-5, 'rope_theta': 1e4, 'max_position_embeddings': 4096, **over}
  where.mkdir(exist_ok=True)
  (where / 'config.json').write_text(json.dumps({key: value for key, value in about.items() if value != 'absent'}))
  return where


def read(where):
  return configs.read_settings(where, {'llama': ''}, ['llama'], 'narrow')


# ------------------------------------------------------------------------------------------------------------------ reading

@pytest.mark.parametrize('over', [
    {},
    dict(rope_theta=1e6),
    dict(rope_theta='absent', rope_parameters=dict(rope_type='default', rope_theta=5e5)),
    dict(rope_theta=1e6, rope_parameters=dict(rope_type='default', rope_theta=5e5)),
    dict(rope_scaling=dict(type='linear', factor=4.0)),
    dict(rope_scaling=dict(rope_type='linear', factor=4.0, rope_theta=2e4)),
    dict(rope_theta='absent', rope_scaling=dict(type='dynamic', factor=2.0)),
    dict(rope_scaling=dict(type='yarn', factor=4.0, original_max_position_embeddings=64, finetuned=True)),
    dict(rope_scaling=dict(type='yarn', factor=4.0)),
    dict(rope_parameters={**LLAMA3, 'rope_theta': 5e5}, rope_theta='absent'),
    dict(rope_scaling={**LLAMA3, 'original_max_position_embeddings': 64}, original_max_position_embeddings=128),
    dict(rope_scaling=dict(type='linear', factor=4.0), rope_parameters=dict(rope_type='linear', factor=2.0)),
    dict(rope_scaling=None, rope_parameters=None, rope_theta='absent', rms_norm_eps='absent', max_position_embeddings='absent'),
    dict(rms_norm_eps=1e-6, max_position_embeddings=2048),
], ids=repr)
def test_settings_are_what_transformers_makes_of_the_file(over, tmp_path):
  found = checkpoint_settings.own(SMALL)['llama'] | read(write(tmp_path, **over)).get('llama', {})
  about = transformers.LlamaConfig.from_pretrained(tmp_path)
  frequency = LlamaRotaryEmbedding(about).inv_freq.numpy()  # which also settles which original length counts
  wanted = dict(about.rope_parameters)
  assert found['rope_theta'] == wanted['rope_theta']
  assert (found['rope_scaling'] or {}).get('rope_type', 'default') == wanted['rope_type']
  for key, value in (found['rope_scaling'] or {}).items():
    assert wanted[key] == value
  llama = lavit.build('narrow', settings={'llama': found}).llama
  positions = jnp.zeros((1, 1), jnp.int32)
  ours = np.ravel(Rope(llama.rope_theta, llama.rope_scaling, llama.max_position_embeddings).frequency(12, positions))
  np.testing.assert_allclose(ours, frequency, rtol=4 * np.finfo(np.float32).eps * (np.log(1e6) + 8) * wanted.get('factor', 1))
  assert (found['rms_norm_eps'], found['max_position_embeddings']) == (about.rms_norm_eps, about.max_position_embeddings)


@pytest.mark.parametrize(('over', 'message'), [
    (dict(hidden_act='gelu'), 'hidden_act="gelu", but the variant \'narrow\' computes with "silu"; choose a checkpoint whose MLP is SwiGLU'),
    (dict(num_attention_heads=8, head_dim=6), 'num_attention_heads=8, but the variant .narrow. computes with 4; choose a variant'),
    (dict(num_attention_heads=8, head_dim='absent', num_key_value_heads='absent'), 'num_attention_heads=8'),
    (dict(num_key_value_heads='absent'), 'num_key_value_heads=4, but the variant .narrow. computes with 2'),
    (dict(head_dim=24), 'head_dim=24'),
    (dict(num_attention_heads='absent'), "num_attention_heads=32 .the default of transformers' LlamaConfig, for the key is missing.*computes with 4"),
    (dict(attention_bias=True), 'attention_bias=true.*computes with false; choose a checkpoint without biases'),
    (dict(mlp_bias=True), 'mlp_bias=true'),
    (dict(partial_rotary_factor=0.5), 'partial_rotary_factor=0.5'),
    (dict(rope_parameters=dict(rope_type='default', rope_theta=1e4, partial_rotary_factor=0.5)), 'partial_rotary_factor=0.5'),
    (dict(model_type='mistral'), 'model_type="mistral"'),
    (dict(quantization_config=dict(quant_method='gptq')), 'quantization_config='),
    (dict(rope_scaling=dict(rope_type='longrope', short_factor=[1.0], long_factor=[1.0])), "cannot be followed: the type 'longrope' is not computed here"),
    (dict(rope_scaling=dict(rope_type='linear', factor=2.0, ntk_alpha=1.0)), 'rope_scaling has the key ntk_alpha=1.0, which is not followed'),
    (dict(rope_scaling=dict(rope_type='longrope', factor=2.0)), "rope_scaling=.* cannot be followed: the type 'longrope' is not computed here"),
    (dict(rope_scaling='linear'), "rope_scaling='linear' is no object"),
    (dict(rope_theta=0), 'rope_theta=0 cannot be followed: it must be a number above 0'),
    (dict(rope_theta='1e6'), 'rope_theta="1e6" cannot be followed'),
    (dict(rms_norm_eps=-1e-5), 'rms_norm_eps=-1e-05 cannot be followed'),
    (dict(max_position_embeddings=2048.5), 'max_position_embeddings=2048.5 cannot be followed: it must be a whole number'),
    (dict(sliding_window=4096), 'sliding_window=4096 is no key that is known of .*remove it from the file if'),
    (dict(rms_norm_epsilon=1e-6), r'rms_norm_epsilon=1e-06 is no key.*nearest known: rms_norm_eps\)'),
], ids=repr)
def test_what_is_not_computed_is_refused(over, message, tmp_path):
  with pytest.raises(UserError, match=message) as error:
    read(write(tmp_path, **over))
  assert str(error.value).startswith(str(tmp_path / 'config.json')) and '\n' not in str(error.value)


def test_keys_that_change_nothing(tmp_path):
  """What Vicuna's files and those of old versions of transformers hold besides."""
  kept = {key: 'anything' for key, rule in llama.RULES.items() if isinstance(rule, rules.Harmless)}
  kept |= dict(_name_or_path='lmsys/vicuna', torch_dtype='float16', tie_word_embeddings=True, pad_token_id=-1, vocab_size=81)
  assert read(write(tmp_path, **kept)) == {}


def test_every_key_of_the_class_has_a_rule():
  known = {field.name for field in dataclasses.fields(transformers.LlamaConfig)} | transformers.LlamaConfig().to_dict().keys()
  old = {'rope_theta', 'rope_scaling', 'torch_dtype'}
  assert {key for key in known | old if not key.startswith('_')} - llama.RULES.keys() == {'rope_parameters'}  # of which `complete` makes two others


def test_the_documentation_names_every_key():
  text = (ROOT / 'docs' / 'checkpoints-language-model.md').read_text()
  named = {}
  for keys, fate in re.findall(r'^\| (`.*?`) \| (followed|checked|harmless) \|', text, re.M):
    named |= dict.fromkeys(re.findall(r'`(\w+)`', keys), fate)
  assert named == {key: fate for key, fate, _ in rules.table(llama.FAMILIES)}


# ---------------------------------------------------------------------------------------------------------- there and back

def test_a_script_passes_settings_and_transformers_reads_the_same(tmp_path):
  expected = theirs(source(tmp_path / 'src', **OTHER))
  settings = torch_settings(tmp_path / 'src', 'llama', variant='narrow')
  assert settings == {'llama': OTHER}
  params = from_torch(tmp_path / 'src', 'llama', variant='narrow', grow=True, settings=settings)
  assert np.abs(ours(lavit.build('narrow'), params) - expected).max() > 30 * limit(expected)
  np.testing.assert_allclose(ours(lavit.build('narrow', settings=settings), params), expected, atol=limit(expected))
  to_torch(params, tmp_path / 'back', 'llama', variant='narrow', settings=settings)
  back = transformers.LlamaForCausalLM.from_pretrained(tmp_path / 'back').eval()
  np.testing.assert_array_equal(theirs(back), expected)
  assert back.config.max_position_embeddings == 512 and back.config.vocab_size == TOTAL


def test_a_script_without_the_settings_is_told(tmp_path, caplog):
  source(tmp_path / 'src', rope_theta=1e6)
  with pytest.raises(UserError, match=r'has rope_theta=1000000.0 of llama, not rope_theta=10000.0; take settings = torch_settings\(path, part\)'):
    from_torch(tmp_path / 'src', 'llama', variant='narrow')
  with pytest.raises(UserError, match='has rope_theta=1000000.0 of llama, not rope_theta=20000.0'):
    from_torch(tmp_path / 'src', 'llama', variant='narrow', settings={'llama': {'rope_theta': 2e4}})
  source(tmp_path / 'long', max_position_embeddings=16384)
  with caplog.at_level(logging.WARNING):
    from_torch(tmp_path / 'long', 'llama', variant='narrow')  # the numbers are the same
  assert 'has max_position_embeddings=16384 of llama, not max_position_embeddings=4096' in caplog.text


def test_a_conversion_carries_them_there_and_back(tmp_path):
  expected = theirs(source(tmp_path / 'src', **OTHER))
  convert.prepare(tmp_path / 'src', tmp_path / 'ours', variant='narrow').run(lambda size: None)
  assert folder.read_config(tmp_path / 'ours')['settings'] == folder.read_settings(tmp_path / 'ours') == {'llama': OTHER}
  found = open_checkpoint(tmp_path / 'ours', None)
  params = folder.load_parts(tmp_path / 'ours')['llama']
  np.testing.assert_allclose(ours(lavit.build('narrow', settings=found.settings), params), expected, atol=limit(expected))
  convert.prepare(tmp_path / 'ours', tmp_path / 'back').run(lambda size: None)
  np.testing.assert_array_equal(theirs(transformers.LlamaForCausalLM.from_pretrained(tmp_path / 'back').eval()), expected)

  # What was trained, and has no descriptions of its own, is described by its settings.
  folder.save_parts(tmp_path / 'export', 'narrow', {'llama': params}, settings=found.settings)
  convert.prepare(tmp_path / 'export', tmp_path / 'theirs').run(lambda size: None)
  theirs_again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / 'theirs' / 'language_model').eval()
  np.testing.assert_array_equal(theirs(theirs_again), expected)
  assert theirs_again.config.max_position_embeddings == 512
  assert open_checkpoint(tmp_path / 'theirs', 'narrow').settings == {'llama': OTHER}  # a PyTorch folder, opened as it is


def test_older_conversions_have_them_in_their_description(tmp_path):
  source(tmp_path / 'src', **OTHER)
  convert.prepare(tmp_path / 'src', tmp_path / 'ours', variant='narrow').run(lambda size: None)
  file = tmp_path / 'ours' / 'config.json'
  config = json.loads(file.read_text())
  del config['settings']
  file.write_text(json.dumps(config))
  assert folder.read_settings(tmp_path / 'ours') == {'llama': OTHER}
  bare = {key: value for key, value in config.items() if key != 'metadata'} | {'metadata': {'stage': 'lm'}}
  (tmp_path / 'old').mkdir()
  (tmp_path / 'old' / 'config.json').write_text(json.dumps(bare))  # an export of a training
  assert folder.read_settings(tmp_path / 'old') == {}


def test_a_description_that_disagrees_is_told_on_the_way_back(tmp_path):
  source(tmp_path / 'src', rope_theta=1e6)
  convert.prepare(tmp_path / 'src', tmp_path / 'ours', variant='narrow').run(lambda size: None)
  file = tmp_path / 'ours' / 'torch' / 'config.json'
  about = json.loads(file.read_text())
  file.write_text(json.dumps(about | {'rope_parameters': {'rope_type': 'default', 'rope_theta': 5e5}}))
  with pytest.raises(UserError, match=r'torch/config.json says rope_theta=500000.0, but the settings in .*/ours/config.json say rope_theta=1000000.0'):
    convert.prepare(tmp_path / 'ours', tmp_path / 'back')


def test_a_bundle_takes_settings_from_where_it_takes_the_part(tmp_path):
  tree = {'kernel': np.ones((2, 3), np.float32)}
  folder.save_parts(tmp_path / 'first', 'tiny', {'llama': tree}, settings={'llama': {'rope_theta': 1e6}})
  folder.save_parts(tmp_path / 'second', 'tiny', {'llama': tree}, settings={'llama': {'rms_norm_eps': 1e-6}})
  folder.save_parts(tmp_path / 'third', 'tiny', {'vit': tree})
  for names, settings in ((('first', 'third'), {'rope_theta': 1e6}), (('first', 'second'), {'rms_norm_eps': 1e-6}), (('second', 'first'), {'rope_theta': 1e6})):
    folder.bundle(tmp_path / 'whole', [tmp_path / name for name in names], WORDS)
    assert folder.read_settings(tmp_path / 'whole') == {'llama': settings}


@pytest.mark.parametrize(('settings', 'message'), [
    ({'llama': {'rope_thta': 1e6}}, "settings of llama: unknown field 'rope_thta'; did you mean 'rope_theta'"),
    ({'lama': {}}, "settings of 'lama': the variant 'tiny' has none of that name"),
    ({'llama': {'rope_theta': float('inf')}}, 'rope_theta=inf is not possible: it must be a number above 0'),
    ({'llama': 5}, 'settings of llama: 5 is not an object'),
])
def test_settings_that_are_not_known(settings, message):
  with pytest.raises(UserError, match=message):
    lavit.build('tiny', settings=settings)


def test_settings_that_are_the_variants_own_are_none():
  model = lavit.build('tiny', settings={'llama': {'rope_theta': 10000, 'rms_norm_eps': 1e-5, 'rope_scaling': {'type': 'default'}}})
  assert model.settings == {} and model == lavit.build('tiny') and hash(model) == hash(lavit.build('tiny'))
  assert layouts.llama_config(model, 5) == layouts.llama_config(lavit.build('tiny'), 5)
  assert lavit.build('tiny', settings={'llama': {'rope_theta': 2e4}}) != model


def test_inspect_shows_them(tmp_path, capsys):
  folder.save_parts(tmp_path / 'ours', 'narrow', {'llama': {'norm': np.ones(3, np.float32)}}, settings={'llama': {'rope_theta': 1e6}})
  show.inspect(tmp_path / 'ours')
  assert '"rope_theta": 1000000.0' in capsys.readouterr().out
