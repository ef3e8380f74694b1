"""A pass: images through a program, batch by batch, on the devices of a placement.

    source -> read -> batches -> run -> parts: outputs per image without padding, and sums
    source ------- measure -----------> outputs of all images in the order of the source, and sums

A program is a function of a batch on the devices, such as ``models.compiled`` makes of a model. It
returns outputs, whose first axis is that of the batch, and sums over the images: two trees of
arrays, replicated if there are several devices (``Placement.replicate``).
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Bool, Float, Int

from vmoe import distributed
from vmoe.config.preprocessing import Preprocessing
from vmoe.data.pipeline import Batch, check_classes, evaluation_batches, evaluation_order
from vmoe.data.reading import READING, Reading
from vmoe.data.sources import Source
from vmoe.errors import UsageError
from vmoe.nn.inputs import to_float
from vmoe.nn.vit import ViT
from vmoe.sharding import ONE_DEVICE, Placement

Program = Callable[[Batch], tuple[Any, Any]]


class Part(NamedTuple):
    """What a program made of one batch.

    Attributes:
        batch: the batch, as this process read it, with padding.
        valid: False for padding, over all processes.
        outputs: the outputs of the images of all processes, without padding.
        sums: the sums.
    """

    batch: Batch
    valid: Bool[np.ndarray, "b"]
    outputs: Any
    sums: Any


class Measured(NamedTuple):
    """What a program made of all images of a source; the same in every process.

    Attributes:
        outputs: the outputs of the images that could be read, in the order of the source.
        indices: the index of each of them in the source, ascending.
        sums: the sums over all images, added up in 64 bits.
    """

    outputs: Any
    indices: Int[np.ndarray, "b"]
    sums: Any


def in_batches(
    images: Float[np.ndarray, "b h w 3"],
    labels: Int[np.ndarray, "b l"] | None = None,
    *,
    batch_size: int = 64,
) -> Iterator[Batch]:
    """Splits arrays into batches of one size; the last one is padded.

    Args:
        labels: the classes of each image; padded with -1. None if they are unknown.
    """
    classes = np.full((len(images), 1), -1) if labels is None else np.asarray(labels)
    for start in range(0, len(images), batch_size):
        rows = slice(start, start + batch_size)
        missing = batch_size - len(images[rows])
        yield Batch(
            np.pad(images[rows], ((0, missing), *[(0, 0)] * (np.ndim(images) - 1))),
            np.pad(classes[rows], ((0, missing), (0, 0)), constant_values=-1),
            np.arange(batch_size) < batch_size - missing,
        )


def as_on_one_device(
    images: Float[np.ndarray, "b h w 3"],
    labels: Int[np.ndarray, "b l"] | None = None,
    placement: Placement = ONE_DEVICE,
) -> Batch:
    """One batch with all images on the first device, where they form the groups of one device."""
    (batch,) = in_batches(images, labels, batch_size=len(images) * placement.devices)
    return batch


def read(
    source: Source, preprocessing: Preprocessing, reading: Reading, placement: Placement
) -> Iterator[Batch]:
    """The part of each batch of a source that this process reads; see ``evaluation_batches``."""
    batch_size = placement.round_up(reading.batch_size)
    reading = dataclasses.replace(reading, batch_size=batch_size)
    return evaluation_batches(source, preprocessing, reading, shard=placement.process_shard())


def inputs(
    model: ViT,
    source: Source,
    preprocessing: Preprocessing,
    reading: Reading = READING,
    *,
    any_classes: bool = False,
) -> Iterator[Batch]:
    """The batches of a source with images as a model takes them, in [-1, 1]; see ``read``.

    Args:
        any_classes: the classes of the source need not be those of the model.

    Raises:
        UsageError: no image can be read, or the source has more classes than the model.
    """
    if not any_classes:
        check_classes(source, model.config.num_classes)
    any_image = False
    for batch in read(source, preprocessing, reading, model.placement):
        any_image |= bool(batch.valid.any())
        yield batch._replace(images=to_float(batch.images))
    if not any_image:
        raise UsageError(f"{source.name}: no image can be read")


def run(
    program: Program, batches: Iterable[Batch], placement: Placement = ONE_DEVICE
) -> Iterator[Part]:
    """Runs a program on batches.

    A batch is read and uploaded while the devices still compute the one before.

    Raises:
        UsageError: a batch cannot be split evenly over the devices.
    """
    _, shards = placement.process_shard()
    running: tuple[Batch, Any, Any] | None = None
    for batch in batches:
        placement.check_batch(shards * len(batch.images))
        on_devices = placement.make_global_array(batch)
        previous, running = running, (batch, on_devices, program(on_devices))
        if previous:
            yield _part(*previous)
    if running:
        yield _part(*running)


def _part(batch: Batch, on_devices: Any, results: tuple[Any, Any]) -> Part:
    valid = batch.valid
    if not on_devices.valid.is_fully_addressable:
        valid = np.asarray(multihost_utils.process_allgather(on_devices.valid, tiled=True))
    outputs, sums = jax.device_get(results)
    return Part(batch, valid, jax.tree.map(lambda x: x[valid], outputs), sums)


def measure(
    program: Program,
    source: Source,
    preprocessing: Preprocessing,
    reading: Reading,
    placement: Placement = ONE_DEVICE,
) -> Measured:
    """Runs a program on every image of a source; calls ``on_batch`` for each computed batch.

    Raises:
        UsageError: no image can be read; every process raises it. Or as for ``evaluation_batches``.
    """
    ahead = dataclasses.replace(reading, on_batch=lambda: None)  # called below, once it is computed
    parts = []
    for part in run(program, read(source, preprocessing, ahead, placement), placement):
        reading.on_batch()
        parts.append(part[1:])  # without pixels: all of the source may not fit in memory
    valid, outputs, sums = zip(*parts, strict=True)
    indices = evaluation_order(len(source))[np.flatnonzero(np.concatenate(valid))]
    if not len(indices):
        raise distributed.synchronized(UsageError(f"{source.name}: no image can be read"))
    order = np.argsort(indices)
    in_order = jax.tree.map(lambda *x: np.concatenate(x)[order], *outputs)
    return Measured(in_order, indices[order], jax.tree.map(_sum, *sums))


def _sum(*parts: Any) -> Any:
    """The sum of arrays or numbers, in 64 bits."""
    stacked = np.stack(parts)
    return stacked.astype(float if stacked.dtype.kind == "f" else int).sum(axis=0)
