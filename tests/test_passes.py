"""Images through a program: every image once, in the order of its source, without padding."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from vmoe import passes
from vmoe.config.preprocessing import Preprocessing
from vmoe.data.pipeline import Batch
from vmoe.data.reading import Reading
from vmoe.data.sources import Example, Source, open_source
from vmoe.data.sources.views import View
from vmoe.errors import UsageError

SIZE_8 = Preprocessing(8)


@pytest.fixture(scope="module")
def digits() -> Source:
    return open_source("digits", "validation")


@dataclasses.dataclass(frozen=True, eq=False)
class WithoutThree(View):
    """Another source, of which every third image cannot be read."""

    def __getitem__(self, index: int) -> Example:
        if index % 3 == 0:
            raise UsageError(f"image {index}: cannot be read")
        return self.source[index]


def program(batch: Batch) -> tuple[dict[str, jnp.ndarray], dict[str, jnp.ndarray]]:
    pixels = jnp.asarray(batch.images).sum((1, 2, 3)).astype(jnp.float32)
    real = jnp.where(batch.valid, pixels, 0)
    outputs = {"pixels": pixels, "labels": jnp.asarray(batch.labels)}
    return outputs, {"pixels": real.sum(), "images": jnp.asarray(batch.valid).sum()}


@pytest.mark.parametrize("batch_size", [1, 64, 180, 500])
def test_outputs_are_in_the_order_of_the_source_at_any_batch_size(
    digits: Source, batch_size: int
) -> None:
    measured = passes.measure(program, digits, SIZE_8, Reading(batch_size))
    expected = [int(np.asarray(digits[i].image, int).sum()) for i in range(len(digits))]
    assert measured.outputs["pixels"].tolist() == expected
    labels = [digits.labels_of(i)[0] for i in range(len(digits))]
    assert measured.outputs["labels"][:, 0].tolist() == labels
    assert measured.indices.tolist() == list(range(len(digits)))
    assert measured.sums == {"pixels": sum(expected), "images": len(digits)}


def test_an_image_that_cannot_be_read_has_no_output_and_moves_no_other(digits: Source) -> None:
    reasons = list[str]()
    source, reading = WithoutThree(digits), Reading(64, on_unreadable=reasons.append)
    measured = passes.measure(program, source, SIZE_8, reading)
    whole = passes.measure(program, digits, SIZE_8, Reading(64))
    rest = [i for i in range(len(digits)) if i % 3]
    assert measured.indices.tolist() == rest and len(reasons) == len(digits) - len(rest)
    for ours, theirs in zip(measured.outputs.values(), whole.outputs.values(), strict=True):
        np.testing.assert_array_equal(ours, theirs[rest])
    with pytest.raises(UsageError, match="image .*: cannot be read"):
        passes.measure(program, source, SIZE_8, Reading(64))


def test_sums_of_batches_are_added_up_in_64_bits(digits: Source) -> None:
    def large(batch: Batch) -> tuple[tuple[()], dict[str, jnp.ndarray]]:
        return (), {"float": jnp.float32(2**24) + batch.valid.sum(), "int": jnp.int32(2**31 - 1)}

    sums = passes.measure(large, digits, SIZE_8, Reading(1)).sums
    assert sums == {"float": 180 * 2.0**24, "int": 180 * (2**31 - 1)}


def test_a_batch_is_run_before_the_results_of_the_one_before_are_used(digits: Source) -> None:
    events = list[str]()

    def noted(batch: Batch) -> tuple[jnp.ndarray, None]:
        events.append("run")
        return jnp.asarray(batch.labels), None

    batches = passes.in_batches(np.zeros((10, 8, 8, 3), np.float32), batch_size=4)
    for part in passes.run(noted, batches):
        events.append(f"{len(part.outputs)} used")
    assert events == ["run", "run", "4 used", "run", "4 used", "2 used"]


def test_arrays_are_cut_into_batches_of_one_size() -> None:
    images, labels = np.arange(7 * 12.0).reshape(7, 2, 2, 3), np.arange(14).reshape(7, 2)
    batches = list(passes.in_batches(images, labels, batch_size=3))
    assert [len(batch.images) for batch in batches] == [3, 3, 3]
    assert [batch.valid.sum() for batch in batches] == [3, 3, 1]
    joined = Batch(*map(np.concatenate, zip(*batches, strict=True)))
    np.testing.assert_array_equal(joined.images[joined.valid], images)
    np.testing.assert_array_equal(joined.labels[joined.valid], labels)
    assert (joined.labels[~joined.valid] == -1).all() and not joined.images[~joined.valid].any()
    (unlabeled,) = passes.in_batches(images)
    assert (unlabeled.labels == -1).all()
