"""Show rows as a table and as a plot."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.measure import BY_TOKENS, LAYERS, Row, machine

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
    *("top-k alone", "ours", "ours after top-k"),
    *("by cumulative sum", "by cumulative sum, our top-k"),
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
    """Plots the cost against the number of experts, the number of tokens, and the capacity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [
        ("routing", "routing", {what: what for what in ROUTING}),
        *(
            ("layer", f"layer, {title}", {name: f"{name}, {way}" for name in LAYERS})
            for way, title in {"forward": "forward", "f+b": "forward + backward"}.items()
        ),
    ]
    panels = [panel for panel in panels if any(row.section == panel[0] for row in rows)]
    capacities = {r.what: r.ms for r in rows if r.what.startswith(("capacity", "dropless"))}
    count = len(panels) + 2 * bool(capacities)
    figure, axes = pyplot.subplots(
        1, count, figsize=(4.2 * count, 3.6), layout="constrained", squeeze=False
    )
    if capacities:
        e = next(row.case["e"] for row in rows if row.what == "layer by tokens")
        lines = {name: f"{name} by tokens" for name in BY_TOKENS}
        _plot_lines(axes[0, -2], rows, "tokens", lines, f"layer, forward: {e} experts")
        axes[0, -1].bar(list(capacities), list(capacities.values()))
        axes[0, -1].set_title("layer, forward, by capacity", fontsize=10)
        axes[0, -1].set_ylabel("ms")
        axes[0, -1].tick_params(axis="x", labelsize=8)
    for ax, (section, title, lines) in zip(axes[0], panels, strict=False):
        own = [row for row in rows if row.section == section]
        _plot_lines(ax, own, "e", lines, f"{title}: {own[0].case['tokens']:,} tokens")
    figure.savefig(path, dpi=120)


def _plot_lines(ax: Any, rows: list[Row], key: str, lines: dict[str, str], title: str) -> None:
    """Plots the time against a number of the cases; ``lines`` has what was measured by label."""
    ticks = set[int]()
    for label, what in lines.items():
        points = {row.case[key]: row.ms for row in rows if row.what == what}
        ax.plot(list(points), list(points.values()), marker="o", label=label)
        ticks |= points.keys()
    ax.set(xscale="log", yscale="log", xlabel={"e": "experts"}.get(key, key), ylabel="ms")
    ax.set_title(title, fontsize=10)
    ax.set_xticks(sorted(ticks), [f"{tick:,}" for tick in sorted(ticks)])
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
