"""Patches of images: tokens on the grid, and the patches that each expert weighs most."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from einops import rearrange
from jaxtyping import Float, Int, Shaped

from vmoe.analysis.collect import Collected, Labelled, without_padding
from vmoe.config.fields import at_least
from vmoe.errors import UsageError


def cut(
    images: Float[np.ndarray, "b h w 3"], patch_size: int
) -> Float[np.ndarray, "b i j {patch_size} {patch_size} 3"]:
    """The patches of images on their grid."""
    return rearrange(images, "b (i p) (j q) c -> b i j p q c", p=patch_size, q=patch_size)


def on_grid(
    tokens: Shaped[np.ndarray, "b n *x"], images: Float[np.ndarray, "b h w 3"], patch_size: int
) -> Shaped[np.ndarray, "b i j *x"]:
    """The tokens of patches on their grid; a class token, which is no patch, is left out.

    Raises:
        UsageError: the tokens are not those of these images.
    """
    (b, h, w, _), n = images.shape, tokens.shape[1]
    i, j = h // patch_size, w // patch_size
    if len(tokens) != b or n - i * j not in (0, 1) or h % patch_size or w % patch_size:
        raise UsageError(
            f"{b} images of {h} x {w} pixels do not have {len(tokens)} x {n} tokens; give the "
            "collected images and the model's patch size",
            patch_size=patch_size,
        )
    return tokens[:, n - i * j :].reshape(b, i, j, *tokens.shape[2:])


class Favourites(NamedTuple):
    """The patches that each expert of a block weighs most, at most one per image, best first.

    Attributes:
        gates: of the expert for the patch, in [0, 1].
        patches: their pixels, in [-1, 1].
        images: the number of the image, in the order of the data.
        places: the number of the patch in its image, row by row.
    """

    gates: Float[np.ndarray, "e x"]
    patches: Float[np.ndarray, "e x p p 3"]
    images: Int[np.ndarray, "e x"]
    places: Int[np.ndarray, "e x"]


def favourites(
    batches: Iterable[Labelled], parts: Iterable[Collected], patch_size: int, *, top: int = 10
) -> dict[int, Favourites]:
    """By sparse block, the patches with the largest gates of each expert, one of an image.

    Neighbouring patches are alike, so each image gives its best one. A patch need not be sent to
    the expert. Of equal gates the earlier is first. Memory is bounded by one batch.

    Args:
        batches: as given to ``collect``.
        parts: what it yields for them; both are read in step.
        patch_size: side of a patch in pixels.
        top: number of patches per expert; fewer if there are fewer images.

    Raises:
        UsageError: there is no image or no sparse block; or as for ``on_grid``.
    """
    at_least(1).check(top=top)
    best: dict[int, Favourites] = {}
    for first, images, part in _aligned(batches, parts):
        for i, block in part.blocks.items():
            own = _of_batch(images, block.gates, patch_size, first)
            both = [best[i], own] if i in best else [own]
            best[i] = _best([np.concatenate(each, axis=1) for each in zip(*both, strict=True)], top)
    if not best:
        raise UsageError("no image, or no sparse block: there is no patch to show")
    return best


def _aligned(
    batches: Iterable[Labelled], parts: Iterable[Collected]
) -> Iterator[tuple[int, Float[np.ndarray, "b h w 3"], Collected]]:
    """The number of a batch's first image, its images without padding, and their routing."""
    first = 0
    for batch, part in zip(batches, parts, strict=True):
        real = without_padding(batch)
        if len(real):
            yield first, real, part
        first += len(real)


def _of_batch(
    images: Float[np.ndarray, "b h w 3"],
    gates: Float[np.ndarray, "b n e"],
    patch_size: int,
    first: int,
) -> Favourites:
    """The best patch of every image for each expert."""
    scores = rearrange(on_grid(gates, images, patch_size), "b i j e -> e b (i j)")
    patches = rearrange(cut(images, patch_size), "b i j p q c -> b (i j) p q c")
    places, numbers = scores.argmax(-1), np.arange(len(images))
    return Favourites(
        scores.max(-1),
        patches[numbers, places],
        np.broadcast_to(first + numbers, places.shape),
        places,
    )


def _best(fields: list[np.ndarray], top: int) -> Favourites:
    order = np.argsort(-fields[0], axis=1, kind="stable")[:, :top]
    return Favourites(*(field[np.arange(len(order))[:, None], order] for field in fields))
