"""Published benchmarks from the official local files: one command, two protocols.

files.py reads and checks files, questions.py, captions.py, coco_fid.py and geneval.py know the data
sets, protocols.py how the model is asked and its texts are compared, registry.py lists the
benchmarks, and runner.py computes, merges and reports.
"""

from lavit_jax.apps.benchmarks.files import Request
from lavit_jax.apps.benchmarks.protocols import PROTOCOLS
from lavit_jax.apps.benchmarks.registry import BENCHMARKS
from lavit_jax.apps.benchmarks.runner import run_benchmark

__all__ = ['BENCHMARKS', 'PROTOCOLS', 'Request', 'run_benchmark']
