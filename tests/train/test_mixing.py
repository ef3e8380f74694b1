"""Mixup and CutMix: weights, partners and boxes, for one device and several."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from vmoe.config import DataConfig
from vmoe.errors import UsageError

GOLDEN = Path(__file__).parents[1] / "golden" / "mixing" / "mixup.npz"
H, W = 12, 16


def mixtures(
    config: DataConfig, *, batch_size: int, devices: int, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mixed images and targets of several steps, where image i has the value i and the class i."""
    import jax
    import jax.numpy as jnp

    from vmoe.train.mixing import mix

    numbers = jnp.arange(batch_size, dtype=float)[:, None, None, None]
    images = jnp.broadcast_to(numbers, (batch_size, H, W, 3))
    keys = jax.random.split(jax.random.key(0), steps)
    targets = jnp.eye(batch_size)
    mixed = jax.jit(jax.vmap(lambda key: mix(images, targets, key, config, devices)))
    return tuple(np.asarray(x) for x in mixed(keys))


@pytest.fixture(scope="module")
def per_image() -> tuple[np.ndarray, np.ndarray]:
    """400 steps of four images on two devices, with mixup or CutMix and weights per image."""
    config = DataConfig(mixup=0.6, cutmix=1.5, mixing="image")
    return mixtures(config, batch_size=4, devices=2, steps=400)


def is_cutmix(images: np.ndarray) -> np.ndarray:
    """Whether a step used CutMix, in which no pixel has a value between two images' values."""
    return (images == images.round()).all((1, 2, 3, 4))


@pytest.mark.parametrize("case", ["device_02", "device_05", "example_05"])
def test_mixtures_with_stored_weights_equal_those_of_the_authors(case: str) -> None:
    import jax.numpy as jnp

    from vmoe.train.mixing import mix_with_next

    with np.load(GOLDEN) as golden:
        stored = {key.split("/")[1]: golden[key] for key in golden.files if key.startswith(case)}
    weights = jnp.asarray(stored["weights_sorted"][..., 0])
    for name, axes in (("images", 3), ("labels", 1)):
        mixed = mix_with_next(jnp.asarray(stored[name]), weights[(..., *[None] * axes)])
        np.testing.assert_allclose(mixed, stored[f"{name}_mixed"], rtol=0, atol=1e-6)


def test_mixup_uses_one_pair_of_weights_per_device_the_larger_for_the_image_itself() -> None:
    """Six images on two devices; the next one of the last image is the first of its device."""
    images, targets = mixtures(DataConfig(mixup=0.6), batch_size=6, devices=2, steps=300)
    weights = targets[:, np.arange(6), np.arange(6)]
    partner = np.array([1, 2, 0, 4, 5, 3])
    np.testing.assert_allclose(targets[:, np.arange(6), partner], 1 - weights, atol=1e-6)
    np.testing.assert_allclose(targets.sum(-1), 1, rtol=1e-6)
    expected = weights * np.arange(6) + (1 - weights) * partner
    np.testing.assert_allclose(
        images, np.broadcast_to(expected[..., None, None, None], images.shape), atol=1e-5
    )
    first, second = weights[:, :3], weights[:, 3:]
    for device in (first, second):
        np.testing.assert_array_equal(device, device[:, :1].repeat(3, 1))
    assert (first[:, 0] != second[:, 0]).mean() > 0.95 and weights.min() >= 0.5
    check_larger_weights(weights[:, ::3].ravel(), 0.6)


def check_larger_weights(weights: np.ndarray, concentration: float) -> None:
    """A Kolmogorov-Smirnov test against the larger one of two weights of a Dirichlet."""
    beta = stats.beta(concentration, concentration)
    larger = stats.ks_1samp(weights, lambda x: beta.cdf(x) - beta.cdf(1 - x))
    assert larger.pvalue > 0.01


def test_mixup_and_cutmix_take_turns_at_random(per_image: tuple[np.ndarray, np.ndarray]) -> None:
    assert 160 < is_cutmix(per_image[0]).sum() < 240


def test_mixup_per_image_draws_each_pair_of_weights_independently(
    per_image: tuple[np.ndarray, np.ndarray],
) -> None:
    images, targets = (x[~is_cutmix(per_image[0])] for x in per_image)
    weights = targets[:, np.arange(4), np.arange(4)]
    check_larger_weights(weights.ravel(), 0.6)
    correlation = np.corrcoef(weights.T) - np.eye(4)
    assert np.abs(correlation).max() < 0.25
    partner = np.array([1, 0, 3, 2])
    expected = weights * np.arange(4) + (1 - weights) * partner
    np.testing.assert_allclose(images[:, :, 0, 0, 0], expected, atol=1e-5)


def test_cutmix_pastes_one_box_and_weights_the_targets_by_its_area(
    per_image: tuple[np.ndarray, np.ndarray],
) -> None:
    """The areas have the distribution of a simulation of the paper's formula in numpy."""
    images, targets = (x[is_cutmix(per_image[0])] for x in per_image)
    partner = np.array([1, 0, 3, 2])
    pasted = images == partner[:, None, None, None]
    rows, columns = pasted.any((3, 4)).sum(2), pasted.any((2, 4)).sum(2)
    np.testing.assert_array_equal(pasted.sum((2, 3, 4)), 3 * rows * columns)
    areas = rows * columns / (H * W)
    np.testing.assert_allclose(targets[:, np.arange(4), partner], areas, atol=1e-6)
    np.testing.assert_allclose(targets[:, np.arange(4), np.arange(4)], 1 - areas, atol=1e-6)
    np.testing.assert_array_equal(
        images[~pasted], np.broadcast_to(np.arange(4)[:, None, None, None], images.shape)[~pasted]
    )
    assert stats.ks_2samp(areas.ravel(), simulated_areas(1.5, 5000)).pvalue > 0.01
    assert pasted.any((0, 1, 4)).all(), "a pixel is never pasted"


def simulated_areas(concentration: float, count: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    side = np.sqrt(1 - rng.beta(concentration, concentration, count))
    overlaps = []
    for length in (H, W):
        size, center = (side * length).astype(int), rng.integers(length, size=count)
        start = center - size // 2
        overlaps.append(np.minimum(start + size, length) - np.maximum(start, 0))
    return overlaps[0] * overlaps[1] / (H * W)


def test_without_mixing_images_and_targets_are_unchanged() -> None:
    images, targets = mixtures(DataConfig(), batch_size=3, devices=3, steps=1)
    np.testing.assert_array_equal(images[0, :, 0, 0, 0], [0, 1, 2])
    np.testing.assert_array_equal(targets[0], np.eye(3))


@pytest.mark.parametrize("config", [DataConfig(mixup=0.5), DataConfig(cutmix=0.5)])
def test_one_image_per_device_cannot_be_mixed(config: DataConfig) -> None:
    with pytest.raises(UsageError, match="a device has one image, and no other to mix it"):
        mixtures(config, batch_size=4, devices=4, steps=1)
