#!/usr/bin/env bash
# diffusers 0.42.1, with torch 2.13.0, Python 3.11.
#
# Expected: image-to-image with PNDM, the scheduler of Stable Diffusion 1.5, removes the noise that it
#   has added, as DDIM does. A model that knows the noise leaves the share of the last timestep, 0.03.
# Behaviour: with strength below 1 more of the noise stays. PNDM evaluates its second timestep twice, and
#   its list repeats that timestep. `get_timesteps` cuts the list behind the repetition, but the
#   scheduler still takes its second call for the repeated one: it steps again from the first sample.
#   So the sample is one step behind the timesteps until the end.
# Output seen:
#   steps strength: noise left by PNDM, by DDIM
#   10 1.00: 0.029 0.029
#   10 0.75: 0.153 0.029
#   50 1.00: 0.029 0.029
#   50 0.75: 0.050 0.029
#
# Exits with another status than 0 when this is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q diffusers==0.42.1 torch==2.13.0 numpy==2.4.6 transformers==5.23.0
"$work/venv/bin/python" - 2>/dev/null <<'EOF'
import types

import torch
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionImg2ImgPipeline

noise = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
image = torch.zeros_like(noise)
config = dict(
  beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear', steps_offset=1,
  set_alpha_to_one=False,
)


def noise_left(scheduler, steps, strength):
  scheduler.set_timesteps(steps)
  pipeline = types.SimpleNamespace(scheduler=scheduler)
  timesteps, _ = StableDiffusionImg2ImgPipeline.get_timesteps(pipeline, steps, strength, 'cpu')
  sample = scheduler.add_noise(image, noise, timesteps[:1])
  for timestep in timesteps:
    sample = scheduler.step(noise, timestep, sample).prev_sample
  return (sample @ noise / (noise @ noise)).item()


left = {}
print('steps strength: noise left by PNDM, by DDIM')
for steps in (10, 50):
  for strength in (1.0, 0.75):
    pndm = noise_left(PNDMScheduler(skip_prk_steps=True, **config), steps, strength)
    ddim = noise_left(DDIMScheduler(clip_sample=False, **config), steps, strength)
    print(f'{steps} {strength:.2f}: {pndm:.3f} {ddim:.3f}')
    left[steps, strength] = pndm / ddim
assert left[10, 1.0] < 1.1 > left[50, 1.0]
assert left[10, 0.75] > 4 and left[50, 0.75] > 1.5
EOF
