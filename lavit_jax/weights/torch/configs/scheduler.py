"""The `scheduler_config.json` beside a U-Net: its training noise, and the options of its samplers.

The published code opens it as a DDIMScheduler, whatever class it names, and diffusers' `from_config`
makes any of its samplers of any such file. So does this: what the file names is followed, and what it
does not name is the default of the class that draws. One exception: a file of a class that cannot clip
does not mean DDIM's default, which clips.
"""

from __future__ import annotations

import math
from typing import Any

from lavit_jax.weights.torch.configs.rules import Checked, Family, Followed, constant, harmless

CLIPPING = (
  'DDIMScheduler',
  'DDPMScheduler',
  'DDIMParallelScheduler',
  'DDPMParallelScheduler',
  None,
)  # by default
CLASSES = (  # whose networks remove the noise of models/noise_schedule.py
  *CLIPPING[:-1],
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
  None,
)


def complete(config: dict) -> dict:
  """The defaults that depend on the class or on each other.

  Raises:
    ValueError: a class whose networks are trained another way, or a wrong number of betas.
  """
  config = dict(config)
  kind = config.get('_class_name')
  if kind not in CLASSES:
    raise ValueError(
      f'_class_name={kind!r} is a scheduler of networks that are trained another way, which is not computed '
      'here; take a checkpoint whose scheduler DDIMScheduler can stand in for'
    )
  config.setdefault('clip_sample', kind in CLIPPING)
  betas, steps = config.get('trained_betas'), config.get('num_train_timesteps', 1000)
  if isinstance(betas, list) and len(betas) != steps:
    raise ValueError(
      f'trained_betas has {len(betas)} entries, and num_train_timesteps={steps}; '
      'they must be as many'
    )
  return config


def lambda_min(value: Any) -> Any:
  """Diffusers' -inf, which JSON may spell as a word, clips nothing."""
  return None if value in (-math.inf, '-Infinity', '-inf') else value


RULES = {
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
  # Known, and refused by the samplers that would go by them:
  'use_karras_sigmas': Followed('use_karras_sigmas', False),
  'use_exponential_sigmas': Followed('use_exponential_sigmas', False),
  'use_beta_sigmas': Followed('use_beta_sigmas', False),
  'use_lu_lambdas': Followed('use_lu_lambdas', False),
  'interpolation_type': Followed('interpolation_type', 'linear'),
  'final_sigmas_type': Followed('final_sigmas_type', 'zero'),
  'lambda_min_clipped': Followed('lambda_min_clipped', None, lambda_min),
  'timestep_type': Checked(
    constant('discrete'), 'discrete', 'take a checkpoint whose U-Net is asked at whole timesteps'
  ),
  'use_flow_sigmas': Checked(
    constant(False, None), False, 'take a checkpoint that was not trained by flow matching'
  ),
  'variance_type': Checked(
    constant(None, 'fixed_small', 'fixed_small_log', 'fixed_large', 'fixed_large_log'),
    None,
    'take a checkpoint whose U-Net gives no variance',
  ),
  'use_dynamic_shifting': Checked(
    constant(False, None), False, 'take a checkpoint without dynamic shifting'
  ),
  **harmless(
    "the name of the sampler says it: 'dpm++2m' is dpmsolver++ of order 2, midpoint",
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
  **harmless("of PNDM's own first steps", 'skip_prk_steps'),
  **harmless("of LCM's and TCD's own steps", 'original_inference_steps', 'timestep_scaling'),
  **harmless('of stochastic samplers', 'noise_sampler_seed'),
}


def _family(prefix: str) -> Family:
  return Family(
    prefix + 'unet',
    '../scheduler/scheduler_config.json',
    "diffusers' DDIMScheduler",
    RULES,
    prefix + 'scheduler',
    complete,
  )


FAMILIES = (_family(''), _family('highres_'))
