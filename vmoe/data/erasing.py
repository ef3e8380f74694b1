"""Random occlusion of a part of an image: by gray (cutout) or by noise (random erasing)."""

import numpy as np

from vmoe.data.decode import Pixels

ERASED = 0.02, 1 / 3  # smallest and largest share of the area
ASPECTS = 0.3, 1 / 0.3  # height / width
ATTEMPTS = 10  # to draw a rectangle that fits into the image


def cutout(pixels: Pixels, side: int, rng: np.random.Generator) -> Pixels:
    """Paints a gray square, centered on a random pixel and clipped at the edges.

    Source: "Improved Regularization of Convolutional Neural Networks with Cutout"
    (arXiv 1708.04552, section 3.2).
    """
    h, w, _ = pixels.shape
    top, left = rng.integers(h) - side // 2, rng.integers(w) - side // 2
    changed = pixels.copy()
    changed[max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = 128
    return changed


def erase(pixels: Pixels, probability: float, rng: np.random.Generator) -> Pixels:
    """Fills a random rectangle with uniform noise, with a given probability.

    The rectangle has 2% to 33% of the area, uniformly, and sides in a ratio of 0.3 to 3.3,
    log-uniformly.

    Source: "Random Erasing Data Augmentation" (arXiv 1708.04896, section 3.2, RE-R).
    """
    if rng.random() >= probability:
        return pixels
    h, w, _ = pixels.shape
    for _ in range(ATTEMPTS):
        area, aspect = rng.uniform(*ERASED) * h * w, np.exp(rng.uniform(*np.log(ASPECTS)))
        rows, columns = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < rows <= h and 0 < columns <= w:
            y, x = rng.integers((h - rows, w - columns), endpoint=True)
            changed = pixels.copy()
            noise = rng.integers(256, size=(rows, columns, 3), dtype=np.uint8)
            changed[y : y + rows, x : x + columns] = noise
            return changed
    return pixels
