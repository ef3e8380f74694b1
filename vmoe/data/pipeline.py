"""From a source to batches: the way of an image from its file to the model's door.

    source -> shuffle -> resize -> augment -> batch -> to [-1, 1] -> mixup -> Batch
    source ------------> resize ------------> batch -> to [-1, 1] ----------> Batch   (evaluation)

Batch number i of training follows from the seed and i alone. Whoever knows the number knows where
the data stands, so nothing else about the data needs to be saved.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Bool, Float

from vmoe.config import TrainConfig
from vmoe.data.augment import augment
from vmoe.data.crops import resize, to_float
from vmoe.data.mixing import mixup
from vmoe.data.sources import Example, Source
from vmoe.errors import UsageError

ENDLESS = 1 << 62  # images: grain cannot slice what really has no end
READ_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


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
    source: Source, config: TrainConfig, *, share: tuple[int, int] = (0, 1), devices: int = 1
) -> grain.MapDataset[Batch]:
    """Endless batches by number, each epoch in an order of its own.

    Args:
        share: which of how many equal parts of each batch is read here.
        devices: among which such a part is spread; images are mixed with those of their device.

    Raises:
        UsageError: there are more classes than logits, fewer images than a batch holds, or none
            to mix an image with.
    """
    data, batch_size, num_classes = config.data, config.batch_size, config.model.num_classes
    check_classes(source, num_classes)
    if len(source) < batch_size:
        raise UsageError(
            f"batch_size={batch_size} is more than the {len(source)} images of {source.name}: "
            "lower it, or add images"
        )

    def change(example: Example, rng: np.random.Generator) -> Example:
        pixels = resize(example.image, config.model.image_size)
        return Example(augment(pixels, data, rng), example.label)

    def mix(batch: Batch, rng: np.random.Generator) -> Batch:
        images, labels = mixup(batch.images, batch.labels, data.mixup, rng, devices=devices)
        return batch._replace(images=images, labels=labels)

    part, parts = share
    rows = batch_size // parts
    if data.mixup and rows == devices:
        raise UsageError("data.mixup with one image a device: there is none to mix it with, use 0")
    batches = (
        grain.MapDataset.source(source)
        .seed(config.seed)
        .shuffle()
        .repeat(ENDLESS // len(source))
        .random_map(change)
        .batch(rows, batch_fn=lambda examples: _batch(examples, num_classes, rows))
    )[part::parts]
    return batches.random_map(mix) if data.mixup else batches


def evaluation_batches(
    source: Source,
    *,
    batch_size: int,
    num_classes: int,
    image_size: int,
    share: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """Every image once, in order; the last batch is filled up with images that are not valid.

    ``share``: which of how many equal parts of each batch is read here.
    """
    part, parts = share
    rows = batch_size // parts
    read = (
        grain.MapDataset.source(source)
        .map(lambda example: Example(resize(example.image, image_size), example.label))
        .batch(
            rows,
            drop_remainder=False,
            batch_fn=lambda examples: _batch(examples, num_classes, rows),
        )[part::parts]
    )
    yield from read.to_iter_dataset(READ_AHEAD) if len(read) else ()
    for _ in range(len(read), -(-len(source) // batch_size)):
        yield empty_batch(rows, num_classes, image_size)


def empty_batch(batch_size: int, num_classes: int, image_size: int) -> Batch:
    """A batch of which nothing is valid."""
    return Batch(
        np.zeros((batch_size, image_size, image_size, 3), np.float32),
        np.zeros((batch_size, num_classes), np.float32),
        np.zeros(batch_size, bool),
    )


def check_classes(source: Source, num_classes: int) -> None:
    """Refuses a source that has more classes than a model has logits.

    Raises:
        UsageError: it has.
    """
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
