"""RandAugment: every operation equals its definition in numpy, at the strengths of the paper."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vmoe.data.rand_augment import OPERATIONS, rand_augment

SIGNED = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
NEUTRAL = {  # magnitudes at which nothing changes
    **dict.fromkeys((*SIGNED, "Cutout", "SolarizeAdd"), 0),
    **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), 5),
    "Solarize": 10,
    "Posterize": 20,
}
TORCHVISION = Path(__file__).parents[1] / "golden" / "augment" / "torchvision.npz"


def picture(h: int = 32, w: int = 44) -> np.ndarray:
    """Smooth colors with a little noise, which span neither all values nor all levels evenly."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:h, :w]
    smooth = np.stack([30 + 2 * y, 40 + 3 * x % 200, 100 + y + x], axis=-1)
    return np.clip(smooth + rng.integers(-9, 9, (h, w, 3)), 10, 240).astype(np.uint8)


def apply(name: str, pixels: np.ndarray, magnitude: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.asarray(OPERATIONS[name](Image.fromarray(pixels), float(magnitude), rng))


def blend(degenerate: np.ndarray, pixels: np.ndarray, magnitude: float) -> np.ndarray:
    """An enhancement: 0.1 at magnitude 0, 1.9 at 10; 1 is the image itself."""
    factor = 1.8 * magnitude / 10 + 0.1
    return np.clip(degenerate + factor * (pixels.astype(float) - degenerate), 0, 255)


def auto_contrast(pixels: np.ndarray, m: float) -> np.ndarray:
    low, high = pixels.min((0, 1)).astype(float), pixels.max((0, 1))
    return (pixels - low) * 255 / (high - low)


def equalize(pixels: np.ndarray, m: float) -> np.ndarray:
    """Each value becomes the share of smaller values, where the largest one counts for nothing."""
    result = np.empty_like(pixels)
    for channel in range(3):
        values = pixels[..., channel]
        step = (values < values.max()).sum() // 255
        for value in np.unique(values):
            share = ((values < value).sum() + step // 2) // step
            result[..., channel][values == value] = min(share, 255)
    return result


def posterize(pixels: np.ndarray, m: float) -> np.ndarray:
    lost = 2 ** (8 - min(int(4 * m / 10), 8))
    return pixels.astype(int) // lost * lost


def solarize(pixels: np.ndarray, m: float) -> np.ndarray:
    return np.where(pixels < int(256 * m / 10), pixels, 255 - pixels)


def solarize_add(pixels: np.ndarray, m: float) -> np.ndarray:
    return np.where(pixels < 128, np.minimum(pixels + float(int(110 * m / 10)), 255), pixels)


def color(pixels: np.ndarray, m: float) -> np.ndarray:
    gray = np.round(pixels @ (0.299, 0.587, 0.114))
    return blend(gray[..., None], pixels, m)


def contrast(pixels: np.ndarray, m: float) -> np.ndarray:
    """Blended with the mean of a histogram of 256 bins."""
    return blend(np.full(3, min(pixels.shape[0] * pixels.shape[1] // 256, 255)), pixels, m)


def brightness(pixels: np.ndarray, m: float) -> np.ndarray:
    return blend(np.zeros(3), pixels, m)


def sharpness(pixels: np.ndarray, m: float) -> np.ndarray:
    """Blurred by the mean of nine pixels, the central one five times; the border is not."""
    blurred = pixels.astype(float)
    for y in range(1, pixels.shape[0] - 1):
        for x in range(1, pixels.shape[1] - 1):
            around = pixels[y - 1 : y + 2, x - 1 : x + 2].sum((0, 1)) + 4.0 * pixels[y, x]
            blurred[y, x] = np.round(around / 13)
    return blend(blurred, pixels, m)


ORACLES: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "AutoContrast": auto_contrast,
    "Equalize": equalize,
    "Invert": lambda pixels, m: 255 - pixels,
    "Posterize": posterize,
    "Solarize": solarize,
    "Color": color,
    "Contrast": contrast,
    "Brightness": brightness,
    "Sharpness": sharpness,
    "SolarizeAdd": solarize_add,
}
EXACT = ("Equalize", "Invert", "Posterize", "Solarize", "SolarizeAdd")


@pytest.mark.parametrize("magnitude", [0, 3, 10, 15])
@pytest.mark.parametrize("name", ORACLES)
def test_operations_on_values_equal_their_definitions(name: str, magnitude: float) -> None:
    """Up to the rounding of a gray or blurred pixel, which an extrapolation multiplies."""
    pixels = picture()
    difference = apply(name, pixels, magnitude) - ORACLES[name](pixels, magnitude)
    allowed = 0 if name in EXACT else 1 + abs(1.8 * magnitude / 10 + 0.1 - 1)
    assert np.abs(difference).max() <= allowed


def test_operations_equal_those_of_torchvision_at_equal_strength() -> None:
    """On stored results (``scripts/maintain/oracles/augment.py``), up to the rounding of a gray
    pixel, which an extrapolation multiplies (Color), or of the result (AutoContrast)."""
    with np.load(TORCHVISION) as file:
        stored = dict(file)
    pixels = stored.pop("picture")
    assert len(stored) == 39
    for key, expected in stored.items():
        name, magnitude = key.split("/")
        seeds = range(8) if name in SIGNED else [0]  # the stored results have one of the signs
        results = [apply(name, pixels, float(magnitude), seed) for seed in seeds]
        allowed = {"AutoContrast": 1, "Color": 2}.get(name, 0)
        assert min(np.abs(result - expected.astype(int)).max() for result in results) <= allowed, (
            key
        )


@pytest.mark.parametrize(("side", "gray"), [(224, 196), (300, 255)])
def test_contrast_blends_with_a_gray_that_depends_on_the_size_alone(side: int, gray: int) -> None:
    """At magnitude 0, nine tenths of it remain in a black image."""
    black = np.zeros((side, side, 3), np.uint8)
    assert np.unique(apply("Contrast", black, 0)) == int(0.9 * gray)


def moved(pixels: np.ndarray, source: Callable[[float, float], tuple[float, float]]) -> np.ndarray:
    """Each pixel shows the one around the source of its center; gray outside."""
    h, w, _ = pixels.shape
    result = np.full_like(pixels, 128)
    for v in range(h):
        for u in range(w):
            x, y = (int(np.floor(place)) for place in source(u + 0.5, v + 0.5))
            if 0 <= x < w and 0 <= y < h:
                result[v, u] = pixels[y, x]
    return result


def source_of(name: str, m: float, h: int, w: int) -> Callable[[float, float], tuple]:
    """Where an operation of positive strength takes its pixels from."""
    cos, sin = np.cos(np.deg2rad(30 * m / 10)), np.sin(np.deg2rad(30 * m / 10))
    return {
        "Rotate": lambda x, y: (
            w / 2 + cos * (x - w / 2) - sin * (y - h / 2),
            h / 2 + sin * (x - w / 2) + cos * (y - h / 2),
        ),
        "ShearX": lambda x, y: (x + 0.3 * m / 10 * y, y),
        "ShearY": lambda x, y: (x, y + 0.3 * m / 10 * x),
        "TranslateX": lambda x, y: (x + 100 * m / 10, y),
        "TranslateY": lambda x, y: (x, y + 100 * m / 10),
    }[name]


@pytest.mark.parametrize("magnitude", [0.7, 3, 10, 19])
@pytest.mark.parametrize("name", SIGNED)
def test_operations_that_move_pixels_equal_their_definitions(name: str, magnitude: float) -> None:
    """In both directions; the nearest pixel may be another one where two are equally near."""
    pixels = picture()
    source = {
        sign: moved(pixels, source_of(name, sign * magnitude, *pixels.shape[:2]))
        for sign in (1, -1)
    }
    seen = set()
    for seed in range(12):
        result = apply(name, pixels, magnitude, seed)
        equal = {sign: (result == expected).all(-1).mean() for sign, expected in source.items()}
        sign = max(equal, key=lambda sign: equal[sign])
        assert equal[sign] > 0.995
        seen.add(sign)
    gray = all((expected == 128).all() for expected in source.values())
    assert seen == {1, -1} or gray


def test_cutout_paints_a_gray_square_with_twice_the_strength_as_its_side() -> None:
    pixels = np.zeros((60, 60, 3), np.uint8)
    sizes = set()
    for seed in range(100):
        painted = apply("Cutout", pixels, 2.5, seed)[..., 0] == 128  # 40 * 0.25 = 10, a half side
        rows, columns = painted.any(1).sum(), painted.any(0).sum()
        assert painted.sum() == rows * columns
        sizes |= {rows, columns}
    assert sizes == set(range(10, 21))


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (31, 18)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_keeps_shape_and_type(name: str, shape: tuple[int, int]) -> None:
    for magnitude in (0, 10, 15, 30):
        result = apply(name, picture(*shape), magnitude)
        assert result.shape == (*shape, 3) and result.dtype == np.uint8


@pytest.mark.parametrize("name", NEUTRAL)
def test_every_operation_changes_nothing_at_its_neutral_strength(name: str) -> None:
    for seed in range(3):
        np.testing.assert_array_equal(apply(name, picture(), NEUTRAL[name], seed), picture())


def test_operations_without_a_strength_have_their_neutral_images() -> None:
    full, flat = picture(), np.full((5, 5, 3), 77, np.uint8)
    full[0, 0], full[0, 1] = 0, 255
    np.testing.assert_array_equal(apply("AutoContrast", full, 10), full)
    np.testing.assert_array_equal(apply("Equalize", flat, 10), flat)
    np.testing.assert_array_equal(apply("Invert", apply("Invert", full, 10), 10), full)


def test_all_sixteen_operations_are_equally_frequent() -> None:
    """At magnitude 2 all but cutout have one or two results, each another picture."""
    pixels, draws = picture(32, 32), 640
    results = {
        apply(name, pixels, 2, seed).tobytes(): name
        for name in OPERATIONS
        for seed in range(8)
        if name != "Cutout"
    }
    rng = np.random.default_rng(0)
    seen = Counter(
        results.get(rand_augment(pixels, 1, 2.0, rng).tobytes(), "Cutout") for _ in range(draws)
    )
    assert len(OPERATIONS) == 16 and set(seen) == set(OPERATIONS)
    assert all(20 <= count <= 65 for count in seen.values()), seen


def test_layers_are_applied_one_after_another() -> None:
    """From the same random numbers, two layers are one layer applied to another one's result."""
    pixels = picture()
    for seed in range(20):
        first, second = np.random.default_rng(seed).integers(16, size=2)
        names = list(OPERATIONS)
        rng = np.random.default_rng(seed)
        rng.integers(16, size=2)
        image = Image.fromarray(pixels)
        for i in (first, second):
            image = OPERATIONS[names[i]](image, 10.0, rng)
        result = rand_augment(pixels, 2, 10.0, np.random.default_rng(seed))
        np.testing.assert_array_equal(result, np.asarray(image))
    assert rand_augment(pixels, 0, 10.0, np.random.default_rng(0)) is pixels
