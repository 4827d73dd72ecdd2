"""Costs of compiled programs: programs of this CPU, and lines from programs of TPUs."""

import jax
import jax.numpy as jnp
import pytest

from lavit_jax.compile import hlo_cost
from lavit_jax.models.attention_kernels import BLOCK, kernel_flops


def compiled(function, *args):
  return jax.jit(function).lower(*args).compile().as_text()


def test_a_loop_counts_as_often_as_it_runs():
  x = jnp.zeros((16, 8))
  w = jnp.zeros((5, 8, 8))

  def loss(w, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0].sum()

  products = 5 * 2 * 16 * 8 * 8
  assert hlo_cost.total_cost(compiled(loss, w, x)).flops == products
  gradients = jax.grad(loss, argnums=(0, 1))
  assert hlo_cost.total_cost(compiled(gradients, w, x)).flops == 3 * products


def test_a_loop_is_reported_apart():
  """A product before a loop of five, whose body has another loop of three."""
  w = jnp.zeros((8, 8))

  def inner(_, x):
    return jnp.tanh(x @ w)

  def outer(_, x):
    return jax.lax.fori_loop(0, 3, inner, x) @ w

  def nested(x):
    return jax.lax.fori_loop(0, 5, outer, x @ w)

  total, [(trip_count, body)] = hlo_cost.analyze(compiled(nested, jnp.zeros((16, 8))))
  product = 2 * 16 * 8 * 8
  assert (trip_count, body.flops, total.flops) == (5, 4 * product, 21 * product)
  assert total.plus(body.times(-trip_count)).flops == product


def test_the_traffic_of_a_product():
  cost = hlo_cost.total_cost(compiled(jnp.matmul, jnp.zeros((64, 32)), jnp.zeros((32, 128))))
  assert cost.flops == 2 * 64 * 32 * 128
  assert cost.bytes == 4 * (64 * 32 + 32 * 128 + 64 * 128)


def program(*lines, before=''):
  return before + '\n'.join(
    [
      'ENTRY %main (a: bf16[4,8]) -> bf16[32,8] {',
      '  %a = bf16[4,8]{1,0} parameter(0)',
      *lines,
      '}',
    ]
  )


@pytest.mark.parametrize(
  'groups, size',
  [
    ('{{0,1,2,3,4,5,6,7}}', 8),
    ('[2,8]<=[16]', 8),
    ("mesh['x'=2,'y'=8] {'y'}", 8),
    ("mesh['x'=8,'y'=1,'z'=2], device_ids=([2,8]T(1,0)) {'x'}", 8),
    ("mesh['x'=4,'y'=2] {'x','y'}", 8),
  ],
)
def test_bytes_sent_by_the_size_of_the_group(groups, size):
  """In a ring, all-gather sends all shards but one; all-reduce twice the array less one shard."""
  shard = 4 * 8 * 2
  gather = program(
    '  ROOT %g = bf16[32,8]{1,0} all-gather(%a), channel_id=1, '
    f'replica_groups={groups}, dimensions={{0}}'
  )
  assert hlo_cost.total_cost(gather).network == {'all-gather': (size - 1) * shard}
  reduce = program(
    '  ROOT %g = bf16[4,8]{1,0} all-reduce(%a), channel_id=1, '
    f'replica_groups={groups}, to_apply=%add'
  )
  assert hlo_cost.total_cost(reduce).network == {'all-reduce': 2 * (size - 1) / size * shard}


def test_pieces_of_a_collective_count_once():
  """Each piece is written as the whole, in the same channel; another channel is another one."""

  def piece(n, channel):
    return (
      f'%step{n} (p: bf16[4,8]) -> bf16[32,8] {{\n'
      f'  %p{n} = bf16[4,8]{{1,0}} parameter(0)\n'
      f'  ROOT %g{n} = bf16[32,8]{{1,0}} all-gather(%p{n}), channel_id={channel}, '
      'replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}\n'
      '}\n'
    )

  before = piece(1, 7) + piece(2, 7) + piece(3, 9)
  lines = [
    f'  %f{n} = bf16[32,8]{{1,0}} fusion(%a), kind=kCustom, calls=%step{n}' for n in (1, 2, 3)
  ]
  assert hlo_cost.total_cost(program(*lines, before=before)).network == {'all-gather': 2 * 7 * 64}


def test_a_reduce_scatter_of_tpus_is_half_an_all_reduce():
  before = (
    '%all-reduce-scatter.3 (p: bf16[4,8]) -> bf16[1,8] {\n'
    '  %p = bf16[4,8]{1,0} parameter(0)\n'
    '  %r = bf16[4,8]{1,0} all-reduce(%p), channel_id=1, '
    'replica_groups={{0,1,2,3}}, to_apply=%add\n'
    '  ROOT %s = bf16[1,8]{1,0} slice(%r), slice={[0:1], [0:8]}\n'
    '}\n'
  )
  line = '  ROOT %f = bf16[1,8]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.3'
  assert hlo_cost.total_cost(program(line, before=before)).network == {'reduce-scatter': 3 / 4 * 64}


def test_kernels_count_by_name_and_marks_cost_nothing():
  kernel = program(
    '  ROOT %splash.1 = bf16[32,8]{1,0} custom-call(%a, %a), custom_call_target="tpu_custom_call"'
  )
  calls = []

  def count(name, shapes):
    calls.append((name, shapes))
    return 11.0

  assert hlo_cost.total_cost(kernel, count).flops == 11
  assert calls == [('splash.1', [(4, 8), (4, 8)])]
  assert hlo_cost.total_cost(kernel).bytes == 2 * 64 + 512
  mark = program('  ROOT %m = bf16[32,8]{1,0} custom-call(%a), custom_call_target="AllocateBuffer"')
  assert hlo_cost.total_cost(mark) == hlo_cost.ZERO


@pytest.mark.parametrize(
  'length, pairs, side',
  [
    (BLOCK // 4, 1, BLOCK // 4),
    (BLOCK, 1, BLOCK),
    (2 * BLOCK, 3, BLOCK),
    (4 * BLOCK, 10, BLOCK),
    (384, 6, 128),
  ],
)
@pytest.mark.parametrize(
  'name, products',
  [('splash_mha_fwd_segmented_residuals.3', 2), ('splash_mha_dkv_segmented_no_residuals.1', 5)],
)
@pytest.mark.parametrize('rows, text', [(3, '3,'), (1, '')])
def test_the_attention_kernel_by_hand(length, pairs, side, name, products, rows, text):
  """For each row, head and pair of blocks (keys not behind the queries), some products.

  A product is that of [side, d] and [d, side].
  """
  heads = 5
  width = 128
  shape = f'bf16[{text}{heads},{length},{width}]'
  lines = [
    'ENTRY %main (q: bf16[1]) -> bf16[1] {',
    '  %m = s32[1,1,4]{2,1,0} parameter(0)',
    f'  %q = {shape} parameter(1)',
    '  %w = bf16[1,4096,4096] parameter(2)',
    f'  ROOT %{name} = {shape} custom-call(%m, %w, %q, %q, %q), '
    'custom_call_target="tpu_custom_call"',
    '}',
  ]
  by_hand = rows * heads * pairs * products * 2 * side * side * width
  assert hlo_cost.total_cost('\n'.join(lines), kernel_flops).flops == by_hand
  unsegmented = '\n'.join(lines).replace('_segmented', '')
  all_pairs = rows * heads * products * 2 * length**2 * width  # no keys are masked
  assert hlo_cost.total_cost(unsegmented, kernel_flops).flops == all_pairs


def test_a_slice_to_the_memory_of_the_chip_is_only_read():
  """The first 8 of 32 numbers in HBM go to the memory of the chip, S(1)."""
  near = program(
    '  %s = ((bf16[4,8]{1,0}), bf16[1,8]{1,0:S(1)}, s32[]{:S(2)}) '
    'slice-start(%a), slice={[0:1], [0:8]}',
    '  ROOT %d = bf16[1,8]{1,0:S(1)} slice-done(%s)',
  )
  assert hlo_cost.total_cost(near).bytes == 8 * 2
