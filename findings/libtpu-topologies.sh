#!/usr/bin/env bash
# libtpu 0.0.42.1 and jax 0.10.2, Python 3.11. No TPU is needed: topologies are described, not opened.
#
# Expected: one chip is a topology ('v5e:1x1'); a chip of v4 and of v5p, which have two cores each, is
#   as many devices, one; Ironwood is called v7x, as v5e and v6e are called.
# Behaviour: 'v5e:1x1' is refused unless chips_per_host_bounds=(1, 1, 1) is given; v4 has two devices a chip
#   where v5p has one, and has one with chip_config_name='megacore'; Ironwood is 'tpu7x' alone, with
#   two devices a chip.
# Output seen:
#   v5e:1x1 {}: Topology layout "v5e:1x1" is not divisible by the given (or default) chips_per_host_bounds "2x2x1"
#   v5e:1x1 {'chips_per_host_bounds': (1, 1, 1)}: 1 devices, TPU v5 lite
#   v5p:2x2x1 {}: 4 devices, TPU v5
#   v4:2x2x1 {}: 8 devices, TPU v4
#   v4:2x2x1 {'chip_config_name': 'megacore'}: 4 devices, TPU v4
#   v7x:2x2x1 {}: Invalid TPU external name: TPU v7x
#   tpu7x:2x2x1 {}: 8 devices, TPU7x
#
# Exits with another status than 0 when this is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 libtpu==0.0.42.1 numpy==2.4.6
export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_WORKER_HOSTNAMES=localhost TPU_ACCELERATOR_TYPE=v5e-4
"$work/venv/bin/python" - 2> "$work/log" <<'EOF' || { cat "$work/log"; exit 1; }
from jax.experimental import topologies


def devices(name, **options):
  try:
    found = topologies.get_topology_desc(platform='tpu', topology_name=name, **options).devices
  except Exception as error:
    print(f'{name} {options}:', ' '.join(str(error).removeprefix('INVALID_ARGUMENT: ').split()))
    return 0
  print(f'{name} {options}: {len(found)} devices, {found[0].device_kind}')
  return len(found)


assert devices('v5e:1x1') == 0
assert devices('v5e:1x1', chips_per_host_bounds=(1, 1, 1)) == 1
assert devices('v5p:2x2x1') == 4
assert devices('v4:2x2x1') == 8
assert devices('v4:2x2x1', chip_config_name='megacore') == 4
assert devices('v7x:2x2x1') == 0
assert devices('tpu7x:2x2x1') == 8
EOF
