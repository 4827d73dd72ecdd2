"""Trailing timesteps: one for each step, for every count (Lin et al. 2023, table 2)."""

from fractions import Fraction

import numpy as np
import pytest

from lavit_jax.models import sampler_plans

TRAINED = 1000


@pytest.mark.parametrize('sampler', sampler_plans.SAMPLERS)
def test_each_count_has_that_many_timesteps(sampler):
  """round(1000 - i * 1000 / steps) - 1 for i = 0 .. steps - 1; a tie may be rounded either way."""
  for steps in (*range(1, 130), 333, 500, 999, TRAINED):
    found = sampler_plans.timesteps(TRAINED, steps, 'trailing', sampler=sampler)
    assert found.shape == (steps,) and (np.diff(found) < 0).all()
    for i, timestep in enumerate(found):
      assert abs(timestep + 1 - (TRAINED - i * Fraction(TRAINED, steps))) <= Fraction(1, 2)


def test_where_diffusers_has_one_too_many():
  """`np.arange(1000, 0, -1000 / steps)`, as diffusers 0.42.1 has it, has 62 numbers for 61 steps.

  Ours have the first `steps` of its timesteps.
  """
  theirs = pytest.importorskip('diffusers').DDIMScheduler(timestep_spacing='trailing')
  for steps in (1, 10, 25, 50, 61, 64, 122, 133, 199):
    theirs.set_timesteps(steps)
    ours = sampler_plans.timesteps(TRAINED, steps, 'trailing')
    assert len(ours) == steps and len(theirs.timesteps) in (steps, steps + 1)
    assert np.abs(ours - theirs.timesteps.numpy()[:steps]).max() <= 1  # 1 at ties
