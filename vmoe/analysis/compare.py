"""Two collections of the same images compared: two checkpoints, two models, or two crops."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from scipy.optimize import linear_sum_assignment

from vmoe.analysis.collect import BlockRouting, Collected
from vmoe.errors import UsageError


class Agreement(NamedTuple):
    """How two routers of one block agree.

    Attributes:
        matches: the second router's expert that corresponds to each of the first; -1 if it has
            fewer.
        share: fraction of the tokens whose first choices are corresponding experts.
        by_chance: this fraction if the second router's tokens were shuffled.
    """

    matches: Int[np.ndarray, "e"]
    share: float
    by_chance: float


def saturation(one: Collected, other: Collected) -> dict[int, float]:
    """By block, the fraction of the first one's choices that the other makes too.

    Between a checkpoint and the last one of a run (OLMoE, section 5.1, arXiv 2409.02060). Blocks
    without choices are left out.

    Raises:
        UsageError: they are not of the same images and blocks.
    """
    _check(one, other)
    return {
        i: _common(block, other.blocks[i])
        for i, block in one.blocks.items()
        if block.experts.shape[-1]
    }


def _check(one: Collected, other: Collected) -> None:
    shapes = [
        {i: block.gates.shape[:2] for i, block in each.blocks.items()} for each in (one, other)
    ]
    if shapes[0] != shapes[1]:
        raise UsageError(
            f"collected {shapes[0]} and {shapes[1]} (images, tokens) by block: compare the same "
            "images in models with the same sparse blocks"
        )


def _common(one: BlockRouting, other: BlockRouting) -> float:
    e = one.gates.shape[-1]
    chosen = [(each.experts[..., None] == np.arange(e)).any(axis=2) for each in (one, other)]
    both = (chosen[0] & chosen[1]).sum(-1)
    return float(both.sum() / max(1, chosen[0].sum()))


def agreement(one: Collected, other: Collected, *, seed: int = 0) -> dict[int, Agreement]:
    """By block, how well the experts of two models correspond.

    The numbers of experts mean nothing across models, so experts are matched such that as many
    tokens as possible have matching first choices (the Hungarian method). The best expert of a
    token is the one of its largest gate.

    Raises:
        UsageError: they are not of the same images and blocks.
    """
    _check(one, other)
    rng = np.random.default_rng(seed)
    return {i: _agreement(block, other.blocks[i], rng) for i, block in one.blocks.items()}


def _agreement(one: BlockRouting, other: BlockRouting, rng: np.random.Generator) -> Agreement:
    first, second = (block.gates.argmax(-1).reshape(-1) for block in (one, other))
    shape = one.gates.shape[-1], other.gates.shape[-1]
    matches, share = _match(first, second, shape)
    _, by_chance = _match(first, rng.permutation(second), shape)
    return Agreement(matches, share, by_chance)


def _match(
    first: Int[np.ndarray, "x"], second: Int[np.ndarray, "x"], shape: tuple[int, int]
) -> tuple[Int[np.ndarray, "e"], float]:
    counts = np.zeros(shape, int)
    np.add.at(counts, (first, second), 1)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    matches = np.full(shape[0], -1)
    matches[rows] = columns
    return matches, float(counts[rows, columns].sum() / max(1, len(first)))
