"""Mixing a batch that is split over eight devices equals mixing eight parts on one device."""

import jax
import numpy as np

from tests.devices.test_sharding import collectives, on
from vmoe.config import DataConfig
from vmoe.train.mixing import mix


def test_mixing_on_eight_devices_equals_one_and_needs_no_collective() -> None:
    config = DataConfig(mixup=0.5, cutmix=1.0, mixing="image")
    rng = np.random.default_rng(0)
    images = rng.normal(size=(24, 8, 8, 3)).astype(np.float32)
    targets = np.eye(24, 10, dtype=np.float32)
    placement = on("expert=2")
    batch = jax.device_put((images, targets), placement.batch())
    split = jax.jit(lambda *arrays: mix(*arrays, config, placement.devices, placement.replicate))
    split = split.lower(*batch, jax.random.key(0)).compile()
    assert not collectives(split)
    whole = jax.jit(lambda *arrays: mix(*arrays, config, 8))
    for seed in range(4):
        key = jax.random.key(seed)
        for ours, expected in zip(split(*batch, key), whole(images, targets, key), strict=True):
            np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6)
