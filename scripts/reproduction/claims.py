"""Claims of the literature that the models can check, and the rule for a verdict.

A claim compares a figure of two kinds of models over the seeds. One is *above* the other if each of
its seeds is above every seed of the other; where both figures are of the same models, if it is
above for each seed. Else they overlap. A claim is *reproduced* if the order is the claimed one,
*within the spread* if the figures overlap but should not, and *contradicted* otherwise.
"""

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

from reproduction.measure import LOW
from reproduction.rows import Rows
from reproduction.variants import SEEDS

Order = Literal["above", "overlapping", "below"]
NOT_MEASURED = "not measured"


class Figure(NamedTuple):
    """A figure of ``measure.py`` of a variant."""

    variant: str
    name: str


class Claim(NamedTuple):
    """A comparison of two figures.

    Attributes:
        text: what is claimed.
        source: where it is claimed.
        first, second: the compared figures.
        holds: the orders of the first and the second figure that reproduce the claim.
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
        "overlapping",
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
        "overlapping",
    ),
    _accuracy("at capacity 0.5, training by largest gate helps", VMOE, "half_bpr", "half"),
    _of_one(
        "late experts know the class: above shuffled labels",
        VMOE,
        "standard",
        "class.5",
        "class_null.5",
    ),
    _of_one("late blocks know the class better", VMOE, "standard", "class.5", "class.1"),
    _of_one(
        "early experts know the position: above shuffled places",
        NOBODY,
        "standard",
        "position.1",
        "position_null.1",
    ),
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
    _of_one(
        "predictions depend on the batch, less with one image per group",
        NOBODY,
        "standard",
        "batch",
        "batch.alone",
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


def values(rows: Rows, figure: Figure) -> list[float]:
    """The figure of each seed for which it was measured."""
    every = [figures for _, figures in sorted(rows.get(figure.variant, {}).items())]
    return [row["figures"][figure.name] for row in every if figure.name in row["figures"]]


def order(first: Sequence[float], second: Sequence[float], *, paired: bool) -> Order:
    """How two figures compare over the seeds.

    Args:
        paired: whether both are of the same models.
    """
    pairs = list(zip(first, second, strict=True) if paired else itertools.product(first, second))
    if all(a > b for a, b in pairs):
        return "above"
    return "below" if all(a < b for a, b in pairs) else "overlapping"


def verdict(claim: Claim, rows: Rows) -> str:
    """Whether a claim is reproduced."""
    first, second = values(rows, claim.first), values(rows, claim.second)
    if min(len(first), len(second)) < len(SEEDS):
        return NOT_MEASURED
    found = order(first, second, paired=claim.first.variant == claim.second.variant)
    if found in claim.holds:
        return "reproduced"
    return "within the spread" if found == "overlapping" else "contradicted"
