"""`lavit compile --decode`: text generation of the language model, compiled for a TPU pod.

The report has two parts: the prefill, which reads the prompts once, and one step of the decoding
loop, which generates a token for each row of the batch.
"""

from __future__ import annotations

import functools
import json
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from rich.console import Console
from rich.table import Table

from lavit_jax import sharding
from lavit_jax.compile.hlo import Cost
from lavit_jax.compile.program import (
  GIB,
  Program,
  bytes_per_device,
  compile_for,
  format_memory,
  roofline_times,
  with_shardings,
)
from lavit_jax.compile.topology import (
  devices_per_chip,
  format_device,
  format_device_count,
  pod_devices,
)
from lavit_jax.errors import UserError
from lavit_jax.inference import decode
from lavit_jax.models import lavit
from lavit_jax.models.initialization import init_params
from lavit_jax.models.int8 import quantize_weights
from lavit_jax.models.llama import Llama, unroll_layers
from lavit_jax.models.vocabulary import EOS_ID

DTYPE = 'bfloat16'


class Workload(NamedTuple):
  """What to generate.

  Attributes:
    batch_size: the number of prompts.
    prompt_tokens: the length of each prompt.
    new_tokens: the number of tokens to generate for each, at least 2.
    weights_dtype: as in `Lavit.from_pretrained`; None for bfloat16.
    cache_dtype: likewise.
  """

  batch_size: int
  prompt_tokens: int
  new_tokens: int
  weights_dtype: str | None = None
  cache_dtype: str | None = None


class Report(NamedTuple):
  """The cost of one part of the program. The fields are the keys of the JSON output.

  "Chip" means a JAX device, which is half a chip where `devices_per_chip` is 2. Memory is in GiB,
  times are in seconds.

  Attributes:
    program: 'prefill', everything outside the decoding loop, or 'decode', one step of the loop.
    hbm_per_chip_gib: of the whole program.
    fits: whether the program leaves `program.SPARE_MEMORY` free.
    tokens_per_second: of all chips, if the longest of the times were the time of this part.
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


def run(variant: str, topology: str, workload: Workload, as_json: bool) -> None:
  """Compiles the program and prints a JSON object for each part on its own line, or a table."""
  reports = compile_decoding(variant, topology, workload)
  if as_json:
    for report in reports:
      print(json.dumps(report._asdict()))
  else:
    Console().print(_table(variant, reports))


def compile_decoding(variant: str, topology: str, workload: Workload) -> list[Report]:
  """Compiles greedy decoding in bfloat16, with heads and hidden units split over all devices.

  Args:
    variant: of the model.
    topology: CHIP:SHAPE, such as 'v5e:2x4'.
    workload: what to generate.

  Returns:
    The reports of the prefill and of one step of the decoding loop.

  Raises:
    UserError: as in `pod_devices` and `compile_for`, or fewer than 2 new tokens.
  """
  if workload.new_tokens < 2:
    raise UserError(
      f'--new-tokens {workload.new_tokens}: the prefill generates the first; ask for 2 or more'
    )
  chip, devices = pod_devices(topology)
  mesh = sharding.make_mesh({'data': 1, 'fsdp': 1, 'tensor': -1}, devices)
  llama, params = _abstract_llama(variant, workload.weights_dtype, mesh)
  program = _compile_generate(topology, mesh, llama, params, workload)
  parameter_bytes = bytes_per_device(params)
  cache_bytes = bytes_per_device(_abstract_cache(llama, workload, mesh))

  def report(name: str, num_tokens: int, cost: Cost) -> Report:
    times = roofline_times(cost, chip)
    return Report(
      program=name,
      topology=topology,
      chips=mesh.size,
      devices_per_chip=devices_per_chip(topology),
      mesh=dict(mesh.shape),
      batch=workload.batch_size,
      prompt_tokens=workload.prompt_tokens,
      new_tokens=workload.new_tokens,
      weights=workload.weights_dtype or DTYPE,
      cache=workload.cache_dtype or DTYPE,
      hbm_parameters_gib=parameter_bytes / GIB,
      hbm_cache_gib=cache_bytes / GIB,
      hbm_per_chip_gib=program.hbm_bytes / GIB,
      hbm_limit_gib=chip.hbm_gib,
      fits=program.fits(chip),
      flops_per_chip=cost.flops,
      hbm_bytes_per_chip=cost.hbm_bytes,
      collective_bytes_per_chip=cost.sent_bytes,
      compute_seconds=times.compute,
      memory_seconds=times.memory,
      network_seconds=times.network,
      tokens_per_second=num_tokens / max(times),
      compile_seconds=program.compile_seconds,
    )

  # The decoding loop is the one with most traffic.
  loop = max(program.loops, key=lambda loop: loop.trip_count * loop.cost.hbm_bytes)
  prefill_cost = program.cost - loop.cost * loop.trip_count
  prompt_tokens = workload.batch_size * workload.prompt_tokens
  return [
    report('prefill', prompt_tokens, prefill_cost),
    report('decode', workload.batch_size, loop.cost),
  ]


def _compile_generate(
  topology: str, mesh: Mesh, llama: Llama, params: dict[str, Any], workload: Workload
) -> Program:
  @jax.jit
  def generate(params, embeddings, mask, suppress):
    return decode.generate(
      llama,
      params,
      embeddings,
      mask,
      max_new_tokens=workload.new_tokens,
      eos_id=EOS_ID,
      suppress=suppress,
      cache_dtype=workload.cache_dtype,
    )

  slots = (workload.batch_size, workload.prompt_tokens)
  embeddings = _struct(mesh, (*slots, llama.hidden_size), DTYPE)
  mask = _struct(mesh, slots, bool)
  suppress = _struct(mesh, (llama.vocab_size,), bool)
  return compile_for(topology, mesh, generate, params, embeddings, mask, suppress)


def _abstract_llama(
  variant: str, weights_dtype: str | None, mesh: Mesh
) -> tuple[Llama, dict[str, Any]]:
  """The language model with unrolled layers, and its parameters as structs with shardings."""
  model = lavit.build(variant, DTYPE)

  def make_params() -> dict[str, Any]:
    params = init_params(model, jax.random.key(0), ('llama',))['llama']
    params = jax.tree.map(lambda x: x.astype(DTYPE), params)
    _, params = unroll_layers(model.llama, params)
    return quantize_weights(params) if weights_dtype == 'int8' else params

  params = jax.eval_shape(make_params)
  llama, params = unroll_layers(model.llama, params)
  shardings = sharding.shardings({'llama': params}, mesh)['llama']
  return llama, with_shardings(params, shardings)


def _abstract_cache(llama: Llama, workload: Workload, mesh: Mesh) -> Any:
  """The key-value cache as structs, split as the compiler does by the kernels of the keys."""
  num_slots = workload.prompt_tokens + workload.new_tokens
  init_cache = functools.partial(
    llama.init_cache, workload.batch_size, num_slots, workload.cache_dtype
  )
  head_axis = sharding.TENSOR_AXIS if llama.num_kv_heads % mesh.size == 0 else None

  def struct(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return _struct(mesh, x.shape, x.dtype, P(None, head_axis) if x.ndim else P())

  return jax.tree.map(struct, jax.eval_shape(init_cache))


def _struct(
  mesh: Mesh, shape: tuple[int, ...], dtype: DTypeLike, spec: P | None = None
) -> jax.ShapeDtypeStruct:
  """A ShapeDtypeStruct on the mesh, replicated by default."""
  return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec or P()))


def _table(variant: str, reports: list[Report]) -> Table:
  first = reports[0]
  devices = format_device_count(first.chips, first.devices_per_chip)
  table = Table(
    format_device(first.devices_per_chip),
    *(report.program for report in reports),
    title=(
      f'{variant} on {first.topology}: {devices}, mesh {first.mesh}; {first.batch} rows of '
      f'{first.prompt_tokens} tokens and {first.new_tokens} new ones, weights {first.weights}, '
      f'cache {first.cache}'
    ),
  )
  columns = [_column(report) for report in reports]
  for label in columns[0]:
    table.add_row(label, *(column[label] for column in columns))
  return table


def _column(report: Report) -> dict[str, str]:
  """{label: formatted value} of one part."""
  memory = format_memory(report.hbm_per_chip_gib, report.hbm_limit_gib, report.fits)
  return {
    'parameters, GiB': f'{report.hbm_parameters_gib:.2f}',
    'cache, GiB': f'{report.hbm_cache_gib:.2f}',
    'memory, GiB': memory,
    'TFLOP': f'{report.flops_per_chip / 1e12:,.3f}',
    'GB to and from HBM': f'{report.hbm_bytes_per_chip / 1e9:,.2f}',
    'GB to other chips': f'{report.collective_bytes_per_chip / 1e9:,.3f}',
    'ms of compute': f'{1e3 * report.compute_seconds:.2f}',
    'ms of memory': f'{1e3 * report.memory_seconds:.2f}',
    'ms of network': f'{1e3 * report.network_seconds:.2f}',
    'tokens a second at most, all chips': f'{report.tokens_per_second:,.0f}',
    'compiled in, s': f'{report.compile_seconds:.0f}',
  }
