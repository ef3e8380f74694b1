"""Images to measure the input pipeline with, computed from a fixed seed."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

H, W, QUALITY = 375, 500, 92  # JPEG files of about 128 kB each; ImageNet's have 110
CLASSES = 2
NAMES = 10  # names of each file
SHARED = 0.8  # share of the noise that is common to the three channels
MEAN, STD = 118, 55  # pixel values


def write_jpegs(folder: Path, count: int) -> tuple[int, int]:
    """Writes JPEG files for the folder source: ``count`` for training, and a few for validation.

    Each file has ten names, since shuffling takes longer with few images than with many.

    Returns:
        the width and the height of the images, in pixels.
    """
    rng = np.random.default_rng(0)
    for split, images in (("train", count), ("validation", CLASSES)):
        for i in range(images):
            path = folder / split / str(i % CLASSES) / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(_photo(rng)).save(path, quality=QUALITY)
            for name in range(1, NAMES):
                path.with_stem(f"{i}-{name}").hardlink_to(path)
    return W, H


def _photo(rng: np.random.Generator) -> np.ndarray:
    """Noise (h, w, 3) whose amplitudes fall with the frequency, as in photographs."""
    frequency = np.hypot(np.fft.fftfreq(H)[:, None], np.fft.rfftfreq(W))
    frequency[0, 0] = np.inf
    spectra = np.fft.rfft2(rng.standard_normal((4, H, W))) / frequency
    noise = np.fft.irfft2(SHARED * spectra[:1] + (1 - SHARED) * spectra[1:], (H, W))
    pixels = MEAN + STD * noise / noise.std()
    return pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def write_arrays(folder: Path, count: int, size: int) -> str:
    """Writes gray images, the same for training and validation; returns the name of the source."""
    images = np.random.default_rng(0).integers(0, 256, (count, size, size), np.uint8)
    splits = ("train", "validation")
    arrays: dict[str, Any] = {f"{split}_images": images for split in splits}
    arrays |= {f"{split}_labels": np.arange(count) % CLASSES for split in splits}
    np.savez(folder / "arrays.npz", **arrays)
    return f"arrays:{folder / 'arrays.npz'}"
