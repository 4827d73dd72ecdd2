"""What a compiled program costs, read from its text: programs of this CPU, and lines as TPUs' programs have them."""

import jax
import jax.numpy as jnp
import pytest

from lavit_jax.compile import hlo
from lavit_jax.models.attention_kernels import BLOCK, kernel_flops


def compiled(fn, *args):
  return jax.jit(fn).lower(*args).compile().as_text()


def test_a_loop_counts_as_often_as_it_runs():
  x, w = jnp.zeros((16, 8)), jnp.zeros((5, 8, 8))

  def loss(w, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0].sum()

  assert hlo.cost(compiled(loss, w, x)).flops == 5 * 2 * 16 * 8 * 8
  assert hlo.cost(compiled(jax.grad(loss, argnums=(0, 1)), w, x)).flops == 3 * 5 * 2 * 16 * 8 * 8


def test_a_loop_apart_from_the_rest():
  """A product before a loop of five, whose rounds hold another loop of three."""
  w = jnp.zeros((8, 8))

  def nested(x):
    return jax.lax.fori_loop(
      0, 5, lambda _, x: jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w), x) @ w, x @ w
    )

  whole, [(rounds, cost)] = hlo.costs(compiled(nested, jnp.zeros((16, 8))))
  product = 2 * 16 * 8 * 8
  assert (rounds, cost.flops, whole.flops) == (5, 4 * product, 21 * product)
  assert (whole + cost.times(-rounds)).flops == product


def test_what_a_product_moves():
  cost = hlo.cost(compiled(jnp.matmul, jnp.zeros((64, 32)), jnp.zeros((32, 128))))
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
  """A ring: in an all-gather a chip passes on all shares but one, in an all-reduce twice its array but a share."""
  shard = 4 * 8 * 2
  gather = program(
    f'  ROOT %g = bf16[32,8]{{1,0}} all-gather(%a), channel_id=1, replica_groups={groups}, dimensions={{0}}'
  )
  assert hlo.cost(gather).network == {'all-gather': (size - 1) * shard}
  reduce = program(
    f'  ROOT %g = bf16[4,8]{{1,0}} all-reduce(%a), channel_id=1, replica_groups={groups}, to_apply=%add'
  )
  assert hlo.cost(reduce).network == {'all-reduce': 2 * (size - 1) / size * shard}


def test_a_collective_in_pieces_is_one():
  """Beside other work it is written three times over, each time as the whole; another channel is another one."""
  inside = (
    '%step{0} (p: bf16[4,8]) -> bf16[32,8] {{\n  %p{0} = bf16[4,8]{{1,0}} parameter(0)\n  ROOT %g{0} = bf16[32,8]{{1,0}} all-gather(%p{0}), '
    'channel_id={1}, replica_groups={{{{0,1,2,3,4,5,6,7}}}}, dimensions={{0}}\n}}\n'
  )
  before = inside.format(1, 7) + inside.format(2, 7) + inside.format(3, 9)
  lines = [
    f'  %f{n} = bf16[32,8]{{1,0}} fusion(%a), kind=kCustom, calls=%step{n}' for n in (1, 2, 3)
  ]
  assert hlo.cost(program(*lines, before=before)).network == {'all-gather': 2 * 7 * 64}


def test_a_reduce_scatter_of_tpus_is_half_an_all_reduce():
  before = (
    '%all-reduce-scatter.3 (p: bf16[4,8]) -> bf16[1,8] {\n  %p = bf16[4,8]{1,0} parameter(0)\n  %r = bf16[4,8]{1,0} all-reduce(%p), '
    'channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add\n  ROOT %s = bf16[1,8]{1,0} slice(%r), slice={[0:1], [0:8]}\n}\n'
  )
  line = '  ROOT %f = bf16[1,8]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.3'
  assert hlo.cost(program(line, before=before)).network == {'reduce-scatter': 3 / 4 * 64}


def test_kernels_are_told_and_marks_cost_nothing():
  kernel = program(
    '  ROOT %splash.1 = bf16[32,8]{1,0} custom-call(%a, %a), custom_call_target="tpu_custom_call"'
  )
  seen = []
  assert hlo.cost(kernel, lambda name, shapes: seen.append((name, shapes)) or 11.0).flops == 11
  assert seen == [('splash.1', [(4, 8), (4, 8)])]
  assert hlo.cost(kernel).bytes == 2 * 64 + 512
  assert (
    hlo.cost(
      program('  ROOT %m = bf16[32,8]{1,0} custom-call(%a), custom_call_target="AllocateBuffer"')
    )
    == hlo.NOTHING
  )


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
  """Of R rows and H heads each pair of blocks (queries, keys before or at them) is `products` products of [side, d] and [d, side]."""
  heads, width = 5, 128
  shape = f'bf16[{text}{heads},{length},{width}]'
  lines = [
    'ENTRY %main (q: bf16[1]) -> bf16[1] {',
    '  %m = s32[1,1,4]{2,1,0} parameter(0)',
    f'  %q = {shape} parameter(1)',
    '  %w = bf16[1,4096,4096] parameter(2)',
    f'  ROOT %{name} = {shape} custom-call(%m, %w, %q, %q, %q), custom_call_target="tpu_custom_call"',
    '}',
  ]
  by_hand = rows * heads * pairs * products * 2 * side * side * width
  assert hlo.cost('\n'.join(lines), kernel_flops).flops == by_hand
  everything = (
    rows * heads * products * 2 * length**2 * width
  )  # without segments, nothing is forbidden
  assert hlo.cost('\n'.join(lines).replace('_segmented', ''), kernel_flops).flops == everything


def test_a_slice_brought_near_is_read_alone():
  """Of bf16[4,8] in HBM the first row goes into the chip's own memory (S(1)): 8 numbers are read, none is written."""
  near = program(
    '  %s = ((bf16[4,8]{1,0}), bf16[1,8]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:1], [0:8]}',
    '  ROOT %d = bf16[1,8]{1,0:S(1)} slice-done(%s)',
  )
  assert hlo.cost(near).bytes == 8 * 2
