#!/usr/bin/env bash
# orbax-checkpoint 0.12.8, with jax 0.10.2, etils 1.15.0, gcsfs 2026.10.1, Python 3.11.
#
# Expected: a checkpoint can be written to each store whose addresses the path library epath knows
#   (gs, s3, az, hf), and a listing of a bucket shows what another process has written since the last one.
# Behaviour: only gs:// is given to TensorStore's driver of a store; any other address is taken for a path
#   of this machine, and refused because it is not absolute. gcsfs remembers a listing for ever, unless its
#   option use_listings_cache is off.
# Output seen:
#   gs://bucket/run gcs
#   s3://bucket/run ValueError: Checkpoint path should be absolute. Got s3:/bucket/run
#   az://bucket/run ValueError: Checkpoint path should be absolute. Got az:/bucket/run
#   hf://bucket/run ValueError: Checkpoint path should be absolute. Got hf:/bucket/run
#   listings are kept by default: True, with the option: False
#
# Exits with another status than 0 when this is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q orbax-checkpoint==0.12.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 etils==1.15.0 gcsfs==2026.10.1
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'EOF'
import gcsfs
from orbax.checkpoint._src.serialization import tensorstore_utils

found = {}
for scheme in ('gs', 's3', 'az', 'hf'):
  try:
    spec = tensorstore_utils.build_kvstore_tspec(f'{scheme}://bucket/run', use_ocdbt=True)
    found[scheme] = spec['base']['driver']
  except ValueError as error:
    found[scheme] = f'ValueError: {error}'
  print(f'{scheme}://bucket/run', found[scheme])
kept = []
for options in ({}, {'use_listings_cache': False}):
  filesystem = gcsfs.core.GCSFileSystem(token='anon', **options)
  filesystem.dircache['bucket'] = []
  kept.append('bucket' in filesystem.dircache)
print(f'listings are kept by default: {kept[0]}, with the option: {kept[1]}')
assert found.pop('gs') == 'gcs' and all('should be absolute' in text for text in found.values())
assert kept == [True, False]
EOF
