"""Patches of images: tokens on the grid, and the top patches of each expert."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from einops import rearrange
from jaxtyping import Float, Int, Shaped

from vmoe.analysis.collect import Collected
from vmoe.data.pipeline import Batch
from vmoe.errors import UsageError
from vmoe.fields import at_least


def on_grid(
    tokens: Shaped[np.ndarray, "b n *x"],
    images: Float[np.ndarray, "b h w 3"],
    patch_size: int,
    *,
    like: Collected,
) -> Shaped[np.ndarray, "b i j *x"]:
    """Arranges the tokens of patches on their grid; class token and registers are left out.

    Args:
        like: what was collected with the tokens, which has the grid.

    Raises:
        UsageError: the tokens do not fit the images.
    """
    (b, h, w, _), n = images.shape, tokens.shape[1]
    _, i, j = like.foreground.shape
    if len(tokens) != b or n < i * j or (h, w) != (i * patch_size, j * patch_size):
        raise UsageError(
            f"{b} images of {h} x {w} pixels do not have {len(tokens)} x {n} tokens; give the "
            "collected images and the model's patch size",
            patch_size=patch_size,
        )
    return tokens[:, n - i * j :].reshape(b, i, j, *tokens.shape[2:])


class TopPatches(NamedTuple):
    """The patches with an expert's largest gates, at most one per image, best first.

    Attributes:
        gates: the gate of the expert for the patch, in [0, 1].
        patches: the pixels of the patch, in [-1, 1].
        images: the number of the image, in the order of the data.
        positions: the number of the patch in its image, row by row.
    """

    gates: Float[np.ndarray, "e x"]
    patches: Float[np.ndarray, "e x p p 3"]
    images: Int[np.ndarray, "e x"]
    positions: Int[np.ndarray, "e x"]

    def first(self, top: int) -> "TopPatches":
        """The best ``top`` patches of each expert, or all if there are fewer."""
        return TopPatches(*(field[:, :top] for field in self))


def find_top_patches(
    batches: Iterable[Batch], parts: Iterable[Collected], patch_size: int, *, top: int = 10
) -> dict[int, TopPatches]:
    """By sparse block, the patches with the largest gates of each expert, at most one per image.

    Neighboring patches are alike, so only the best patch of an image counts. It need not be sent to
    the expert. Among equal gates, the earlier image comes first. Leave out the blocks whose router
    has no gate: all gates of a token's experts are equal there. Memory is bounded by one batch.

    Args:
        batches: as given to ``collect``.
        parts: the results of ``collect`` for them; both are read in step.
        patch_size: side of a patch in pixels.
        top: number of patches per expert; fewer if there are fewer images.

    Raises:
        UsageError: there is no image or no sparse block; or as for ``on_grid``.
    """
    at_least(1).check(top=top)
    best: dict[int, TopPatches] = {}
    for _ in with_top_patches(best, batches, parts, patch_size, top=top):
        pass
    if not best:
        raise UsageError("no image, or no sparse block: there is no patch to show")
    return best


def with_top_patches(
    best: dict[int, TopPatches],
    batches: Iterable[Batch],
    parts: Iterable[Collected],
    patch_size: int,
    *,
    top: int = 10,
) -> Iterator[Collected]:
    """Yields the parts unchanged, and keeps the top patches of all parts so far in ``best``.

    One pass over the data then also serves ``statistics``. See ``find_top_patches`` for the other
    arguments.
    """
    first = 0  # number of the batch's first image
    for batch, part in zip(batches, parts, strict=True):
        images = batch.images[batch.valid]
        numbers = np.arange(len(images))
        for i, block in part.blocks.items() if len(images) else ():
            gates = on_grid(block.gates, images, patch_size, like=part)
            scores = rearrange(gates, "b i j e -> e b (i j)")
            grid = "b (i p) (j q) c -> b (i j) p q c"
            patches = rearrange(images, grid, p=patch_size, q=patch_size)
            positions = scores.argmax(-1)  # the best patch of each image
            numbered = np.broadcast_to(first + numbers, positions.shape)
            fields = [scores.max(-1), patches[numbers, positions], numbered, positions]
            if i in best:
                both = zip(best[i], fields, strict=True)
                fields = [np.concatenate(each, axis=1) for each in both]
            order = np.argsort(-fields[0], axis=1, kind="stable")[:, :top]
            rows = np.arange(len(order))[:, None]
            best[i] = TopPatches(*(field[rows, order] for field in fields))
        first += len(images)
        yield part
