"""The sections of ``scripts/bench.py``, one per file."""
