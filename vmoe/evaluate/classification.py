"""A model on the whole of a split: every image once, whatever the batch size."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import numpy as np
from flax import nnx

from vmoe import distributed
from vmoe.analysis import capture
from vmoe.analysis.measures import choices_and_drops
from vmoe.config import MoEConfig, Soft, ViTConfig
from vmoe.data.pipeline import Batch, check_classes, empty_batch, evaluation_batches
from vmoe.data.sources import Source
from vmoe.errors import Failure, UsageError
from vmoe.evaluate.metrics import PerExample, calibration_error, outcomes
from vmoe.nn.vit import ViT, num_tokens
from vmoe.routing import slots_and_factor
from vmoe.routing.groups import group_sizes


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How a model did on a split.

    Where tokens are dropped, results depend on which images share a group: on the batch size and
    the order of the data. So the grouping stands beside them.
    """

    data: str
    images: int
    accuracy: float
    """Share of images whose first guess is right."""
    top5_accuracy: float
    """Share of images whose class is among the first five guesses."""
    cross_entropy: float
    """Mean, in nats, of the softmax."""
    brier: float
    """Mean squared distance of the probabilities from the label, in [0, 2]."""
    calibration_error: float
    """Mean gap between confidence and accuracy, over 15 bins of confidence."""
    dropped: float
    """Share of the tokens' choices that got no slot."""
    image_size: int
    """Side of the images as the model saw them, in pixels."""
    batch_size: int
    devices: int
    """Among which each batch was spread; groups are of images of one device."""
    images_per_group: dict[int, int]
    """By sparse block: most images whose tokens competed for slots."""
    capacity_factor: dict[int, float | None]
    """By sparse block: slots per token and choice in a full group, after rounding; None where
    there is no capacity."""
    images_per_second: float
    """After compiling."""
    class_names: tuple[str, ...] = dataclasses.field(repr=False)
    outcomes: PerExample = dataclasses.field(repr=False, compare=False)
    """What each image got, in the order of the data."""

    def figures(self) -> dict[str, object]:
        """All but the single images."""
        names = [field.name for field in dataclasses.fields(self)]
        return {n: getattr(self, n) for n in names if n not in ("class_names", "outcomes")}


class NamedEvaluation(NamedTuple):
    """An evaluation of a run: the name of the set, whose weights, and the result."""

    set: str
    weights: Literal["raw", "ema"]
    result: Evaluation


def evaluate(
    model: ViT,
    source: Source,
    *,
    batch_size: int = 256,
    image_size: int | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Evaluates a model on every image of a source.

    Args:
        image_size: side to which the images are resized; the model's own if None. Positions are
            resampled for another.
        on_batch: called before each batch, and before compiling; what it raises ends the evaluation.

    Raises:
        UsageError: the images do not fit the model, or the batch holds none.
        Failure: the model's logits are NaN or infinite.
    """
    config = model.config
    image_size = config.image_size if image_size is None else image_size
    check_classes(source, config.num_classes)
    for name, value in (("batch_size", batch_size), ("image_size", image_size)):
        if value < 1:
            raise UsageError(f"{name}={value}: use at least 1")
    on_batch()
    placement = model.placement
    batch_size = placement.round_up(batch_size)
    part, parts = placement.process_shard()
    graph, state = nnx.split(model)
    nothing = empty_batch(batch_size // parts, config.num_classes, image_size)
    jax.block_until_ready(_measure(graph, state, placement.make_global_array(nothing)))  # compiles
    start = time.perf_counter()
    results, made, dropped = [], 0.0, 0.0
    for batch in evaluation_batches(
        source,
        batch_size=batch_size,
        num_classes=config.num_classes,
        image_size=image_size,
        share=(part, parts),
    ):
        on_batch()
        found, valid, counts = jax.device_get(
            _measure(graph, state, placement.make_global_array(batch))
        )
        results.append(PerExample(*(values[valid] for values in found)))
        made, dropped = made + float(counts[0]), dropped + float(counts[1])
    seconds = time.perf_counter() - start
    every = PerExample(*map(np.concatenate, zip(*results, strict=True)))
    if broken := int((~np.isfinite(every.cross_entropy)).sum()):
        told = f"{source.name}: {broken} of {len(source)} images have logits that are NaN"
        raise distributed.synchronized(Failure(told))
    correct = every.guesses == every.labels
    blocks = {block: config.moe_of(block) for block in config.sparse_blocks}
    return Evaluation(
        data=source.name,
        images=len(correct),
        accuracy=float(correct.mean()),
        top5_accuracy=float(every.in_top5.mean()),
        cross_entropy=float(every.cross_entropy.mean(dtype=np.float64)),
        brier=float(every.brier.mean(dtype=np.float64)),
        calibration_error=calibration_error(every.confidence, correct),
        dropped=dropped / max(made, 1),
        image_size=image_size,
        batch_size=batch_size,
        devices=placement.devices,
        images_per_group={block: moe.images_per_group for block, moe in blocks.items()},
        capacity_factor={
            block: _capacity_factor(config, moe, batch_size // placement.devices, image_size)
            for block, moe in blocks.items()
        },
        images_per_second=len(correct) / seconds,
        class_names=source.class_names,
        outcomes=every,
    )


@functools.partial(jax.jit, static_argnums=0)
def _measure(
    graph: nnx.GraphDef, state: nnx.State, batch: Batch
) -> tuple[PerExample, jax.Array, tuple[jax.Array, jax.Array]]:
    model = nnx.merge(graph, state)
    logits, records = capture(model, batch.images, valid=batch.valid)
    found = outcomes(logits, batch.labels), batch.valid, choices_and_drops(records)
    return model.placement.replicate(found)


def _capacity_factor(
    config: ViTConfig, moe: MoEConfig, images: int, image_size: int
) -> float | None:
    """Of the groups that so many images, those of one device, form."""
    if moe.dropless:
        return None
    _, images = group_sizes(images, moe.images_per_group)
    s = images * num_tokens(dataclasses.replace(config, image_size=image_size))
    if isinstance(moe.router, Soft):  # whose slots are parameters, as many as the trained size asks
        return slots_and_factor(moe, images * num_tokens(config))[0] * moe.num_experts / s
    return slots_and_factor(moe, s)[1]
