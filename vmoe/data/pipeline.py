"""The input pipeline: the examples of a source become batches for a model.

    training    source -> shuffle -> decode -> resize ----------> augment -> batch -> float -> mixup
    evaluation  source ------------> decode -> resize and crop -----------> batch -> float

Batch number i of training is a function of the seed and i, so a checkpoint saves only the number of
the next batch.
"""

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Bool, Float

from vmoe.config import TrainConfig
from vmoe.config.preprocessing import Preprocessing
from vmoe.data.augment import augment
from vmoe.data.crops import resize_and_crop, to_float
from vmoe.data.decode import decode
from vmoe.data.mixing import mixup
from vmoe.data.resize import Pixels
from vmoe.data.sources import Example, Source
from vmoe.errors import UsageError

ENDLESS = 1 << 62  # images; grain cannot slice an infinite data set
ATTEMPTS = 100  # to replace an image by one that can be read
READ_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


class Batch(NamedTuple):
    """Images and labels for one step of training or evaluation.

    Attributes:
        images: pixels in [-1, 1].
        labels: probabilities; sum to 1 over y.
        valid: False for padding.
    """

    images: Float[np.ndarray, "b h w 3"]
    labels: Float[np.ndarray, "b y"]
    valid: Bool[np.ndarray, "b"]


class _Prepared(NamedTuple):
    """An image in the model's size, with pixels in [0, 255], and its label."""

    pixels: Pixels
    label: int


class Unreadable:
    """The images that could not be read while batches were made; thread-safe.

    Args:
        instead: what is done in place of reading one, such as "left out".
    """

    def __init__(self, instead: str) -> None:
        self._instead = instead
        self._reasons: dict[str, None] = {}  # each once, in the order of their arrival
        self._reported = 0
        self._lock = threading.Lock()

    def add(self, error: UsageError) -> None:
        """Notes an image, which the error names."""
        with self._lock:
            self._reasons[str(error)] = None

    def news(self) -> list[str]:
        """A line for each image that no earlier call has returned."""
        with self._lock:
            start, reasons = self._reported, list(self._reasons)
            self._reported = len(reasons)
        return [
            f"{reason}; {self._instead} ({number} so far)"
            for number, reason in enumerate(reasons[start:], start + 1)
        ]


def training_batches(
    source: Source,
    config: TrainConfig,
    *,
    shard: tuple[int, int] = (0, 1),
    devices: int = 1,
    on_replaced: Callable[[UsageError], None] = lambda error: None,
) -> grain.MapDataset[Batch]:
    """An endless sequence of training batches; every epoch has a different order.

    Args:
        shard: (i, n): return the i-th of n equal shards of each batch.
        devices: number of devices that the shard is split over; mixup mixes images on one device.
        on_replaced: called from any thread with the reason why an image was replaced by another,
            if ``data.on_error`` asks for it.

    Returns:
        the batches, by number. Reading one raises a UsageError if an image cannot be read.

    Raises:
        UsageError: there are more classes than logits, fewer images than a batch holds, or mixup
            with one image per device.
    """
    data, batch_size = config.data, config.batch_size
    num_classes, image_size = config.model.num_classes, config.model.image_size
    preprocessing = Preprocessing(image_size)
    check_classes(source, num_classes)
    if len(source) < batch_size:
        raise UsageError(
            f"batch_size={batch_size} is more than the {len(source)} images of {source.name}: "
            "lower it, or add images"
        )

    def prepare(index: int, rng: np.random.Generator) -> _Prepared:
        example = _decoded(source, index)
        for _ in range(ATTEMPTS if data.on_error == "replace" else 0):
            if isinstance(example, Example):
                break
            on_replaced(example)
            example = _decoded(source, int(rng.integers(len(source))))
        if isinstance(example, UsageError):
            raise example
        pixels = resize_and_crop(np.asarray(example.image), preprocessing)
        return _Prepared(augment(pixels, data, rng), example.label)

    def mix(batch: Batch, rng: np.random.Generator) -> Batch:
        images, labels = mixup(batch.images, batch.labels, data.mixup, rng, devices=devices)
        return batch._replace(images=images, labels=labels)

    index, count = shard
    rows = batch_size // count
    if data.mixup and rows == devices:
        raise UsageError(
            f"data.mixup={data.mixup} with one image per device: there is no other to mix it with; "
            "use data.mixup=0"
        )
    batches = (
        grain.MapDataset.range(len(source))
        .seed(config.seed)
        .shuffle()
        .repeat(ENDLESS // len(source))
        .random_map(prepare)
        .batch(rows, batch_fn=lambda images: _batch(images, rows, num_classes, image_size))
    )[index::count]
    return batches.random_map(mix) if data.mixup else batches


def _decoded(source: Source, index: int) -> Example | UsageError:
    """The example at an index with its pixels, or why it cannot be read."""
    try:
        example = source[index]
        return dataclasses.replace(example, image=decode(example.image, example.origin))
    except UsageError as error:
        return error


def evaluation_batches(
    source: Source,
    *,
    batch_size: int,
    num_classes: int,
    preprocessing: Preprocessing,
    shard: tuple[int, int] = (0, 1),
    on_unreadable: Callable[[UsageError], None] | None = None,
) -> Iterator[Batch]:
    """Every image once, in order; the last batch is padded.

    Args:
        shard: (i, n): return the i-th of n equal shards of each batch.
        on_unreadable: called from any thread with the reason why an image cannot be read, which
            becomes padding; if None, the reason is raised.

    Returns:
        an iterator over the batches; every shard has the same number of them.
    """

    def prepare(index: int) -> _Prepared | UsageError:
        example = _decoded(source, index)
        if isinstance(example, Example):
            pixels = resize_and_crop(np.asarray(example.image), preprocessing)
            return _Prepared(pixels, example.label)
        if on_unreadable is None:
            raise example
        on_unreadable(example)
        return example

    index, count = shard
    rows, image_size = batch_size // count, preprocessing.image_size
    batches = (
        grain.MapDataset.range(len(source))
        .map(prepare)
        .batch(
            rows,
            drop_remainder=False,
            batch_fn=lambda images: _batch(images, rows, num_classes, image_size),
        )[index::count]
    )
    yield from batches.to_iter_dataset(READ_AHEAD) if len(batches) else ()
    for _ in range(len(batches), -(-len(source) // batch_size)):
        yield empty_batch(rows, num_classes, image_size)


def empty_batch(batch_size: int, num_classes: int, image_size: int) -> Batch:
    """A batch of only padding.

    Args:
        image_size: side of the images in pixels.
    """
    return Batch(
        np.zeros((batch_size, image_size, image_size, 3), np.float32),
        np.zeros((batch_size, num_classes), np.float32),
        np.zeros(batch_size, bool),
    )


def check_classes(source: Source, num_classes: int) -> None:
    """Checks that a model has a logit for each class of a source.

    Raises:
        UsageError: it has fewer.
    """
    if len(source.class_names) > num_classes:
        raise UsageError(
            f"{source.name} has {len(source.class_names)} classes, "
            f"model.num_classes={num_classes}: raise it"
        )


def _batch(
    images: Sequence[_Prepared | UsageError], batch_size: int, num_classes: int, image_size: int
) -> Batch:
    """A batch of images, padded; an error is padding, too."""
    batch = empty_batch(batch_size, num_classes, image_size)
    for i, image in enumerate(images):
        if isinstance(image, _Prepared):
            batch.images[i] = to_float(image.pixels)
            batch.labels[i, image.label] = 1
            batch.valid[i] = True
    return batch
