"""The data set, and how training images are prepared, augmented and mixed."""

import dataclasses
from typing import Annotated, Literal, NamedTuple

from vmoe.config.preprocessing import MAX_PIXELS, Interpolation, Preprocessing
from vmoe.fields import Checked, NonNegative, at_least, at_most, more_than

Check = Literal["headers", "decode"]
OnError = Literal["fail", "replace"]
Decoder = Literal["exact", "fast"]
Mixing = Literal["device", "image"]


class ImageChecks(NamedTuple):
    """How the image files of a folder or a list are checked when it is opened; see ``DataConfig``.

    With ``on_error="replace"`` the split "train" keeps unreadable images, and a reader takes
    another image instead; other splits leave them out.
    """

    check: Check = "headers"
    on_error: OnError = "fail"
    max_pixels: int = MAX_PIXELS


CHECKS = ImageChecks()


@dataclasses.dataclass(frozen=True)
class PreprocessingConfig(Checked):
    """How images are resized to the model's input, in training and evaluation."""

    section = "data.preprocessing"

    interpolation: Interpolation = "bilinear"
    """How pixels are resized: by Pillow (nearest, bilinear, bicubic, lanczos), or as TensorFlow
    does (tf_bilinear)."""
    exif: bool = True
    """Rotate an image by its EXIF orientation, which TensorFlow, and thus V-MoE, ignores. TIFF
    files are always rotated."""
    keep_aspect: bool = False
    """Resize the shorter side and cut out the central square, instead of resizing both sides.
    Random crops for training stay as they are (data.crop_min_area)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.interpolation != "tf_area",
            "its pixels are not whole numbers, which augmentation needs; use another one",
            "interpolation",
        )

    def of_size(self, image_size: int) -> Preprocessing:
        """How the images are prepared for evaluation, and for training without random crops."""
        own = dict(interpolation=self.interpolation, exif=self.exif)
        return Preprocessing(image_size, keep_aspect=self.keep_aspect, **own)


@dataclasses.dataclass(frozen=True)
class RandAugmentConfig(Checked):
    """RandAugment: random operations on a training image (arXiv 1909.13719)."""

    section = "data.rand_augment"

    num_layers: Annotated[int, at_least(0), at_most(16)] = 0
    """Number of operations on each image; 0 for no RandAugment."""
    magnitude: Annotated[float, at_least(0), at_most(30)] = 10.0
    """Strength of the operations, in [0, 30]."""


@dataclasses.dataclass(frozen=True)
class DataConfig(Checked):
    """The data set of a run, and the augmentation of its training images."""

    section = "data"

    name: str = "digits"
    """Data set: digits, fashion_mnist[:FOLDER], folder:PATH, manifest:FILE, tar:FOLDER_OR_PATTERN,
    tfds:NAME_OR_PATH, hf:FOLDER, arrays:FILE_OR_FOLDER or synthetic:ITEMS[:SIZE[:CLASSES]]; or
    fashion_mnist_sample or emoji_sample, to evaluate. vmoe/data/sources describes each."""
    check: Check = "headers"
    """Check of the image files of a folder or a list when it is first opened. headers: the header
    and the last bytes of each file; decode: decode every image. The result is cached."""
    on_error: OnError = "fail"
    """If an image cannot be read. fail: end the run; replace: train on another image, which
    depends only on the seed and the position, and leave the image out of evaluations. Both are
    reported."""
    max_pixels: Annotated[int, at_least(1)] = MAX_PIXELS
    """Most pixels of an image file. A larger one counts as unreadable, by its header: decoded, a
    file of a few bytes can take gigabytes."""
    num_workers: Annotated[int, at_least(0)] | None = None
    """Number of processes that read images, each some of a batch at a time, for each process of
    the run; 0 to read in threads. None for one fewer than the cores of the process, or threads
    where they are as fast. May differ between the processes of a run."""
    decoder: Decoder = "exact"
    """How training images are decoded. exact: the whole image, before it is cropped; fast: with
    faster libraries, large JPEG files at a smaller scale. Images that these libraries cannot decode
    are decoded exactly, and counted."""
    preprocessing: PreprocessingConfig = PreprocessingConfig()
    crop_min_area: Annotated[float, more_than(0), at_most(1)] | None = None
    """Train on a random crop of at least this fraction of the area of the image, in (0, 1], such as
    0.05 (arXiv 1409.4842); None to prepare it as for evaluation."""
    flip: bool = False
    """Mirror a training image left to right, with probability 1/2."""
    shift: Annotated[int, at_least(0)] = 0
    """Largest shift of a training image along each axis, in pixels of the model's input."""
    rotate: Annotated[float, at_least(0), at_most(180)] = 0.0
    """Largest rotation of a training image in either direction, in degrees, up to 180."""
    rand_augment: RandAugmentConfig = RandAugmentConfig()
    cutout: Annotated[int, at_least(0)] = 0
    """Side of a gray square that covers a random part of each training image, in pixels of the
    model's input; 0 for none (arXiv 1708.04552)."""
    erasing: Annotated[float, at_least(0), at_most(1)] = 0.0
    """Probability of replacing a random rectangle of a training image by noise (arXiv
    1708.04896)."""
    mixup: NonNegative = 0.0
    """Concentration of the Dirichlet distribution of the weights of an image and its partner; 0 for
    no mixup (arXiv 1710.09412)."""
    cutmix: NonNegative = 0.0
    """Concentration of the beta distribution of the area that an image gets from its partner; 0 for
    no CutMix (arXiv 1905.04899). With mixup too, each step uses one of them, at random."""
    mixing: Mixing = "device"
    """Weights of mixup and CutMix. device: one per device and step, as in V-MoE; image: one per
    image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.decoder == "exact" or self.preprocessing.interpolation == "tf_bilinear",
            "fast resizes as tf_bilinear does; use this interpolation",
            "decoder",
            "preprocessing.interpolation",
        )

    @property
    def checks(self) -> ImageChecks:
        """How image files are checked when they are opened."""
        return ImageChecks(self.check, self.on_error, self.max_pixels)
