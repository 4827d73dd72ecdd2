"""What all stages do with loaded params."""

import jax.numpy as jnp
import nano
import numpy as np
import pytest

from lavit_jax.errors import UserError
from lavit_jax.models import lavit
from lavit_jax.training.run import resolve_abstract
from lavit_jax.training.stages.base import (
  initialize_params,
)

nano.install()
MODEL = lavit.build('nano')


def test_unknown_stage():
  config = nano.config('encoder')
  with config.unlocked():
    config.stage = 'decoder'
  with pytest.raises(UserError, match='unknown stage .decoder.'):
    resolve_abstract(config)


def test_loaded_params_must_fit_but_a_vocabulary_may_grow():
  fresh = {
    'llama': {
      'embedding': jnp.zeros((5, 2)),
      'head': jnp.zeros((2, 5)),
      'norm': {'scale': jnp.zeros(2)},
    }
  }
  loaded = {
    'llama': {
      'embedding': jnp.ones((3, 2)),
      'head': jnp.ones((2, 3)),
      'norm': {'scale': jnp.ones(2)},
    },
    'other': {},
  }
  grown = initialize_params(fresh, loaded)['llama']
  np.testing.assert_array_equal(grown['embedding'][:, 0], [1, 1, 1, 0, 0])
  np.testing.assert_array_equal(grown['head'][0], [1, 1, 1, 0, 0])
  with pytest.raises(UserError, match='norm/scale: the weights of init_from are'):
    initialize_params(fresh, {'llama': {**loaded['llama'], 'norm': {'scale': jnp.ones(1)}}})
  with pytest.raises(UserError, match="missing .'head'.*unexpected .'foot'"):
    initialize_params(
      fresh,
      {
        'llama': {
          'embedding': loaded['llama']['embedding'],
          'foot': jnp.ones(1),
          'norm': loaded['llama']['norm'],
        }
      },
    )
