"""The schedulers of diffusers by the names of samplers, and the settings of published models."""

import pytest

diffusers = pytest.importorskip('diffusers')
pytest.importorskip('torch')

SETTINGS = dict(  # as the scheduler configs of Stable Diffusion 1.5 and SDXL have them
  _class_name='DDIMScheduler',
  beta_start=0.00085,
  beta_end=0.012,
  beta_schedule='scaled_linear',
  steps_offset=1,
  clip_sample=False,
  set_alpha_to_one=False,
  skip_prk_steps=True,
)
PEERS = {
  'ddim': diffusers.DDIMScheduler,
  'euler': diffusers.EulerDiscreteScheduler,
  'dpm++2m': diffusers.DPMSolverMultistepScheduler,
  'pndm': diffusers.PNDMScheduler,
}
