"""The cost of compiled programs, of this CPU and as lines of programs of TPUs."""

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


def test_loops_are_also_counted_apart_from_the_rest():
  """A product before a loop of five iterations, each with a loop of three in it."""
  w = jnp.zeros((8, 8))

  def inner(x):
    return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w), x)

  def nested(x):
    return jax.lax.fori_loop(0, 5, lambda _, x: inner(x) @ w, x @ w)

  total, [loop] = hlo.analyze(compiled(nested, jnp.zeros((16, 8))))
  product = 2 * 16 * 8 * 8
  assert (loop.trip_count, loop.cost.flops, total.flops) == (5, 4 * product, 21 * product)
  assert (total - loop.cost * loop.trip_count).flops == product


def test_memory_traffic_of_a_product():
  cost = hlo.cost(compiled(jnp.matmul, jnp.zeros((64, 32)), jnp.zeros((32, 128))))
  assert cost.flops == 2 * 64 * 32 * 128
  assert cost.hbm_bytes == 4 * (64 * 32 + 32 * 128 + 64 * 128)


def program(*lines, before=''):
  header = 'ENTRY %main (a: bf16[4,8]) -> bf16[32,8] {'
  return before + '\n'.join([header, '  %a = bf16[4,8]{1,0} parameter(0)', *lines, '}'])


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
  """In a ring.

  In an all-gather a chip passes on all shards but one. In an all-reduce it sends its array twice,
  less one share each time.
  """
  shard = 4 * 8 * 2
  gather = program(
    '  ROOT %g = bf16[32,8]{1,0} all-gather(%a), channel_id=1, '
    f'replica_groups={groups}, dimensions={{0}}'
  )
  assert hlo.cost(gather).collective_bytes == {'all-gather': (size - 1) * shard}
  reduce = program(
    '  ROOT %g = bf16[4,8]{1,0} all-reduce(%a), channel_id=1, '
    f'replica_groups={groups}, to_apply=%add'
  )
  assert hlo.cost(reduce).collective_bytes == {'all-reduce': 2 * (size - 1) / size * shard}


def gather_step(name, channel):
  """A computation that gathers %a from eight chips."""
  return (
    f'%{name} (p: bf16[4,8]) -> bf16[32,8] {{\n'
    '  %p = bf16[4,8]{1,0} parameter(0)\n'
    f'  ROOT %g = bf16[32,8]{{1,0}} all-gather(%p), channel_id={channel}, '
    'replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}\n'
    '}\n'
  )


def test_the_pieces_of_a_collective_count_once():
  """Each piece is written with the size of the whole; another channel is another collective."""
  before = gather_step('step1', 7) + gather_step('step2', 7) + gather_step('step3', 9)
  lines = [
    f'  %f{n} = bf16[32,8]{{1,0}} fusion(%a), kind=kCustom, calls=%step{n}' for n in (1, 2, 3)
  ]
  cost = hlo.cost(program(*lines, before=before))
  assert cost.collective_bytes == {'all-gather': 2 * 7 * 64}


def test_a_reduce_scatter_of_tpus_is_half_an_all_reduce():
  before = (
    '%all-reduce-scatter.3 (p: bf16[4,8]) -> bf16[1,8] {\n'
    '  %p = bf16[4,8]{1,0} parameter(0)\n'
    '  %r = bf16[4,8]{1,0} all-reduce(%p), channel_id=1, replica_groups={{0,1,2,3}}, '
    'to_apply=%add\n'
    '  ROOT %s = bf16[1,8]{1,0} slice(%r), slice={[0:1], [0:8]}\n'
    '}\n'
  )
  line = '  ROOT %f = bf16[1,8]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.3'
  cost = hlo.cost(program(line, before=before))
  assert cost.collective_bytes == {'reduce-scatter': 3 / 4 * 64}


def test_kernels_count_as_the_caller_says_and_annotations_are_free():
  kernel = program(
    '  ROOT %splash.1 = bf16[32,8]{1,0} custom-call(%a, %a), custom_call_target="tpu_custom_call"'
  )
  calls = []

  def record_call(name, shapes):
    calls.append((name, shapes))
    return 11.0

  assert hlo.cost(kernel, record_call).flops == 11
  assert calls == [('splash.1', [(4, 8), (4, 8)])]
  assert hlo.cost(kernel).hbm_bytes == 2 * 64 + 512
  annotation = program(
    '  ROOT %m = bf16[32,8]{1,0} custom-call(%a), custom_call_target="AllocateBuffer"'
  )
  assert hlo.cost(annotation) == hlo.ZERO


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
def test_flops_of_the_attention_kernel(length, pairs, side, name, products, rows, text):
  """Counted by hand.

  Each pair of blocks (queries, keys before or at them) of a row and a head takes `products`
  products of [side, d] and [d, side].
  """
  heads, width = 5, 128
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
  segmented = '\n'.join(lines)
  expected = rows * heads * pairs * products * 2 * side * side * width
  assert hlo.cost(segmented, kernel_flops).flops == expected
  # Without segments no block is masked.
  unmasked = rows * heads * products * 2 * length**2 * width
  assert hlo.cost(segmented.replace('_segmented', ''), kernel_flops).flops == unmasked


def test_a_slice_copied_into_the_chip_counts_alone():
  """The first row of bf16[4,8] in HBM goes into the chip's own memory (S(1)).

  8 numbers are read from HBM and none is written.
  """
  copy = program(
    '  %s = ((bf16[4,8]{1,0}), bf16[1,8]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%a), '
    'slice={[0:1], [0:8]}',
    '  ROOT %d = bf16[1,8]{1,0:S(1)} slice-done(%s)',
  )
  assert hlo.cost(copy).hbm_bytes == 8 * 2


def test_text_that_is_no_program_is_refused():
  with pytest.raises(ValueError, match='no ENTRY computation'):
    hlo.cost('HloModule empty')
