"""Descriptions of a diffusers folder, compared with diffusers: followed, checked or refused."""

import inspect
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from nano import NANO, jit

from lavit_jax.errors import UserError
from lavit_jax.models import lavit
from lavit_jax.models.noise_schedule import Scheduler
from lavit_jax.porting import from_torch, to_torch
from lavit_jax.weights.store import folder
from lavit_jax.weights.torch import configs, convert, formats, name_tables
from lavit_jax.weights.torch.api import torch_settings
from lavit_jax.weights.torch.configs import pipeline, rules, safety, scheduler, unet, vae

torch = pytest.importorskip('torch')
diffusers = pytest.importorskip('diffusers')
transformers = pytest.importorskip('transformers')

SDXL = dict(
  block_out_channels=(8, 16),
  layers_per_block=1,
  down_block_attention=(False, True),
  transformer_layers=(1, 2),
  num_heads=(2, 2),
  cross_attention_dim=12,
  norm_num_groups=4,
  use_linear_projection=True,
  addition_time_embed_dim=8,
  pooled_dim=20,
)
CHECKER = dict(
  image_size=16, patch_size=8, hidden_size=16, num_layers=2, num_heads=2, mlp_dim=24, output_dim=12
)
VARIANT = {
  **NANO,
  'highres_unet': SDXL,
  'highres_vae': NANO['vae'],
  'highres_decoder': dict(num_layers=1, context_dims=(16, 24), pooled_dim=20),
  'safety_checker': CHECKER,
}
MODULES = ('unet', 'vae', 'highres_unet', 'highres_vae', 'safety_checker', 'uncond_embeddings')
FOLDERS = {location.module: location.folder for location in formats.PUBLISHED}
RNG = np.random.default_rng(0)


@pytest.fixture(scope='module', autouse=True)
def variant():
  lavit.VARIANTS['described'] = VARIANT
  yield
  del lavit.VARIANTS['described']


@pytest.fixture(scope='module')
def params():
  tree = name_tables.module_shapes(lavit.build('described'), MODULES)
  return jax.tree.map(
    lambda x: RNG.normal(0, np.prod(x.shape[:-1] or 1) ** -0.5, x.shape).astype(np.float32), tree
  )


@pytest.fixture(scope='module')
def published(params, tmp_path_factory):
  """A LaVIT folder of the image decoders, without settings."""
  base = tmp_path_factory.mktemp('described')
  folder.save_params(base / 'checkpoint', 'described', params)
  convert.plan_conversion(base / 'checkpoint', base / 'torch').run(lambda size: None)
  return base / 'torch'


def edited(src, dst, file, **keys):
  """A copy of a folder with other values in one of its descriptions; `...` removes a key."""
  shutil.copytree(src, dst)
  content = json.loads((dst / file).read_text()) | keys
  content = {key: value for key, value in content.items() if value is not ...}
  (dst / file).write_text(json.dumps(content))
  return dst


def settings_of(src):
  return configs.read_settings(src, FOLDERS, MODULES, 'described')


def defaults(cls):
  values = {
    name: parameter.default
    for name, parameter in inspect.signature(cls.__init__).parameters.items()
    if name not in ('self', 'kwargs', 'args')
  }
  return json.loads(json.dumps(values, default=str))


# DPMSolverSDEScheduler needs torchsde to be imported.
SCHEDULERS = [name for name in scheduler.CLASSES if name not in (None, 'DPMSolverSDEScheduler')]


@pytest.mark.parametrize('name', ['UNet2DConditionModel', 'AutoencoderKL', *SCHEDULERS])
def test_every_key_of_a_class_has_a_rule_and_its_default(name):
  cls = getattr(diffusers, name)
  tables = {'UNet2DConditionModel': unet._rules('unet'), 'AutoencoderKL': vae._rules('vae')}
  table = tables.get(name, scheduler.RULES)
  assert defaults(cls).keys() <= table.keys()
  if name in ('UNet2DConditionModel', 'AutoencoderKL', 'DDIMScheduler'):
    levels = unet.complete({}) if name == 'UNet2DConditionModel' else {}
    for key, default in defaults(cls).items():
      rule = table[key]
      of_each_sampler = key == 'timestep_spacing'
      if isinstance(rule, rules.Harmless) or key in levels or of_each_sampler:
        continue
      is_same = rules.json_equal(rules.to_json_value(rule.default), default)
      assert is_same or (rule.default, default) == (None, ...), key
  if name == 'UNet2DConditionModel':
    assert levels['attention_head_dim'] == [8] * 4
    assert levels['transformer_layers_per_block'] == [1] * 4


def test_every_key_of_the_safety_checker_has_a_rule():
  config = transformers.CLIPConfig().to_dict()
  assert {key for key in safety.complete(config) if not key.startswith('_')} <= safety.RULES.keys()
  processor = json.loads(transformers.CLIPImageProcessor().to_json_string())
  assert safety.complete_processor(processor).keys() <= safety.PROCESSOR_RULES.keys()
  for module in (diffusers.StableDiffusionPipeline, diffusers.StableDiffusionXLPipeline):
    assert inspect.signature(module.__init__).parameters.keys() - {'self'} <= pipeline.RULES.keys()


UNETS = {
  'all': dict(attention_head_dim=[1, 8], norm_eps=1e-2, flip_sin_to_cos=False, freq_shift=1),
  'heads': dict(attention_head_dim=4),
  'flipped': dict(flip_sin_to_cos=False),
  'shifted': dict(freq_shift=1),
  'eps': dict(norm_eps=0.1),
}


@pytest.mark.parametrize('module', ['unet', 'highres_unet'])
@pytest.mark.parametrize(
  'name', ['all', *(pytest.param(name, marks=pytest.mark.slow) for name in UNETS if name != 'all')]
)
def test_a_unet_with_settings_computes_as_in_diffusers(published, params, tmp_path, module, name):
  keys = dict(UNETS[name])
  levels = len(getattr(lavit.build('described'), module).block_out_channels)
  if isinstance(keys.get('attention_head_dim'), list):
    keys['attention_head_dim'] = keys['attention_head_dim'][-levels:]
  src = edited(published, tmp_path / 'src', f'{FOLDERS[module]}/config.json', **keys)
  with pytest.raises(UserError, match='torch_settings'):
    from_torch(src, module, variant='described')
  settings = torch_settings(src, module, variant='described')
  model = getattr(lavit.build('described', settings=settings), module)
  tree = from_torch(src, module, variant='described', settings=settings)

  latents = RNG.normal(size=(2, 8, 8, 4)).astype(np.float32)
  context = RNG.normal(size=(2, 5, model.cross_attention_dim)).astype(np.float32)
  timesteps = np.array([3, 500])
  added = None
  options = {}
  if module == 'highres_unet':
    pooled = RNG.normal(size=(2, 20)).astype(np.float32)
    sizes = np.full((2, 6), 64, np.float32)
    added = (pooled, sizes)
    conditions = dict(text_embeds=torch.from_numpy(pooled), time_ids=torch.from_numpy(sizes))
    options = dict(added_cond_kwargs=conditions)

  def diffusers_output(folder_of_unet):
    reference = diffusers.UNet2DConditionModel.from_pretrained(folder_of_unet).eval()
    with torch.no_grad():
      output = reference(
        torch.from_numpy(latents.transpose(0, 3, 1, 2)),
        torch.from_numpy(timesteps),
        torch.from_numpy(context),
        **options,
      ).sample
    return output.numpy().transpose(0, 2, 3, 1)

  expected = diffusers_output(src / FOLDERS[module])
  assert np.abs(expected - diffusers_output(published / FOLDERS[module])).max() > 1e-3
  output = jit(model.apply)({'params': tree}, latents, timesteps, context, None, added)
  np.testing.assert_allclose(output, expected, atol=1e-4)
  to_torch(tree, tmp_path / 'back', module, variant='described', settings=settings)
  np.testing.assert_array_equal(diffusers_output(tmp_path / 'back'), expected)


@pytest.mark.parametrize('module', ['vae', 'highres_vae'])
@pytest.mark.parametrize(
  'keys',
  [
    dict(scaling_factor=0.36, shift_factor=0.12),
    dict(scaling_factor=0.5, latents_mean=[-1.6, 0.9, 1.2, 2.6], latents_std=[8.4, 5.9, 5.3, 6.4]),
  ],
)
def test_the_factors_of_a_vae_travel_and_come_back(published, tmp_path, module, keys):
  """In float64 as in diffusers' pipelines of Stable Diffusion 3 and XL."""
  src = edited(published, tmp_path / 'src', f'{FOLDERS[module]}/config.json', **keys)
  convert.plan_conversion(src, tmp_path / 'checkpoint').run(lambda size: None)
  settings = folder.read_settings(tmp_path / 'checkpoint')
  assert settings == {module: keys}
  model = getattr(lavit.build('described', settings=settings), module)
  x = RNG.normal(size=(2, 4, 4, 4))
  if 'shift_factor' in keys:
    encoded = (x - 0.12) * 0.36
    decoded = x / 0.36 + 0.12
  else:
    mean = np.array(keys['latents_mean'])
    std = np.array(keys['latents_std'])
    encoded = (x - mean) * 0.5 / std
    decoded = x * std / 0.5 + mean
  np.testing.assert_allclose(model.to_unet(x.astype(np.float32)), encoded, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(model.from_unet(x.astype(np.float32)), decoded, rtol=1e-5, atol=1e-5)
  convert.plan_conversion(tmp_path / 'checkpoint', tmp_path / 'exported').run(lambda size: None)
  again = diffusers.AutoencoderKL.from_pretrained(tmp_path / 'exported' / FOLDERS[module]).config
  assert {key: again[key] for key in keys} == keys


def test_an_export_has_the_settings_of_its_checkpoint(params, tmp_path):
  """Its descriptions have them, and diffusers and this package read the same from these."""
  betas = dict(
    rescale_betas_zero_snr=True, prediction_type='v_prediction', timestep_spacing='trailing'
  )
  settings = dict(
    unet=dict(num_heads=[4], norm_eps=0.01, flip_sin_to_cos=False, freq_shift=1),
    vae=dict(shift_factor=0.1),
    scheduler=betas,
    highres_vae=dict(latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[2.0, 3.0, 4.0, 5.0]),
    highres_scheduler=dict(clip_sample=True),
  )
  folder.save_params(tmp_path / 'checkpoint', 'described', params, settings=settings)
  exported = tmp_path / 'exported'
  convert.plan_conversion(tmp_path / 'checkpoint', exported).run(lambda size: None)
  assert settings_of(exported) == lavit.build('described', settings=settings).settings
  reference = diffusers.DDIMScheduler.from_pretrained(exported / 'pixel_decoding' / 'scheduler')
  assert {key: reference.config[key] for key in betas} == betas
  expected = Scheduler(**betas).schedule.alphas_cumprod
  # diffusers sums 1,000 roundings of float32.
  np.testing.assert_allclose(reference.alphas_cumprod, expected, rtol=1e-3, atol=1e-7)
  config = diffusers.UNet2DConditionModel.load_config(exported / 'pixel_decoding' / 'unet')
  assert config['attention_head_dim'] == [4]
  assert config['norm_eps'] == 0.01
  assert config['flip_sin_to_cos'] is False
  assert config['freq_shift'] == 1


UNET = 'pixel_decoding/unet/config.json'
VAE = 'pixel_decoding/vae/config.json'
SCHEDULER = 'pixel_decoding/scheduler/scheduler_config.json'
SAFETY_CHECKER = 'pixel_decoding/safety_checker/config.json'
EXTRACTOR = 'pixel_decoding/feature_extractor/preprocessor_config.json'


@pytest.mark.parametrize(
  'file, keys, message',
  [
    (
      UNET,
      dict(act_fn='gelu'),
      'act_fn="gelu", but the variant .described. computes with "silu"; '
      'choose a checkpoint with act_fn=.silu.',
    ),
    (
      UNET,
      dict(attention_head_dim=3),
      r'attention_head_dim=\[3\], the numbers of heads, must divide block_out_channels=\[16\]',
    ),
    (
      UNET,
      dict(num_attention_heads=2),
      'num_attention_heads=2, but .* computes with null; .*attention_head_dim',
    ),
    (UNET, dict(time_cond_proj_dim=256), 'time_cond_proj_dim=256, but'),
    (UNET, dict(center_input_sample=True), 'center_input_sample=true, but'),
    (UNET, dict(norm_num_groups=8), 'norm_num_groups=8, but .* computes with 4'),
    (UNET, dict(norm_eps=0), 'norm_eps=0 cannot be followed'),
    (UNET, dict(mid_block_scale_factor=2), 'mid_block_scale_factor=2'),
    (UNET, dict(downsample_padding=0), 'downsample_padding=0'),
    (UNET, dict(dual_cross_attention=True), 'dual_cross_attention=true'),
    (UNET, dict(only_cross_attention=[True]), 'only_cross_attention=true'),
    (UNET, dict(resnet_time_scale_shift='scale_shift'), 'resnet_time_scale_shift="scale_shift"'),
    (UNET, dict(class_embed_type='timestep'), 'class_embed_type="timestep"'),
    (UNET, dict(no_such_key=1), 'no_such_key=1 is not a known key of'),
    (
      UNET,
      dict(cross_attention_dim=...),
      r'cross_attention_dim=1280 \(the default of .*key is missing\), but .* computes with 16',
    ),
    (
      UNET,
      dict(flip_sin_to_cos='yes'),
      'flip_sin_to_cos="yes" cannot be followed: it must be true or false',
    ),
    (VAE, dict(act_fn='mish'), 'act_fn="mish"'),
    (VAE, dict(norm_num_groups=2), 'norm_num_groups=2'),
    (VAE, dict(scaling_factor=0), 'scaling_factor=0'),
    (VAE, dict(latents_mean=[0, 0, 0, 0]), 'latents_mean and latents_std go together'),
    (VAE, dict(use_quant_conv=False), 'use_quant_conv=false'),
    (
      VAE,
      dict(latents_mean=[0, 0], latents_std=[1, 1]),
      r'latents_mean=\[0.0, 0.0\] must have 4 entries',
    ),
    (
      VAE,
      dict(shift_factor=1, latents_mean=[0] * 4, latents_std=[1] * 4),
      'shift_factor=1 and latents_mean=.*give one of them',
    ),
    (
      SCHEDULER,
      dict(prediction_type='flow_prediction'),
      'prediction_type="flow_prediction" cannot be followed',
    ),
    (SCHEDULER, dict(beta_schedule='sigmoid'), 'beta_schedule="sigmoid" cannot be followed'),
    (SCHEDULER, dict(steps_offset=1.5), 'steps_offset=1.5'),
    (SCHEDULER, dict(_class_name='FlowMatchEulerDiscreteScheduler'), 'trained differently'),
    (SCHEDULER, dict(clip_sample=1), 'clip_sample=1'),
    (
      SCHEDULER,
      dict(trained_betas=[0.1]),
      'trained_betas has 1 entries, and num_train_timesteps=1000',
    ),
    (SCHEDULER, dict(timestep_type='continuous'), 'timestep_type="continuous"'),
    (SCHEDULER, dict(beta_end='0.012'), 'beta_end="0.012"'),
    (SCHEDULER, dict(timestep_spacing='karras'), 'timestep_spacing="karras" cannot be followed'),
    (SAFETY_CHECKER, dict(projection_dim=24), 'projection_dim=24'),
    (EXTRACTOR, dict(image_mean=[0.5, 0.5, 0.5]), 'image_mean'),
    (EXTRACTOR, dict(resample=2), 'resample=2'),
    (EXTRACTOR, dict(do_normalize=False), 'do_normalize=false'),
  ],
)
def test_what_cannot_be_followed_is_refused_in_one_line_when_converting(
  published, tmp_path, file, keys, message
):
  src = edited(published, tmp_path / 'src', file, **keys)
  with pytest.raises(UserError, match=message) as caught:
    convert.plan_conversion(src, tmp_path / 'checkpoint', variant='described')
  assert '\n' not in str(caught.value)
  assert file.split('/')[-1] in str(caught.value)


def test_the_models_of_the_pipeline_are_checked(published, tmp_path):
  shutil.copytree(published, tmp_path / 'src')
  index = tmp_path / 'src' / 'pixel_decoding' / 'model_index.json'
  right = dict(
    _class_name='StableDiffusionPipeline',
    unet=['diffusers', 'UNet2DConditionModel'],
    vae=['diffusers', 'AutoencoderKL'],
  )
  index.write_text(json.dumps(right))
  assert settings_of(tmp_path / 'src') == {}
  for wrong in (
    dict(vae=['diffusers', 'AsymmetricAutoencoderKL']),
    dict(controlnet=['diffusers', 'ControlNetModel']),
  ):
    index.write_text(json.dumps(right | wrong))
    with pytest.raises(UserError, match=f'model_index.json: {next(iter(wrong))}='):
      settings_of(tmp_path / 'src')


@pytest.mark.parametrize(
  'keys, settings',
  [
    (
      dict(clip_sample=True, timestep_spacing='linspace'),
      dict(clip_sample=True, timestep_spacing='linspace'),
    ),
    (dict(clip_sample=...), dict(clip_sample=True)),  # DDIM's default
    (dict(clip_sample=..., _class_name='EulerDiscreteScheduler'), {}),  # which cannot clip
    (dict(set_alpha_to_one=..., steps_offset=...), dict(set_alpha_to_one=True, steps_offset=0)),
    (dict(lambda_min_clipped=-float('inf'), use_karras_sigmas=True), dict(use_karras_sigmas=True)),
    (dict(_class_name='PNDMScheduler', skip_prk_steps=True, trained_betas=None), {}),
  ],
)
def test_keys_and_missing_keys_of_a_scheduler(published, tmp_path, keys, settings):
  src = edited(published, tmp_path / 'src', SCHEDULER, **keys)
  assert settings_of(src) == (dict(scheduler=settings) if settings else {})


def test_the_documentation_names_every_key():
  page = (pathlib.Path(__file__).parents[3] / 'docs' / 'checkpoints-diffusion.md').read_text()
  for config_file in configs.CONFIG_FILES:
    if config_file.module not in ('llama', 'vit') and not config_file.module.startswith('highres_'):
      for key in config_file.rules:
        is_listed = f'`{key.removeprefix(safety.VISION)}`' in page
        is_harmless = isinstance(config_file.rules[key], rules.Harmless)
        assert is_listed or (is_harmless and config_file.module == 'safety_checker'), key
