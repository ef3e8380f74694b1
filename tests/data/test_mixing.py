"""Mixup of one batch."""

import numpy as np

from vmoe.data.mixing import mixup


def test_mixup_mixes_each_image_and_label_with_the_next() -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(4, 2, 2, 3)).astype(np.float32)
    labels = np.eye(4, dtype=np.float32)
    for _ in range(20):
        mixed, mixed_labels = mixup(images, labels, 0.5, rng)
        weight = mixed_labels[0, 0]
        assert 0.5 <= weight <= 1
        np.testing.assert_allclose(mixed_labels.sum(1), 1, rtol=1e-6)
        np.testing.assert_allclose(mixed_labels[3], [1 - weight, 0, 0, weight], atol=1e-6)
        np.testing.assert_allclose(
            mixed[3], weight * images[3] + (1 - weight) * images[0], atol=1e-6
        )
