"""The section of configs/README.md: tables, verdicts and plots of the small reproduction."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from experiments import Rows, jax_versions, markdown_table, percents
from matplotlib import pyplot

from reproduction.claims import (
    CLAIMS,
    ERRORS,
    NOT_CHECKED,
    NOT_MEASURED,
    SEEDS_ALONE,
    Claim,
    Figure,
    chance,
    margin,
    values,
    verdict,
)
from reproduction.measure import LOW, PRIORITIES, SLOTS, STRENGTHS
from reproduction.variants import BATCH_SIZE, VARIANTS
from vmoe.analysis.colors import expert_colors
from vmoe.analysis.statistics import KINDS

CURVES = ("standard", "class_token", "half", "half_bpr")
BLOCKS = ("standard", "all_blocks", "class_token", "expert_choice")
ATTACKED = ("standard", "dense", "dense_flops", "expert_choice", "soft")
KEPT = ("standard", "all_blocks", "class_token")
DRAWN = ("standard", "class_token")  # of BLOCKS
MARKS = "osD^v"
COLORS = tuple(expert_colors(7)[i] for i in (4, 0, 2, 6, 5))  # without yellow, on white


def section(rows: Rows, plots: Sequence[str]) -> str:
    """Everything as Markdown.

    Args:
        plots: addresses of the plots.
    """
    parts = [
        f"""Fashion-MNIST, batches of {BATCH_SIZE}, otherwise `configs/fashion_mnist.py`;
{jax_versions(rows)}. Figures are means over the seeds, of accuracies in percent on the test split,
on which nothing was chosen; ranges are from the worst to the best seed. Attacks are the published
one, on 512 images; so many are predicted in eight orders to see which predictions depend on the
batch; with one image per group none do. Merged: with the mean of its experts as the MLP of each
sparse block.""",
        models(rows),
        f"""Accuracy against slots per expert and group of 8 images (128 patches; with class tokens,
136 tokens); 0 drops every choice, {SLOTS[-1]} drop few. The rows of `configs/reproduce_small` have
the same figures for the other models.""",
        slots(rows),
        f"""Percent of the choices that get one of {LOW} slots, by largest gate; a patch is
background if all of it has the color of the image's border:""",
        kept(rows),
        """Normalized mutual information of expert and class, and of expert and place in the image
(in parentheses: under shuffled classes and places), and the accuracy with a random router in one
block.""",
        blocks(rows),
        rule(rows),
        claims(rows),
        surprises(rows),
        not_checked(),
        *(f"![{Path(plot).stem} of the small reproduction]({plot})" for plot in plots),
    ]
    return "\n\n".join(parts) + "\n"


def models(rows: Rows) -> str:
    columns = ["model", "MFLOPs per image", "steps", "accuracy by seed", "mean"]
    columns += [f"attacked by {strength} / 255" for strength in STRENGTHS]
    columns += [f"by {STRENGTHS[-1]} / 255, projected", "changed by batch"]
    columns += ["experts merged"]
    lines = []
    for name in _measured(rows, VARIANTS):
        row = next(iter(rows[name].values()))
        line = [VARIANTS[name].label, f"{row['flops_per_image'] / 1e6:.2f}", f"{row['steps']:,}"]
        line += percents(100 * value for value in values(rows, Figure(name, "accuracy")))
        line += [_mean(rows, name, f"attack.{strength}") for strength in STRENGTHS]
        line += [_mean(rows, name, f"attack.{STRENGTHS[-1]}.projected")]
        lines.append([*line, *(_mean(rows, name, figure) for figure in ("batch", "merged"))])
    return markdown_table(columns, lines)


def slots(rows: Rows) -> str:
    lines = [
        [
            VARIANTS[name].label,
            priority.replace("_", " "),
            *(_mean(rows, name, f"capacity.{number}.{priority}") for number in SLOTS),
        ]
        for name in _measured(rows, CURVES)
        for priority in PRIORITIES
    ]
    return markdown_table(["trained", "priority", *(f"{number} slots" for number in SLOTS)], lines)


def blocks(rows: Rows) -> str:
    every = [str(i) for i in range(6)]
    lines = []
    for name in _measured(rows, BLOCKS):
        for kind, label in {"class": VARIANTS[name].label, "position": ""}.items():
            own, null = (
                [_mean(rows, name, f"{kind}{suffix}.{i}", 1, 3) for i in every]
                for suffix in ("", "_null")
            )
            with_null = [f"{a} ({b})" if a else "" for a, b in zip(own, null, strict=True)]
            lines.append([label, kind, *with_null])
        random = [_mean(rows, name, f"random.{i}") for i in every]
        if any(random):
            lines.append(["", "random router", *random])
    return markdown_table(["model", "", *(f"block {i}" for i in every)], lines)


def kept(rows: Rows) -> str:
    every = [str(i) for i in range(6)]
    lines = []
    for name in _measured(rows, KEPT):
        for kind in KINDS:
            shares = [_mean(rows, name, f"kept.{i}.{kind}") for i in every]
            if any(shares):
                lines.append([VARIANTS[name].label, kind.replace("_", " "), *shares])
    return markdown_table(["model", "kept", *(f"block {i}" for i in every)], lines)


def rule(rows: Rows) -> str:
    """When a claim is reproduced, and how often it would be by chance."""
    measured = _verdicts(rows)
    expected = sum(map(chance, measured))
    return f"""The first figure of a claim differs from the second if two things hold. Each of its
seeds is above (or each is below) every seed of the second; for two figures of the same models, each
is compared with the same seed. And the margin, the difference of the means, is at least {ERRORS}
standard errors over the test images, on each of which the models are compared (after ±).
*Reproduced*: they differ in the claimed order; *contradicted*: in another one; *not contradicted*:
they do not differ, as claimed; *within the error*: they do not differ, but should. By the seeds
alone: the figure is no mean over images, or a row has no results per image.

If nothing had an effect, the seeds of a claim would separate with a probability of 1 in 10, and for
two figures of the same models of 1 in 4: of these {len(measured)} claims, at most {expected:.1f}
would differ by chance, half of them in the claimed order."""


def claims(rows: Rows) -> str:
    lines = [
        [
            claim.text,
            claim.source,
            _spread(rows, claim.first),
            _spread(rows, claim.second),
            _margin(rows, claim),
            f"**{text.removesuffix(SEEDS_ALONE)}**{SEEDS_ALONE * text.endswith(SEEDS_ALONE)}",
        ]
        for claim, text in _verdicts(rows).items()
    ]
    return markdown_table(["claim", "of", "first", "second", "margin", "verdict"], lines)


def surprises(rows: Rows) -> str:
    """The claims that came out the other way."""
    verdicts = _verdicts(rows)
    found = [claim.text for claim, text in verdicts.items() if text.startswith("contradicted")]
    missing = len(CLAIMS) - len(verdicts)
    text = f"Contradicted: {'; '.join(found) or 'none'}."
    return text + (f" Not measured: {missing} of {len(CLAIMS)} claims." if missing else "")


def _verdicts(rows: Rows) -> dict[Claim, str]:
    """The verdicts on the measured claims."""
    every = {claim: verdict(claim, rows) for claim in CLAIMS}
    return {claim: text for claim, text in every.items() if text != NOT_MEASURED}


def not_checked() -> str:
    """The claims that need something else, and what."""
    return f"Not checked: {'; '.join(f'{claim}: {why}' for claim, why in NOT_CHECKED.items())}."


def _measured(rows: Rows, names: Iterable[str]) -> list[str]:
    return [name for name in names if rows.get(name)]


def _has(rows: Rows, name: str, figure: str) -> bool:
    return all(figure in row["figures"] for row in rows[name].values())


def _mean(rows: Rows, name: str, figure: str, scale: float = 100, digits: int = 2) -> str:
    """The mean over the seeds; empty if the model has no such figure."""
    if not _has(rows, name, figure):
        return ""
    return f"{scale * np.mean(values(rows, Figure(name, figure))):.{digits}f}"


def _spread(rows: Rows, figure: Figure) -> str:
    scale, digits = _units(figure)
    own = scale * np.array(values(rows, figure))
    return f"{own.mean():.{digits}f} ({own.min():.{digits}f} to {own.max():.{digits}f})"


def _margin(rows: Rows, claim: Claim) -> str:
    mean, error = margin(claim, rows)
    scale, digits = _units(claim.first)
    after = "" if error is None else f" ± {scale * error:.{digits}f}"
    return f"{scale * mean:+.{digits}f}{after}"


def _units(figure: Figure) -> tuple[float, int]:
    """A factor and a number of digits: of accuracies in percent, of information as it is."""
    return (1, 3) if figure.name.startswith(("class", "position")) else (100, 2)


def plot(rows: Rows, folder: Path) -> list[Path]:
    """Writes the plots; lines are means over the seeds, bands and bars ranges."""
    matplotlib.use("Agg")
    return [
        _plot_capacity(rows, folder / "capacity.png"),
        _plot_models(rows, folder / "models.png"),
    ]


def _plot_capacity(rows: Rows, path: Path) -> Path:
    names = _measured(rows, CURVES)
    figure, axes = pyplot.subplots(
        1,
        max(1, len(names)),
        figsize=(4 * max(1, len(names)), 3.6),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for ax, name in zip(axes[0], names, strict=False):
        for priority, color, mark in zip(PRIORITIES, COLORS, MARKS, strict=False):
            figures = [f"capacity.{number}.{priority}" for number in SLOTS]
            _line(ax, rows, name, SLOTS, figures, priority.replace("_", " "), color, mark)
        nothing = np.mean(values(rows, Figure(name, "capacity.0.order")))
        ax.axhline(100 * nothing, color="gray", linestyle=":", label="everything dropped")
        ax.set_title(VARIANTS[name].label, fontsize=9)
        ax.set(xlabel="slots per expert and group", ylabel="test accuracy in percent")
        ax.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _plot_models(rows: Rows, path: Path) -> Path:
    figure, (bars, attacked, special) = pyplot.subplots(
        1, 3, figsize=(15, 4.2), layout="constrained"
    )
    names = _measured(rows, VARIANTS)[::-1]
    for y, name in enumerate(names):
        own = [100 * value for value in values(rows, Figure(name, "accuracy"))]
        bars.plot(own, [y] * len(own), "o", color="#0072b2", alpha=0.6)
        bars.plot(np.mean(own), y, "|", color="black", markersize=14)
    bars.set_yticks(range(len(names)), [VARIANTS[name].label for name in names], fontsize=8)
    bars.grid(axis="y", alpha=0.3)
    bars.set(xlabel="test accuracy in percent; each seed, and the mean")
    for name, color, mark in zip(ATTACKED, COLORS, MARKS, strict=True):
        if rows.get(name):
            figures = [f"attack.{strength}" for strength in (0, *STRENGTHS)]
            _line(attacked, rows, name, (0, *STRENGTHS), figures, _short(name), color, mark)
    attacked.set(xlabel="largest change of a pixel, in 1/255", ylabel="accuracy in percent")
    styles = {"class": "-", "class_null": ":", "position": "--"}
    for name, color, mark in zip(DRAWN, COLORS, MARKS, strict=False):
        for kind, style in styles.items() if rows.get(name) else ():
            numbers = [i for i in range(6) if _has(rows, name, f"{kind}.{i}")]
            label = f"{_short(name)}: {kind.replace('_null', ', shuffled')}"
            figures = [f"{kind}.{i}" for i in numbers]
            _line(special, rows, name, numbers, figures, label, color, mark, style, 1)
    special.set_xticks(range(6))
    special.set(xlabel="block", ylabel="mutual information with the expert, normalized")
    for ax in (attacked, special):
        if ax.lines:
            ax.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _short(name: str) -> str:
    return VARIANTS[name].label.partition(":")[0]


def _line(
    ax: Any,
    rows: Rows,
    name: str,
    xs: Sequence[int],
    figures: Sequence[str],
    label: str,
    color: str,
    mark: str,
    style: str = "-",
    scale: float = 100,
) -> None:
    own = scale * np.array([values(rows, Figure(name, figure)) for figure in figures])
    if own.size:
        ax.plot(xs, own.mean(1), marker=mark, color=color, linestyle=style, label=label)
        ax.fill_between(xs, own.min(1), own.max(1), color=color, alpha=0.15)
