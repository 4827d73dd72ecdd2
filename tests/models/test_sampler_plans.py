"""The timesteps and plans of samplers, as those of diffusers, and settings that are refused."""

import re

import numpy as np
import pytest
from scheduler_peers import PEERS, SETTINGS

from lavit_jax.models.noise_schedule import Scheduler
from lavit_jax.models.sampler_plans import make_plan, timesteps


@pytest.mark.parametrize('sampler', ['ddim', 'euler', 'dpm++2m'])
def test_zero_terminal_snr_begins_at_noise_alone(sampler):
  said = dict(
    rescale_betas_zero_snr=True, prediction_type='v_prediction', timestep_spacing='trailing'
  )
  peer = PEERS[sampler].from_config(SETTINGS | said)
  peer.set_timesteps(10)
  scheduler = Scheduler(**said)
  steps = make_plan(scheduler, 10, sampler=sampler)
  np.testing.assert_array_equal(steps.t, peer.timesteps)
  assert steps.signal[0] == (0 if sampler == 'ddim' else 2**-12)
  with pytest.raises(
    ValueError, match="rescale_betas_zero_snr leaves no signal.*take timestep_spacing='leading'"
  ):
    make_plan(scheduler._replace(prediction_type='epsilon'), 10)


@pytest.mark.parametrize('sampler,first', [('ddim', 981), ('euler', 999), ('dpm++2m', 999)])
def test_spacing_that_is_not_named_is_the_default_of_the_class(sampler, first):
  peer = PEERS[sampler].from_config(SETTINGS)
  peer.set_timesteps(50)
  np.testing.assert_allclose(timesteps(1000, 50, sampler=sampler), peer.timesteps, rtol=1e-7)
  assert peer.timesteps[0] == first


@pytest.mark.parametrize('sampler', ['euler', 'dpm++2m'])
def test_what_a_sampler_cannot_follow_is_named(sampler):
  with pytest.raises(
    ValueError,
    match=f"sampler='{re.escape(sampler)}' cannot draw with use_karras_sigmas=True "
    ".*draw with sampler='ddim'",
  ):
    make_plan(Scheduler(use_karras_sigmas=True), 10, sampler=sampler)
  make_plan(Scheduler(use_karras_sigmas=True), 10)


def test_pndm_visits_its_second_timestep_twice():
  for steps in (1, 2, 3, 50):
    peer = PEERS['pndm'].from_config(SETTINGS)
    peer.set_timesteps(steps)
    np.testing.assert_array_equal(make_plan(Scheduler(), steps, sampler='pndm').t, peer.timesteps)


@pytest.mark.parametrize('steps', [1, 60, 61, 103, 201, 999, 1000])
def test_trailing_timesteps_stay_in_range(steps):
  visited = timesteps(1000, steps, 'trailing')
  assert (
    len(visited) == steps
    and visited[0] == 999
    and visited[-1] >= 0
    and (np.diff(visited) < 0).all()
  )


@pytest.mark.parametrize(
  'change,message',
  [
    (dict(spacing='karras'), "spacing='karras'"),
    (dict(steps=0), 'steps=0'),
    (dict(steps=1001), 'steps=1001'),
    (dict(steps=1000), 'begins at 1000'),
    (dict(steps=999, sampler='dpm++2m', spacing='leading'), 'begins at 1000'),
    (dict(strength=0.05), 'strength=0.05 leaves none of 10 steps'),
    (dict(steps=1000, sampler='dpm++2m'), 'must be in 1..999'),
    (dict(sampler='heun'), "sampler='heun' is not one of 'ddim', 'euler'"),
  ],
)
def test_bad_settings_are_named(change, message):
  with pytest.raises(ValueError, match=message):
    timesteps(**(dict(num_train_steps=1000, steps=10) | change))
