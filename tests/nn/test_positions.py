"""Positions are resampled as by other libraries: to fewer, to more, and to other aspect ratios."""

import functools
from collections.abc import Callable

import cv2
import jax
import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from vmoe.config.model import Resampling
from vmoe.nn.positions import resample


def scipys_zoom(places: np.ndarray, i: int, j: int) -> np.ndarray:
    return scipy.ndimage.zoom(places, (i / len(places), j / places.shape[1]), order=1)


def opencvs_cubic(places: np.ndarray, i: int, j: int) -> np.ndarray:
    """As PyTorch's, which is bicubic with a = -0.75 and edges that are repeated."""
    return cv2.resize(places, (j, i), interpolation=cv2.INTER_CUBIC)


def pillows_bicubic(places: np.ndarray, i: int, j: int) -> np.ndarray:
    """As PyTorch's with ``antialias=True``, which is bicubic with a = -0.5."""
    return np.asarray(Image.fromarray(places).resize((j, i), Image.Resampling.BICUBIC))


@pytest.mark.parametrize(
    ("method", "oracle"),
    [
        ("bilinear", scipys_zoom),
        ("bicubic", opencvs_cubic),
        ("bicubic_antialias", pillows_bicubic),
    ],
)
def test_positions_are_resampled_as_by_scipy_opencv_and_pillow(
    method: Resampling, oracle: Callable[[np.ndarray, int, int], np.ndarray]
) -> None:
    places = np.random.default_rng(0).normal(size=(16, 5, 2)).astype(np.float32)
    for i, j in ((7, 9), (3, 1), (37, 4)):
        ours = jax.jit(functools.partial(resample, i=i, j=j, method=method))(places)
        expected = np.stack([oracle(each, i, j) for each in np.moveaxis(places, 2, 0)], axis=2)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
