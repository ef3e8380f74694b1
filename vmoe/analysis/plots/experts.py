"""Figures of statistics: experts by class, and the gates of choices."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vmoe.analysis.plots.style import NORMAL, SMALL, early_to_late, label_experts, panels
from vmoe.analysis.statistics import BlockStatistics
from vmoe.errors import UsageError

NAMED = 30
"""Largest number of classes that are named, with percentages."""
MANY = 32
"""Largest number of experts that are all labeled."""
LONGEST = 24
"""Largest number of characters of a class name."""
RANKS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
HATCHES = ("", "///", "...", "xxx")


def experts_by_class(
    statistics: Mapping[int, BlockStatistics],
    class_names: Sequence[str],
    blocks: Sequence[int] | None = None,
) -> Figure:
    """The share of each class's choices that go to each expert, after figure 7 of V-MoE.

    The title of a block has the normalized mutual information of expert and class, and its chance
    baseline with shuffled classes. More than 30 classes are not named; each block sorts them by
    their most frequent expert.

    Args:
        blocks: the blocks to show; if None, at most four from early to late.
    """
    num_classes = len(class_names)
    few, e = num_classes <= NAMED, max(len(block.gates) for block in statistics.values())
    shown = early_to_late(statistics, blocks, 4 if e <= 8 else 2)
    tables = {i: _shares(i, statistics[i], num_classes) for i in shown}
    largest = max(np.nanmax(table) for table in tables.values())
    size = (min(9.0, max(3.4, 0.3 * e)), 0.28 * num_classes + 1.0 if few else 5.0)
    title = "Experts by class: share of the choices of a class, in %"
    figure, axes = panels(1, len(shown), size=size, title=title, share_y=few)
    for (i, table), ax in zip(tables.items(), axes[0], strict=True):
        information, chance = statistics[i].class_information(num_classes)
        if not few:
            table = table[np.argsort(np.nan_to_num(table).argmax(1), kind="stable")]
        ax.imshow(100 * table, aspect="auto", cmap="viridis", vmin=0, vmax=100 * largest)
        text = f"block {i}\nmutual information {information:.3f}\n(chance {chance:.3f})"
        ax.set_title(text, fontsize=NORMAL)
        ax.set_xlabel("expert")
        label_experts(ax.xaxis, table.shape[1], every=-(-table.shape[1] // MANY))
        if few and e <= MANY:  # the percentages in the cells
            for (y, x), share in np.ndenumerate(table):
                if np.isfinite(share):
                    color = "white" if share < 0.6 * largest else "black"
                    style = dict(ha="center", va="center", color=color, fontsize=7)
                    ax.text(x, y, f"{100 * share:.0f}", **style)
        ax.set_yticks(range(num_classes) if few else [], map(_short, class_names) if few else [])
    if not few or e > MANY:
        bar = figure.colorbar(axes[0][-1].images[0], ax=list(axes[0]), format="{x:.0f}%")
        bar.ax.tick_params(labelsize=SMALL)
    axes[0][0].set_ylabel("class" if few else f"{num_classes} classes, by most frequent expert")
    return figure


def _check_choices(i: int, block: BlockStatistics) -> None:
    if not block.choices.any():
        raise UsageError(f"block {i}: its router makes no choices; leave the block out")


def _shares(i: int, block: BlockStatistics, num_classes: int) -> Float[np.ndarray, "y e"]:
    """The share of each expert by class; NaN for classes without a choice."""
    _check_choices(i, block)
    table = block.class_table(num_classes)
    total = table.sum(0)
    if not total.any():
        raise UsageError(f"block {i}: no image has a known class")
    return np.where(total > 0, table / np.maximum(total, 1), np.nan).T


def _short(name: str) -> str:
    line = " ".join(name.split()).replace("$", r"\$")  # else matplotlib reads mathematics
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"


def weight_histograms(
    statistics: Mapping[int, BlockStatistics], blocks: Sequence[int] | None = None
) -> Figure:
    """How large the gates of the choices are, by rank of the choice.

    Choices of all ranks are counted together if there are more than four ranks, or if experts
    choose tokens.

    Args:
        blocks: the blocks to show; if None, at most four from early to late.
    """
    shown = early_to_late(statistics, blocks, 4)
    figure, axes = panels(
        1, len(shown), size=(3.4, 3.0), title="Gates of the chosen experts", share_y=True
    )
    for i, ax in zip(shown, axes[0], strict=True):
        _check_choices(i, statistics[i])
        counts, sums = _by_rank(statistics[i])
        edges = np.linspace(0, 1, counts.shape[1] + 1)
        for r, (row, gates) in enumerate(zip(counts, sums, strict=True)):
            rank = f"choice {r + 1}" if len(counts) > 1 else "all choices"
            ax.stairs(
                row / max(1, row.sum()),
                edges,
                fill=True,
                alpha=0.6,
                color=RANKS[r],
                hatch=HATCHES[r],
                label=f"{rank}, mean {gates / max(1, row.sum()):.3f}",
            )
        ax.set_title(f"block {i}", fontsize=NORMAL)
        ax.set_xlabel("gate")
        ax.set_xlim(0, 1)
        ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        ax.yaxis.set_major_formatter("{x:.0%}")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=SMALL)
    axes[0][0].set_ylabel("share of the choices")
    return figure


def _by_rank(
    block: BlockStatistics,
) -> tuple[Int[np.ndarray, "k x"], Float[np.ndarray, "k"]]:
    """The histogram and the sum of each rank; one for all ranks if experts choose or k is large."""
    counts, sums = block.by_weight, block.gates_by_rank
    by_rank = (counts.sum(1) == block.tokens).all() and len(counts) < len(block.gates)
    if by_rank and len(counts) <= len(RANKS):
        return counts, sums
    return counts.sum(0, keepdims=True), sums.sum(keepdims=True)
