"""Attacks on runs, commands and readers of models: ``python -m tests.hostility --help``."""
