"""Classification of a whole split: every image counts once, at any batch size."""

import dataclasses
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from vmoe import distributed, models, passes
from vmoe.analysis.statistics import standard_error
from vmoe.config import MoEConfig, ViTConfig
from vmoe.config.evaluation import Weights
from vmoe.config.preprocessing import Preprocessing
from vmoe.config.train import Loss
from vmoe.data.pipeline import (
    ORDER,
    Batch,
    check_classes,
    check_labeled,
    empty_batch,
)
from vmoe.data.reading import READING, Reading
from vmoe.data.sources import Source
from vmoe.errors import UsageError
from vmoe.evaluate.metrics import PerExample, calibration_error, check_finite, per_example
from vmoe.fields import at_least
from vmoe.nn.inputs import has_label, to_float
from vmoe.nn.patches import num_tokens
from vmoe.nn.vit import ViT
from vmoe.routing.groups import group_sizes
from vmoe.routing.load import (
    ExpertTotals,
    dropped_and_unprocessed,
    expert_totals,
    totals_of,
)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The metrics of a model on a split, and the settings that they depend on.

    If tokens are dropped, results depend on which images share a group, and so on the batch size
    and the order in which images are read. Both are therefore reported too.
    """

    data: str
    images: int
    unlabeled: int | None
    """Number of images without a label, which the metrics below leave out; None if all have one."""
    accuracy: float
    """Fraction of images whose predicted class is one of their labels."""
    accuracy_over_all: float | None
    """The accuracy with unlabeled images counted as wrong; None if all images have a label."""
    top5_accuracy: float | None
    """Fraction of images with a label among the classes of the five largest logits; None if there
    are fewer than six classes."""
    probabilities: Loss
    """The loss that trained the model: probabilities are the softmax over the classes, or the
    sigmoid of each class. The next three metrics and the metrics of each image depend on it."""
    cross_entropy: float
    """Mean in nats; with the sigmoid, summed over the classes."""
    brier: float
    """Mean squared distance between the probabilities and the targets, summed over the classes; in
    [0, 2] for the softmax."""
    calibration_error: float
    """Mean gap between confidence and accuracy, over 15 bins of confidence."""
    dropped: float | None
    """Fraction of the tokens' choices that got no slot, over all sparse blocks; None if no router
    lets tokens choose."""
    unprocessed: float | None
    """Fraction of the tokens that no routed expert processed, over all sparse blocks; None without
    sparse blocks. Shared experts, which process every token, do not count; zero experts do."""
    image_size: int
    """Side of the model's input in pixels."""
    batch_size: int
    order: str
    """The order in which the images are read, the same in every evaluation; see
    ``evaluation_order``."""
    devices: int
    """Number of devices that each batch was split over; all images of a group are on one."""
    images_per_group: dict[int, int]
    """By sparse block: maximum number of images whose tokens competed for the same slots."""
    capacity_factor: dict[int, float | None]
    """By sparse block: the capacity factor in a full group, after rounding; None if dropless."""
    images_per_second: float
    """Excludes compilation."""
    class_names: tuple[str, ...] = dataclasses.field(repr=False)
    per_example: PerExample = dataclasses.field(repr=False, compare=False)
    """The metrics of each image, in the order of the data."""
    indices: Int[np.ndarray, "b"] = dataclasses.field(repr=False, compare=False)
    """The index of each image in the source; images that could not be read are missing."""
    groups: Int[np.ndarray, "b"] | None = dataclasses.field(repr=False, compare=False)
    """Images of the same group are one observation, such as two drawings of an emoji; None if each
    image is one. See ``Source``."""
    totals: dict[int, ExpertTotals] = dataclasses.field(repr=False, compare=False)
    """By sparse block: how much each expert was used, for ``vmoe.health``."""

    @property
    def labeled(self) -> int:
        """Number of images with a label, over which the accuracy is computed."""
        return self.images - (self.unlabeled or 0)

    @property
    def standard_error(self) -> float:
        """Standard error of the accuracy; see ``paired_difference`` to compare two models.

        It is NaN for one observation.
        """
        return standard_error(*self.known(np.asarray(self.per_example.correct)))

    def known(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """The values (b,) of the images that have a label, and their groups."""
        labeled = has_label(np.asarray(self.per_example.labels))
        groups = None if self.groups is None else self.groups[labeled]
        return values[labeled], groups

    def metrics(self) -> dict[str, object]:
        """The fields by name, except hidden fields and fields that are None."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.repr}
        return {name: value for name, value in values.items() if value is not None}


class NamedEvaluation(NamedTuple):
    """One evaluation of a run.

    Attributes:
        set: the name of the evaluation set.
        weights: which parameters were evaluated.
        result: the evaluation.
    """

    set: str
    weights: Weights
    result: Evaluation


def evaluate(
    model: ViT,
    source: Source,
    reading: Reading = READING,
    *,
    preprocessing: Preprocessing | None = None,
    loss: Loss = "softmax",
) -> Evaluation:
    """Evaluates a model on every image of a source.

    Args:
        reading: how the images are read.
        preprocessing: how the images are prepared, such as ``Loaded.preprocessing``; if None, both
            sides are resized to the image size of the model. Learned positions are resampled for
            other sizes.
        loss: the loss that trained the model; it determines the probabilities.

    Raises:
        UsageError: the source has more classes than the model, the image size is not a multiple of
            the patch size, no image can be read, or no image has a label.
        Failure: a logit is NaN or infinite, or a worker died.
    """
    config, placement = model.config, model.placement
    preprocessing = preprocessing or Preprocessing(config.image_size)
    image_size = preprocessing.image_size
    check_classes(source, config.num_classes)
    check_labeled(source)
    at_least(1).check(batch_size=reading.batch_size)
    batch_size = placement.round_up(reading.batch_size)
    _, shards = placement.process_shard()
    program = _measure(model, loss)
    empty = empty_batch(batch_size // shards, source.max_labels, preprocessing)
    jax.block_until_ready(program(placement.make_global_array(empty)))  # compiles
    start = time.perf_counter()
    measured = passes.measure(program, source, preprocessing, reading, placement)
    seconds = time.perf_counter() - start
    images = measured.outputs
    check_finite(images.cross_entropy, source.name)
    labeled = has_label(np.asarray(images.labels))
    if not labeled.any():
        raise distributed.synchronized(UsageError(f"{source.name}: no image has a label"))
    known = PerExample(*(np.asarray(values)[labeled] for values in images))
    unlabeled = len(labeled) - len(known.labels)
    groups = getattr(source, "groups", None)
    blocks = {i: totals_of(sums) for i, sums in measured.sums.items()}
    dropped, unprocessed = map(float, dropped_and_unprocessed(map(vars, blocks.values())))
    return Evaluation(
        data=source.name,
        images=len(labeled),
        unlabeled=unlabeled or None,
        accuracy=float(known.correct.mean()),
        accuracy_over_all=float(images.correct.mean()) if unlabeled else None,
        top5_accuracy=float(known.in_top5.mean()) if len(source.class_names) > 5 else None,
        probabilities=loss,
        cross_entropy=float(known.cross_entropy.mean(dtype=np.float64)),
        brier=float(known.brier.mean(dtype=np.float64)),
        calibration_error=calibration_error(*map(np.asarray, (known.confidence, known.correct))),
        dropped=dropped if config.can_drop else None,
        unprocessed=unprocessed if blocks else None,
        image_size=image_size,
        batch_size=batch_size,
        order=ORDER,
        devices=placement.devices,
        images_per_group={i: moe.router.images_per_group for i, moe in config.moe_blocks.items()},
        capacity_factor={
            i: _capacity_factor(config, moe, batch_size // placement.devices, image_size)
            for i, moe in config.moe_blocks.items()
        },
        images_per_second=len(labeled) / seconds,
        class_names=source.class_names,
        per_example=images,
        indices=measured.indices,
        groups=None if groups is None else groups[measured.indices],
        totals=blocks,
    )


class Difference(NamedTuple):
    """How much more accurate one model is than another.

    Attributes:
        accuracy: accuracy of the first model minus accuracy of the second, in [-1, 1].
        standard_error: standard error of the difference, over the images; NaN for one observation.
    """

    accuracy: float
    standard_error: float


def paired_difference(first: Evaluation, second: Evaluation) -> Difference:
    """The difference in accuracy of two models, or of two settings of one, on the same images.

    Images that both predict correctly, or both wrongly, do not contribute. So the standard error is
    smaller than for two independent samples. Images without a label are left out, and images of the
    same group are one observation (``Evaluation.groups``). The standard error does not cover
    training: another seed may differ more.

    Raises:
        UsageError: the evaluations are not of the same images: the labels differ, or the places of
            the images in their data, such as if another image could not be read.
    """
    pairs = {
        "labels": (first.per_example.labels, second.per_example.labels),
        "indices of the images": (first.indices, second.indices),
    }
    if differing := [name for name, pair in pairs.items() if not np.array_equal(*pair)]:
        raise UsageError(
            f"evaluations of {first.data} ({first.images} images) and {second.data} "
            f"({second.images}): the {differing[0]} differ, evaluate the same images"
        )
    of_first, of_second = (np.asarray(each.per_example.correct, float) for each in (first, second))
    differences, groups = first.known(of_first - of_second)
    return Difference(float(differences.mean()), standard_error(differences, groups))


def check_evaluation(
    model: ViT, *, batch_size: int, preprocessing: Preprocessing, loss: Loss, max_labels: int
) -> None:
    """Traces the program of ``evaluate``, which then reuses the trace.

    Args:
        model: its parameters may be ``jax.ShapeDtypeStruct``.
        batch_size: images per batch, over all devices; rounded up to a multiple of the devices.
        loss: the loss that trains the model.
        max_labels: largest number of labels of an image in the source.

    Raises:
        UsageError: image_size is not a multiple of the patch size, or the capacity leaves no slot.
    """
    batch = empty_batch(model.placement.round_up(batch_size), max_labels, preprocessing)
    models.shapes_of(_measure(model, loss), batch)


@models.compiled
def _measure(
    model: ViT, loss: Loss, batch: Batch
) -> tuple[PerExample, dict[int, dict[str, jax.Array]]]:
    logits, records = model.forward(to_float(batch.images), valid=batch.valid)
    totals = {i: expert_totals(record) for i, record in records.items()}
    return model.placement.replicate((per_example(logits, jnp.asarray(batch.labels), loss), totals))


def _capacity_factor(config: ViTConfig, moe: MoEConfig, b: int, image_size: int) -> float | None:
    """The capacity factor, after rounding, of the groups that the b images of one device form."""
    if moe.router.dropless:
        return None
    _, images = group_sizes(b, moe.router.images_per_group)
    s = images * num_tokens(dataclasses.replace(config, image_size=image_size))
    if moe.router.logits_per == "slot":  # its slots are parameters, independent of image_size
        return moe.slots(images * num_tokens(config)) * moe.num_experts / s
    return moe.rounded_factor(s)
