"""The checksum of an array; ``tests/devices/test_training.py`` tests sharded arrays."""

import numpy as np
import pytest

from vmoe.checkpoints.checksums import CHUNK, checksums


@pytest.mark.parametrize(
    "shape", [(), (7,), (3, CHUNK + 5), (5, 300, 301), (2, 3, CHUNK), (2, 3, 4, 5), (70_000, 2, 1)]
)
def test_a_checksum_does_not_depend_on_how_the_array_is_cut(shape: tuple[int, ...]) -> None:
    """The flat array, which is cut along its only axis, has the same indices."""
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    one, flat = (checksums({"a": x})["a"].split("-")[1] for x in (array, array.reshape(-1)))
    assert one == flat
