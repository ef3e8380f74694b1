"""The parts of reproduce_small.py."""
