"""Show rows as a table and as a plot."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from scripts.bench.measure import Row, machine

COLUMNS: dict[str, Callable[[Row], str]] = {
    "what": lambda row: row.what,
    "ms": lambda row: _figure(row.ms, 1),
    "IQR": lambda row: _figure(row.iqr_ms, 1),
    "ratio": lambda row: _figure(row.ratio, 2),
    "relative to": lambda row: row.to,
    "target": lambda row: row.target,
    "cores": lambda row: _figure(row.cores, 0),
    "images/s/core": lambda row: _figure(row.rate, 0),
    "temp MB": lambda row: _figure(row.temp_mb, 0),
    "sent MB": lambda row: _figure(row.sent_mb, 1),
}
ROUTING = (
    *("top-k alone", "vmoe", "vmoe after top-k"),
    *("by cumulative sum", "by cumulative sum, vmoe's top-k"),
)
TEXT = ("what", "relative to", "target")


def table(rows: list[Row]) -> Table:
    """The rows without the columns that are empty in all of them."""
    columns = [name for name, text in COLUMNS.items() if any(map(text, rows))]
    shown = Table("case", title=f"{rows[0].section}, {machine()['device']}")
    for name in columns:
        shown.add_column(name, justify="left" if name in TEXT else "right")
    case = None
    for row in rows:
        if case is not None and row.case != case:
            shown.add_section()
        first, case = row.case != case, row.case
        words = ", ".join(f"{k} {v}" for k, v in row.case.items()) if first else ""
        shown.add_row(words, *(COLUMNS[name](row) for name in columns))
    return shown


def _figure(value: float | None, digits: int) -> str:
    return "" if value is None or np.isnan(value) else f"{value:,.{digits}f}"


def plot(rows: list[Row], path: Path) -> None:
    """Plots the time of routing by the number of experts, and of the layer by its capacity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    routing = [row for row in rows if row.section == "routing"]
    capacities = {r.what: r.ms for r in rows if r.what.startswith(("capacity", "dropless"))}
    count = bool(routing) + bool(capacities)
    figure, axes = pyplot.subplots(
        1, count, figsize=(4.2 * count, 3.6), layout="constrained", squeeze=False
    )
    if routing:
        _plot_routing(axes[0, 0], routing)
    if capacities:
        axes[0, -1].bar(list(capacities), list(capacities.values()))
        axes[0, -1].set_title("layer, forward, by capacity", fontsize=10)
        axes[0, -1].set_ylabel("ms")
        axes[0, -1].tick_params(axis="x", labelsize=8)
    figure.savefig(path, dpi=120)


def _plot_routing(ax: Any, rows: list[Row]) -> None:
    for what in ROUTING:
        points = {row.case["e"]: row.ms for row in rows if row.what == what}
        ax.plot(list(points), list(points.values()), marker="o", label=what)
    ticks = sorted({row.case["e"] for row in rows})
    ax.set(xscale="log", yscale="log", xlabel="experts", ylabel="ms")
    ax.set_title(f"routing: {rows[0].case['tokens']:,} tokens", fontsize=10)
    ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
