"""`lavit compile --decode`: the program that continues sequences, compiled for TPUs that are not there (topology.py).

It is told of in two halves: what runs once, which reads the prompts, and what its loop runs for each token.
"""

from __future__ import annotations

import functools
import json
from typing import NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from lavit_jax import sharding
from lavit_jax.compile import topology as pods
from lavit_jax.compile.topology import GIB
from lavit_jax.errors import UserError
from lavit_jax.inference import decode
from lavit_jax.models import lavit
from lavit_jax.models.initialization import init_params
from lavit_jax.models.int8 import quantize_weights
from lavit_jax.models.llama import unroll_layers
from lavit_jax.models.vocabulary import EOS_ID

DTYPE = 'bfloat16'


class Report(NamedTuple):
  """What one half needs, of one chip unless it says otherwise; times in seconds, memory in GiB.

  Of chips that are two devices each (`devices_per_chip`), 'chip' means a device throughout: a half,
  with half of the memory.
  """

  program: str  # 'prefill', all but the loop, of all prompts, or 'decode', a round of the loop, of one token a row
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
  hbm_per_chip_gib: float  # of the whole program
  hbm_limit_gib: float
  fits: bool  # with `pods.SPARE` to spare
  flops_per_chip: float
  hbm_bytes_per_chip: float
  collective_bytes_per_chip: float
  compute_seconds: float
  memory_seconds: float
  network_seconds: float
  tokens_per_second: float  # of all chips, were the longest of these times all
  compile_seconds: float


def run(
  variant: str,
  topology: str,
  batch: int,
  prompt: int,
  new: int,
  weights: str | None,
  cache: str | None,
  as_json: bool,
) -> None:
  """Compiles the program and prints its halves, each as one JSON object on a line, or together as a table."""
  reports = compile_decoding(variant, topology, batch, prompt, new, weights, cache)
  if as_json:
    for report in reports:
      print(json.dumps(report._asdict()))
    return
  first = reports[0]
  one = 'a chip' if first.devices_per_chip == 1 else 'a device'
  chips = pods.count(first.chips, first.devices_per_chip)
  table = Table(
    one,
    *(report.program for report in reports),
    title=(
      f'{variant} on {topology}: {chips}, mesh {first.mesh}; {batch} rows of {prompt} tokens and '
      f'{new} new ones, weights {first.weights}, cache {first.cache}'
    ),
  )
  lines = {
    'parameters, GiB': lambda r: f'{r.hbm_parameters_gib:.2f}',
    'cache, GiB': lambda r: f'{r.hbm_cache_gib:.2f}',
    'memory, GiB': pods.memory_limit_note,
    'TFLOP': lambda r: f'{r.flops_per_chip / 1e12:,.3f}',
    'GB to and from HBM': lambda r: f'{r.hbm_bytes_per_chip / 1e9:,.2f}',
    'GB to other chips': lambda r: f'{r.collective_bytes_per_chip / 1e9:,.3f}',
    'ms of compute': lambda r: f'{1e3 * r.compute_seconds:.2f}',
    'ms of memory': lambda r: f'{1e3 * r.memory_seconds:.2f}',
    'ms of network': lambda r: f'{1e3 * r.network_seconds:.2f}',
    'tokens a second at most, all chips': lambda r: f'{r.tokens_per_second:,.0f}',
    'compiled in, s': lambda r: f'{r.compile_seconds:.0f}',
  }
  for name, tell in lines.items():
    table.add_row(name, *map(tell, reports))
  Console().print(table)


def compile_decoding(
  variant: str,
  topology: str,
  batch: int,
  prompt: int,
  new: int,
  weights: str | None,
  cache: str | None,
) -> list[Report]:
  """Compiles `decode.generate` (greedy), the language model split over all chips by heads and hidden units.

  Args:
    batch: rows; prompt: their slots; new: tokens to write, two at least.
    weights, cache: as in `Lavit.from_pretrained`; the compute dtype is bfloat16.

  Raises:
    UserError: as `pods.pod` and `pods.compile_on`; too few new tokens.
  """
  if new < 2:
    raise UserError(f'--new-tokens {new}: the first comes of the prompt; ask for 2 or more')
  chip, devices = pods.pod_devices(topology)
  mesh = sharding.make_mesh(dict(data=1, fsdp=1, tensor=-1), devices)
  llama, params = _abstract_llama(variant, weights, mesh)

  def struct(shape, dtype, spec=P()):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

  @jax.jit
  def generate(params, embeddings, mask, suppress):
    return decode.generate(
      llama,
      params,
      embeddings,
      mask,
      max_new_tokens=new,
      eos_id=EOS_ID,
      suppress=suppress,
      cache_dtype=cache,
    )

  program = pods.compile_on(
    topology,
    mesh,
    generate,
    params,
    struct((batch, prompt, llama.hidden_size), DTYPE),
    struct((batch, prompt), bool),
    struct((llama.vocab_size,), bool),
  )
  rounds, token = max(program.loops, key=lambda loop: loop[0] * loop[1].bytes)
  halves = dict(
    prefill=(batch * prompt, program.cost + token.times(-rounds)), decode=(batch, token)
  )
  heads = (
    sharding.TENSOR_AXIS if llama.num_kv_heads % mesh.size == 0 else None
  )  # as the compiler splits the cache, by the keys' kernels
  slots = jax.tree.map(
    lambda x: struct(x.shape, x.dtype, P(None, heads) if x.ndim else P()),
    jax.eval_shape(functools.partial(llama.init_cache, batch, prompt + new, cache)),
  )

  def report(name, tokens, cost):
    half = program._replace(cost=cost)
    times = half.times(chip)
    return Report(
      name,
      topology,
      mesh.size,
      pods.devices_per_chip(topology),
      dict(mesh.shape),
      batch,
      prompt,
      new,
      weights or DTYPE,
      cache or DTYPE,
      pods.bytes_per_chip(params) / GIB,
      pods.bytes_per_chip(slots) / GIB,
      program.hbm_bytes / GIB,
      chip.hbm_gib,
      program.fits(chip),
      cost.flops,
      cost.bytes,
      half.sent,
      *times,
      tokens / max(times),
      program.compile_seconds,
    )

  return [report(name, *half) for name, half in halves.items()]


def _abstract_llama(variant: str, weights: str | None, mesh: Mesh):
  """The language model with its layers one by one, and its parameters as structs with their shardings."""
  model = lavit.build(variant, DTYPE)

  def parameters():
    params = jax.tree.map(
      lambda x: x.astype(DTYPE), init_params(model, jax.random.key(0), ('llama',))['llama']
    )
    params = unroll_layers(model.llama, params)[1]
    return quantize_weights(params) if weights == 'int8' else params

  params = jax.eval_shape(parameters)
  places = sharding.shardings({'llama': params}, mesh)['llama']
  params = jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), params, places
  )
  return unroll_layers(model.llama, params)[0], params
