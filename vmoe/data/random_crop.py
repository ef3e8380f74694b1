"""Inception's random crop, with the distribution of TensorFlow's implementation."""

import math
from typing import NamedTuple

import numpy as np

ASPECTS = (0.75, 1.33)  # width / height
ATTEMPTS = 100


class Box(NamedTuple):
    """A rectangle of whole pixels in an image: its first row and column, and its sides."""

    y: int
    x: int
    h: int
    w: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """The rows and the columns of the box."""
        return slice(self.y, self.y + self.h), slice(self.x, self.x + self.w)


def random_box(h: int, w: int, min_area: float, rng: np.random.Generator) -> Box:
    """Draws a box of ``min_area`` to all of an image's area and an aspect ratio of 3:4 to 4:3.

    The aspect ratio is drawn first, then a height that fits, then the position, each uniformly. If
    no box fits, as in a narrow image, the result is the whole image.

    Args:
        min_area: smallest share of the area, in (0, 1].

    Source: "Going Deeper with Convolutions" (arXiv 1409.4842, section 6), as implemented in
    ``tf.image.sample_distorted_bounding_box``, where the height, not the area, is uniform.
    """
    for _ in range(ATTEMPTS):
        sides = _sides(h, w, min_area, rng)
        if sides:
            box_h, box_w = sides
            y, x = (int(rng.integers(max(free, 1))) for free in (h - box_h, w - box_w))
            return Box(y, x, box_h, box_w)
    return Box(0, 0, h, w)


def _sides(h: int, w: int, min_area: float, rng: np.random.Generator) -> tuple[int, int] | None:
    """Height and width of a random box, in pixels; None if the rounded box does not fit."""
    aspect, least = rng.uniform(*ASPECTS), min_area * h * w
    lowest, highest = (round(math.sqrt(area / aspect)) for area in (least, h * w))
    highest = min(highest, int((w + 0.5) / aspect), h)
    box_h = int(rng.integers(min(lowest, highest), highest, endpoint=True))
    if box_h * round(box_h * aspect) < least:
        box_h += 1
    box_w = round(box_h * aspect)
    fits = box_h <= h and 0 < box_w <= w and box_h * box_w >= least
    return (box_h, box_w) if fits else None
