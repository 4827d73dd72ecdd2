"""`lavit compile --decode`: generation of text, compiled for absent TPUs (topology.py).

The report has two halves: the prefill, which runs once and reads the prompts, and the decode step,
which the loop runs for each token.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from rich.console import Console
from rich.table import Table

from lavit_jax import sharding
from lavit_jax.accelerators import Chip
from lavit_jax.compile import hlo_cost, topology
from lavit_jax.compile.topology import GIB
from lavit_jax.errors import UserError
from lavit_jax.inference import decode
from lavit_jax.models import lavit
from lavit_jax.models.initialization import init_params
from lavit_jax.models.int8 import quantize_weights
from lavit_jax.models.llama import Llama, unroll_layers
from lavit_jax.models.vocabulary import EOS_ID

DTYPE = 'bfloat16'  # of computation


class Report(NamedTuple):
  """What one half of the program needs of one chip; seconds and GiB.

  Of chips that are two devices each (`devices_per_chip`), "chip" means a device throughout, which
  has half of the memory.

  Attributes:
    program: 'prefill', for all prompts, or 'decode', for one token of each row.
    topology: CHIP:SHAPE.
    chips: all of them.
    devices_per_chip: 1 or 2.
    mesh: axis -> size.
    batch: rows.
    prompt_tokens: of a row.
    new_tokens: of a row.
    weights: dtype of the matrices.
    cache: dtype of the cache of keys and values.
    hbm_parameters_gib: of the parameters.
    hbm_cache_gib: of the cache.
    hbm_per_chip_gib: of the whole program.
    hbm_limit_gib: of the chip.
    fits: whether that suffices, with `topology.SPARE` left.
    flops_per_chip: operations.
    hbm_bytes_per_chip: traffic of the memory.
    collective_bytes_per_chip: bytes that are sent to other chips.
    compute_seconds: lower bound by operations.
    memory_seconds: lower bound by memory traffic.
    network_seconds: lower bound by network traffic.
    tokens_per_second: of all chips, at most: by the largest of the three bounds.
    compile_seconds: of the whole program.
  """

  program: str
  topology: str
  chips: int
  devices_per_chip: int
  mesh: dict[str, int]
  batch: int
  prompt_tokens: int
  new_tokens: int
  weights: str
  cache: str
  hbm_parameters_gib: float
  hbm_cache_gib: float
  hbm_per_chip_gib: float
  hbm_limit_gib: float
  fits: bool
  flops_per_chip: float
  hbm_bytes_per_chip: float
  collective_bytes_per_chip: float
  compute_seconds: float
  memory_seconds: float
  network_seconds: float
  tokens_per_second: float
  compile_seconds: float


_TABLE_ROWS: dict[str, Callable[[Report], str]] = {
  'parameters, GiB': lambda report: f'{report.hbm_parameters_gib:.2f}',
  'cache, GiB': lambda report: f'{report.hbm_cache_gib:.2f}',
  'memory, GiB': topology.memory_limit_note,
  'TFLOP': lambda report: f'{report.flops_per_chip / 1e12:,.3f}',
  'GB to and from HBM': lambda report: f'{report.hbm_bytes_per_chip / 1e9:,.2f}',
  'GB to other chips': lambda report: f'{report.collective_bytes_per_chip / 1e9:,.3f}',
  'ms of compute': lambda report: f'{1e3 * report.compute_seconds:.2f}',
  'ms of memory': lambda report: f'{1e3 * report.memory_seconds:.2f}',
  'ms of network': lambda report: f'{1e3 * report.network_seconds:.2f}',
  'tokens a second at most, all chips': lambda report: f'{report.tokens_per_second:,.0f}',
  'compiled in, s': lambda report: f'{report.compile_seconds:.0f}',
}


def run(
  variant: str,
  topology_name: str,
  batch: int,
  prompt_tokens: int,
  new_tokens: int,
  weights: str | None,
  cache: str | None,
  as_json: bool,
) -> None:
  """Compiles the program and prints its halves.

  Args:
    variant: as in `compile_decoding`.
    topology_name: as in `compile_decoding`.
    batch: as in `compile_decoding`.
    prompt_tokens: as in `compile_decoding`.
    new_tokens: as in `compile_decoding`.
    weights: as in `compile_decoding`.
    cache: as in `compile_decoding`.
    as_json: one JSON object on a line for each half; otherwise a table.

  Raises:
    UserError: as `compile_decoding`.
  """
  reports = compile_decoding(
    variant, topology_name, batch, prompt_tokens, new_tokens, weights, cache
  )
  if as_json:
    for report in reports:
      print(json.dumps(report._asdict()))
    return
  first = reports[0]
  unit = 'a chip' if first.devices_per_chip == 1 else 'a device'
  chips = topology.format_count(first.chips, first.devices_per_chip)
  title = (
    f'{variant} on {topology_name}: {chips}, mesh {first.mesh}; '
    f'{batch} rows of {prompt_tokens} tokens and {new_tokens} new ones, '
    f'weights {first.weights}, cache {first.cache}'
  )
  table = Table(unit, *(report.program for report in reports), title=title)
  for name, format_value in _TABLE_ROWS.items():
    table.add_row(name, *map(format_value, reports))
  Console().print(table)


def compile_decoding(
  variant: str,
  topology_name: str,
  batch: int,
  prompt_tokens: int,
  new_tokens: int,
  weights: str | None,
  cache: str | None,
) -> list[Report]:
  """Compiles greedy generation, with the language model split over all chips.

  Heads and hidden units are split (tensor parallelism).

  Args:
    variant: the name of the model variant.
    topology_name: CHIP:SHAPE, such as 'v5e:2x4'.
    batch: rows.
    prompt_tokens: slots of a prompt.
    new_tokens: generated tokens of a row, at least 2.
    weights: 'int8', or None for bfloat16.
    cache: 'int8', or None for bfloat16.

  Returns:
    The reports of the prefill and of the decode step.

  Raises:
    UserError: as `topology.pod_devices` and `topology.compile_on`; or too few new tokens.
  """
  if new_tokens < 2:
    raise UserError(
      f'--new-tokens {new_tokens}: the first comes from the prompt; ask for 2 or more'
    )
  chip, devices = topology.pod_devices(topology_name)
  mesh = sharding.make_mesh(dict(data=1, fsdp=1, tensor=-1), devices)
  llama, params = _abstract_llama(variant, weights, mesh)

  @jax.jit
  def generate(params, embeddings, mask, suppress):
    return decode.generate(
      llama,
      params,
      embeddings,
      mask,
      max_new_tokens=new_tokens,
      eos_id=EOS_ID,
      suppress=suppress,
      cache_dtype=cache,
    )

  program = topology.compile_on(
    topology_name,
    mesh,
    generate,
    params,
    _struct(mesh, (batch, prompt_tokens, llama.hidden_size), DTYPE),
    _struct(mesh, (batch, prompt_tokens), bool),
    _struct(mesh, (llama.vocab_size,), bool),
  )
  prefill, decode_step = _split(program)
  cache_structs = _abstract_cache(llama, mesh, batch, prompt_tokens + new_tokens, cache)

  def report(name: str, tokens: int, cost: hlo_cost.Cost) -> Report:
    return _report(
      name,
      cost,
      tokens,
      chip,
      program,
      topology=topology_name,
      chips=mesh.size,
      devices_per_chip=topology.devices_per_chip(topology_name),
      mesh=dict(mesh.shape),
      batch=batch,
      prompt_tokens=prompt_tokens,
      new_tokens=new_tokens,
      weights=weights or DTYPE,
      cache=cache or DTYPE,
      hbm_parameters_gib=topology.bytes_per_chip(params) / GIB,
      hbm_cache_gib=topology.bytes_per_chip(cache_structs) / GIB,
    )

  return [
    report('prefill', batch * prompt_tokens, prefill),
    report('decode', batch, decode_step),
  ]


def _report(
  name: str,
  cost: hlo_cost.Cost,
  tokens: int,
  chip: Chip,
  program: topology.Program,
  **fields: Any,
) -> Report:
  """The report of one half.

  Args:
    name: of the half.
    cost: of the half.
    tokens: that one run of the half reads or generates.
    chip: one device.
    program: both halves.
    **fields: the fields of the report that both halves share.
  """
  bounds = topology.roofline(cost, chip)
  return Report(
    program=name,
    hbm_per_chip_gib=program.hbm_bytes / GIB,
    hbm_limit_gib=chip.hbm_gib,
    fits=program.fits(chip),
    flops_per_chip=cost.flops,
    hbm_bytes_per_chip=cost.bytes,
    collective_bytes_per_chip=topology.bytes_sent(cost),
    compute_seconds=bounds.compute,
    memory_seconds=bounds.memory,
    network_seconds=bounds.network,
    tokens_per_second=tokens / max(bounds),
    compile_seconds=program.compile_seconds,
    **fields,
  )


def _split(program: topology.Program) -> tuple[hlo_cost.Cost, hlo_cost.Cost]:
  """The costs of the prefill and of one step of the loop over tokens."""
  loop = max(program.loops, key=lambda loop: loop.trip_count * loop.body.bytes)
  prefill = program.cost.plus(loop.body.times(-loop.trip_count))
  return prefill, loop.body


def _struct(
  mesh: Mesh, shape: tuple[int, ...], dtype: DTypeLike, spec: P | None = None
) -> jax.ShapeDtypeStruct:
  """An array on the mesh; replicated without a spec."""
  return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec or P()))


def _abstract_llama(variant: str, weights: str | None, mesh: Mesh) -> tuple[Llama, Any]:
  """The language model with separate layers, and its parameters as ShapeDtypeStructs."""
  model = lavit.build(variant, DTYPE)

  def init() -> Any:
    params = init_params(model, jax.random.key(0), ('llama',))['llama']
    params = jax.tree.map(lambda x: x.astype(DTYPE), params)
    _, params = unroll_layers(model.llama, params)
    return quantize_weights(params) if weights == 'int8' else params

  structs = jax.eval_shape(init)
  shardings = sharding.shardings({'llama': structs}, mesh)['llama']
  params = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), structs, shardings
  )
  llama, _ = unroll_layers(model.llama, params)
  return llama, params


def _abstract_cache(llama: Llama, mesh: Mesh, batch: int, length: int, dtype: str | None) -> Any:
  """The cache of keys and values, split as the compiler splits it: by heads, if they divide."""
  heads = sharding.TENSOR_AXIS if llama.num_kv_heads % mesh.size == 0 else None
  cache = jax.eval_shape(functools.partial(llama.init_cache, batch, length, dtype))
  return jax.tree.map(
    lambda x: _struct(mesh, x.shape, x.dtype, P(None, heads) if x.ndim else P()), cache
  )
