"""The dense twin of fashion_mnist.py: the same model with an MLP in every block, equal training.

vmoe train --config configs/fashion_mnist_dense.py --workdir runs/fashion_mnist_dense
vmoe evaluate --checkpoint runs/fashion_mnist_dense
"""

from pathlib import Path

from vmoe.config import load, replace

config = replace(load(Path(__file__).with_name("fashion_mnist.py")), model=dict(sparse_blocks=()))
