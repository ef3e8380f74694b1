"""Random augmentation of one image."""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from vmoe.config import DataConfig, RandAugmentConfig
from vmoe.data.augment import augment
from vmoe.data.sources import open_source


def test_about_half_of_the_images_are_mirrored() -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    rng, config = np.random.default_rng(0), DataConfig(flip=True)
    mirrored = [augment(pixels, config, rng)[0, 0, 0] for _ in range(400)]
    assert set(mirrored) == {pixels[0, 0, 0], pixels[0, 3, 0]}
    assert 150 < sum(first == pixels[0, 3, 0] for first in mirrored) < 250


def test_shifts_move_by_whole_pixels_in_every_direction() -> None:
    pixels = np.zeros((9, 9, 3), np.uint8)
    pixels[4, 4] = 200
    rng, config, seen = np.random.default_rng(0), DataConfig(shift=1), set()
    for _ in range(200):
        moved = augment(pixels, config, rng)
        assert moved.sum() == 600 and moved.max() == 200
        seen.add(tuple(np.argwhere(moved[..., 0])[0] - 4))
    assert seen == {(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)}


def test_rotations_about_the_center_equal_pillows() -> None:
    pixels = open_source("digits", "train")[0].image.repeat(4, 0).repeat(4, 1)
    for seed in range(5):
        rotated = augment(pixels, DataConfig(rotate=30.0), np.random.default_rng(seed))
        angle = np.random.default_rng(seed).uniform(-30, 30)
        expected = Image.fromarray(pixels).rotate(angle, Image.Resampling.BILINEAR)
        assert np.abs(rotated.astype(int) - np.asarray(expected, int)).max() <= 1


def test_cutout_paints_one_square_clipped_at_the_edges() -> None:
    pixels = np.zeros((6, 6, 3), np.uint8)
    rng, config, sizes = np.random.default_rng(0), DataConfig(cutout=3), set()
    for _ in range(300):
        painted = augment(pixels, config, rng)[..., 0] == 128
        rows, columns = painted.any(1).sum(), painted.any(0).sum()
        assert painted.sum() == rows * columns
        sizes.add((rows, columns))
    assert sizes == {(y, x) for y in (2, 3) for x in (2, 3)}
    assert pixels.sum() == 0, "the pixels of the source were changed"


def erased(pixels: np.ndarray, probability: float, count: int) -> Iterator[np.ndarray]:
    """Which pixels of a black image random erasing has filled, for each of several draws."""
    rng, config = np.random.default_rng(0), DataConfig(erasing=probability)
    for _ in range(count):
        yield augment(pixels, config, rng).any(axis=-1)


def test_random_erasing_fills_one_rectangle_of_the_published_areas_and_ratios() -> None:
    pixels = np.zeros((60, 90, 3), np.uint8)
    shares, ratios, edges = [], [], set()
    for filled in erased(pixels, 1.0, 300):
        rows, columns = np.flatnonzero(filled.any(1)), np.flatnonzero(filled.any(0))
        assert filled.sum() == len(rows) * len(columns)
        shares.append(filled.mean())
        ratios.append(len(rows) / len(columns))
        edges |= {("row", y) for y in (0, 59) if y in rows}
        edges |= {("column", x) for x in (0, 89) if x in columns}
    assert 0.018 < min(shares) < 0.03 and 0.28 < max(shares) < 0.35
    assert 0.25 < min(ratios) < 0.4 and 2.5 < max(ratios) < 4
    assert 0.9 < np.exp(np.log(ratios).mean()) < 1.1, "tall and wide are not equally likely"
    assert len(edges) == 4, "an edge of the image is never reached"
    assert pixels.sum() == 0, "the pixels of the source were changed"


def test_random_erasing_has_the_given_probability_and_fills_with_uniform_noise() -> None:
    pixels = np.zeros((20, 20, 3), np.uint8)
    assert 70 < sum(filled.any() for filled in erased(pixels, 0.25, 400)) < 130
    filled = augment(pixels, DataConfig(erasing=1.0), np.random.default_rng(1))
    noise = filled[filled.any(axis=-1)]
    assert 110 < noise.mean() < 145 and 60 < noise.std() < 88


def test_rand_augment_is_part_of_the_augmentation() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    config = DataConfig(rand_augment=RandAugmentConfig(num_layers=2, magnitude=3.0))
    results = [augment(pixels, config, np.random.default_rng(seed)) for seed in range(20)]
    assert len({result.tobytes() for result in results}) > 16
    again = [augment(pixels, config, np.random.default_rng(seed)) for seed in range(20)]
    np.testing.assert_array_equal(results, again)
