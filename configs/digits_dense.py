"""The dense twin of digits.py: the same model with an MLP in every block, the same training.

    vmoe train --config configs/digits_dense.py --workdir runs/digits_dense
    vmoe evaluate --checkpoint runs/digits_dense

Test accuracy over seeds 0, 1, 2 (--seed): 98.61, 99.17, 98.33, mean 98.70; validation 97.22, 97.78,
96.67. 37 s of training on 2 cores of an AMD EPYC (2026-11-24, jax 0.10.2).
"""

from pathlib import Path

from vmoe.config import load, replace

config = replace(load(Path(__file__).with_name("digits.py")), model=dict(sparse_blocks=()))
