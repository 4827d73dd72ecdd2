"""PyTorch modules with random weights, and the same weights here by the name tables."""

import jax
import numpy as np

from lavit_jax.weights.torch.mapping import from_state_dict, to_torch

torch = __import__('pytest').importorskip('torch')


def randomize(module, seed=0, scale=0.3):
  """Random weights for all of a PyTorch module, also where it begins with ones or zeros."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, parameter in module.named_parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      is_norm = parameter.ndim == 1 and name.endswith('weight')
      fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
      parameter.copy_(
        1 + scale * noise if is_norm else noise * scale if fan_in == 1 else noise / fan_in**0.5
      )
  return module.eval()


def numpy_state(module, drop=(), rename=lambda name: name):
  """A module's state dict as numpy arrays."""
  state = {}
  for name, tensor in module.state_dict().items():
    if not name.startswith(tuple(drop)):
      state[rename(name)] = tensor.numpy()
  return state


def port(rules, state, module, *inputs, **options):
  """The parameters of a Flax module from a state dict; and back, bit by bit."""
  like = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, **options))['params']
  params = from_state_dict(rules, state, like)
  back = to_torch(rules, params)
  assert all(np.array_equal(back[name], state[name]) for name in back)
  return params, set(state) - set(back)


def arrays(*shapes, seed=0):
  """Unit Gaussian float32 arrays."""
  rng = np.random.default_rng(seed)
  return [rng.standard_normal(shape, np.float32) for shape in shapes]


def close(got, want, atol=1e-4):
  """Compares with a PyTorch tensor."""
  want = want.detach().numpy() if hasattr(want, 'detach') else want
  assert np.abs(want).max() > 0.05, 'the reference is nearly zero and proves nothing'
  np.testing.assert_allclose(got, want, rtol=0, atol=atol)
