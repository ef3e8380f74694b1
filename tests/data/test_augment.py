"""Random augmentation of one image."""

import numpy as np
from PIL import Image

from vmoe.config import DataConfig
from vmoe.data.augment import augment
from vmoe.data.sources import open_source


def test_about_half_of_the_images_are_mirrored() -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    rng = np.random.default_rng(0)
    mirrored = [augment(pixels, DataConfig(flip=True), rng)[0, 0, 0] for _ in range(400)]
    assert set(mirrored) == {pixels[0, 0, 0], pixels[0, 3, 0]}
    assert 150 < sum(first == pixels[0, 3, 0] for first in mirrored) < 250


def test_shifts_move_by_whole_pixels_in_every_direction() -> None:
    pixels = np.zeros((9, 9, 3), np.uint8)
    pixels[4, 4] = 200
    rng, seen = np.random.default_rng(0), set()
    for _ in range(200):
        moved = augment(pixels, DataConfig(shift=1), rng)
        assert moved.sum() == 600 and moved.max() == 200
        seen.add(tuple(np.argwhere(moved[..., 0])[0] - 4))
    assert seen == {(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)}


def test_rotations_about_the_centre_equal_pillows() -> None:
    pixels = open_source("digits", "train")[0].image.repeat(4, 0).repeat(4, 1)
    for seed in range(5):
        rotated = augment(pixels, DataConfig(rotate=30.0), np.random.default_rng(seed))
        angle = np.random.default_rng(seed).uniform(-30, 30)
        expected = Image.fromarray(pixels).rotate(angle, Image.Resampling.BILINEAR)
        assert np.abs(rotated.astype(int) - np.asarray(expected, int)).max() <= 1


def test_cutout_paints_one_square_clipped_at_the_edges() -> None:
    pixels = np.zeros((6, 6, 3), np.uint8)
    rng, sizes = np.random.default_rng(0), set()
    for _ in range(300):
        painted = augment(pixels, DataConfig(cutout=3), rng)[..., 0] == 128
        rows, columns = painted.any(1).sum(), painted.any(0).sum()
        assert painted.sum() == rows * columns
        sizes.add((rows, columns))
    assert sizes == {(y, x) for y in (2, 3) for x in (2, 3)}
    assert pixels.sum() == 0, "the pixels of the source were changed"
