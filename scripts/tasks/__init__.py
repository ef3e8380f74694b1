"""Experiments with several tasks: see ``scripts/multitask.py``."""
