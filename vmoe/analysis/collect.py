"""Collects the routing of a data set as NumPy arrays, image by image, one batch at a time."""

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from jaxtyping import Bool, Float, Int

from vmoe import models, passes
from vmoe.axes import Images, Record, Route, SoftRouting
from vmoe.data.pipeline import Batch
from vmoe.errors import UsageError
from vmoe.nn.inputs import check_labels
from vmoe.nn.vit import ViT
from vmoe.routing.groups import by_image


class BlockRouting(NamedTuple):
    """The decisions of one sparse block on the tokens of some images.

    Attributes:
        gates: the weight of each expert for each token, in [0, 1].
        experts: the expert of each choice, best first (with expert choice, ordered by expert); e
            where there is no choice. k is 0 for soft routing, which makes no choices.
        positions: the position of each choice in the queue of its expert, from 0; -1 if it got no
            slot.
        weights: the combine weight of each choice; 0 if it got no slot.
        groups: the number of the group in which the image's tokens competed, unique over all
            batches.
    """

    gates: Float[np.ndarray, "b n e"]
    experts: Int[np.ndarray, "b n k"]
    positions: Int[np.ndarray, "b n k"]
    weights: Float[np.ndarray, "b n k"]
    groups: Int[np.ndarray, "b"]

    @property
    def kept(self) -> Bool[np.ndarray, "b n k"]:
        """Whether a choice got a slot."""
        return self.positions >= 0

    @property
    def dropped(self) -> Bool[np.ndarray, "b n k"]:
        """Whether a choice exists but got no slot."""
        return (self.experts < self.gates.shape[-1]) & ~self.kept

    @property
    def first_choice(self) -> Int[np.ndarray, "b n"]:
        """The expert of each token's first choice; its largest gate where it makes no choice.

        The first choice need not have the largest gate: a router can add a bias to the gates, or
        have no gates at all.
        """
        e, largest = self.gates.shape[-1], self.gates.argmax(-1)
        own = np.where(self.experts < e, np.arange(self.experts.shape[-1]), e)
        if not own.size or (own.shape[-1] == e and (self.experts == own).all()):
            return largest  # choices are ordered by expert, as with expert choice
        first = self.experts[..., 0]
        return np.where(first < e, first, largest)

    @property
    def priority(self) -> Float[np.ndarray, "b n"]:
        """The gate of each token's first choice: its score in Batch Prioritized Routing."""
        return np.take_along_axis(self.gates, self.first_choice[..., None], axis=-1)[..., 0]


class Collected(NamedTuple):
    """The logits, the routing and the labels of a batch.

    Attributes:
        logits: the logits of the model.
        labels: the classes of each image; padded with -1.
        blocks: the routing of each sparse block, by the number of the block.
        foreground: whether each patch shows more than plain background; see ``foreground``.
        registers: the number of tokens just before the patches that are registers. The others
            before the patches are class tokens.
    """

    logits: Float[np.ndarray, "b y"]
    labels: Int[np.ndarray, "b l"]
    blocks: dict[int, BlockRouting]
    foreground: Bool[np.ndarray, "b i j"]
    registers: int


def collect(
    model: ViT, batches: Iterable[Batch], *, decide: Mapping[int, Route] | None = None
) -> Iterator[Collected]:
    """Yields the logits and the routing of every image, without padding, batch by batch.

    Args:
        batches: batches of any size, of images in [-1, 1]; ``vmoe.passes.in_batches`` makes them of
            arrays. Only images of one batch can compete for slots.
        decide: see ``capture``.

    Raises:
        UsageError: labels are not an array (b, l), or a label is not a class of the model.
    """
    program = _run(model, tuple((decide or {}).items()))
    config = model.config
    first = dict.fromkeys(config.sparse_blocks, 0)  # number of the batch's first group
    for batch, valid, (logits, blocks), groups in passes.run(program, batches, model.placement):
        check_labels(batch.labels, config.num_classes)
        own = {}
        for i, fields in blocks.items():
            block = BlockRouting(*fields)
            own[i] = block._replace(groups=block.groups + first[i])
            first[i] += int(groups[i])
        shown = foreground(batch.images[valid], config.patch_size)
        yield Collected(logits, batch.labels[valid], own, shown, config.registers)


@models.compiled  # once for all passes over a data set
def _run(
    model: ViT, decide: tuple[tuple[int, Route], ...], batch: Batch
) -> tuple[tuple[jax.Array, dict[int, tuple[jax.Array, ...]]], dict[int, int]]:
    images = jnp.asarray(batch.images)
    logits, records = model.forward(images, valid=batch.valid, decide=dict(decide))
    devices = model.placement.devices
    blocks = {i: _by_image(record, len(images), devices) for i, record in records.items()}
    return (logits, blocks), {i: len(record.gates) for i, record in records.items()}


def _by_image(record: Record, b: int, devices: int) -> tuple[jax.Array, ...]:
    """The fields of ``BlockRouting`` from the record of a batch of b images."""
    g, s, _ = record.gates.shape
    split = functools.partial(by_image, b=b, devices=devices)
    groups = split(jnp.broadcast_to(jnp.arange(g)[:, None, None], (g, s, 1)))[:, 0, 0]
    routing = record.routing
    if isinstance(routing, SoftRouting):
        none = jnp.zeros((g, s, 0), jnp.int32)
        choices = none, none, none.astype(jnp.float32)
    else:
        positions = jnp.where(routing.kept, routing.slots % routing.choices.shape[-1], -1)
        choices = routing.experts, positions, routing.weights
    return (*map(split, (record.gates, *choices)), groups)


def concatenate(parts: Iterable[Collected]) -> Collected:
    """Joins all batches into one.

    Raises:
        UsageError: there is no batch.
    """
    every = list(parts)
    if not every:
        raise UsageError("no batch: give at least one image")
    blocks = {i: zip(*(part.blocks[i] for part in every), strict=True) for i in every[0].blocks}
    return Collected(
        np.concatenate([part.logits for part in every]),
        np.concatenate([part.labels for part in every]),
        {i: BlockRouting(*map(np.concatenate, fields)) for i, fields in blocks.items()},
        np.concatenate([part.foreground for part in every]),
        every[0].registers,
    )


def foreground(
    images: Images, patch_size: int, tolerance: float = 0.1
) -> Bool[np.ndarray, "b i j"]:
    """False for patches of background: every pixel has the color of the image's border.

    The border's color is the median of the outermost pixels, by channel. The rule suits objects on
    a plain color, as in Fashion-MNIST and emoji. It is not meaningful for photographs, which rarely
    have a uniform background.

    Args:
        images: pixels in [-1, 1]; height and width are multiples of the patch size.
        tolerance: largest difference of a background pixel from the border's color, in any channel.
    """
    pixels, p = np.asarray(images), patch_size
    rows, columns = pixels[:, [0, -1]], pixels[:, 1:-1, [0, -1]]
    border = np.concatenate([rearrange(x, "b i j c -> b (i j) c") for x in (rows, columns)], axis=1)
    distance = np.abs(pixels - np.median(border, axis=1)[:, None, None])
    return reduce(distance, "b (i p) (j q) c -> b i j", "max", p=p, q=p) > tolerance
