"""The data set and the augmentation of training images."""

import dataclasses
from typing import Literal

from vmoe.config.fields import Checked, require

Check = Literal["headers", "decode"]
OnError = Literal["fail", "replace"]


@dataclasses.dataclass(frozen=True)
class DataConfig(Checked):
    """Which data set a run trains on, and how its training images are augmented."""

    section = "data"

    name: str = "digits"
    """Data set: digits, fashion_mnist, fashion_mnist:FOLDER, folder:PATH or arrays:FILE.npz; or
    fashion_mnist_sample or emoji_sample, to evaluate."""
    check: Check = "headers"
    """headers: check the first and last bytes of each file when a folder is first opened; decode:
    decode every image. The result is cached."""
    on_error: OnError = "fail"
    """If an image cannot be read, fail: end the run; replace: train on another image, determined by
    the seed and the position, and leave the image out of evaluations. Both are reported."""
    flip: bool = False
    """Mirror a training image left to right, with probability 1/2."""
    shift: int = 0
    """Largest shift of a training image along each axis, in pixels of the model's input."""
    rotate: float = 0.0
    """Largest rotation of a training image, clockwise or counter-clockwise, in degrees."""
    cutout: int = 0
    """Side of the grey square painted over a part of each training image, in pixels of the model's
    input; 0 for none (arXiv 1708.04552)."""
    mixup: float = 0.0
    """Concentration of the Dirichlet distribution that weights an image and its partner; 0 for no
    mixup (arXiv 1710.09412)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("shift", "rotate", "cutout", "mixup"):
            require(getattr(self, name) >= 0, f"data.{name}={getattr(self, name)}: use 0 or more")
