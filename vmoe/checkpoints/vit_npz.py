"""ViT weights in .npz files: the original ViT's, AugReg's, big_vision's.

All have the tanh GELU, epsilon 1e-6 and pixels in [-1, 1] (``configs/`` and ``models/vit.py`` of
google-research/big_vision and google-research/vision_transformer).
"""

from pathlib import Path

from vmoe.checkpoints import npz
from vmoe.checkpoints.assemble import Conversion
from vmoe.checkpoints.flax_names import rename
from vmoe.checkpoints.released import ASSUMED


def matches(path: Path) -> bool:
    """Whether the path is that of a .npz file."""
    return path.suffix == ".npz" and path.is_file()


def conversion(path: Path) -> Conversion:
    """How to read a ViT, or a V-MoE, of which the authors' settings in pre-training are assumed.

    Raises:
        Failure: the file is corrupt.
    """
    return Conversion(npz.read(path), rename, {"gelu": "tanh", "norm_epsilon": 1e-6}, ASSUMED)
