"""Training: one loop for all stages.

`run.py` turns a config into a `Run`; `loop.py` runs it; `stages/` says what is learned.
"""
