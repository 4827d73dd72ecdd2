"""`lavit demo`: every task once, on held-out images, on the terminal and on one HTML page.

    python -m lavit_jax.apps.demo --make --source DATA     # writes new inputs

inputs.py makes and reads the inputs, runner.py calls the model, sections.py writes the sections of
the page, and neighbors.py finds the training image that is nearest to a generated one.
"""

from lavit_jax.apps.demo.inputs import make_inputs, read_manifest
from lavit_jax.apps.demo.runner import NUM_STEPS, run

__all__ = ['NUM_STEPS', 'make_inputs', 'read_manifest', 'run']
