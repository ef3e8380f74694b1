"""Figures of accuracies under other settings: slots and priorities, k, random routers.

All settings are measured on the same images. So error bars are standard errors of the difference
between two settings; only images that exactly one of the two predicts correctly contribute.
"""

from collections.abc import Collection, Mapping

import numpy as np
from jaxtyping import Bool, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vmoe.analysis.effects import Logits
from vmoe.analysis.plots.style import NORMAL, legend_below, panels
from vmoe.analysis.statistics import standard_error
from vmoe.errors import UsageError
from vmoe.nn.inputs import has_label, is_label
from vmoe.routing.priority import Priority

LINES: dict[Priority, tuple[str, str, str, str]] = {
    "order": ("order", "#0072b2", "o", "-"),
    "largest_gate": ("largest gate (BPR)", "#d55e00", "s", "-"),
    "sum_of_gates": ("sum of gates", "#009e73", "^", "--"),
    "random": ("random, one draw", "#000000", "x", ":"),
}
"""The name, color, marker and line style of each priority."""
Labels = Int[np.ndarray, "b l"]


def correct(logits: Logits, labels: Labels) -> Bool[np.ndarray, "x"]:
    """Whether each image of known class is predicted correctly."""
    known = has_label(labels)
    if not known.any():
        raise UsageError("labels: no image has a known class, so there is no accuracy")
    return is_label(logits.argmax(-1), labels)[known]


def capacity_curves(
    logits: Mapping[tuple[int, Priority], Logits],
    labels: Labels,
    flops: Mapping[int, float],
    *,
    even: float | None = None,
) -> Figure:
    """Accuracy and cost by number of slots; the accuracy has a line per priority.

    There are two baselines: random priority, and all choices dropped. Bars are standard errors of
    the difference from the first priority with the same slots.

    Args:
        logits: logits by slots and priority, as ``at_capacities`` returns them. Those at 0 slots
            give the baseline of all choices dropped.
        flops: FLOPs per image by slots, for every number of slots but 0.
        even: number of slots at capacity factor 1, which would hold all choices if experts had
            equal loads; not marked if None.
    """
    slots = sorted({number for number, _ in logits if number})
    if missing := [number for number in slots if number not in flops]:
        raise UsageError(f"flops: none for {missing} slots; give them for every number of slots")
    title = "Accuracy and cost by capacity, in every sparse block"
    figure, axes = panels(1, 2, size=(4.6, 3.6), title=title)
    ax, costs = axes[0]
    right = {setting: correct(each, labels) for setting, each in logits.items()}
    first, *_ = (priority for priority in LINES if (slots[0], priority) in right)
    for priority, (name, color, mark, line) in LINES.items():
        points = {c: right[c, priority] for c in slots if (c, priority) in right}
        if points:
            values = [each.mean() for each in points.values()]
            errors = [
                standard_error(each.astype(float) - right[c, first]) for c, each in points.items()
            ]
            style = dict(color=color, marker=mark, linestyle=line, label=name, capsize=2)
            ax.errorbar(list(points), values, None if priority == first else errors, **style)
    nothing = [each for (number, _), each in right.items() if not number]
    if nothing:
        style = dict(color="0.45", linestyle="-.", label="every choice dropped")
        ax.axhline(nothing[0].mean(), **style)
    unit, prefix = (1e9, "G") if max(flops.values()) >= 1e9 else (1e6, "M")
    costs.plot(slots, [flops[c] / unit for c in slots], color="black", marker="o")
    bars = f"bars: standard error of the difference from {LINES[first][0]}"
    _label(ax, "accuracy", f"{_on(labels)}\n{bars}")
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
    legend_below(figure, ax, columns=3)
    return figure


def _on(labels: Labels) -> str:
    return f"{has_label(labels).sum():,} images"


def _label(ax: Axes, y: str, title: str) -> None:
    ax.set_ylabel(y)
    ax.set_title(title, fontsize=NORMAL)
    ax.grid(alpha=0.3)


def k_at_inference(
    logits: Mapping[int, Logits],
    labels: Labels,
    *,
    own: int | None = None,
    slots: Mapping[int, Collection[int]] | None = None,
) -> Figure:
    """Accuracy by number of experts per token.

    Bars are standard errors of the difference from ``own``, or from the smallest k if it is None.

    Args:
        logits: logits by k, as ``vmoe.analysis.effects.at_k`` returns them.
        own: the k of the unmodified model; not marked if None.
        slots: slots per expert and group of each sparse block, by k; not shown if None.
    """
    figure, ((ax,),) = panels(1, 1, size=(4.8, 3.6), title="Accuracy by k at inference")
    ks = sorted(logits)
    right = {k: correct(logits[k], labels) for k in ks}
    first = ks[0] if own is None else own
    errors = [standard_error(right[k].astype(float) - right[first]) for k in ks]
    values = [right[k].mean() for k in ks]
    ax.errorbar(ks, values, errors, color="#0072b2", marker="o", capsize=3)
    if own is not None:
        ax.axvline(own, color="0.45", linestyle=":", label=f"the model's own k, {own}")
        legend_below(figure, ax)
    names = {k: str(k) for k in ks}
    if slots is not None:
        ends = {k: sorted({min(slots[k]), max(slots[k])}) for k in ks}
        names = {k: f"{k}\n{'–'.join(map(str, ends[k]))}" for k in ks}
    ax.set_xlabel("k, experts per token" + "; slots per expert and group" * (slots is not None))
    ax.set_xticks(ks, list(names.values()))
    ax.yaxis.set_major_formatter("{x:.1%}")
    bars = f"bars: standard error of the difference from k {first}"
    _label(ax, "accuracy", f"{_on(labels)}\n{bars}")
    return figure


def random_routers(
    logits: Mapping[int, Logits], own: Int[np.ndarray, "b"], labels: Labels
) -> Figure:
    """Accuracy with a random router in one block at a time.

    Bars are standard errors, over the images, of the difference from the model's own routers.
    Another draw of the random logits differs by more.

    Args:
        logits: logits by block, as ``with_random_routers`` returns them.
        own: the class that the unmodified model predicts for each image.
    """
    title = "Accuracy with a random router in one block"
    figure, ((ax,),) = panels(1, 1, size=(max(4.6, 0.5 * len(logits) + 1.5), 3.4), title=title)
    right = [correct(each, labels) for each in logits.values()]
    as_it_is = is_label(own, labels)[has_label(labels)]
    values = [each.mean() for each in right]
    errors = [standard_error(each.astype(float) - as_it_is) for each in right]
    bars = ax.bar(range(len(values)), values, yerr=errors, capsize=3, color="#56b4e9")
    ax.bar_label(bars, [f"{value:.1%}" for value in values], label_type="center")
    level = as_it_is.mean()
    ax.axhline(level, color="black", linestyle="--", label=f"own routers, {level:.1%}")
    ax.set_xticks(range(len(values)), [str(block) for block in logits])
    ax.set_xlabel("block with a random router")
    ax.set_ylim(0, 1.1 * max(level, *values) or 1)  # 0 to 1 where nothing is right
    ax.yaxis.set_major_formatter("{x:.0%}")
    bars = "bars: standard error of the difference from own routers"
    _label(ax, "accuracy", f"{_on(labels)}, one draw of random logits\n{bars}")
    legend_below(figure, ax)
    return figure
