"""Further observations on the rows.

Each describes the three seeds, and stands only if it is true of them. One that says which of two
figures is higher for every seed adds the p of its test, as three seeds often agree by chance.
"""

from collections.abc import Callable

import numpy as np

from scripts.experiments.claims.measure import LOW, PRIORITIES, SLOTS
from scripts.experiments.claims.verdicts import Claim, Figure, margin, values
from scripts.experiments.framework.differences import Difference, p_value
from scripts.experiments.framework.pages import wrapped
from scripts.experiments.framework.runs import Rows

MANY = 24
"""Slots from which on priorities hardly matter."""


class Figures:
    """The figures of all seeds, in percent.

    Raises:
        LookupError: a figure was not measured.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __call__(self, variant: str, name: str) -> np.ndarray:
        found = values(self.rows, Figure(variant, name))
        if not found:
            raise LookupError(f"{variant}: {name}")
        return 100 * np.array(found)

    def cost(self, variant: str, name: str) -> float:
        """How much lower than the accuracy a figure is, in points."""
        return float(np.mean(self(variant, "accuracy") - self(variant, name)))

    def difference(self, variant: str, first: str, second: str) -> Difference:
        """The first figure minus the second one, of the same models."""
        return margin(Claim("", "", Figure(variant, first), Figure(variant, second)), self.rows)[0]


def _uncorrected(*tests: Difference) -> str:
    """The largest p, in words; the p of the page's table are corrected."""
    text = p_value(max(each.p for each in tests))
    return f"p {'= ' * ('<' not in text)}{text}, not corrected"


Observation = Callable[[Figures], str | None]


def order_is_worse_than_random(of: Figures) -> str | None:
    parts = []
    for variant in ("standard", "class_token"):
        order, random = (of(variant, f"capacity.{LOW}.{name}") for name in ("order", "random"))
        parts.append((order, random))
    (order, random), (order_class, random_class) = parts
    if not (order < random).all():
        return None
    found = of.difference("standard", *(f"capacity.{LOW}.{name}" for name in ("order", "random")))
    text = (
        f"With {LOW} slots, tokens in order are worse than random priority for each seed "
        f"({order.mean():.2f} and {random.mean():.2f}; {_uncorrected(found)})."
    )
    if found.clear:
        text += " The last images of a group lose their tokens, instead of each image some."
    if not (order_class < random_class).all():
        text += " With a class token the seeds do not agree on that."
    return text


def training_in_order_makes_experts_matter_less(of: Figures) -> str | None:
    kept = {name: of(name, "capacity.0.order").mean() for name in ("half", "half_bpr")}
    full = {name: of(name, "accuracy").mean() for name in kept}
    if kept["half"] <= kept["half_bpr"]:
        return None
    return (
        "Training at capacity factor 0.5 in order makes experts that hardly matter: with every "
        f"token dropped the model keeps {kept['half']:.2f} of {full['half']:.2f}%. Trained with "
        f"the largest gate first it keeps {kept['half_bpr']:.2f} of {full['half_bpr']:.2f}%."
    )


def class_token_is_dropped_early_and_kept_late(of: Figures) -> str | None:
    kinds = ("class_token", "foreground")
    (early, early_fore), (late, late_fore) = (
        [of("class_token", f"kept.{block}.{kind}") for kind in kinds] for block in (1, 5)
    )
    if not ((early < early_fore).all() and (late > late_fore).all()):
        return None
    tests = [of.difference("class_token", *(f"kept.{i}.{kind}" for kind in kinds)) for i in (1, 5)]
    return (
        f"With {LOW} slots, the class token loses more of its choices in block 1 than foreground "
        f"patches do ({early.mean():.1f}% and {early_fore.mean():.1f}% are kept), and fewer in "
        f"block 5 ({late.mean():.1f}% and {late_fore.mean():.1f}%), for each seed "
        f"({_uncorrected(*tests)})."
    )


def first_router_matters_most(of: Figures) -> str | None:
    blocks = [of("standard", f"random.{i}") for i in (1, 3, 5)]
    if not ((blocks[0] < blocks[1]).all() and (blocks[0] < blocks[2]).all()):
        return None
    first, last = (of.cost("standard", f"random.{i}") for i in (1, 5))
    tests = [of.difference("standard", "random.1", f"random.{i}") for i in (3, 5)]
    text = (
        "With mean pooling, a random router costs most in the first MoE layer for each seed: "
        f"{first:.1f} points in block 1 and {last:.1f} in block 5 ({_uncorrected(*tests)}), "
        "although the experts of block 5 know the class best."
    )
    every = [of.cost("all_blocks", f"random.{i}") for i in (0, 5)]
    token = [f"{of.cost('class_token', f'random.{i}'):.1f}" for i in (1, 3, 5)]
    return (
        f"{text} With MoE layers in all blocks it costs {every[0]:.1f} in block 0 and "
        f"{every[1]:.1f} in block 5; with a class token {token[0]}, {token[1]} and {token[2]} in "
        "blocks 1, 3 and 5. The random routers are one draw."
    )


def a_class_token_keeps_experts_ignorant_of_the_class(of: Figures) -> str | None:
    first, last = (of("class_token", f"class.{i}") / 100 for i in (1, 5))
    pooled = of("standard", "class.5") / 100
    if not last.max() < pooled.min() / 2:
        return None
    return (
        f"With a class token the last block does not specialize by class: {last.mean():.3f} in "
        f"block 5 and {first.mean():.3f} in block 1, against {pooled.mean():.3f} in block 5 with "
        "mean pooling."
    )


def merging_costs_more_with_more_moe_layers(of: Figures) -> str | None:
    names = ("last2", "standard", "all_blocks", "averaged")
    last2, standard, every, averaged = (of.cost(name, "merged") for name in names)
    if not averaged < last2 < standard < every:
        return None
    return (
        "Replacing the experts of each MoE layer by their mean costs "
        f"{last2:.1f} points with MoE layers in blocks 3 and 5, {standard:.1f} in blocks 1, 3 and "
        f"5, {every:.1f} in all blocks, and {averaged:.1f} if experts were averaged in training."
    )


def information_is_far_above_chance(of: Figures) -> str | None:
    baselines = [
        of("standard", f"{kind}_null.{i}").max()
        for kind in ("class", "position")
        for i in (1, 3, 5)
    ]
    own = [of("standard", f"{kind}.{i}").min() for kind in ("class", "position") for i in (1, 3, 5)]
    if min(own) < 10 * max(baselines):
        return None
    return (
        "The experts of every block know the class and the position better than chance: with "
        f"shuffled classes and positions the information is at most {max(baselines) / 100:.4f}."
    )


def with_many_slots_no_priority_is_better(of: Figures) -> str | None:
    many = [slots for slots in SLOTS if slots >= MANY]
    spread = [
        np.ptp([of(variant, f"capacity.{slots}.{each}").mean() for each in PRIORITIES])
        for variant in ("standard", "class_token", "half", "half_bpr")
        for slots in many
    ]
    if max(spread) > 0.15:
        return None
    return (
        f"From {MANY} slots on (capacity factor {MANY / 32:g}), the means of the four priorities "
        f"lie within {max(spread):.2f} points: Batch Prioritized Routing makes little difference."
    )


CAPACITY: tuple[Observation, ...] = (
    with_many_slots_no_priority_is_better,
    order_is_worse_than_random,
    training_in_order_makes_experts_matter_less,
    class_token_is_dropped_early_and_kept_late,
)
SPECIALIZATION: tuple[Observation, ...] = (
    a_class_token_keeps_experts_ignorant_of_the_class,
    first_router_matters_most,
    merging_costs_more_with_more_moe_layers,
    information_is_far_above_chance,
)


def observations(rows: Rows, every: tuple[Observation, ...]) -> str:
    """A list of the observations that the rows support."""
    figures, items = Figures(rows), []
    for observation in every:
        try:
            text = observation(figures)
        except LookupError:
            continue
        if text:
            items.append(wrapped(f"- {text}", "  "))
    return "\n".join(items)
