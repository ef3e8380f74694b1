"""What ``scripts/bench.py`` measures, one section per file."""
