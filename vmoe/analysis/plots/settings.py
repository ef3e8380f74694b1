"""Figures of accuracies under other settings: slots and priorities, k, random routers."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vmoe.analysis.effects import Logits
from vmoe.analysis.plots.style import NORMAL, SMALL, panels
from vmoe.config.routers import Priority
from vmoe.errors import UsageError
from vmoe.nn.inputs import has_label, is_label

LINES: dict[Priority, tuple[str, str, str, str]] = {
    "order": ("order", "#0072b2", "o", "-"),
    "largest_gate": ("largest gate (BPR)", "#d55e00", "s", "-"),
    "sum_of_gates": ("sum of gates", "#009e73", "^", "--"),
    "random": ("random", "#000000", "x", ":"),
}
"""Of each priority: its name, colour, mark and line."""
Labels = Int[np.ndarray, "b l"]


def accuracy(logits: Logits, labels: Labels) -> tuple[float, float]:
    """The accuracy on images of known class, and its standard error.

    Raises:
        UsageError: no class is known.
    """
    known = has_label(labels)
    if not known.any():
        raise UsageError("labels: no image has a known class, so there is no accuracy")
    right = float(is_label(logits.argmax(-1), labels)[known].mean())
    return right, float(np.sqrt(right * (1 - right) / known.sum()))


def capacity_curves(
    logits: Mapping[tuple[int, Priority], Logits],
    labels: Labels,
    flops: Mapping[int, float],
    *,
    even: float | None = None,
) -> Figure:
    """Accuracy by number of slots, a line per priority; and the cost of that many slots.

    The two controls are random priority, and every choice dropped.

    Args:
        logits: by slots and priority, as ``at_capacities`` returns them; those of 0 slots are the
            line of every choice dropped.
        flops: by slots, the FLOPs per image.
        even: the slots that would hold every choice if all experts had the same load, a capacity
            factor of 1; not marked if None.

    Raises:
        UsageError: no class is known, or a number of slots has no cost.
    """
    slots = sorted({number for number, _ in logits if number})
    if missing := [number for number in slots if number not in flops]:
        raise UsageError(f"flops: none for {missing} slots; give them for every number of slots")
    title = "Accuracy and cost by capacity, in every sparse block"
    figure, axes = panels(1, 2, size=(4.6, 3.6), title=title)
    ax, costs = axes[0]
    largest = 0.0
    for priority, (name, color, mark, line) in LINES.items():
        points = {c: logits[c, priority] for c in slots if (c, priority) in logits}
        if points:
            values, errors = zip(*(accuracy(each, labels) for each in points.values()), strict=True)
            largest = max(largest, *errors)
            ax.plot(list(points), values, color=color, marker=mark, linestyle=line, label=name)
    nothing = [each for (number, _), each in logits.items() if not number]
    if nothing:
        every = accuracy(nothing[0], labels)[0]
        ax.axhline(every, color="0.45", linestyle="-.", label="every choice dropped")
    unit, prefix = (1e9, "G") if max(flops.values()) >= 1e9 else (1e6, "M")
    costs.plot(slots, [flops[c] / unit for c in slots], color="black", marker="o")
    _label(ax, "accuracy", f"{_on(labels)}; standard errors up to {largest:.1%}")
    _label(costs, f"{prefix}FLOPs per image", "cost of the forward pass")
    costs.set_ylim(bottom=0)
    for each in (ax, costs):
        each.set_xscale("log", base=2)
        each.set_xlabel("slots per expert and group")
        each.set_xticks(slots, [str(number) for number in slots])
        each.minorticks_off()
        if even is not None:
            each.axvline(even, color="0.45", linewidth=1, linestyle=":", label="capacity factor 1")
    ax.yaxis.set_major_formatter("{x:.0%}")
    ax.legend(fontsize=SMALL)
    return figure


def _on(labels: Labels) -> str:
    return f"{has_label(labels).sum():,} images"


def _label(ax: Axes, y: str, title: str) -> None:
    ax.set_ylabel(y)
    ax.set_title(title, fontsize=NORMAL)
    ax.grid(alpha=0.3)


def k_at_inference(
    logits: Mapping[int, Logits], labels: Labels, *, own: int | None = None
) -> Figure:
    """Accuracy by number of experts per token, with standard errors.

    Args:
        logits: by k, as ``vmoe.analysis.effects.at_k`` returns them.
        own: the k of the model as it is; not marked if None.

    Raises:
        UsageError: no class is known.
    """
    figure, ((ax,),) = panels(1, 1, size=(4.6, 3.4), title="Accuracy by k at inference")
    values, errors = zip(*(accuracy(logits[k], labels) for k in sorted(logits)), strict=True)
    ax.errorbar(sorted(logits), values, errors, color="#0072b2", marker="o", capsize=3)
    if own is not None:
        ax.axvline(own, color="0.45", linestyle=":", label=f"the model's own k, {own}")
        ax.legend(fontsize=SMALL)
    ax.set_xlabel("k, experts per token")
    ax.set_xticks(sorted(logits), [str(k) for k in sorted(logits)])
    ax.yaxis.set_major_formatter("{x:.1%}")
    _label(ax, "accuracy", f"{_on(labels)}; bars: standard error")
    return figure


def random_routers(logits: Mapping[int, Logits], own: Logits, labels: Labels) -> Figure:
    """Accuracy with a random router in one block at a time, with standard errors.

    Args:
        logits: by block, as ``with_random_routers`` returns them.
        own: of the model as it is.

    Raises:
        UsageError: no class is known.
    """
    title = "Accuracy with a random router in one block"
    figure, ((ax,),) = panels(1, 1, size=(max(4.6, 0.5 * len(logits) + 1.5), 3.4), title=title)
    values, errors = zip(*(accuracy(each, labels) for each in logits.values()), strict=True)
    bars = ax.bar(range(len(values)), values, yerr=errors, capsize=3, color="#56b4e9")
    ax.bar_label(bars, [f"{value:.1%}" for value in values], label_type="center")
    as_is = accuracy(own, labels)[0]
    ax.axhline(as_is, color="black", linestyle="--", label=f"own routers, {as_is:.1%}")
    ax.set_xticks(range(len(values)), [str(block) for block in logits])
    ax.set_xlabel("block with a random router")
    ax.set_ylim(0, 1.1 * max(as_is, *values))
    ax.yaxis.set_major_formatter("{x:.0%}")
    _label(ax, "accuracy", f"{_on(labels)}; bars: standard error")
    ax.legend(fontsize=SMALL, loc="lower right")
    return figure
