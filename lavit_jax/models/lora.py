"""Low-rank adapters (Hu et al. 2022, LoRA, section 4.1): y = x W + s (x A) B with W frozen.

The product x A B is computed beside x W, so that no step makes a matrix of the size of W. What is
trained of a module is a tree of its own, with the names of the module's parameters:

    {'layers': {'attention': {'query': {'lora': {'a', 'b'}}}}, 'embedding': ...}

A 'lora' stands beside the kernel that it adapts; other leaves are trained in full, in place of the
module's. `attach` puts such a tree into the parameters with which the module is applied, `merge`
adds it to the kernels.

Axes: I input and O output channels, r the rank, n products of one kernel (`attention.QKV`). Stacked
layers have a leading axis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

LORA = 'lora'  # the name of an adapter beside its kernel
Tree = Mapping[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
  """An adapter among the parameters of a layer.

  Attributes:
    a: [I, r].
    b: [r, O], or [n, r, O], times the scale.
    key: by which inputs are dropped; None drops none.
    rate: the share of the inputs that is dropped.
  """

  a: Array
  b: Array
  key: Array | None = None
  rate: float = dataclasses.field(default=0.0, metadata=dict(static=True))


def adapter_scale(rank: int, alpha: float, rslora: bool = False) -> float:
  """s: alpha / r, or alpha / sqrt(r) (Kalajdzievski 2023, rank-stabilized LoRA, equation 4)."""
  return alpha / (rank**0.5 if rslora else rank)


# --- Layers --------------------------------------------------------------------------------------


class Dense(nn.Dense):
  """`nn.Dense`, and the adapter among its parameters if there is one."""

  def __call__(self, inputs: Array) -> Array:
    """[..., I] -> dtype[..., O]."""
    (y,) = add_low_rank(self, inputs, [super().__call__(inputs)])
    return y


def add_low_rank(layer: nn.Module, x: Array, outputs: list[Array]) -> list[Array]:
  """Adds the adapter of a layer, if it has one, to what the layer computes of x.

  Args:
    layer: whose parameters may have a `LowRank`.
    x: [..., I].
    outputs: [..., O] each, the products with the layer's kernel, or with its n kernels.
  """
  if not layer.has_variable('params', LORA):
    return outputs
  adapter = layer.get_variable('params', LORA)
  dtype = outputs[0].dtype
  x = x.astype(dtype)
  if adapter.key is not None:
    kept = jax.random.bernoulli(adapter.key, 1 - adapter.rate, x.shape)
    x = jnp.where(kept, x / (1 - adapter.rate), 0).astype(dtype)
  reduced = x @ adapter.a.astype(dtype)
  factors = adapter.b.astype(dtype)
  factors = [factors] if factors.ndim == adapter.a.ndim else list(factors)
  return [y + reduced @ b for y, b in zip(outputs, factors, strict=True)]


# --- Trees ---------------------------------------------------------------------------------------


def is_adapter(name: str, tree: Any) -> bool:
  """Whether an entry of a trained tree is an adapter {'a', 'b'}."""
  return name == LORA and isinstance(tree, Mapping)


def attach(
  params: Tree, trained: Tree, scale: float, key: Array | None = None, rate: float = 0.0
) -> dict[str, Any]:
  """The parameters of a module with what is trained of it.

  Args:
    params: of the module.
    trained: see above; leaves that are trained in full replace those of `params`.
    scale: s.
    key: by which the inputs of the adapters are dropped; None drops none.
    rate: the share that is dropped.
  """

  def low_rank(path: str, adapter: Tree) -> LowRank:
    a, b = adapter['a'], adapter['b']
    if key is None or not rate:
      return LowRank(a, scale * b)
    own_key = jax.random.fold_in(key, paths.index(path))
    return LowRank(a, scale * b, jax.random.split(own_key, a.shape[:-2]), rate)

  paths = sorted(path for path, _ in adapters(trained))
  return _attach(params, trained, low_rank)


def _attach(
  params: Tree, trained: Tree, low_rank: Callable[[str, Tree], Any], prefix: str = ''
) -> dict[str, Any]:
  attached = dict(params)
  for name, value in trained.items():
    path = f'{prefix}{name}'
    if is_adapter(name, value):
      attached[name] = low_rank(path, value)
    elif isinstance(value, Mapping):
      attached[name] = _attach(params.get(name, {}), value, low_rank, f'{path}/')
    else:
      attached[name] = value
  return attached


def adapters(trained: Tree, prefix: str = '') -> Iterator[tuple[str, Tree]]:
  """('layers/attention/query/lora', {'a', 'b'}), ... of a trained tree."""
  for name, value in trained.items():
    if is_adapter(name, value):
      yield f'{prefix}{name}', value
    elif isinstance(value, Mapping):
      yield from adapters(value, f'{prefix}{name}/')


def kernel_change(a: Any, b: Any, scale: float) -> Any:
  """S A B [..., I, O], or [..., n, I, O], of NumPy's or JAX's arrays in their dtype."""
  if b.ndim > a.ndim:
    a = a[..., None, :, :]
  return scale * (a @ b)
