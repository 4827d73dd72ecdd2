"""Floating-point operations: of a traced function, and of the model in one training step.

XLA's own cost analysis counts the body of a loop once, and so would miss scanned layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from lavit_jax import sharding
from lavit_jax.data import loader
from lavit_jax.models import lavit, lora
from lavit_jax.models.initialization import init_params
from lavit_jax.models.interfaces.base import RowImages
from lavit_jax.models.lavit import LavitModules
from lavit_jax.training import optimizer, stages
from lavit_jax.training.run import Run
from lavit_jax.training.stages import LanguageModelOptions
from lavit_jax.training.stages.base import apply_module, frozen_params, image_features
from lavit_jax.training.train_step import abstract_inputs

ONE_CPU = AbstractMesh(
  (1, 1, 1),
  sharding.AXES,
  axis_types=(AxisType.Auto,) * 3,
  abstract_device=AbstractDevice('cpu', 1, 'cpu'),
)


class StepFlops(NamedTuple):
  """What the model needs for one step."""

  fixed: float  # whatever the packed rows hold
  slots: float = 0.0  # of the packed rows, if every slot holds a token

  def at(self, packed_share: float) -> float:
    """If `packed_share` of the slots hold a token."""
    return self.fixed + packed_share * self.slots


class PairFlops(NamedTuple):
  """What one pair and one packed row need in the language model's step."""

  features: float  # of an image: the encoder and, if there is one, the selector; 0 of codes alone
  codes: float  # of an image to draw, from its features; 0 without codes, unless it is regressed
  understanding: float  # continuous tokens of an image, and their gradient
  row: float  # products of the language model and their gradients, without attention to slots
  attention: float  # of a slot to one other slot, and its gradient


def step_flops(run: Run) -> StepFlops:
  """Each product of the model once forward and, where it is trained, its gradients.

  So 6 operations for each parameter and token that are trained, 2 where they are frozen. What the
  program computes besides does not count: rematerialization; in the language model's stage empty
  slots, attention to later tokens and to other pairs, and what a kind of pair has no use for: the
  image of plain text, the codes of an image that is read, the features of one that is drawn. The
  kinds have the frequencies of `data`, and pairs the length `lm.mean_length`; a conversation counts
  as one image that is read. Where extra layers
  read images, each token sees one, those of plain text too.
  """
  with jax.sharding.use_abstract_mesh(ONE_CPU):
    if not isinstance(run.options, LanguageModelOptions):
      return StepFlops(trace_step(run))
    pair = pair_flops(run)
  options = run.options
  read, drawn, text = loader.task_shares(run.data.shares or loader.DEFAULT_SHARES, run.data.sources)
  images = (1 - text) * pair.features + drawn * pair.codes + read * pair.understanding
  row = pair.row + options.row_length * pair.attention * (options.mean_length + 1) / 2
  return StepFlops(float(run.batch_size * images), options.num_rows * row)


def expected_share(run: Run) -> float:
  """The share of the slots of packed rows that hold a token, if pairs have `lm.mean_length`.

  1 where nothing is packed.
  """
  if not isinstance(run.options, LanguageModelOptions):
    return 1.0
  return min(1.0, run.batch_size * run.options.mean_length / run.tokens_per_step)


def trace_step(run: Run) -> float:
  """The operations of a stage's loss and gradient as they are computed, used or not."""
  layout = dataclasses.replace(run.layout, shards=1, accumulate=1)
  model = _without_remat(run)
  stage = stages.build_stage(run.stage_name, run.options, model, layout)
  loaded, batch = abstract_inputs(run)
  params, state = jax.eval_shape(stage.init, jax.random.key(0), loaded)
  frozen = frozen_params(stage, loaded)

  def step(params, frozen, state, batch):
    def loss(params):
      params = optimizer.stop_frozen_gradients(run.optimizer, params)
      return stage.loss(params, frozen, state, batch, jax.random.key(0), True)

    return jax.grad(loss, has_aux=True)(params)

  return count(jax.make_jaxpr(step)(params, frozen, state, batch))


def pair_flops(run: Run) -> PairFlops:
  """The language model's step, in parts that are traced one by one."""
  model = _without_remat(run)
  options = run.options
  if not isinstance(options, LanguageModelOptions):
    raise ValueError(f'stage {run.stage_name} has no pairs')
  llama = model.llama
  names = ('vit', 'tokenizer', 'understanding', 'llama')
  if model.interface is not None:
    names = ('vit', 'interface', 'llama')
  params = jax.eval_shape(lambda: init_params(model, jax.random.key(0), names))
  adapters = _adapters(run, params)
  image = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.uint8)
  slots = jax.ShapeDtypeStruct((1, options.row_length), jnp.int32)

  def trace(name: str, function: Callable, *inputs) -> float:
    return count(jax.make_jaxpr(function)(params[name], *inputs))

  def trace_gradient(
    name: str, function: Callable, *inputs, argnums: Sequence[int] = (0,)
  ) -> float:
    """Of a function of parameters and inputs with the gradient of its outputs' sum.

    Beside weights with adapters, the parameters are the adapters.
    """
    base, trained = (params[name], adapters[name]) if name in adapters else (None, params[name])

    def loss(p, base, *inputs):
      p = optimizer.stop_frozen_gradients(run.optimizer, {name: p})[name]
      if base is not None:
        p = lora.attach(base, p, 1.0)
      outputs = jax.tree.leaves(function(p, *inputs))
      return sum(array.astype(jnp.float32).sum() for array in outputs)

    argnums = tuple(number and number + 1 for number in argnums)  # after the weights
    return count(jax.make_jaxpr(jax.grad(loss, argnums))(trained, base, *inputs))

  def features(p, image):
    if model.interface is not None:
      return model.tower.features(p, image)
    return image_features(model, p, image)[:, 1:]

  x = jax.eval_shape(features, params['vit'], image)
  keep = jax.ShapeDtypeStruct(x.shape[:2], jnp.float32)

  def select(p, x):
    return apply_module(model.tokenizer, p, x, method='select')

  def code(p, x, keep):
    merged = apply_module(model.tokenizer, p, x, keep, method='merge')
    return apply_module(model.tokenizer, p, merged, method='quantize')

  def read(p, x, keep):
    return apply_module(model.understanding, p, x, keep)

  def extra_layers(p, vectors):
    images = RowImages(vectors[:, None], jnp.zeros(slots.shape, jnp.int32))
    assert model.layered_interface is not None
    return model.layered_interface.extra_layers(p, images)

  def read_by_interface(p, x):
    vectors = apply_module(model.interface, p, x).vectors
    if model.layered_interface is None:
      return vectors
    _, memory = extra_layers(p, vectors).layers
    return vectors, memory

  def row(p, embedded, ids):
    hidden, _ = apply_module(llama, p, embedded, ids, ids)
    return apply_module(llama, p, hidden, method='logits')

  stream = jax.ShapeDtypeStruct((*slots.shape, llama.hidden_size), jnp.float32)

  def extra_products() -> float:
    """Of the extra layers in a row, without those of its image's keys and values."""
    if model.layered_interface is None:
      return 0.0
    vectors = jax.ShapeDtypeStruct((1, model.num_image_vectors, x.shape[-1]), jnp.float32)

    def memory(p, vectors):
      return extra_layers(p, vectors).layers[1]

    def run_layers(p, vectors, stream):
      extra = extra_layers(p, vectors)
      return jax.lax.scan(lambda x, layer: (extra.run(x, layer), None), stream, extra.layers)

    both = trace_gradient('interface', run_layers, vectors, stream, argnums=(0, 1, 2))
    return both - trace_gradient('interface', memory, vectors, argnums=(0, 1))

  def regress(p, hidden):
    return apply_module(model.interface, p, hidden, method='regress')

  # Two products for each pair of slots, of queries and keys, and of scores and values. Whatever is
  # frozen, their gradients lead to the images.
  attention = 3 * 2 * 2 * llama.num_heads * llama.head_dim * llama.num_layers
  encode = trace_gradient if adapters.get('vit') else trace
  encoded = encode('vit', features, image)
  to_features = (0, 1) if adapters.get('vit') else (0,)
  if model.interface is not None:
    seen = trace_gradient('interface', read_by_interface, x)
    drawn = 0.0
    if model.regressing_interface is not None:
      pairs = jax.ShapeDtypeStruct((model.num_image_vectors + 1, llama.hidden_size), jnp.float32)
      seen += trace_gradient('interface', regress, pairs, argnums=(0, 1))
      drawn = seen
    of_images = (encoded, drawn, seen)
  elif options.from_codes:
    of_images = (0.0, 0.0, 0.0)
  else:
    of_images = (
      encoded + trace('tokenizer', select, x),
      trace('tokenizer', code, x, keep),
      trace_gradient('understanding', read, x, keep, argnums=to_features),
    )
  products = trace_gradient('llama', row, stream, slots, argnums=(0, 1))
  return PairFlops(
    *of_images,
    row=products - options.row_length**2 * attention + extra_products(),
    attention=attention,
  )


def _adapters(run: Run, params: dict[str, Any]) -> dict[str, Any]:
  """The shapes of the adapters of each module beside whose weights they stand; {} for none."""
  if run.stage.base is None:
    return {}
  trained, _ = jax.eval_shape(run.stage.init, jax.random.key(0), params)
  return {name: trained.get(name, {}) for name in params if name in run.stage.modules.needs}


def _without_remat(run: Run) -> LavitModules:
  """The run's model, of which backward computes nothing again."""
  if run.model.llama.remat == 'none':
    return run.model
  return lavit.build(
    run.variant,
    str(run.model.llama.dtype),
    settings=run.model.settings,
    merger_capacities=run.model.tokenizer.capacities,
  )


def count(jaxpr: Any) -> float:
  """Multiplications and additions in the products and convolutions of a (closed) jaxpr.

  Recomputation by rematerialization is included. A `while` counts as one round. Of the branches of
  a `cond` the cheapest counts, since the expensive one is the exception (k-means; the merger's rows
  of dropped patches, if it has buckets).
  """
  return float(sum(_count_equation(equation) for equation in getattr(jaxpr, 'jaxpr', jaxpr).eqns))


def _count_equation(equation: Any) -> float:
  params = equation.params
  primitive = equation.primitive.name
  if primitive == 'dot_general':
    (contracted, _), _ = params['dimension_numbers']
    inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    return 2 * inner * math.prod(equation.outvars[0].aval.shape)
  if primitive == 'conv_general_dilated':
    kernel = equation.invars[1].aval.shape
    out_features, *_ = params['dimension_numbers'].rhs_spec
    outputs = math.prod(equation.outvars[0].aval.shape)
    return 2 * math.prod(kernel) // kernel[out_features] * outputs
  if primitive == 'cond':
    return min(count(branch) for branch in params['branches'])
  rounds = params['length'] if primitive == 'scan' else 1
  return rounds * sum(count(inner) for inner in jaxprs_in_params(params))
