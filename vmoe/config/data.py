"""The data set and the augmentation of training images."""

import dataclasses

from vmoe.config.fields import Checked, require


@dataclasses.dataclass(frozen=True)
class DataConfig(Checked):
    """Where images come from and what happens to them in training."""

    name: str = "digits"
    """Data set: digits, fashion_mnist, fashion_mnist:FOLDER, folder:PATH or arrays:FILE.npz."""
    flip: bool = False
    """Mirror a training image, left to right, with a chance of one half."""
    shift: int = 0
    """Largest shift of a training image, in pixels, in either direction."""
    rotate: float = 0.0
    """Largest rotation of a training image, in degrees, in either direction."""
    cutout: int = 0
    """Side of a square of a training image that is painted grey, in pixels (arXiv 1708.04552)."""
    mixup: float = 0.0
    """Concentration of the Dirichlet that weights an image and its partner; 0 is no mixup."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("shift", "rotate", "cutout", "mixup"):
            require(getattr(self, name) >= 0, f"data.{name}={getattr(self, name)}: use 0 or more")
