"""A model on the whole of a split: every image once, whatever the batch size."""

import dataclasses
import functools
import time
from typing import Any

import jax
import numpy as np
from flax import nnx

from vmoe.analysis import capture
from vmoe.analysis.measures import choices_and_drops
from vmoe.config import UsageError
from vmoe.data.pipeline import Batch, check_fit, evaluation_batches
from vmoe.data.sources import Source
from vmoe.evaluate.metrics import classification_sums
from vmoe.nn.vit import ViT


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
    cross_entropy: float
    """Mean, in nats."""
    dropped: float
    """Share of the tokens' choices that got no slot."""
    batch_size: int
    images_per_group: int | None
    """Most images whose tokens compete for slots; None for a dense model."""
    images_per_second: float
    """After compiling."""


def evaluate(model: ViT, source: Source, *, batch_size: int = 256) -> Evaluation:
    """Evaluates a model on every image of a source.

    Raises:
        UsageError: the images do not fit the model, or the batch holds none.
    """
    config = model.config
    check_fit(source, config)
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size}: use at least 1")
    graph, state = nnx.split(model)
    batches = functools.partial(
        evaluation_batches, source, batch_size=batch_size, num_classes=config.num_classes
    )
    jax.block_until_ready(_measure(graph, state, next(batches())))  # compiles
    start = time.perf_counter()
    total: dict[str, Any] = {}
    for batch in batches():
        sums = jax.device_get(_measure(graph, state, batch))
        total = {name: total.get(name, 0) + np.float64(value) for name, value in sums.items()}
    seconds = time.perf_counter() - start
    images, sparse = int(total["images"]), config.sparse_blocks
    return Evaluation(
        data=source.name,
        images=images,
        accuracy=float(total["correct"] / images),
        cross_entropy=float(total["cross_entropy"] / images),
        dropped=float(total["dropped"] / max(total["choices"], 1)),
        batch_size=batch_size,
        images_per_group=config.moe_of(sparse[0]).images_per_group if sparse else None,
        images_per_second=images / seconds,
    )


@functools.partial(jax.jit, static_argnums=0)
def _measure(graph: nnx.GraphDef, state: nnx.State, batch: Batch) -> dict[str, jax.Array]:
    logits, records = capture(nnx.merge(graph, state), batch.images, valid=batch.valid)
    made, dropped = choices_and_drops(records)
    sums = classification_sums(logits, batch.labels, batch.valid)
    return sums | {"choices": made, "dropped": dropped}
