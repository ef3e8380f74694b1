"""Two collections of the same images compared: two checkpoints, two models, or two crops."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

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


Tokens = tuple[Int[np.ndarray, "x"], Int[np.ndarray, "x"]]
"""Tokens of the images of a first and a second collection that show the same; for two crops of each
image, the tokens of the patches that both have."""


def saturation(
    one: Collected, other: Collected, *, tokens: Tokens | None = None
) -> dict[int, float]:
    """By block, the fraction of the first one's choices that the other makes too.

    Between a checkpoint and the last one of a run (OLMoE, section 5.1, arXiv 2409.02060). Blocks
    without choices are left out.

    Args:
        tokens: those to compare; all if None.

    Raises:
        UsageError: they are not of the same images, tokens and blocks.
    """
    return {
        i: _common(ours, theirs)
        for i, (ours, theirs) in _pairs(one, other, tokens).items()
        if ours.experts.shape[-1]
    }


def _pairs(
    one: Collected, other: Collected, tokens: Tokens | None
) -> dict[int, tuple[BlockRouting, BlockRouting]]:
    """Both records of each block, of the tokens to compare."""
    first, second = (dict(each.blocks) for each in (one, other))
    if tokens:
        for blocks, own in zip((first, second), tokens, strict=True):
            blocks |= {i: _at(block, own) for i, block in blocks.items()}
    shapes = [{i: b.gates.shape[:2] for i, b in blocks.items()} for blocks in (first, second)]
    if shapes[0] != shapes[1]:
        raise UsageError(
            f"collected {shapes[0]} and {shapes[1]} (images, tokens) by block: compare the same "
            "images in models with the same sparse blocks"
        )
    return {i: (block, second[i]) for i, block in first.items()}


def _at(block: BlockRouting, tokens: Int[np.ndarray, "x"]) -> BlockRouting:
    by_token = {name: x for name, x in block._asdict().items() if name != "groups"}
    return block._replace(**{name: field[:, tokens] for name, field in by_token.items()})


def _common(one: BlockRouting, other: BlockRouting) -> float:
    e = one.gates.shape[-1]
    chosen = [(each.experts[..., None] == np.arange(e)).any(axis=2) for each in (one, other)]
    both = (chosen[0] & chosen[1]).sum(-1)
    return float(both.sum() / max(1, chosen[0].sum()))


def agreement(
    one: Collected, other: Collected, *, tokens: Tokens | None = None, seed: int = 0
) -> dict[int, Agreement]:
    """By block, how well the experts of two models correspond.

    The numbers of experts mean nothing across models, so experts are matched such that as many
    tokens as possible have matching first choices (the Hungarian method). The best expert of a
    token is the one of its largest gate.

    Args:
        tokens: those to compare; all if None.

    Raises:
        UsageError: they are not of the same images, tokens and blocks.
    """
    rng = np.random.default_rng(seed)
    return {
        i: _agreement(ours, theirs, rng) for i, (ours, theirs) in _pairs(one, other, tokens).items()
    }


def _agreement(one: BlockRouting, other: BlockRouting, rng: np.random.Generator) -> Agreement:
    first, second = (block.gates.argmax(-1).reshape(-1) for block in (one, other))
    shape = one.gates.shape[-1], other.gates.shape[-1]
    matches, share = _match(first, second, shape)
    _, by_chance = _match(first, rng.permutation(second), shape)
    return Agreement(matches, share, by_chance)


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
