"""Decoded pixels become images of the model's size and range."""

import hashlib
import json
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vmoe.checkpoints import from_hugging_face
from vmoe.config import from_json, to_json
from vmoe.config.preprocessing import Preprocessing
from vmoe.data.crops import resize_and_crop
from vmoe.data.decode import decode
from vmoe.data.resize import resize
from vmoe.errors import UsageError
from vmoe.nn.inputs import to_float

GOLDEN = Path(__file__).parents[1] / "golden" / "preprocess" / "evaluation.npz"
TRANSFORMERS = GOLDEN.with_name("transformers.npz")
AUTHORS = {  # by the name of the golden: `decode|resize(384)|value_range(-1,1)` and so on
    "finetune": Preprocessing(384, interpolation="tf_bilinear"),
    "cifar": Preprocessing(128, interpolation="tf_bilinear"),
    "fewshot": Preprocessing(224, 256, interpolation="tf_bilinear"),
    "pretrain": Preprocessing(224, 256, keep_aspect=True, interpolation="tf_area"),
}
SHAPES = [(8, 8), (20, 7), (3, 40), (33, 47), (101, 64), (64, 101), (61, 60)]
FILTERS = ["nearest", "bilinear", "bicubic", "lanczos"]


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


def test_pixels_become_float32_from_minus_one_to_one() -> None:
    pixels = np.array([0, 51, 255], np.uint8).reshape(1, 1, 3)
    for dtype in (np.uint8, np.float32):
        np.testing.assert_allclose(to_float(pixels.astype(dtype)).ravel(), [-1, -0.6, 1], atol=1e-6)
        assert to_float(pixels.astype(dtype)).dtype == np.float32


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("interpolation", FILTERS)
def test_a_whole_image_is_resized_to_a_square_as_by_pillow(
    shape: tuple[int, int], interpolation: str
) -> None:
    pillow = Image.fromarray(noise(*shape)).resize(
        (16, 16), Image.Resampling[interpolation.upper()]
    )
    ours = resize_and_crop(noise(*shape), Preprocessing(16, interpolation=interpolation))
    np.testing.assert_array_equal(ours, np.asarray(pillow))


@pytest.mark.parametrize("name", ["vit", "vit_lanczos", "deit", "dinov2"])
def test_pixels_equal_those_of_the_image_processors_of_transformers(name: str) -> None:
    """Stored results of its processors, given the JSON that they save."""
    with np.load(TRANSFORMERS) as stored:
        config = json.loads(str(stored[f"{name}/config"]))
        for i in range(4):
            theirs = stored[f"{name}/{i}"]
            ours = resize_and_crop(
                stored[f"picture/{i}"], from_hugging_face.preprocessing(config, len(theirs))
            )
            np.testing.assert_array_equal(ours, theirs)


def test_an_image_of_the_model_size_is_left_as_it_is() -> None:
    np.testing.assert_array_equal(resize_and_crop(noise(9, 9), Preprocessing(9)), noise(9, 9))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(("size", "crop_pct"), [(16, 0.9), (21, 0.875), (24, 1.0), (15, 0.95)])
@pytest.mark.parametrize("squash", [False, True])
def test_a_crop_of_timm_equals_its_calls_of_pillow(
    shape: tuple[int, int], interpolation: str, size: int, crop_pct: float, squash: bool
) -> None:
    """The shorter side, or both, become floor(size / crop_pct); half a pixel rounds to even."""
    resize_to, (h, w) = math.floor(size / crop_pct), shape
    if squash:
        w, h = resize_to, resize_to
    elif w <= h:
        w, h = resize_to, int(resize_to * h / w)
    else:
        w, h = int(resize_to * w / h), resize_to
    image = Image.fromarray(noise(*shape)).resize((w, h), Image.Resampling[interpolation.upper()])
    left, top = int(round((w - size) / 2.0)), int(round((h - size) / 2.0))
    oracle = image.crop((left, top, left + size, top + size))
    preprocessing = Preprocessing(size, resize_to, not squash, interpolation)
    np.testing.assert_array_equal(resize_and_crop(noise(*shape), preprocessing), np.asarray(oracle))


@pytest.mark.parametrize("name", AUTHORS)
@pytest.mark.parametrize("i", [0, 3, 4])
def test_evaluation_images_equal_those_of_the_authors(name: str, i: int) -> None:
    """The oracle is their pipeline in TensorFlow on an image of 500 x 375, 33 x 47, 120 x 90."""
    with np.load(GOLDEN) as golden:
        arrays = {key: golden[key] for key in golden.files}
    image = decode(arrays[f"image/{i}"].tobytes(), f"image/{i}")
    pixels = resize_and_crop(image, AUTHORS[name])
    y, x, channel = arrays[f"{name}/probe_yxc/{i}"].T.astype(int)
    probes, area = arrays[f"{name}/probe/{i}"], name == "pretrain"
    np.testing.assert_allclose(
        to_float(pixels)[y, x, channel], probes, rtol=0, atol=1e-4 if area else 2e-7
    )
    if not area:
        digest = hashlib.sha256(np.ascontiguousarray(pixels)).hexdigest()
        assert pixels.dtype == np.uint8 and digest == str(arrays[f"{name}/sha256/{i}"])
    elif i:  # every second row and column is stored
        stored = arrays[f"{name}/fixed16/{i}"] / 256
        np.testing.assert_allclose(pixels[::2, ::2], stored, rtol=0, atol=0.01)


def test_half_a_pixel_beside_a_crop_rounds_down_in_tensorflow_and_to_even_in_torchvision() -> None:
    """Seven columns become four: 1.5 are left on each side of the crop."""
    columns = np.broadcast_to(np.arange(7, dtype=np.uint8)[:, None], (7, 7, 3))
    for interpolation, first in (("tf_bilinear", 1), ("tf_area", 1), ("bilinear", 2)):
        pixels = resize_and_crop(columns, Preprocessing(4, 7, interpolation=interpolation))
        assert pixels[0].tolist() == [[x] * 3 for x in range(first, first + 4)]


def test_the_mean_over_an_area_equals_the_mean_of_the_repeated_pixels() -> None:
    preprocessing = Preprocessing(4, interpolation="tf_area")
    repeated = noise(6, 9).repeat(4, axis=0).repeat(4, axis=1).astype(np.float64)
    oracle = repeated.reshape(4, 6, 4, 9, 3).mean(axis=(1, 3))
    pixels = resize_and_crop(noise(6, 9), preprocessing)
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, oracle, rtol=1e-6)


@pytest.mark.parametrize("interpolation", ["bicubic", "tf_area"])
@pytest.mark.parametrize("shape", [(1, 1000), (1000, 1)])
def test_of_a_very_long_image_only_the_middle_is_resized(
    shape: tuple[int, int], interpolation: str
) -> None:
    preprocessing = Preprocessing(16, 20, keep_aspect=True, interpolation=interpolation)
    h, w = (20 * side for side in shape)
    whole = resize(noise(*shape), h, w, interpolation)
    oracle = whole[(h - 16) // 2 :, (w - 16) // 2 :][:16, :16].astype(float)
    tracemalloc.start()
    pixels = resize_and_crop(noise(*shape), preprocessing)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_allclose(pixels, oracle, rtol=0, atol=1e-3)
    assert peak < 2e6, f"{peak:,} bytes"


def test_a_pipeline_scales_with_the_image_size() -> None:
    preprocessing = Preprocessing(224, 256, keep_aspect=True, interpolation="tf_area")
    assert preprocessing.scaled(112) == Preprocessing(112, 128, True, "tf_area")
    assert preprocessing.scaled(224) == preprocessing
    assert Preprocessing(224).scaled(384) == Preprocessing(384)


def test_preprocessing_survives_json() -> None:
    for preprocessing in (*AUTHORS.values(), Preprocessing(8)):
        assert from_json(Preprocessing, to_json(preprocessing)) == preprocessing


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(image_size=0), "preprocessing.image_size=0: use at least 1"),
        (
            dict(image_size=8, resize_to=7),
            "preprocessing.resize_to=7 with preprocessing.image_size=8",
        ),
        (
            dict(image_size=8, resize_to=81),
            "resize_to=81 .* use 1 to 10 times the size of the image",
        ),
    ],
)
def test_impossible_pipelines_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Preprocessing(**fields)
