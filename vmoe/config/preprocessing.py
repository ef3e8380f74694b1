"""How images are prepared for a trained model."""

import dataclasses
from typing import Annotated, Literal

from vmoe.fields import Checked, at_least

MAX_PIXELS = 89_478_485  # Pillow's limit, of 256 MB in RGB; a photo of 13,300 x 6,700
MOST_RESIZED = 10  # times image_size; a crop shows a hundredth of such an image

Interpolation = Literal[
    "nearest",
    "bilinear",
    "bicubic",
    "lanczos",
    "torch_bilinear",
    "torch_bicubic",
    "torch_lanczos",
    "tf_bilinear",
    "tf_area",
]
"""How pixels are resized: by Pillow (antialiased, except nearest); as torchvision resizes uint8
tensors (torch_, which differs from Pillow in the rounding); or as TensorFlow's ``resize`` (tf_:
bilinear without antialiasing, or the mean over an area)."""


@dataclasses.dataclass(frozen=True)
class Preprocessing(Checked):
    """How pixels of any size become the input of a trained model: resized, then cropped.

    The crop is central. These are the pipelines of the V-MoE authors, of timm and of Hugging Face:

        decode|resize(384)                     Preprocessing(384, interpolation="tf_bilinear")
        decode|resize(256)|central_crop(224)   Preprocessing(224, 256, interpolation="tf_bilinear")
        decode|resize_small(256)|central_crop(224)
                                               Preprocessing(224, 256, True, "tf_area")
        crop_pct=0.9, interpolation="bicubic"  Preprocessing(224, 248, True, "bicubic")
        the same, crop_mode="squash"           Preprocessing(224, 248, False, "bicubic")
        ViTImageProcessor(size=224)            Preprocessing(224, interpolation="torch_bilinear")

    timm's ``resize_to`` is ``floor(image_size / crop_pct)``.
    """

    section = "preprocessing"

    image_size: Annotated[int, at_least(1)]
    """Side in pixels of the model's input, a square."""
    resize_to: int | None = None
    """Side in pixels to which an image is resized before the crop; image_size if None."""
    keep_aspect: bool = False
    """Whether to resize the shorter side and keep the aspect ratio, or to resize both sides."""
    interpolation: Interpolation = "bilinear"
    """How pixels are resized; see ``Interpolation``."""
    exif: bool = True
    """Whether to rotate an image by its EXIF orientation, which TensorFlow ignores. TIFF files are
    always rotated."""
    max_pixels: Annotated[int, at_least(1)] = dataclasses.field(default=MAX_PIXELS, repr=False)
    """Most pixels of an image file; a larger one is refused before it is decoded."""

    def __post_init__(self) -> None:
        super().__post_init__()
        times = 1 if self.resize_to is None else self.resize_to / self.image_size
        self.require(
            1 <= times <= MOST_RESIZED,
            f"use 1 to {MOST_RESIZED} times the size of the image",
            "resize_to",
            "image_size",
        )

    def scaled(self, image_size: int) -> "Preprocessing":
        """The same pipeline for another size: resize_to changes in proportion, rounded.

        >>> Preprocessing(224, resize_to=256).scaled(384).resize_to
        439
        """
        side = self.resize_to and round(self.resize_to * image_size / self.image_size)
        return dataclasses.replace(self, image_size=image_size, resize_to=side)
