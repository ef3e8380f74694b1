"""Claims of the literature that the models can check, and the rule for a verdict.

A claim compares two figures, A and B. A is *above* B if two things hold. The seeds separate: each
seed of A is above every seed of B; if both figures come from the same models, A is above B for each
seed. And the images confirm it: the mean over the seeds exceeds the other by two standard errors
over the test images, which all models share. Rows without results per image have a *bound* of that
error: the error if both were measured on different images. Models tend to be wrong on the same
images, so the true error is smaller. A figure that is no accuracy has neither: its verdict rests on
*the seeds alone*.

A claim is *reproduced* if the order is the claimed one, and *contradicted* if it is another one.
Without an order it is *not contradicted* if it claims that nothing changes, else *inconclusive*. A
verdict that chance would give in more than one of eight cases is inconclusive, too.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from experiments import SEEDS, Rows

from reproduction.measure import ACCURACIES, ATTACKED, LOW, unpack

Order = Literal["above", "none", "below"]
ERRORS = 2
"""Standard errors over the images that a difference must exceed."""
CHANCE = 1 / 8
"""The largest probability at which chance may give a verdict."""
VERDICTS = ("contradicted", "inconclusive", "not contradicted", "reproduced")
NOT_MEASURED = "not measured"
BOUND, SEEDS_ALONE = " by a bound", " by the seeds alone"
"""After a verdict: what it rests on, if not on the seeds and the error over the images."""


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
        labels: what the figures measure.
    """

    text: str
    source: str
    first: Figure
    second: Figure
    holds: tuple[Order, ...] = ("above",)
    labels: tuple[str, str] = ("A", "B")


def _accuracy(
    text: str,
    source: str,
    first: str,
    second: str,
    labels: tuple[str, str],
    holds: tuple[Order, ...] = ("above",),
) -> Claim:
    figures = (Figure(variant, "accuracy") for variant in (first, second))
    return Claim(text, source, *figures, holds, labels)


def _of_one(
    text: str,
    source: str,
    variant: str,
    first: str,
    second: str,
    labels: tuple[str, str],
    holds: tuple[Order, ...] = ("above",),
) -> Claim:
    figures = (Figure(variant, name) for name in (first, second))
    return Claim(text, source, *figures, holds, labels)


VMOE, SWEET, ROUTERS = "2106.05974", "2411.18322", "2401.15969"
ATTACK, EXPERTS_WEAK, NOBODY = "2210.10253", "2502.06832", "-"
PRUNING, LAYERS, AVERAGING = "2306.04073", "2410.15732", "2308.06093"
BIAS, COSINE, HASH = "2408.15664", "2204.09179", "2106.04426"
NAMES = {"standard": "mean pooling", "class_token": "class token"}
CLAIMS = {
    "dense": _accuracy(
        "sparse is better than dense at equal steps",
        VMOE,
        "standard",
        "dense",
        ("V-MoE", "dense"),
    ),
    "dense_flops": _accuracy(
        "sparse is better than dense at equal training FLOPs",
        VMOE,
        "standard",
        "dense_flops",
        ("V-MoE", "dense"),
    ),
    "e16": _accuracy(
        "16 experts are better than 8", VMOE, "e16", "standard", ("16 experts", "8 experts")
    ),
    "e4": _accuracy(
        "8 experts are better than 4", VMOE, "standard", "e4", ("8 experts", "4 experts")
    ),
    "k1": _accuracy("k = 2 is better than k = 1", VMOE, "standard", "k1", ("k = 2", "k = 1")),
    "last2": _accuracy(
        "MoE layers in every second block are better than in the last two of these blocks",
        SWEET,
        "standard",
        "last2",
        ("blocks 1, 3, 5", "blocks 3, 5"),
    ),
    "expert_choice": _accuracy(
        "expert choice is better than token choice",
        ROUTERS,
        "expert_choice",
        "standard",
        ("expert choice", "token choice"),
    ),
    "soft": _accuracy(
        "soft routing is better than token choice",
        ROUTERS,
        "soft",
        "standard",
        ("soft", "token choice"),
    ),
    "soft_expert_choice": _accuracy(
        "soft routing is better than expert choice",
        ROUTERS,
        "soft",
        "expert_choice",
        ("soft", "expert choice"),
    ),
    "bias_balanced": _accuracy(
        "balance by a bias is better than by auxiliary losses",
        BIAS,
        "bias_balanced",
        "standard",
        ("balance by a bias", "balance by losses"),
    ),
    "cosine": _accuracy(
        "a cosine gate is better than a linear one",
        COSINE,
        "cosine",
        "standard",
        ("cosine gate", "linear gate"),
    ),
    "hash": _accuracy(
        "a fixed hash of the position is better than a learned gate",
        HASH,
        "hash",
        "standard",
        ("hash", "learned gate"),
    ),
    "shared": _accuracy(
        "a shared expert and k = 1 are better than k = 2",
        LAYERS,
        "shared",
        "standard",
        ("shared expert, k = 1", "k = 2"),
    ),
    **{
        f"{other}.{variant}": _of_one(
            f"{LOW} slots, {NAMES[variant]}: largest gate first is better than {than}",
            VMOE,
            variant,
            f"capacity.{LOW}.largest_gate",
            f"capacity.{LOW}.{other}",
            ("largest gate first", than),
        )
        for variant in NAMES
        for other, than in {"order": "in order", "random": "at random"}.items()
    },
    "sum_of_gates": _of_one(
        f"{LOW} slots: largest gate and sum of gates are equally good",
        NOBODY,
        "standard",
        f"capacity.{LOW}.largest_gate",
        f"capacity.{LOW}.sum_of_gates",
        ("largest gate first", "largest sum of gates first"),
        ("none",),
    ),
    **{
        f"background.{block}": _of_one(
            f"{LOW} slots, largest gate first, block {block}: background is dropped first",
            PRUNING,
            "standard",
            f"kept.{block}.foreground",
            f"kept.{block}.background",
            ("foreground kept", "background kept"),
        )
        for block in (1, 5)
    },
    "half_bpr": _accuracy(
        "training at capacity factor 0.5, largest gate first, costs no accuracy",
        VMOE,
        "half_bpr",
        "standard",
        ("capacity factor 0.5", "capacity factor 1.05"),
        ("above", "none"),
    ),
    "half": _accuracy(
        "training at capacity factor 0.5: largest gate first is better than in order",
        VMOE,
        "half_bpr",
        "half",
        ("largest gate first", "in order"),
    ),
    "class": _of_one(
        "experts of late blocks know the class better",
        VMOE,
        "standard",
        "class.5",
        "class.1",
        ("information in block 5", "in block 1"),
    ),
    "position": _of_one(
        "experts of early blocks know the position better",
        NOBODY,
        "standard",
        "position.1",
        "position.5",
        ("information in block 1", "in block 5"),
    ),
    "random_router": _of_one(
        "routers of late blocks matter more",
        LAYERS,
        "standard",
        "random.1",
        "random.5",
        ("random router in block 1", "in block 5"),
    ),
    "averaged": Claim(
        "averaging experts at every step makes them more accurate when merged into one MLP",
        AVERAGING,
        Figure("averaged", "merged"),
        Figure("standard", "merged"),
        labels=("averaged, merged", "not averaged, merged"),
    ),
    **{
        f"{attack}.{dense}": Claim(
            f"{how} attack by 8/255: sparse is more accurate than dense at equal {what}",
            ATTACK,
            Figure("standard", attack),
            Figure(dense, attack),
            labels=("V-MoE", "dense"),
        )
        for attack, how in {"attack.8": "published", "attack.8.projected": "projected"}.items()
        for dense, what in {"dense": "steps", "dense_flops": "training FLOPs"}.items()
    },
    "experts_weak": _of_one(
        "experts are more vulnerable to an attack than routers",
        EXPERTS_WEAK,
        "standard",
        "attack.8.routers",
        "attack.8.experts",
        ("attacked through the routers", "through the experts"),
    ),
}
NOT_CHECKED = {
    "pruning by the change of the routers' norms (2405.16646)": "see [pruning](pruning.md)",
    "gains vanish as more is activated; the last two blocks are the more robust choice (2411.18322)"
    "": "needs larger models and several recipes",
}
"""Claims that these models cannot check, and why."""


def compared(variant: str) -> set[str]:
    """The figures of a variant that a claim compares."""
    figures = {figure for claim in CLAIMS.values() for figure in (claim.first, claim.second)}
    return {figure.name for figure in figures if figure.variant == variant}


def values(rows: Rows, figure: Figure) -> list[float]:
    """The figure of each seed for which it was measured."""
    every = [figures for _, figures in sorted(rows.get(figure.variant, {}).items())]
    return [row["figures"][figure.name] for row in every if figure.name in row["figures"]]


class Margin(NamedTuple):
    """How much A exceeds B.

    Attributes:
        mean: the difference of the means over the seeds.
        over_seeds: its standard error over the seeds, from three of them; NaN for one seed.
        error: its standard error over the images, on each of which the two are compared; None if
            a row has no results per image.
        bound: an upper bound of that error; None if a figure is no accuracy over images.
    """

    mean: float
    over_seeds: float
    error: float | None
    bound: float | None


def margin(claim: Claim, rows: Rows) -> Margin:
    """The margin of a measured claim.

    Raises:
        SystemExit: the rows were measured on different images.
    """
    figures = (claim.first, claim.second)
    first, second = (np.array(values(rows, figure)) for figure in figures)
    mean = float(first.mean() - second.mean())
    over_seeds = error_over_seeds(first, second, paired=paired(claim))
    every = [row for figure in figures for row in rows[figure.variant].values()]
    of_first, of_second = (_correct(rows, figure) for figure in figures)
    if of_first is None or of_second is None:
        counts = [_images(rows, figure) for figure in figures]
        if None in counts:
            return Margin(mean, over_seeds, None, None)
        return Margin(mean, over_seeds, None, error_bound(first.mean(), second.mean(), min(counts)))
    if len({row["labels"] for row in every}) > 1:
        raise SystemExit(f"{claim.text}: rows of different images; remove rows of other versions")
    differences = of_first.mean(0) - of_second.mean(0)
    error = float(differences.std() / math.sqrt(differences.size))
    return Margin(mean, over_seeds, error, error)


def paired(claim: Claim) -> bool:
    """Whether both figures come from the same models."""
    return claim.first.variant == claim.second.variant


def error_over_seeds(first: np.ndarray, second: np.ndarray, *, paired: bool) -> float:
    """The standard error of the difference of two means over the seeds.

    Args:
        paired: whether a seed of both is the same model.
    """
    parts = [first - second] if paired else [first, second]
    if min(part.size for part in parts) < 2:
        return math.nan
    return math.sqrt(sum(float(part.var(ddof=1)) / part.size for part in parts))


def error_bound(first: float, second: float, images: int) -> float:
    """The standard error of the difference of two accuracies on different images.

    On the same images the error is smaller, if models tend to be wrong on the same ones. Means over
    seeds do not count for more images.
    """
    return math.sqrt((first * (1 - first) + second * (1 - second)) / images)


def _images(rows: Rows, figure: Figure) -> int | None:
    """The number of images of an accuracy; None for other figures."""
    kind = figure.name.partition(".")[0]
    if kind not in ACCURACIES:
        return None
    number = min(row["images"] for row in rows[figure.variant].values())
    return min(ATTACKED, number) if kind == "attack" else number


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


def order_of_seeds(claim: Claim, rows: Rows) -> Order:
    """How the figures of a measured claim compare, by the seeds."""
    return order(values(rows, claim.first), values(rows, claim.second), paired=paired(claim))


def found(claim: Claim, rows: Rows) -> Order:
    """How the figures of a measured claim compare, by the seeds and by the images."""
    by_seeds = order_of_seeds(claim, rows)
    mean, _, error, bound = margin(claim, rows)
    if error is None and _chance_of_verdict(claim) > CHANCE:
        return "none"
    return by_seeds if bound is None or abs(mean) >= ERRORS * bound else "none"


def verdict(claim: Claim, rows: Rows) -> str:
    """Whether a claim is reproduced."""
    first, second = values(rows, claim.first), values(rows, claim.second)
    if min(len(first), len(second)) < len(SEEDS):
        return NOT_MEASURED
    result = found(claim, rows)
    separate = order_of_seeds(claim, rows) != "none"
    _, _, error, bound = margin(claim, rows)
    if result == "none":
        alone = separate and error is None
        text = "not contradicted" if result in claim.holds and not alone else "inconclusive"
    else:
        text = "reproduced" if result in claim.holds else "contradicted"
    return text + (SEEDS_ALONE if bound is None else BOUND if error is None else "")


def word(text: str) -> str:
    """A verdict without what it rests on."""
    return text.removesuffix(SEEDS_ALONE).removesuffix(BOUND)


def seeds_agree(claim: Claim, rows: Rows) -> bool:
    """Whether the seeds of a measured claim separate in the claimed order, whatever the images."""
    return "above" in claim.holds and order_of_seeds(claim, rows) == "above"


def chance(claim: Claim) -> float:
    """The probability that the seeds separate, in one order or the other, without any effect.

    Every order of the seeds is then equally likely. That the images must agree makes an order
    rarer, so this bounds the probability of a verdict.
    """
    n = len(SEEDS)
    return 2 / (2**n if paired(claim) else math.comb(2 * n, n))


def _chance_of_verdict(claim: Claim) -> float:
    """The probability that the seeds alone contradict a true claim, or reproduce a false one."""
    return chance(claim) / (1 if claim.holds == ("none",) else 2)
