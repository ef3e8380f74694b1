"""Decoded pixels become images of the model's size and range."""

import numpy as np
import pytest
from PIL import Image

from vmoe.data.crops import resize, to_float


def test_pixels_become_float32_from_minus_one_to_one() -> None:
    pixels = np.array([0, 51, 255], np.uint8).reshape(1, 1, 3)
    np.testing.assert_allclose(to_float(pixels).reshape(-1), [-1, -0.6, 1], atol=1e-6)
    assert to_float(pixels).dtype == np.float32


@pytest.mark.parametrize("shape", [(8, 8), (20, 7), (3, 40)])
def test_resizing_images_of_any_size_equals_pillow(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (*shape, 3), dtype=np.uint8)
    pillow = Image.fromarray(pixels).resize((16, 16), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(resize(pixels, 16), np.asarray(pillow))
    assert resize(pixels[:3, :3], 3).tolist() == pixels[:3, :3].tolist()
