"""The settings under which batch-mates are tried, and what comes of it."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vmoe.config.attack import MatesConfig
from vmoe.config.routers import Priority
from vmoe.nn.inputs import is_label


class Setting(NamedTuple):
    """The routing under which mates are tried.

    Attributes:
        capacity_factor: None for capacity for every token.
        priority: which tokens get their slots first.
        split: whether every image gets a group of its own, and so has no mates.
    """

    capacity_factor: float | None
    priority: Priority = "order"
    split: bool = False


def settings(config: MatesConfig) -> list[Setting]:
    """Every capacity and priority, then two settings that are immune."""
    tried = [Setting(c, priority) for c in config.capacity_factor for priority in config.priority]
    first = config.priority[0]
    return [*tried, Setting(None, first), Setting(min(config.capacity_factor), first, split=True)]


class Outcome(NamedTuple):
    """Victims in one group each, or in several.

    Attributes:
        losses: softmax cross-entropy in nats.
        predictions: the class with the largest logit.
        dropped: fraction of the victim's choices, in all sparse blocks, that got no slot.
    """

    losses: Float[np.ndarray, "b *x"]
    predictions: Int[np.ndarray, "b *x"]
    dropped: Float[np.ndarray, "b *x"]


class Changed(NamedTuple):
    """Victims with the mates of the first draw after their pixels were changed.

    Attributes:
        optimised: mates that climbed the surrogate.
        control: mates whose pixels were changed by as much, with random signs.
        surrogate: before and after, in [0, 1]; see ``mates_program.surrogate``.
    """

    optimised: Outcome
    control: Outcome
    surrogate: Float[np.ndarray, "b 2"]


class MatesResult(NamedTuple):
    """Victims under one setting.

    Attributes:
        slots: of an expert in a group, by block.
        without: the victims without mates, with the same slots.
        drawn: with the mates of every draw.
        changed: with changed mates, for each way of changing them.
    """

    slots: dict[int, int]
    without: Outcome
    drawn: Outcome
    changed: list[Changed]


class Measures(NamedTuple):
    """Victims under one way to choose their mates; means over the victims.

    Attributes:
        accuracy: fraction of right predictions.
        changed: fraction of predictions that differ from those without mates.
        loss: softmax cross-entropy in nats.
        dropped: fraction of the victims' choices that got no slot.
    """

    accuracy: float
    changed: float
    loss: float
    dropped: float


def measures(
    outcome: Outcome, without: Outcome, labels: Int[np.ndarray, "b l"], *, worst: bool = False
) -> Measures:
    """Sums up victims in one or several groups.

    Args:
        without: the same victims without mates.
        labels: the classes of each victim; padded with -1.
        worst: for each victim and measure its worst group, in place of the mean: right in all,
            changed in any.
    """
    losses, predictions, dropped = (x.reshape(len(labels), -1) for x in outcome)
    right = is_label(predictions.T, labels).T
    changed = predictions != without.predictions[:, None]

    def over_groups(x: np.ndarray) -> float:
        return float((x.max(1) if worst else x.mean(1)).mean())

    accuracy = float((right.all(1) if worst else right).mean())
    return Measures(accuracy, *map(over_groups, (changed, losses, dropped)))
