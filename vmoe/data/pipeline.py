"""From a source to batches: the way of an image from its file to the model's door.

    source -> shuffle -> augment -> batch -> to [-1, 1] -> mixup -> Batch

Batch number i of training follows from the seed and i alone. Whoever knows the step knows where
the data stands, so nothing about the data needs to be saved.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Bool, Float

from vmoe.config import Data, UsageError
from vmoe.data.augment import augment
from vmoe.data.images import to_float
from vmoe.data.mixing import mixup
from vmoe.data.sources import Example, Source


class Batch(NamedTuple):
    """What a model is trained or evaluated on.

    Attributes:
        images: pixels in [-1, 1].
        labels: probabilities; sum to 1 over y.
        valid: False for images that only fill the batch.
    """

    images: Float[np.ndarray, "b h w 3"]
    labels: Float[np.ndarray, "b y"]
    valid: Bool[np.ndarray, "b"]


def training_batches(
    source: Source, config: Data, *, batch_size: int, num_classes: int, seed: int
) -> grain.MapDataset[Batch]:
    """Endless batches by number, each epoch in an order of its own.

    Raises:
        UsageError: a label that the model has no class for, or fewer images than a batch holds.
    """
    _check(source, num_classes)
    if len(source) < batch_size:
        raise UsageError(f"batch_size={batch_size} is more than the {len(source)} of {source.name}")

    def change(example: Example, rng: np.random.Generator) -> Example:
        return Example(augment(example.image, config, rng), example.label)

    def mix(batch: Batch, rng: np.random.Generator) -> Batch:
        images, labels = mixup(batch.images, batch.labels, config.mixup, rng)
        return batch._replace(images=images, labels=labels)

    batches = (
        grain.MapDataset.source(source)
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(change)
        .batch(batch_size, batch_fn=lambda examples: _batch(examples, num_classes, batch_size))
    )
    return batches.random_map(mix) if config.mixup else batches


def evaluation_batches(source: Source, *, batch_size: int, num_classes: int) -> Iterator[Batch]:
    """Every image once, in order; the last batch is filled up with images that are not valid.

    Raises:
        UsageError: a label that the model has no class for.
    """
    _check(source, num_classes)
    for start in range(0, len(source), batch_size):
        examples = [source[i] for i in range(start, min(start + batch_size, len(source)))]
        yield _batch(examples, num_classes, batch_size)


def _check(source: Source, num_classes: int) -> None:
    if len(source.class_names) > num_classes:
        raise UsageError(
            f"{source.name} has {len(source.class_names)} classes, "
            f"model.num_classes={num_classes}: raise it"
        )


def _batch(examples: Sequence[Example], num_classes: int, batch_size: int) -> Batch:
    missing = batch_size - len(examples)
    images = to_float(np.stack([example.image for example in examples]))
    labels = np.eye(num_classes, dtype=np.float32)[[example.label for example in examples]]
    return Batch(
        np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0))),
        np.pad(labels, ((0, missing), (0, 0))),
        np.arange(batch_size) < len(examples),
    )
