#!/usr/bin/env bash
# pyarrow 26.0.1, with numpy 2.4.6, Python 3.11.
#
# Expected: ParquetFile.iter_batches(64) has about 64 rows in memory at a time.
# Behaviour: before the first batch it has read the whole row group, 200 MB here. With
#   pre_buffer=False and a buffer_size when the file is opened it reads page by page, of 1,024 rows.
# Output seen:
#   10,000 rows of 20 KB in one row group; most bytes after the first 64 rows:
#   as it comes: 245 MB
#   pre_buffer=False, buffer_size=65536: 31 MB
#
# Exits with another status than 0 when this is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q pyarrow==26.0.1 numpy==2.4.6
cat > "$work/look.py" <<'EOF'
import sys
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

path, how = sys.argv[1:]
if how == 'write':
  rng = np.random.default_rng(0)
  rows = [rng.bytes(20_000) for _ in range(10_000)]
  pq.write_table(pa.table({'image': rows}), path, compression='none', use_dictionary=False)
  print('10,000 rows of 20 KB in one row group; most bytes after the first 64 rows:')
else:
  options = dict(pre_buffer=False, buffer_size=65536) if how == 'less' else {}
  with pq.ParquetFile(path, **options) as file:
    assert file.num_row_groups == 1
    batch = next(file.iter_batches(64))
    assert batch.num_rows == 64
    most = pa.default_memory_pool().max_memory() / 1e6
  print(', '.join(f'{k}={v}' for k, v in options.items()) or 'as it comes', f': {most:.0f} MB', sep='')
  assert most < 70 if how == 'less' else most > 200
EOF
for how in write more less; do
  "$work/venv/bin/python" "$work/look.py" "$work/x.parquet" "$how"
done
