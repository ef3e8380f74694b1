"""Random crops: the boxes' distribution and the cropped pixels equal TensorFlow's."""

import functools
import hashlib
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ks_2samp

from vmoe.data.decode import decode
from vmoe.data.random_crop import ASPECTS, Box, random_box
from vmoe.data.resize import resize

GOLDEN = Path(__file__).parents[1] / "golden" / "preprocess"
SIZES = {0: (375, 500), 3: (47, 33)}  # by the number of the stored image: height and width


@pytest.fixture(scope="module")
def stored() -> dict[str, np.ndarray]:
    """Stored runs of the authors' crops, and the images that they cut."""
    arrays = {}
    for name in ("crops", "evaluation"):
        with np.load(GOLDEN / f"{name}.npz") as file:
            arrays |= dict(file)
    return arrays


@functools.cache
def draw(h: int, w: int, min_area: float, count: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.array([random_box(h, w, min_area, rng) for _ in range(count)])


@pytest.mark.parametrize("image", SIZES)
def test_boxes_have_the_distribution_of_tensorflows(
    image: int, stored: dict[str, np.ndarray]
) -> None:
    """A two-sample Kolmogorov-Smirnov test for each of 16 properties, at 1 per cent in all."""
    h, w = SIZES[image]

    def properties(boxes: np.ndarray) -> dict[str, np.ndarray]:
        y, x, box_h, box_w = boxes.T.astype(float)
        return {
            "height": box_h,
            "width": box_w,
            "area": box_h * box_w,
            "aspect": box_w / box_h,
            "y": y / np.maximum(h - box_h, 1),
            "x": x / np.maximum(w - box_w, 1),
            "bottom": y + box_h,
            "right": x + box_w,
        }

    ours, theirs = properties(draw(h, w, 0.05, 4000)), properties(stored[f"sampled/{image}"])
    for name, values in theirs.items():
        assert ks_2samp(ours[name], values).pvalue > 0.01 / 16, name


def test_a_box_whose_rounded_area_is_too_small_gets_one_row_more(
    stored: dict[str, np.ndarray],
) -> None:
    """In a small image this is seen in the frequency of the smallest heights."""
    ours, theirs = draw(*SIZES[3], 0.05, 4000)[:, 2], stored["sampled/3"][:, 2]
    assert ours.min() == theirs.min() == 8
    assert abs((ours == 9).mean() - (theirs == 9).mean()) < 0.006


@pytest.mark.parametrize("min_area", [0.05, 0.5, 1.0])
@pytest.mark.parametrize(("h", "w"), [(40, 40), (30, 41), (1, 1), (2, 7), (50, 3)])
def test_boxes_lie_in_the_image_with_at_least_the_given_area(
    h: int, w: int, min_area: float
) -> None:
    """An image in which no such box fits is taken whole."""
    y, x, box_h, box_w = draw(h, w, min_area, 30).T
    assert (y >= 0).all() and (x >= 0).all() and (y + box_h <= h).all() and (x + box_w <= w).all()
    assert (box_h * box_w >= min_area * h * w).all()
    if ASPECTS[1] * w**2 < min_area * h * w:
        assert (box_h == h).all() and (box_w == w).all()


@pytest.mark.parametrize(("image", "size"), [(0, 224), (0, 128), (3, 128)])
def test_crops_of_given_boxes_equal_those_of_the_authors(
    image: int, size: int, stored: dict[str, np.ndarray]
) -> None:
    pixels = decode(stored[f"image/{image}"].tobytes(), "")
    digests = stored[f"sha256/{image}/{size}"]
    for box, digest in zip(stored[f"boxes/{image}"].tolist(), digests, strict=True):
        crop = resize(pixels[Box(*box).slices], size, size, "tf_bilinear")
        assert hashlib.sha256(np.ascontiguousarray(crop)).hexdigest() == digest, box


def slow_bilinear(pixels: np.ndarray, h: int, w: int) -> np.ndarray:
    """Pixel by pixel in float32: first along x, then along y, then truncated."""

    def neighbors(old: int, new: int) -> list[tuple[int, int, np.float32]]:
        scale, half = np.float32(old) / np.float32(new), np.float32(0.5)
        centers = [(np.float32(i) + half) * scale - half for i in range(new)]
        firsts = [int(np.floor(center)) for center in centers]
        return [
            (max(first, 0), min(first + 1, old - 1), center - np.float32(first))
            for first, center in zip(firsts, centers, strict=True)
        ]

    source = pixels.astype(np.float32)
    resized = np.empty((h, w, 3), np.uint8)
    for i, (top, bottom, down) in enumerate(neighbors(pixels.shape[0], h)):
        for j, (left, right, across) in enumerate(neighbors(pixels.shape[1], w)):
            start, end = (
                source[y, left] + (source[y, right] - source[y, left]) * across
                for y in (top, bottom)
            )
            resized[i, j] = (start + (end - start) * down).astype(np.uint8)
    return resized


@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (33, 17), (50, 50)])
@pytest.mark.parametrize(("h", "w"), [(32, 32), (7, 61)])
def test_tf_bilinear_equals_a_loop_over_pixels(shape: tuple[int, int], h: int, w: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    pixels = image[: shape[0], : shape[1]]  # rows with gaps in memory, as crops have
    np.testing.assert_array_equal(resize(pixels, h, w, "tf_bilinear"), slow_bilinear(pixels, h, w))
