"""torchvision's operations on one picture, with the strengths of Google's RandAugment.

torchvision's own RandAugment has other strengths. No operation of it equals our Contrast, Cutout or
SolarizeAdd.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms.v2 import functional

MAGNITUDES = (1, 3, 15)
GRAY = [128.0, 128.0, 128.0]

Change = Callable[[torch.Tensor], torch.Tensor]


def affine(translate: tuple[int, int] = (0, 0), shear: tuple[float, float] = (0, 0)) -> Change:
    """Moves pixels by whole numbers, or shears them about the first pixel, by angles in degrees."""
    return partial(
        functional.affine,
        angle=0.0,
        translate=list(translate),
        scale=1.0,
        shear=list(shear),
        center=[0.0, 0.0],
        fill=GRAY,
    )


def operations(magnitude: float) -> dict[str, Change]:
    """The operations by our names; operations that move pixels have one of the two signs."""
    share = magnitude / 10
    factor = 1.8 * share + 0.1
    angle = math.degrees(math.atan(0.3 * share))
    shift = round(100 * share)
    return {
        "AutoContrast": functional.autocontrast,
        "Equalize": functional.equalize,
        "Invert": functional.invert,
        "Rotate": partial(functional.rotate, angle=30 * share, fill=GRAY),
        "Posterize": partial(functional.posterize, bits=int(4 * share)),
        "Solarize": partial(functional.solarize, threshold=min(int(256 * share), 255)),
        "Color": partial(functional.adjust_saturation, saturation_factor=factor),
        "Brightness": partial(functional.adjust_brightness, brightness_factor=factor),
        "Sharpness": partial(functional.adjust_sharpness, sharpness_factor=factor),
        "ShearX": affine(shear=(angle, 0)),
        "ShearY": affine(shear=(0, angle)),
        "TranslateX": affine(translate=(shift, 0)),
        "TranslateY": affine(translate=(0, shift)),
    }


def picture() -> np.ndarray:
    """Smooth colors with a little noise, of 48 x 64 pixels; no value reaches the limits."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:48, :64]
    smooth = np.stack([30 + 2 * y, 40 + 3 * x % 200, 100 + y + x], axis=-1)
    return np.clip(smooth + rng.integers(-9, 9, smooth.shape), 10, 240).astype(np.uint8)


def write(path: Path) -> None:
    """Stores the picture, and the result of each operation as ``NAME/MAGNITUDE``."""
    pixels = picture()
    tensor = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
    results = {
        f"{name}/{magnitude}": change(tensor).numpy().transpose(1, 2, 0)
        for magnitude in MAGNITUDES
        for name, change in operations(magnitude).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, picture=pixels, **results)
