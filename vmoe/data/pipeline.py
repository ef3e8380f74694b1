"""The input pipeline: the examples of a source become batches of pixels.

    training    source -> shuffle -> decode -> crop -> resize -> augment -> batch
    evaluation  source -> shuffle -> decode -> resize -> crop ----------> batch

Training batch i is a function of the seed and i. So a checkpoint saves only the number of the next
batch, and any process can read it (``vmoe/data/reading.py``). All other commands read in one order
(``evaluation_order``). On the device the pixels become floats, and images are mixed
(``vmoe/train/step.py``).
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import grain
import numpy as np
from grain.experimental import index_shuffle
from jaxtyping import Bool, Float32, Int, Int32, UInt8

from vmoe.config import DataConfig, TrainConfig
from vmoe.config.preprocessing import Preprocessing
from vmoe.data.augment import augment
from vmoe.data.crops import resize_and_crop
from vmoe.data.decode import decode
from vmoe.data.fast_decode import decode_crop_and_resize
from vmoe.data.random_crop import Box, random_box
from vmoe.data.reading import READING, Reading, read_ahead
from vmoe.data.resize import Resized, resize
from vmoe.data.sources import Example, Source
from vmoe.data.workers import Workers, count_workers, num_threads
from vmoe.errors import UsageError
from vmoe.fields import at_least

ENDLESS = 1 << 62  # images; grain cannot slice an infinite data set
MOST_IMAGES = (1 << 32) - 1  # that can be shuffled, as Grain's shuffle computes with 32 bits
ROUNDS = 4  # of Grain's shuffle
PART = 8 << 20  # bytes of images that a thread or a worker reads at a time
ATTEMPTS = 100  # to find a readable image that replaces another
ORDER = "shuffled, seeds 0 and 1"
"""The text that describes ``evaluation_order`` to users."""


class Batch(NamedTuple):
    """Images and labels for one step of training or evaluation.

    Attributes:
        images: pixels in [0, 255], float32 only for the interpolation ``tf_area``; or the inputs of
            a model, float32 in [-1, 1].
        labels: classes; padded with -1 for images with fewer labels than others.
        valid: False for padding.
    """

    images: UInt8[np.ndarray, "b h w 3"] | Float32[np.ndarray, "b h w 3"]
    labels: Int32[np.ndarray, "b l"]
    valid: Bool[np.ndarray, "b"]


class Read(NamedTuple):
    """A batch, and the images that could not be read, or not by the fast decoder.

    Attributes:
        batch: the images and their labels.
        unreadable: the reason for each image that could not be read.
        refused: origins of the images that the fast decoder does not support; they were decoded
            exactly.
    """

    batch: Batch
    unreadable: tuple[str, ...]
    refused: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ImageBatches:
    """Batches of images by number, which are read in parts; see ``InParts``."""

    images: grain.MapDataset[Any]
    """Images, read and prepared, in the order of the batches."""
    rows: int
    """Images of this shard in a batch."""
    shard: tuple[int, int]
    """(i, n): the i-th of n equal shards of each batch."""
    max_labels: int
    preprocessing: Preprocessing

    def __len__(self) -> int:
        """The number of batches with an image of this shard."""
        index, count = self.shard
        return max(0, -(-(-(-len(self.images) // self.rows) - index) // count))

    @functools.cached_property
    def parts(self) -> int:
        """The number of parts of a batch."""
        return _parts(self.rows, self.preprocessing)

    def __getitem__(self, number: int) -> Read:
        parts = range(number * self.parts, (number + 1) * self.parts)
        return self.joined([self.part(part) for part in parts])

    def part(self, number: int) -> Read:
        """Reads part ``number % parts`` of batch ``number // parts``, padded."""
        (batch, part), (index, count) = divmod(number, self.parts), self.shard
        start, stop = (
            (batch * count + index) * self.rows + x * self.rows // self.parts
            for x in (part, part + 1)
        )
        there = range(start, min(stop, len(self.images)))
        images = cast(list[_Image], [self.images[i] for i in there])
        return _collate(stop - start, self.max_labels, self.preprocessing, images)

    def joined(self, parts: list[Read]) -> Read:
        """The batch of its parts; empties the list, to free their memory one by one."""
        if len(parts) == 1:
            return parts.pop()
        whole, start = empty_batch(self.rows, self.max_labels, self.preprocessing), 0
        unreadable, refused = list[str](), list[str]()
        while parts:
            read = parts.pop(0)
            stop = start + len(read.batch.valid)
            for target, own in zip(whole, read.batch, strict=True):
                target[start:stop] = own
            unreadable += read.unreadable
            refused += read.refused
            start = stop
        return Read(whole, tuple(unreadable), tuple(refused))


class _Image(NamedTuple):
    """An image in the model's size, and its errors as in ``Read``; without pixels it is padding."""

    pixels: Resized | None
    labels: tuple[int, ...] = ()
    unreadable: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()


def training_batches(
    source: Source, config: TrainConfig, *, shard: tuple[int, int] = (0, 1)
) -> ImageBatches:
    """An endless sequence of training batches; every epoch has a different order.

    Args:
        shard: (i, n): return the i-th of n equal shards of each batch.

    Returns:
        the batches, by number. Reading one raises a UsageError if an image cannot be read, unless
        ``data.on_error`` is "replace".

    Raises:
        UsageError: there are more classes than logits, fewer images than a batch holds, or too many
            images to shuffle.
    """
    check_classes(source, config.model.num_classes)
    if len(source) < config.batch_size:
        raise UsageError(
            f"more than the {len(source)} images of {source.name}: lower it, or add images",
            batch_size=config.batch_size,
        )
    _check_length(source)
    preprocessing = config.data.preprocessing.of_size(config.model.image_size)
    images = (
        grain.MapDataset.range(len(source))
        .seed(config.seed)
        .shuffle()
        .repeat(ENDLESS // len(source))
        .random_map(functools.partial(_training_image, source, config.data, preprocessing))
    )
    rows = config.batch_size // shard[1]
    return ImageBatches(images, rows, shard, source.max_labels, preprocessing)


def _check_length(source: Source) -> None:
    if len(source) > MOST_IMAGES:
        raise UsageError(
            f"{source.name} has {len(source):,} images: at most {MOST_IMAGES:,} can be shuffled; "
            "use a part of them"
        )


def _training_image(
    source: Source,
    data: DataConfig,
    preprocessing: Preprocessing,
    index: int,
    rng: np.random.Generator,
) -> _Image:
    """Reads and augments the image at an index, or another one if it cannot be read."""
    reasons: list[str] = []
    while True:
        try:
            image = _cropped(source[index], data, preprocessing, rng)
            pixels = augment(np.asarray(image.pixels), data, rng)
            return image._replace(pixels=pixels, unreadable=tuple(reasons))
        except UsageError as error:
            if data.on_error == "fail" or len(reasons) == ATTEMPTS:
                raise
            reasons.append(str(error))
            index = int(rng.integers(len(source)))


def _cropped(
    example: Example, data: DataConfig, preprocessing: Preprocessing, rng: np.random.Generator
) -> _Image:
    """Decodes the part of an image to train on, in the model's size."""
    area, size = data.crop_min_area, preprocessing.image_size

    def box(h: int, w: int) -> Box:
        if area is not None:
            return random_box(h, w, area, rng)
        if not preprocessing.keep_aspect:
            return Box(0, 0, h, w)
        side = min(h, w)
        return Box((h - side) // 2, (w - side) // 2, side, side)

    how, refused = dict(exif=preprocessing.exif, max_pixels=data.max_pixels), False
    if data.decoder == "fast":
        pixels, refused = decode_crop_and_resize(example.image, example.origin, box, size, **how)
    else:
        pixels = decode(example.image, example.origin, **how)
        if area is None:
            pixels = resize_and_crop(pixels, preprocessing)
        else:
            pixels = resize(
                pixels[box(*pixels.shape[:2]).slices], size, size, preprocessing.interpolation
            )
    return _Image(pixels, example.labels, refused=(example.origin,) if refused else ())


@functools.lru_cache(maxsize=8)  # needed at each evaluation; takes seconds for a million images
def evaluation_order(count: int) -> Int[np.ndarray, "b"]:
    """The order in which ``evaluation_batches`` reads the images of a source, as their indices.

    Data is often stored class by class. Images of one class select the same experts, so more
    choices are dropped in groups of one class than in mixed groups. The order is a permutation that
    depends only on the number of images. Its ``np.argsort`` restores the order of the source.

    Args:
        count: number of images of the source.
    """
    order = np.fromiter(map(functools.partial(_shuffled, count), range(count)), np.int64, count)
    order.flags.writeable = False
    return order


@functools.lru_cache(maxsize=1 << 16)  # each evaluation of a run reads in this order again
def _shuffled(count: int, place: int) -> int:
    """The index of the image at a position in the order of evaluations.

    Equals ``grain.MapDataset.range(count).shuffle(seed=0).shuffle(seed=1)``, in a third of the
    time. One shuffle of Grain leaves traces of the original order: of 50,000 images of 1,000
    classes, stored class by class, 0.62 times as many pairs of one class share a group of 8 as by
    chance; after two shuffles, 0.97 times as many.
    """
    for seed in (1, 0):
        place = index_shuffle(place, count - 1, seed, ROUNDS)
    return place


def evaluation_batches(
    source: Source,
    preprocessing: Preprocessing,
    reading: Reading = READING,
    *,
    shard: tuple[int, int] = (0, 1),
    shuffled: bool = True,
) -> Iterator[Batch]:
    """Every image once; the last batch is padded, and an image that cannot be read is padding.

    Args:
        shard: (i, n): return the i-th of n equal shards of each batch.
        shuffled: read in the order of ``evaluation_order``, not in that of the source.

    Returns:
        an iterator over the batches; every shard has the same number of them.

    Raises:
        UsageError: an image cannot be read, there are too many to shuffle, or the batch size is
            below 1.
    """
    at_least(1).check(batch_size=reading.batch_size)
    _check_length(source)
    rows, leave_out = reading.batch_size // shard[1], reading.on_unreadable is not None
    indices = grain.MapDataset.range(len(source))
    if shuffled:
        indices = indices.map(functools.partial(_shuffled, len(source)))
    images = indices.map(functools.partial(_evaluation_image, source, preprocessing, leave_out))
    batches = ImageBatches(images, rows, shard, source.max_labels, preprocessing)
    with read_ahead(batches, 0, len(batches), reading.workers, on_wait=reading.on_wait) as reader:
        for read in reader:
            if reading.on_unreadable:
                for reason in read.unreadable:
                    reading.on_unreadable(reason)
            reading.on_batch()
            yield read.batch
    for _ in range(len(batches), -(-len(source) // reading.batch_size)):
        reading.on_batch()
        yield empty_batch(rows, source.max_labels, preprocessing)


def _evaluation_image(
    source: Source, preprocessing: Preprocessing, leave_out: bool, index: int
) -> _Image:
    """Reads the image at an index, or leaves it out if it cannot be read."""
    try:
        example = source[index]
        pixels = decode(
            example.image,
            example.origin,
            exif=preprocessing.exif,
            max_pixels=preprocessing.max_pixels,
        )
        return _Image(resize_and_crop(pixels, preprocessing), example.labels)
    except UsageError as error:
        if not leave_out:
            raise
        return _Image(None, unreadable=(str(error),))


def _collate(
    rows: int, max_labels: int, preprocessing: Preprocessing, images: Sequence[_Image]
) -> Read:
    """Makes a batch of images, padded to ``rows``."""
    batch = empty_batch(rows, max_labels, preprocessing)
    for i, image in enumerate(images):
        if image.pixels is not None:
            batch.images[i] = image.pixels
            batch.labels[i, : len(image.labels)] = image.labels
            batch.valid[i] = True
    unreadable = tuple(reason for image in images for reason in image.unreadable)
    refused = tuple(origin for image in images for origin in image.refused)
    return Read(batch, unreadable, refused)


def empty_batch(batch_size: int, max_labels: int, preprocessing: Preprocessing) -> Batch:
    """A batch of only padding.

    Args:
        max_labels: largest number of labels of an image.

    Raises:
        MemoryError: the batch is too large.
    """
    size = preprocessing.image_size
    dtype = np.float32 if preprocessing.interpolation == "tf_area" else np.uint8
    try:
        images = np.zeros((batch_size, size, size, 3), dtype)
    except ValueError as error:  # more bytes than 64 bits can count
        raise MemoryError(str(error)) from None
    return Batch(
        images,
        np.full((batch_size, max_labels), -1, np.int32),
        np.zeros(batch_size, bool),
    )


def part_bytes(rows: int, preprocessing: Preprocessing) -> int:
    """Bytes of the images of the largest part of a batch."""
    size = empty_batch(1, 1, preprocessing).images.nbytes
    return -(-rows // _parts(rows, preprocessing)) * size


def start_workers(
    asked: int | None, source: Source, batch_size: int, preprocessing: Preprocessing
) -> Workers:
    """Starts what reads a source once; see ``count_workers`` and ``num_threads``; close it after.

    Args:
        batch_size: images of a batch that this process reads.
    """
    at_least(1).check(batch_size=batch_size)
    if count := count_workers(asked, source, len(source), part_bytes(batch_size, preprocessing)):
        return Workers(count)
    return Workers(threads=num_threads(source, part_bytes(1, preprocessing)))


def _parts(rows: int, preprocessing: Preprocessing) -> int:
    """The number of parts of a batch, of about ``PART`` bytes each."""
    size = empty_batch(1, 1, preprocessing).images.nbytes
    return min(rows, -(-rows * size // PART))


def check_labeled(source: Source) -> None:
    """Checks that an image of a source has a label; stops at the first one that has."""
    if not any(source.labels_of(i) for i in range(len(source))):
        raise UsageError(f"{source.name}: no image has a label: use data with labels")


def check_classes(source: Source, num_classes: int) -> None:
    """Checks that a model has a logit for each class of a source."""
    if len(source.class_names) > num_classes:
        raise UsageError(
            f"{source.name} has {len(source.class_names)} classes: raise it",
            **{"model.num_classes": num_classes},
        )
