"""Claims of the literature that the models can check, and the rule for a verdict.

A claim compares a figure of two kinds of models. One is *above* the other if two things hold. The
seeds say so: each seed of the first is above every seed of the second; where both figures are of
the same models, it is above for each seed. And the images say so: the mean over the seeds exceeds
the other by two of its standard errors over the images, which all models share. The images say
nothing of figures that are no mean over images, and of rows without results per image; such a
verdict is marked as one *by the seeds alone*.

A claim is *reproduced* if the order is the claimed one and *contradicted* if it is another one. If
there is none, it is *not contradicted* where the claim is that nothing changes, else *within the
error*.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from experiments import SEEDS, Rows

from reproduction.measure import LOW, unpack

Order = Literal["above", "none", "below"]
ERRORS = 2
"""Standard errors over the images that a difference must exceed."""
NOT_MEASURED = "not measured"
SEEDS_ALONE = " by the seeds alone"


class Figure(NamedTuple):
    """A figure of ``measure.py`` of a variant."""

    variant: str
    name: str


class Claim(NamedTuple):
    """A comparison of two figures.

    Attributes:
        text: what is claimed.
        source: where it is claimed.
        first: the first of the compared figures.
        second: the second one.
        holds: the orders of the first and the second figure that agree with the claim.
    """

    text: str
    source: str
    first: Figure
    second: Figure
    holds: tuple[Order, ...] = ("above",)


def _accuracy(text: str, source: str, first: str, second: str, *holds: Order) -> Claim:
    figures = (Figure(variant, "accuracy") for variant in (first, second))
    return Claim(text, source, *figures, holds or ("above",))


def _of_one(text: str, source: str, variant: str, first: str, second: str, *holds: Order) -> Claim:
    figures = (Figure(variant, name) for name in (first, second))
    return Claim(text, source, *figures, holds or ("above",))


VMOE, SWEET, ROUTERS = "arXiv 2106.05974", "arXiv 2411.18322", "arXiv 2401.15969"
ATTACK, EXPERTS_WEAK, NOBODY = "arXiv 2210.10253", "arXiv 2502.06832", "-"
PRUNING, LAYERS, AVERAGING = "arXiv 2306.04073", "arXiv 2410.15732", "arXiv 2308.06093"
NAMES = {"standard": "mean-pooled", "class_token": "class-token"}
CLAIMS = (
    _accuracy("sparse is better than dense at equal steps", VMOE, "standard", "dense"),
    _accuracy("the same at equal training FLOPs", VMOE, "standard", "dense_flops"),
    _accuracy("16 experts are better than 8", VMOE, "e16", "standard"),
    _accuracy("8 experts are better than 4", VMOE, "standard", "e4"),
    _accuracy("k 2 is better than k 1", VMOE, "standard", "k1"),
    _accuracy("every second block beats only the last two of these", SWEET, "standard", "last2"),
    _accuracy("expert choice is better than token choice", ROUTERS, "expert_choice", "standard"),
    _accuracy("soft is better than token choice", ROUTERS, "soft", "standard"),
    _accuracy("soft is better than expert choice", ROUTERS, "soft", "expert_choice"),
    *(
        _of_one(
            f"{NAMES[variant]}, {LOW} slots: priority by largest gate is better than {than}",
            VMOE,
            variant,
            f"capacity.{LOW}.largest_gate",
            f"capacity.{LOW}.{other}",
        )
        for variant in NAMES
        for other, than in {"order": "by order", "random": "at random"}.items()
    ),
    _of_one(
        f"{LOW} slots: largest gate and sum of gates are equal",
        NOBODY,
        "standard",
        f"capacity.{LOW}.largest_gate",
        f"capacity.{LOW}.sum_of_gates",
        "none",
    ),
    *(
        _of_one(
            f"{LOW} slots by largest gate, block {block}: background is dropped first",
            PRUNING,
            "standard",
            f"kept.{block}.foreground",
            f"kept.{block}.background",
        )
        for block in (1, 5)
    ),
    _accuracy(
        "training at capacity 0.5 by largest gate costs no accuracy",
        VMOE,
        "half_bpr",
        "standard",
        "above",
        "none",
    ),
    _accuracy("at capacity 0.5, training by largest gate helps", VMOE, "half_bpr", "half"),
    _of_one("late blocks know the class better", VMOE, "standard", "class.5", "class.1"),
    _of_one(
        "early blocks know the position better", NOBODY, "standard", "position.1", "position.5"
    ),
    _of_one(
        "the router of a late block matters more: a random one costs more there",
        LAYERS,
        "standard",
        "random.1",
        "random.5",
    ),
    Claim(
        "experts averaged at every step are more accurate as one MLP than others",
        AVERAGING,
        Figure("averaged", "merged"),
        Figure("standard", "merged"),
    ),
    *(
        Claim(
            f"attacked by 8 / 255{how}, sparse is more accurate than dense at equal {what}",
            ATTACK,
            Figure("standard", attack),
            Figure(dense, attack),
        )
        for attack, how in {"attack.8": "", "attack.8.projected": ", projected steps"}.items()
        for dense, what in {"dense": "steps", "dense_flops": "training FLOPs"}.items()
    ),
    _of_one(
        "an attack through the experts harms more than one through the routers",
        EXPERTS_WEAK,
        "standard",
        "attack.8.routers",
        "attack.8.experts",
    ),
)
NOT_CHECKED = {
    "pruning by the change of the routers' norms (arXiv 2405.16646)": "under Upcycling and pruning",
    "gains vanish as more is activated; last-2 is the more robust placement (arXiv 2411.18322)": (
        "needs larger models and several recipes"
    ),
    "shared experts (arXiv 2410.15732), cosine routers, balance by a bias (arXiv 2408.15664)": (
        "no such layers yet"
    ),
}
"""Claims that these models cannot check, and why."""


def compared(variant: str) -> set[str]:
    """The figures of a variant that a claim compares."""
    figures = {figure for claim in CLAIMS for figure in (claim.first, claim.second)}
    return {figure.name for figure in figures if figure.variant == variant}


def values(rows: Rows, figure: Figure) -> list[float]:
    """The figure of each seed for which it was measured."""
    every = [figures for _, figures in sorted(rows.get(figure.variant, {}).items())]
    return [row["figures"][figure.name] for row in every if figure.name in row["figures"]]


class Margin(NamedTuple):
    """How much the first figure of a claim exceeds the second.

    Attributes:
        mean: over the seeds.
        error: its standard error over the images, on each of which the two are compared; None if
            a row has no results per image.
    """

    mean: float
    error: float | None


def margin(claim: Claim, rows: Rows) -> Margin:
    """The margin of a measured claim.

    Raises:
        SystemExit: the figures are not of the same images.
    """
    figures = (claim.first, claim.second)
    first, second = (float(np.mean(values(rows, figure))) for figure in figures)
    every = [row for figure in figures for row in rows[figure.variant].values()]
    of_first, of_second = (_correct(rows, figure) for figure in figures)
    if of_first is None or of_second is None:
        return Margin(first - second, None)
    if len({row["labels"] for row in every}) > 1:
        raise SystemExit(f"{claim.text}: rows of different images; remove those of other versions")
    differences = of_first.mean(0) - of_second.mean(0)
    return Margin(first - second, float(differences.std() / math.sqrt(differences.size)))


def _correct(rows: Rows, figure: Figure) -> np.ndarray | None:
    """Which images are predicted correctly, by seed; None if a row does not say."""
    every = [row.get("correct", {}).get(figure.name) for row in rows[figure.variant].values()]
    return None if None in every else np.stack([unpack(stored) for stored in every])


def order(first: Sequence[float], second: Sequence[float], *, paired: bool) -> Order:
    """How two figures compare by their seeds.

    Args:
        paired: whether both are of the same models.
    """
    pairs = list(zip(first, second, strict=True) if paired else itertools.product(first, second))
    if all(a > b for a, b in pairs):
        return "above"
    return "below" if all(a < b for a, b in pairs) else "none"


def verdict(claim: Claim, rows: Rows) -> str:
    """Whether a claim is reproduced."""
    first, second = values(rows, claim.first), values(rows, claim.second)
    if min(len(first), len(second)) < len(SEEDS):
        return NOT_MEASURED
    found = order(first, second, paired=claim.first.variant == claim.second.variant)
    mean, error = margin(claim, rows)
    if error is not None and abs(mean) < ERRORS * error:
        found = "none"
    if found == "none":
        text = "not contradicted" if found in claim.holds else "within the error"
    else:
        text = "reproduced" if found in claim.holds else "contradicted"
    return text + (SEEDS_ALONE if error is None else "")


def chance(claim: Claim) -> float:
    """The probability that the seeds separate, in one order or the other, without any effect.

    Every order of the seeds is then equally likely. That the images must agree makes an order
    rarer, so this bounds the probability of a verdict.
    """
    n = len(SEEDS)
    return 2 / (2**n if claim.first.variant == claim.second.variant else math.comb(2 * n, n))
