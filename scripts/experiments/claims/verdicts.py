"""Claims of the literature that the models can check, and the rule for a verdict.

A claim compares two figures, A and B. The difference of their means has one error, over the seeds
and over the test images, which all models share (``differences.crossed``). Rows without results per
image have a *bound* of the error over the images: that of different images. Models tend to be wrong
on the same images, so the true error is smaller. A figure that is no accuracy has an error over
*the seeds* alone.

A claim of an order is *reproduced* or *contradicted* if a t-test says that the difference has the
claimed sign, or the other one. A claim that a figure is equal, or not lower, names a margin: it is
*not contradicted* if a test says that the difference lies within it, and *contradicted* if one says
that it lies beyond it. Otherwise a claim is *inconclusive*. A test says something if p < 0.05,
corrected for all tests of the page on which the claim stands.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from scripts.experiments.claims.measure import ACCURACIES, ATTACKED, LOW, unpack
from scripts.experiments.framework.differences import (
    LEVEL,
    Difference,
    Order,
    corrected_p,
    crossed,
    difference,
)
from scripts.experiments.framework.runs import SEEDS, Rows

MARGIN = 0.005
"""The margin of claims that an accuracy stays the same: half a point.

Nobody would choose a model for less: it is about half of the difference between V-MoE and the dense
model at equal steps, as trials of non-inferiority allow a loss of half of a treatment's effect (FDA
2016). It was set before any verdict by this rule was computed; the differences themselves were
known.
"""
VERDICTS = ("contradicted", "inconclusive", "not contradicted", "reproduced")
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
        first: the first of the compared figures.
        second: the second one.
        labels: what the figures measure.
        says: the first figure is above the second one, equal to it, or not below it.
        margin: the difference that "equal" and "not below" allow.
    """

    text: str
    source: str
    first: Figure
    second: Figure
    labels: tuple[str, str] = ("A", "B")
    says: Literal["above", "equal", "not below"] = "above"
    margin: float = 0.0


def _claim(
    text: str, source: str, first: str, second: str, labels: tuple[str, str], **says: Any
) -> Claim:
    """A claim on two figures, "VARIANT:NAME", or on the accuracies of two variants."""
    return Claim(text, source, _figure(first), _figure(second), labels, **says)


def _figure(words: str) -> Figure:
    variant, _, name = words.partition(":")
    return Figure(variant, name or "accuracy")


VMOE, SWEET, ROUTERS = "2106.05974", "2411.18322", "2401.15969"
ATTACK, EXPERTS_WEAK, NOBODY = "2210.10253", "2502.06832", "-"
PRUNING, LAYERS, AVERAGING = "2306.04073", "2410.15732", "2308.06093"
BIAS, COSINE = "2408.15664", "2204.09179"
NAMES = {"standard": "mean pooling", "class_token": "class token"}
CLAIMS = {
    "dense": _claim(
        "sparse is better than dense at equal steps", VMOE, "standard", "dense", ("V-MoE", "dense")
    ),
    "dense_flops": _claim(
        "sparse is better than dense at equal training FLOPs",
        VMOE,
        "standard",
        "dense_flops",
        ("V-MoE", "dense"),
    ),
    "e16": _claim(
        "16 experts are better than 8", VMOE, "e16", "standard", ("16 experts", "8 experts")
    ),
    "e4": _claim("8 experts are better than 4", VMOE, "standard", "e4", ("8 experts", "4 experts")),
    "k1": _claim("k = 2 is better than k = 1", VMOE, "standard", "k1", ("k = 2", "k = 1")),
    "last2": _claim(
        "MoE layers in every second block are better than in the last two of these blocks",
        SWEET,
        "standard",
        "last2",
        ("blocks 1, 3, 5", "blocks 3, 5"),
    ),
    "expert_choice": _claim(
        "expert choice is better than token choice",
        ROUTERS,
        "expert_choice",
        "standard",
        ("expert choice", "token choice"),
    ),
    "soft": _claim(
        "soft routing is better than token choice",
        ROUTERS,
        "soft",
        "standard",
        ("soft", "token choice"),
    ),
    "soft_expert_choice": _claim(
        "soft routing is better than expert choice",
        ROUTERS,
        "soft",
        "expert_choice",
        ("soft", "expert choice"),
    ),
    "bias_balanced": _claim(
        "the bias-balanced recipe (sigmoid scores, no noise, a bias instead of losses) is better "
        "than V-MoE's",
        BIAS,
        "bias_balanced",
        "standard",
        ("bias-balanced recipe", "V-MoE's recipe"),
    ),
    "bias": _claim(
        "with softmax scores, a bias is better than losses and noise",
        BIAS,
        "bias_softmax",
        "standard",
        ("a bias", "losses with noise"),
    ),
    "sigmoid": _claim(
        "with a bias, sigmoid scores are better than softmax scores",
        BIAS,
        "bias_balanced",
        "bias_softmax",
        ("sigmoid scores", "softmax scores"),
    ),
    "bias_unbalanced": _claim(
        "with softmax scores and no noise, a bias is better than nothing that balances",
        NOBODY,
        "bias_softmax",
        "unbalanced",
        ("a bias", "no balance"),
    ),
    "unbalanced": _claim(
        "losses and noise are better than neither",
        VMOE,
        "standard",
        "unbalanced",
        ("losses with noise", "neither of them"),
    ),
    "cosine": _claim(
        "a cosine gate is better than a linear one",
        COSINE,
        "cosine",
        "standard",
        ("cosine gate", "linear gate"),
    ),
    "hash": _claim(
        "a fixed hash of the position is better than a learned gate",
        NOBODY,  # Hash Layers (2106.04426) hash the token, not its position
        "hash",
        "standard",
        ("hash", "learned gate"),
    ),
    "shared": _claim(
        "a shared expert and k = 1 are better than k = 2",
        LAYERS,
        "shared",
        "standard",
        ("shared expert, k = 1", "k = 2"),
    ),
    **{
        f"{other}.{variant}": _claim(
            f"{LOW} slots, {NAMES[variant]}: largest gate first is better than {than}",
            VMOE,
            f"{variant}:capacity.{LOW}.largest_gate",
            f"{variant}:capacity.{LOW}.{other}",
            ("largest gate first", than),
        )
        for variant in NAMES
        for other, than in {"order": "in order", "random": "at random"}.items()
    },
    "sum_of_gates": _claim(
        f"{LOW} slots: largest gate and sum of gates are equally good, within half a point",
        NOBODY,
        f"standard:capacity.{LOW}.largest_gate",
        f"standard:capacity.{LOW}.sum_of_gates",
        ("largest gate first", "largest sum of gates first"),
        says="equal",
        margin=MARGIN,
    ),
    **{
        f"background.{block}": _claim(
            f"{LOW} slots, largest gate first, block {block}: background is dropped first",
            PRUNING,
            f"standard:kept.{block}.foreground",
            f"standard:kept.{block}.background",
            ("foreground kept", "background kept"),
        )
        for block in (1, 5)
    },
    "half_bpr": _claim(
        "training at capacity factor 0.5, largest gate first, costs at most half a point",
        VMOE,
        "half_bpr",
        "standard",
        ("capacity factor 0.5", "capacity factor 1.05"),
        says="not below",
        margin=MARGIN,
    ),
    "half": _claim(
        "training at capacity factor 0.5: largest gate first is better than in order",
        VMOE,
        "half_bpr",
        "half",
        ("largest gate first", "in order"),
    ),
    "class": _claim(
        "experts of late blocks know the class better",
        VMOE,
        "standard:class.5",
        "standard:class.1",
        ("information in block 5", "in block 1"),
    ),
    "position": _claim(
        "experts of early blocks know the position better",
        NOBODY,
        "standard:position.1",
        "standard:position.5",
        ("information in block 1", "in block 5"),
    ),
    "random_router": _claim(
        "routers of late blocks matter more",
        LAYERS,
        "standard:random.1",
        "standard:random.5",
        ("random router in block 1", "in block 5"),
    ),
    "averaged": _claim(
        "averaging experts at every step makes them more accurate when merged into one MLP",
        AVERAGING,
        "averaged:merged",
        "standard:merged",
        ("averaged, merged", "not averaged, merged"),
    ),
    **{
        f"{attack}.{dense}": _claim(
            f"{how} attack by 8/255: sparse is more accurate than dense at equal {what}",
            ATTACK,
            f"standard:{attack}",
            f"{dense}:{attack}",
            ("V-MoE", "dense"),
        )
        for attack, how in {"attack.8": "published", "attack.8.projected": "projected"}.items()
        for dense, what in {"dense": "steps", "dense_flops": "training FLOPs"}.items()
    },
    "experts_weak": _claim(
        "experts are more vulnerable to an attack than routers",
        EXPERTS_WEAK,
        "standard:attack.8.routers",
        "standard:attack.8.experts",
        ("attacked through the routers", "through the experts"),
    ),
}
ROUTERS_COMPARED = (
    *("expert_choice", "soft", "bias_balanced", "bias", "sigmoid", "bias_unbalanced"),
    *("unbalanced", "cosine", "hash", "shared"),
)
KEPT = ("background.1", "background.5")
PAGES = {
    "sparse_or_dense": ("dense", "dense_flops"),
    "design": ("e16", "e4", "k1", "last2"),
    "routers": (*ROUTERS_COMPARED, "soft_expert_choice"),
    "capacity": (
        *(f"{other}.{variant}" for variant in NAMES for other in ("order", "random")),
        *("sum_of_gates", *KEPT, "half_bpr", "half"),
    ),
    "specialization": ("class", "position", "random_router", "averaged"),
    "attacks": (*(name for name in CLAIMS if name.startswith("attack.")), "experts_weak"),
}
"""The claims of each page of docs/results, whose tests are corrected together."""
NOT_CHECKED = {
    "pruning by the change of the routers' norms (2405.16646)": "see [pruning](pruning.md)",
    "gains vanish as more is activated; the last two blocks are the more robust choice (2411.18322)"
    "": "needs larger models and several recipes",
}
"""Claims that these models cannot check, and why."""


def compared(variant: str) -> set[str]:
    """The accuracy of a variant, and the figures that a claim compares."""
    figures = {figure for claim in CLAIMS.values() for figure in (claim.first, claim.second)}
    return {"accuracy"} | {figure.name for figure in figures if figure.variant == variant}


def values(rows: Rows, figure: Figure) -> list[float]:
    """The figure of each seed for which it was measured."""
    every = [figures for _, figures in sorted(rows.get(figure.variant, {}).items())]
    return [row["figures"][figure.name] for row in every if figure.name in row["figures"]]


class Judged(NamedTuple):
    """A measured claim.

    Attributes:
        difference: A minus B, with its error.
        basis: what the error covers: the seeds, and the images or a bound.
        p: that of the test of the order, or that the difference lies within the margin, corrected.
        verdict: one of ``VERDICTS``.
    """

    difference: Difference
    basis: str
    p: float
    verdict: str

    @property
    def order(self) -> Order:
        """How A and B compare, by a claim of an order."""
        if self.p >= LEVEL:
            return "none"
        return "above" if self.difference.mean > 0 else "below"


Recipes = Sequence[Mapping[str, Any]]
"""Runs of the configs with a dense counterpart, as in scripts/experiments/rows/recipes.json."""


class Findings(NamedTuple):
    """What the rows say.

    Attributes:
        claims: the measured claims by name.
        recipes: V-MoE minus dense in points, by config.
    """

    claims: dict[str, Judged]
    recipes: dict[str, Difference]


def judge(rows: Rows, recipes: Recipes = ()) -> Findings:
    """The verdicts on the measured claims, corrected for the number of tests of each page."""
    found = {recipe["config"]: difference_of_recipe(recipe) for recipe in recipes}
    claims: dict[str, Judged] = {}
    for page, names in PAGES.items():
        measured = {name: margin(CLAIMS[name], rows) for name in names if _measured(name, rows)}
        tests = {
            (name, test): p
            for name, (own, _) in measured.items()
            for test, p in tests_of(CLAIMS[name], own).items()
        }
        others = found if page == "sparse_or_dense" else {}
        every = corrected_p(tests | {("", name): each.p for name, each in others.items()})
        for name in others:
            found[name] = found[name]._replace(p=every["", name])
        for name, (own, basis) in measured.items():
            p = {test: every[name, test] for test in VERDICTS if (name, test) in every}
            claims[name] = Judged(own, basis, *verdict_of(own, p))
    return Findings({name: claims[name] for name in CLAIMS if name in claims}, found)


def _measured(name: str, rows: Rows) -> bool:
    figures = (CLAIMS[name].first, CLAIMS[name].second)
    return min(len(values(rows, figure)) for figure in figures) >= len(SEEDS)


def tests_of(claim: Claim, found: Difference) -> dict[str, float]:
    """p of the tests of a claim, by the verdict for which each is evidence.

    An order is tested on both sides at once, and has the verdict of its sign.
    """
    if claim.says == "above":
        return {"reproduced" if found.mean > 0 else "contradicted": found.p}
    within, beyond = found.p_above(-claim.margin), found.p_below(-claim.margin)
    if claim.says == "equal":  # two tests of one side each (Schuirmann 1987)
        within = max(within, found.p_below(claim.margin))
        beyond = min(1.0, 2 * min(beyond, found.p_above(claim.margin)))
    return {"not contradicted": within, "contradicted": beyond}


def verdict_of(found: Difference, p: Mapping[str, float]) -> tuple[float, str]:
    """The p to show, and the verdict.

    Args:
        p: as from ``tests_of``, corrected.
    """
    clear = [verdict for verdict in p if p[verdict] < LEVEL]
    shown = p.get("not contradicted", next(iter(p.values())))
    return shown, clear[0] if clear else "inconclusive"


def margin(claim: Claim, rows: Rows, planned: Sequence[int] = ()) -> tuple[Difference, str]:
    """How much A exceeds B in a measured claim, and what the error covers.

    Args:
        planned: numbers of seeds, as for ``crossed``.

    Raises:
        SystemExit: the rows were measured on different images.
    """
    figures = (claim.first, claim.second)
    first, second = (np.array(values(rows, figure)) for figure in figures)
    same = claim.first.variant == claim.second.variant
    every = [row for figure in figures for row in rows[figure.variant].values()]
    of_first, of_second = (_correct(rows, figure) for figure in figures)
    if of_first is None or of_second is None:
        counts = [count for figure in figures if (count := _images(rows, figure))]
        if len(counts) < len(figures):
            return difference(first, second, paired=same, planned=planned), "seeds"
        bound = error_bound(first.mean(), second.mean(), min(counts))
        return difference(first, second, paired=same, images=bound), "seeds, bound"
    if len({row["labels"] for row in every}) > 1:
        raise SystemExit(f"{claim.text}: rows of different images; remove rows of other versions")
    return crossed(of_first, of_second, paired=same, planned=planned), "seeds, images"


def difference_of_recipe(recipe: Mapping[str, Any]) -> Difference:
    """V-MoE minus dense of a config in points, with a bound of the error over the images.

    The images of one emoji are one observation.
    """
    sparse, dense = (np.array(recipe[key]) for key in ("sparse", "dense"))
    observations = recipe.get("observations", recipe["images"])
    bound = 100 * error_bound(sparse.mean() / 100, dense.mean() / 100, observations)
    return difference(sparse, dense, paired=False, images=bound)


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
