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

from vmoe.config import Train, UsageError, ViTConfig
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


def training_batches(source: Source, config: Train) -> grain.MapDataset[Batch]:
    """Endless batches by number, each epoch in an order of its own.

    Raises:
        UsageError: the images do not fit the model, or are fewer than a batch holds.
    """
    data, batch_size, num_classes = config.data, config.batch_size, config.model.num_classes
    check_fit(source, config.model)
    if len(source) < batch_size:
        raise UsageError(f"batch_size={batch_size} is more than the {len(source)} of {source.name}")

    def change(example: Example, rng: np.random.Generator) -> Example:
        return Example(augment(example.image, data, rng), example.label)

    def mix(batch: Batch, rng: np.random.Generator) -> Batch:
        images, labels = mixup(batch.images, batch.labels, data.mixup, rng)
        return batch._replace(images=images, labels=labels)

    batches = (
        grain.MapDataset.source(source)
        .seed(config.seed)
        .shuffle()
        .repeat()
        .random_map(change)
        .batch(batch_size, batch_fn=lambda examples: _batch(examples, num_classes, batch_size))
    )
    return batches.random_map(mix) if data.mixup else batches


def evaluation_batches(source: Source, *, batch_size: int, num_classes: int) -> Iterator[Batch]:
    """Every image once, in order; the last batch is filled up with images that are not valid."""
    for start in range(0, len(source), batch_size):
        examples = [source[i] for i in range(start, min(start + batch_size, len(source)))]
        yield _batch(examples, num_classes, batch_size)


def check_fit(source: Source, model: ViTConfig) -> None:
    """Refuses a source whose images or classes are not those that a model is made for.

    Raises:
        UsageError: the images are of another size, or there are more classes than logits.
    """
    side, classes = source.images.shape[1], len(source.class_names)
    if side != model.image_size:
        raise UsageError(f"{source.name} has images of {side} px: set model.image_size={side}")
    if classes > model.num_classes:
        raise UsageError(
            f"{source.name} has {classes} classes, model.num_classes={model.num_classes}: raise it"
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
