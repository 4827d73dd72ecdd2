"""Rules for the `scheduler_config.json` beside a U-Net: its noise schedule, and sampler options.

The published code opens the file as a DDIMScheduler, whatever class it names, and the `from_config`
of diffusers makes any of its samplers from any such file. The rules do the same: a key in the file
is followed, and a missing key has the default of the sampler's class. There is one exception: in a
file of a class that cannot clip, a missing `clip_sample` does not have DDIM's default, true.
"""

from __future__ import annotations

import math
from typing import Any

from lavit_jax.weights.torch.configs.rules import (
  Checked,
  ConfigFile,
  Followed,
  Rule,
  constant,
  harmless,
)

# The classes that clip by default. None: the file names no class.
CLIPPING = (
  'DDIMScheduler',
  'DDPMScheduler',
  'DDIMParallelScheduler',
  'DDPMParallelScheduler',
  None,
)
# The classes whose networks remove the noise of models/noise_schedule.py.
CLASSES = (
  *CLIPPING,
  'DDIMInverseScheduler',
  'PNDMScheduler',
  'LMSDiscreteScheduler',
  'EulerDiscreteScheduler',
  'HeunDiscreteScheduler',
  'EulerAncestralDiscreteScheduler',
  'DPMSolverMultistepScheduler',
  'DPMSolverSinglestepScheduler',
  'DPMSolverSDEScheduler',
  'DPMSolverMultistepInverseScheduler',
  'KDPM2DiscreteScheduler',
  'KDPM2AncestralDiscreteScheduler',
  'DEISMultistepScheduler',
  'UniPCMultistepScheduler',
  'SASolverScheduler',
  'LCMScheduler',
  'TCDScheduler',
)


def complete(config: dict[str, Any]) -> dict[str, Any]:
  """Fills in a default that depends on the class, and checks the number of betas.

  Raises:
    ValueError: the class is for networks that are trained differently, or a number does not match.
  """
  config = dict(config)
  class_name = config.get('_class_name')
  if class_name not in CLASSES:
    raise ValueError(
      f'_class_name={class_name!r} is a scheduler of networks that are trained differently, which '
      'is not computed here; choose a checkpoint whose scheduler DDIMScheduler can replace'
    )
  config.setdefault('clip_sample', class_name in CLIPPING)
  betas = config.get('trained_betas')
  steps = config.get('num_train_timesteps', 1000)
  if isinstance(betas, list) and len(betas) != steps:
    raise ValueError(
      f'trained_betas has {len(betas)} entries, and num_train_timesteps={steps}; '
      'the two must be equal'
    )
  return config


def convert_lambda_min(value: Any) -> Any:
  """None for minus infinity, diffusers' default, which clips nothing."""
  return None if value in (-math.inf, '-Infinity', '-inf') else value


RULES: dict[str, Rule] = {
  'prediction_type': Followed('prediction_type', 'epsilon'),
  'beta_schedule': Followed('beta_schedule', 'linear'),
  'beta_start': Followed('beta_start', 0.0001),
  'beta_end': Followed('beta_end', 0.02),
  'num_train_timesteps': Followed('num_train_timesteps', 1000),
  'trained_betas': Followed('trained_betas', None),
  'rescale_betas_zero_snr': Followed('rescale_betas_zero_snr', False),
  'timestep_spacing': Followed('timestep_spacing', None),
  'steps_offset': Followed('steps_offset', 0),
  'set_alpha_to_one': Followed('set_alpha_to_one', True),
  'clip_sample': Followed('clip_sample', True),
  'clip_sample_range': Followed('clip_sample_range', 1.0),
  'thresholding': Followed('thresholding', False),
  'dynamic_thresholding_ratio': Followed('dynamic_thresholding_ratio', 0.995),
  'sample_max_value': Followed('sample_max_value', 1.0),
  # The samplers that would use these refuse them.
  'use_karras_sigmas': Followed('use_karras_sigmas', False),
  'use_exponential_sigmas': Followed('use_exponential_sigmas', False),
  'use_beta_sigmas': Followed('use_beta_sigmas', False),
  'use_lu_lambdas': Followed('use_lu_lambdas', False),
  'interpolation_type': Followed('interpolation_type', 'linear'),
  'final_sigmas_type': Followed('final_sigmas_type', 'zero'),
  'lambda_min_clipped': Followed('lambda_min_clipped', None, convert_lambda_min),
  'timestep_type': Checked(
    constant('discrete'), 'discrete', 'choose a checkpoint whose U-Net takes whole timesteps'
  ),
  'use_flow_sigmas': Checked(
    constant(False, None), False, 'choose a checkpoint that was not trained by flow matching'
  ),
  'variance_type': Checked(
    constant(None, 'fixed_small', 'fixed_small_log', 'fixed_large', 'fixed_large_log'),
    None,
    'choose a checkpoint whose U-Net predicts no variance',
  ),
  'use_dynamic_shifting': Checked(
    constant(False, None), False, 'choose a checkpoint without dynamic shifting'
  ),
  **harmless(
    "the name of the sampler determines it: 'dpm++2m' is dpmsolver++ of order 2, midpoint",
    'algorithm_type',
    'solver_order',
    'solver_type',
    'predict_x0',
    'disable_corrector',
    'solver_p',
    'predictor_order',
    'corrector_order',
    'tau_func',
  ),
  **harmless(
    'the last step of order 2 to the clean image is always of order 1',
    'lower_order_final',
    'euler_at_final',
  ),
  **harmless('of spacings by sigma, which are refused', 'sigma_min', 'sigma_max'),
  **harmless(
    'of flow matching and dynamic shifting, which are refused',
    'flow_shift',
    'time_shift_type',
    'shift_terminal',
  ),
  **harmless("the sampler `pndm` always skips PNDM's Runge-Kutta steps", 'skip_prk_steps'),
  **harmless("of LCM's and TCD's own steps", 'original_inference_steps', 'timestep_scaling'),
  **harmless('of stochastic samplers', 'noise_sampler_seed'),
}


def _config_file(prefix: str) -> ConfigFile:
  return ConfigFile(
    prefix + 'unet',
    '../scheduler/scheduler_config.json',
    "diffusers' DDIMScheduler",
    RULES,
    settings_group=prefix + 'scheduler',
    complete=complete,
  )


CONFIG_FILES = (_config_file(''), _config_file('highres_'))
