#!/usr/bin/env bash
# diffusers 0.42.1, with torch 2.13.0, Python 3.11.
#
# Expected: set_timesteps(n) makes n timesteps.
# Behaviour: with timestep_spacing='trailing' some n have n + 1, for they are counted by
#   np.arange(1000, 0, -1000 / n), whose last number is a rounding error above 0. The last of them is -1,
#   behind the first timestep that was trained.
# Output seen:
#   61 steps: 62 timesteps, the last three [32, 15, -1]
#   of 1 to 1000 steps 62 have one too many
#
# Exits with another status than 0 when this is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q diffusers==0.42.1 torch==2.13.0 numpy==2.4.6 transformers==5.23.0
"$work/venv/bin/python" - <<'EOF'
from diffusers import DDIMScheduler

scheduler = DDIMScheduler(num_train_timesteps=1000, timestep_spacing='trailing')
odd = []
for steps in range(1, 1001):
  scheduler.set_timesteps(steps)
  if len(scheduler.timesteps) != steps:
    odd.append(steps)
  if steps == 61:
    last = scheduler.timesteps[-3:].tolist()
    print(f'61 steps: {len(scheduler.timesteps)} timesteps, the last three {last}')
print(f'of 1 to 1000 steps {len(odd)} have one too many')
assert 61 in odd and last[-1] == -1
EOF
