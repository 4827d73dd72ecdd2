"""LaVIT in evaluation harnesses of others: one file each, which imports its harness.

requests.py turns what a harness asks into calls of `Lavit`.
"""
