"""RandAugment in the form of Google's image models: 16 operations, strengths from 0 to 10.

Strengths above 10 extrapolate, as in the recipes of V-MoE (15 and 20). torchvision's RandAugment
differs: it has 14 operations, and strengths from 0 to 30.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from vmoe.data.decode import Pixels
from vmoe.data.erasing import cutout

GRAY = (128, 128, 128)  # fills the area that geometric operations uncover
DARK = 128  # SolarizeAdd changes values below


class Operation(NamedTuple):
    """A change of an image, by a value that grows with the magnitude.

    Attributes:
        change: function (image, value, rng) -> image; it may draw a random position.
        scale: increase of the value from magnitude 0 to 10.
        offset: the value at magnitude 0.
        signed: whether the value gets a random sign.
    """

    change: Callable[[Image.Image, float, np.random.Generator], Image.Image]
    scale: float = 0
    offset: float = 0
    signed: bool = False

    def __call__(
        self, image: Image.Image, magnitude: float, rng: np.random.Generator
    ) -> Image.Image:
        """The image after the operation, in the same size."""
        value = self.offset + self.scale * magnitude / 10
        if self.signed and rng.random() < 0.5:
            value = -value
        return self.change(image, value, rng)


def rand_augment(
    pixels: Pixels, num_layers: int, magnitude: float, rng: np.random.Generator
) -> Pixels:
    """Applies random operations one after another, each drawn uniformly from ``OPERATIONS``.

    Translation and cutout are in pixels, for images of about 224 px; they are not scaled.

    Args:
        magnitude: their strength, 0 or more; 10 is the usual largest one.

    Source: "RandAugment: Practical automated data augmentation with a reduced search space"
    (arXiv 1909.13719, section 3).
    """
    if not num_layers:
        return pixels
    image, operations = Image.fromarray(pixels), list(OPERATIONS.values())
    for i in rng.integers(len(operations), size=num_layers):
        image = operations[i](image, magnitude, rng)
    return np.asarray(image)


def _posterize(image: Image.Image, bits: float, rng: np.random.Generator) -> Image.Image:
    """Keeps the highest bits."""
    shift = 8 - min(int(bits), 8)
    return image.point([value >> shift << shift for value in range(256)] * 3)


def _solarize_add(image: Image.Image, added: float, rng: np.random.Generator) -> Image.Image:
    """Adds to dark values."""
    table = [min(value + int(added), 255) if value < DARK else value for value in range(256)]
    return image.point(table * 3)


def _contrast(image: Image.Image, factor: float, rng: np.random.Generator) -> Image.Image:
    """Blends with a gray level that depends on the size alone: the mean of the 256 counts of the
    histogram, not of the image."""
    gray = min(image.height * image.width // 256, 255)
    return Image.blend(Image.new("RGB", image.size, (gray,) * 3), image, factor)


def _cutout(image: Image.Image, half: float, rng: np.random.Generator) -> Image.Image:
    """Paints a gray square; the value is half of its side."""
    return Image.fromarray(cutout(np.asarray(image), 2 * int(half), rng))


def _affine(
    image: Image.Image, *, b: float = 0.0, c: float = 0.0, d: float = 0.0, f: float = 0.0
) -> Image.Image:
    """Pixel (x, y) of the result is the one nearest to (x + b y + c, d x + y + f)."""
    matrix = 1, b, c, d, 1, f
    return image.transform(image.size, Image.Transform.AFFINE, matrix, fillcolor=GRAY)


OPERATIONS = {
    "AutoContrast": Operation(lambda image, _, rng: ImageOps.autocontrast(image)),
    "Equalize": Operation(lambda image, _, rng: ImageOps.equalize(image)),
    "Invert": Operation(lambda image, _, rng: ImageOps.invert(image)),
    "Rotate": Operation(
        lambda image, angle, rng: image.rotate(angle, fillcolor=GRAY), 30, signed=True
    ),
    "Posterize": Operation(_posterize, 4),
    "Solarize": Operation(
        lambda image, threshold, rng: ImageOps.solarize(image, int(threshold)), 256
    ),
    "Color": Operation(
        lambda image, factor, rng: ImageEnhance.Color(image).enhance(factor), 1.8, 0.1
    ),
    "Contrast": Operation(_contrast, 1.8, 0.1),
    "Brightness": Operation(
        lambda image, factor, rng: ImageEnhance.Brightness(image).enhance(factor), 1.8, 0.1
    ),
    "Sharpness": Operation(
        lambda image, factor, rng: ImageEnhance.Sharpness(image).enhance(factor), 1.8, 0.1
    ),
    "ShearX": Operation(lambda image, shear, rng: _affine(image, b=shear), 0.3, signed=True),
    "ShearY": Operation(lambda image, shear, rng: _affine(image, d=shear), 0.3, signed=True),
    "TranslateX": Operation(lambda image, shift, rng: _affine(image, c=shift), 100, signed=True),
    "TranslateY": Operation(lambda image, shift, rng: _affine(image, f=shift), 100, signed=True),
    "Cutout": Operation(_cutout, 40),
    "SolarizeAdd": Operation(_solarize_add, 110),
}
