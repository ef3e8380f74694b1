"""Pictures of a run: training images as the model gets them, and the worst errors."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy.special import expit, softmax

import vmoe
from tests.events import pictures
from vmoe.config import RoutingOverrides
from vmoe.config.preprocessing import Preprocessing
from vmoe.config.train import Loss
from vmoe.data.pipeline import training_batches
from vmoe.data.reading import Reading
from vmoe.data.sources import Example, Source, open_source
from vmoe.data.sources.views import View
from vmoe.errors import UsageError
from vmoe.evaluate import Evaluation, evaluate
from vmoe.factory import Loaded
from vmoe.train.pictures import ERRORS, EXAMPLES, Tile, examples, sheet, worst_errors
from vmoe.train.step import make_inputs, step_key
from vmoe.workdir.layout import read_config

SIDE = 8  # of a digit in pixels
SIZE_8 = Preprocessing(SIDE)
GAP = 6


@dataclasses.dataclass(frozen=True, eq=False)
class Unreadable(View):
    """Another source, with some images that cannot be read."""

    indices: tuple[int, ...]

    def __getitem__(self, index: int) -> Example:
        if index in self.indices:
            raise UsageError(f"image {index}: cannot be read")
        return self.source[index]


@pytest.fixture(scope="module")
def digits() -> Source:
    return open_source("digits", "validation")


@pytest.fixture(scope="module")
def loaded(tiny_run: Path) -> Loaded:
    """A model whose predictions do not depend on the batch: every token has a slot."""
    return vmoe.load(tiny_run, routing=RoutingOverrides(capacity_factor=4.0))


@pytest.fixture(scope="module")
def result(loaded: Loaded, digits: Source) -> Evaluation:
    return evaluate(loaded.model, digits)


@pytest.fixture(scope="module")
def errors(loaded: Loaded, digits: Source) -> dict[int, Tile]:
    return errors_of(loaded, digits, "softmax")


def errors_of(loaded: Loaded, digits: Source, loss: Loss) -> dict[int, Tile]:
    """All errors by index, the worst one first, from the probabilities of all classes."""
    images = [np.asarray(digits[i].image) for i in range(len(digits))]
    logits = np.asarray(jax.jit(loaded.model.__call__)(loaded.preprocess(images)), float)
    p = softmax(logits, axis=1) if loss == "softmax" else expit(logits)
    labels = np.array([digits.labels_of(i)[0] for i in range(len(digits))])
    best, true = p.argmax(1), p[np.arange(len(p)), labels]
    others = np.log1p(-p).sum(1) - np.log1p(-true) if loss == "sigmoid" else 0.0
    return {
        int(i): Tile(
            images[i], [f"true {true[i]:.1%}: {labels[i]}", f"pred {p[i, best[i]]:.1%}: {best[i]}"]
        )
        for i in np.argsort(np.log(true) + others)
        if best[i] != labels[i]
    }


def assert_tiles(tiles: list[Tile], expected: list[Tile]) -> None:
    for tile, other in zip(tiles, expected, strict=True):
        np.testing.assert_array_equal(tile.pixels, other.pixels)
        assert list(tile.lines) == list(other.lines)


def enlarged(pixels: np.ndarray) -> np.ndarray:
    return pixels.repeat(18, axis=0).repeat(18, axis=1)


def test_tiles_are_shown_in_rows_each_with_its_pixels_enlarged_and_text_below() -> None:
    images = np.random.default_rng(0).integers(0, 255, (10, SIDE, SIDE, 3), dtype=np.uint8)
    picture = sheet([Tile(image, ["one", "two"][: i % 3]) for i, image in enumerate(images)])
    side = SIDE * 18
    height = side + GAP + 2 * 14
    assert picture.shape == (GAP + 2 * height, GAP + 8 * (side + GAP), 3)
    for i, image in enumerate(images):
        y, x = GAP + i // 8 * height, GAP + i % 8 * (side + GAP)
        np.testing.assert_array_equal(picture[y : y + side, x : x + side], enlarged(image))
        below = picture[y + side : y + height, x : x + side]
        assert (below.min() < 128) == (i % 3 > 0)  # black on white


def test_a_large_image_is_shrunk_and_a_long_text_is_cut_off() -> None:
    black = np.zeros((500, 500, 3), np.uint8)
    picture = sheet([Tile(black, ["a long name of a class " * 10]), Tile(black, [])])
    assert picture.shape == (2 * GAP + 192 + 14, GAP + 2 * (192 + GAP), 3)
    assert (picture[GAP + 192 :, GAP + 192 :] == 255).all()


def test_examples_name_the_classes_and_their_weights() -> None:
    images = np.stack([np.full((SIDE, SIDE, 3), v, np.float32) for v in (-1, 0, 1, 1)])
    labels = np.array(
        [[0, 1, 0, 0, 0], [0.7, 0.3, 0, 0, 0], [1, 1, 1, 1, 1], [0.96, 0.01, 0.01, 0.01, 0.01]],
        np.float32,
    )
    tiles = examples(images, labels, ["cat", "dog", "emu", "fox"])
    assert [tile.pixels.flat[0] for tile in tiles] == [0, 128, 255, 255]
    assert [list(tile.lines) for tile in tiles] == [
        ["dog"],
        ["70%: cat", "30%: dog"],
        ["cat", "dog", "emu", "and 2 more"],
        ["96%: cat"],
    ]


def test_a_run_shows_the_batch_of_its_first_row_as_the_model_got_it(tiny_run: Path) -> None:
    config = read_config(tiny_run)
    shown = {tag: step for tag, step in pictures(tiny_run) if tag == "train/examples"}
    assert shown == {"train/examples": config.log_every}
    number = config.log_every - 1
    batch = training_batches(open_source("digits", "train"), config)[number].batch
    inputs = jax.jit(lambda batch: make_inputs(batch, step_key(config, number), config))(batch)
    images, targets, _ = map(np.asarray, inputs)
    expected = sheet(examples(images, targets, [str(digit) for digit in range(10)]))
    picture = pictures(tiny_run)["train/examples", config.log_every]
    np.testing.assert_array_equal(picture, expected)
    first = np.round((images[0] + 1) * 127.5)
    assert np.abs(picture[GAP : GAP + 144 : 18, GAP : GAP + 144 : 18] - first).max() <= 1
    assert config.batch_size <= EXAMPLES


def test_a_run_shows_the_worst_errors_of_its_evaluation(tiny_run: Path, digits: Source) -> None:
    result = evaluate(vmoe.load(tiny_run).model, digits)
    picture = pictures(tiny_run)["validation_raw/worst_errors", 60]
    np.testing.assert_array_equal(picture, sheet(worst_errors(result, digits, SIZE_8)))


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_the_worst_errors_are_the_wrong_images_of_the_largest_losses(
    loss: Loss, loaded: Loaded, digits: Source
) -> None:
    result, errors = evaluate(loaded.model, digits, loss=loss), errors_of(loaded, digits, loss)
    assert_tiles(worst_errors(result, digits, SIZE_8), list(errors.values())[:ERRORS])


def test_images_that_an_evaluation_could_not_read_do_not_shift_the_others(
    loaded: Loaded, digits: Source, errors: dict[int, Tile]
) -> None:
    broken = Unreadable(digits, (0, next(iter(errors))))
    result = evaluate(loaded.model, broken, Reading(on_unreadable=lambda error: None))
    expected = [tile for i, tile in errors.items() if i not in broken.indices]
    assert_tiles(worst_errors(result, broken, SIZE_8), expected[:ERRORS])


def test_an_image_that_cannot_be_read_again_is_reported_and_left_out(
    digits: Source, result: Evaluation, errors: dict[int, Tile]
) -> None:
    broken, messages = Unreadable(digits, (next(iter(errors)),)), []
    tiles = worst_errors(result, broken, SIZE_8, Reading(on_unreadable=messages.append))
    assert_tiles(tiles, list(errors.values())[1:ERRORS])
    assert messages == [f"image {broken.indices[0]}: cannot be read"]
    with pytest.raises(UsageError, match="cannot be read"):
        worst_errors(result, broken, SIZE_8)
