"""The data set, and how training images are prepared, augmented and mixed."""

import dataclasses
from typing import Literal

from vmoe.config.fields import Checked, require
from vmoe.config.preprocessing import Interpolation, Preprocessing

Check = Literal["headers", "decode"]
OnError = Literal["fail", "replace"]
Decoder = Literal["exact", "fast"]
Mixing = Literal["device", "image"]


@dataclasses.dataclass(frozen=True)
class PreprocessingConfig(Checked):
    """How the images of a run become pixels of the model's size, in training and evaluation."""

    section = "data.preprocessing"

    interpolation: Interpolation = "bilinear"
    """How pixels are resized: by Pillow (nearest, bilinear, bicubic, lanczos), or as TensorFlow
    does (tf_bilinear)."""
    exif: bool = True
    """Turn an image as its EXIF orientation says; TensorFlow, and so V-MoE, ignores it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.interpolation != "tf_area",
            "data.preprocessing.interpolation=tf_area: its pixels are not whole numbers, which "
            "augmentation needs; use another one",
        )

    def of_size(self, image_size: int) -> Preprocessing:
        """How the images are prepared for evaluation: resized to a square.

        Args:
            image_size: its side in pixels.
        """
        return Preprocessing(image_size, interpolation=self.interpolation, exif=self.exif)


@dataclasses.dataclass(frozen=True)
class RandAugmentConfig(Checked):
    """RandAugment: random operations on a training image (arXiv 1909.13719)."""

    section = "data.rand_augment"

    num_layers: int = 0
    """Number of operations on each image; 0 for no RandAugment."""
    magnitude: float = 10.0
    """Strength of the operations, in [0, 30]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, limit in (("num_layers", 16), ("magnitude", 30)):
            value = getattr(self, name)
            require(0 <= value <= limit, f"{self.section}.{name}={value}: use 0 to {limit}")


@dataclasses.dataclass(frozen=True)
class DataConfig(Checked):
    """Which data set a run trains on, and how its training images are augmented."""

    section = "data"

    name: str = "digits"
    """Data set: digits, fashion_mnist[:FOLDER], folder:PATH, manifest:FILE, tar:FOLDER_OR_PATTERN,
    tfds:NAME_OR_PATH, hf:FOLDER, arrays:FILE_OR_FOLDER or synthetic:ITEMS[:SIZE[:CLASSES]]; or
    fashion_mnist_sample or emoji_sample, to evaluate. vmoe/data/sources describes each."""
    check: Check = "headers"
    """headers: check the first and last bytes of each file when a folder or a list is first opened;
    decode: decode every image. The result is cached."""
    on_error: OnError = "fail"
    """If an image cannot be read, fail: end the run; replace: train on another image, determined by
    the seed and the position, and leave the image out of evaluations. Both are reported."""
    num_workers: int = 0
    """Processes that read images, each a batch at a time, in each process of the run; 0 to read in
    threads. Up to two batches more than processes are in memory. May change when a run is resumed,
    and differ between the processes of a run."""
    decoder: Decoder = "exact"
    """exact: decode the whole training image, then crop it; fast: decode with faster libraries, a
    JPEG perhaps at a smaller scale. Images that they refuse are decoded exactly, and counted."""
    preprocessing: PreprocessingConfig = PreprocessingConfig()
    crop_min_area: float | None = None
    """Train on a random crop of at least this share of the image's area, in (0, 1], such as 0.05
    (arXiv 1409.4842); None to resize the whole image."""
    flip: bool = False
    """Mirror a training image left to right, with probability 1/2."""
    shift: int = 0
    """Largest shift of a training image along each axis, in pixels of the model's input."""
    rotate: float = 0.0
    """Largest rotation of a training image, clockwise or counter-clockwise, in degrees, up to
    180."""
    rand_augment: RandAugmentConfig = RandAugmentConfig()
    cutout: int = 0
    """Side of the grey square painted over a part of each training image, in pixels of the model's
    input; 0 for none (arXiv 1708.04552)."""
    erasing: float = 0.0
    """Probability of replacing a random rectangle of a training image by noise (arXiv
    1708.04896)."""
    mixup: float = 0.0
    """Concentration of the Dirichlet distribution that weights an image and its partner; 0 for no
    mixup (arXiv 1710.09412)."""
    cutmix: float = 0.0
    """Concentration of the beta distribution of the area that an image gets from its partner; 0 for
    no CutMix (arXiv 1905.04899). With mixup too, each step uses one of them, at random."""
    mixing: Mixing = "device"
    """device: mixup and CutMix draw one weight per device and step, as V-MoE does; image: one for
    each image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_workers", "shift", "rotate", "cutout", "mixup", "cutmix"):
            require(getattr(self, name) >= 0, f"data.{name}={getattr(self, name)}: use 0 or more")
        require(self.rotate <= 180, f"data.rotate={self.rotate}: use at most 180 degrees")
        require(
            self.decoder == "exact" or self.preprocessing.interpolation == "tf_bilinear",
            f"data.decoder=fast resizes as tf_bilinear does, not {self.preprocessing.interpolation}"
            ": use data.preprocessing.interpolation=tf_bilinear",
        )
        require(0 <= self.erasing <= 1, f"data.erasing={self.erasing}: use 0 to 1")
        require(
            self.crop_min_area is None or 0 < self.crop_min_area <= 1,
            f"data.crop_min_area={self.crop_min_area}: use more than 0, up to 1; or None",
        )
