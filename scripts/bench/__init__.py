"""Measurements of this machine: ``python -m scripts.bench``, a section a file."""
