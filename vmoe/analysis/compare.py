"""Compares the routing of the same images by two checkpoints or models, or in two crops."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from vmoe.analysis.collect import BlockRouting, Collected
from vmoe.errors import UsageError


class Agreement(NamedTuple):
    """How well the routers of two models agree in one block.

    Attributes:
        matches: for each expert of the first router, the corresponding expert of the second; -1 if
            there is none.
        share: fraction of the tokens whose first choices are corresponding experts.
        by_chance: the same fraction with the second router's tokens shuffled.
    """

    matches: Int[np.ndarray, "e"]
    share: float
    by_chance: float


Tokens = tuple[Int[np.ndarray, "x"], Int[np.ndarray, "x"]]
"""Indices of the tokens to compare, in the images of the first and of the second collection; for
two crops of an image, the patches that both crops show."""


def saturation(
    one: Collected, other: Collected, *, tokens: Tokens | None = None
) -> dict[int, float]:
    """By block, the fraction of the choices of ``one`` that ``other`` also makes.

    OLMoE (section 5.1, arXiv 2409.02060) measures it between a checkpoint and the last one of a
    run. Blocks without choices are left out.

    Args:
        tokens: the tokens to compare; all if None.

    Raises:
        UsageError: the collections differ in images, tokens or blocks.
    """
    shares = {}
    for i, pair in _pairs(one, other, tokens).items():
        e, k = pair[0].gates.shape[-1], pair[0].experts.shape[-1]
        ours, theirs = (_chosen(each, e) for each in pair)
        if k:
            shares[i] = float((ours & theirs).sum() / max(1, ours.sum()))
    return shares


def _chosen(block: BlockRouting, e: int) -> Bool[np.ndarray, "b n e"]:
    """Whether a token chose each of the first e experts, some of which the block may not have."""
    experts = block.experts[..., None]
    return ((experts == np.arange(e)) & (experts < block.gates.shape[-1])).any(axis=2)


def _pairs(
    one: Collected, other: Collected, tokens: Tokens | None
) -> dict[int, tuple[BlockRouting, BlockRouting]]:
    """The routing of each block in both collections, for the tokens to compare."""
    first, second = (dict(each.blocks) for each in (one, other))
    if tokens:
        for blocks, own in zip((first, second), tokens, strict=True):
            for i, block in blocks.items():
                by_token = {name: x for name, x in block._asdict().items() if name != "groups"}
                blocks[i] = block._replace(**{name: x[:, own] for name, x in by_token.items()})
    shapes = [{i: b.gates.shape[:2] for i, b in blocks.items()} for blocks in (first, second)]
    if shapes[0] != shapes[1]:
        raise UsageError(
            f"collected {shapes[0]} and {shapes[1]} (images, tokens) by block: compare the same "
            "images in models with the same sparse blocks"
        )
    return {i: (block, second[i]) for i, block in first.items()}


def agreement(
    one: Collected, other: Collected, *, tokens: Tokens | None = None, seed: int = 0
) -> dict[int, Agreement]:
    """By block, how well the experts of two models correspond.

    Expert numbers are unrelated across models. So experts are matched to maximize the number of
    tokens whose first choices match (the Hungarian method). Where tokens do not choose, the expert
    with a token's largest gate counts as its first choice.

    Arguments and errors are as for ``saturation``.
    """
    rng, result = np.random.default_rng(seed), {}
    for i, pair in _pairs(one, other, tokens).items():
        first, second = (block.first_choice.reshape(-1) for block in pair)
        shape = pair[0].gates.shape[-1], pair[1].gates.shape[-1]
        _, by_chance = _match(first, rng.permutation(second), shape)
        result[i] = Agreement(*_match(first, second, shape), by_chance)
    return result


def _match(
    first: Int[np.ndarray, "x"], second: Int[np.ndarray, "x"], shape: tuple[int, int]
) -> tuple[Int[np.ndarray, "e"], float]:
    from scipy.optimize import linear_sum_assignment  # slow to import, and rarely needed

    counts = np.zeros(shape, int)
    np.add.at(counts, (first, second), 1)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    matches = np.full(shape[0], -1)
    matches[rows] = columns
    return matches, float(counts[rows, columns].sum() / max(1, len(first)))
