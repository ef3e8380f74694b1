"""The parts of ``scripts/mixtures.py``: published results of classic mixtures, measured again."""
