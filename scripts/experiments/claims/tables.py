"""The figures and the verdicts as tables in Markdown and CSV."""

import csv
import io
import math
from collections.abc import Iterable

import numpy as np

from scripts.experiments.claims.measure import ATTACKED, PRIORITIES, SLOTS, STRENGTHS
from scripts.experiments.claims.variants import VARIANTS
from scripts.experiments.claims.verdicts import (
    CLAIMS,
    NOT_CHECKED,
    NOT_MEASURED,
    PAGES,
    VERDICTS,
    Claim,
    Figure,
    Findings,
    Judged,
    values,
)
from scripts.experiments.framework.differences import LEVEL, by_chance, p_value, signed
from scripts.experiments.framework.pages import markdown_table, percents, wrapped
from scripts.experiments.framework.runs import Rows
from vmoe.analysis.statistics import KINDS

CURVES = ("standard", "class_token", "half", "half_bpr")
BLOCKS = ("standard", "all_blocks", "class_token", "expert_choice")
KEPT = ("standard", "all_blocks", "class_token")
DIFFERENCE = ("A − B", "p")
NUMBERS = range(6)
"""The blocks of a model."""
FIRST = {"order": "in order", "random": "at random"} | {
    name: f"{name.replace('_', ' ')} first" for name in ("largest_gate", "sum_of_gates")
}


MEANINGS = {
    "reproduced": "A and B differ in the claimed order",
    "contradicted": "they differ in the other order, or by more than the margin of a claim that an "
    "accuracy stays the same",
    "not contradicted": "the claim is that an accuracy stays the same, and the difference lies "
    "within its margin",
    "inconclusive": "no test says any of these",
}


def comparisons(rows: Rows, found: Findings, names: Iterable[str]) -> str:
    """The verdicts on some claims, in the order of all claims."""
    names = set(names)
    lines = [
        [CLAIMS[name].text, *_compared(rows, name, own), f"{own.verdict} ({own.basis})"]
        for name, own in found.claims.items()
        if name in names
    ]
    return markdown_table(["claim", "A", "B", *DIFFERENCE, "verdict"], lines)


def _compared(rows: Rows, name: str, own: Judged) -> list[str]:
    """Both figures with their labels, the difference with its error, and the p of its test."""
    claim = CLAIMS[name]
    cells = [
        f"{label}: {_spread(rows, figure)}"
        for label, figure in zip(claim.labels, (claim.first, claim.second), strict=True)
    ]
    return [*cells, _difference(claim, own), p_value(own.p)]


def models(rows: Rows) -> str:
    columns = ["model", "MFLOPs per image", "steps", "accuracy by seed", "mean"]
    columns += ["changed by batch", "experts merged"]
    lines = []
    for name in measured(rows, VARIANTS):
        row = next(iter(rows[name].values()))
        line = [VARIANTS[name].label, f"{row['flops_per_image'] / 1e6:.2f}", f"{row['steps']:,}"]
        line += percents(100 * value for value in values(rows, Figure(name, "accuracy")))
        lines.append([*line, *(mean(rows, name, figure) for figure in ("batch", "merged"))])
    return markdown_table(columns, lines)


def attacked(rows: Rows) -> str:
    columns = ["model", *(f"{strength}/255" for strength in STRENGTHS)]
    columns += [f"{STRENGTHS[-1]}/255, projected"]
    figures = [f"attack.{strength}" for strength in STRENGTHS]
    figures += [f"attack.{STRENGTHS[-1]}.projected"]
    return markdown_table(
        columns,
        (
            [VARIANTS[name].label, *(_attacked(rows, name, figure) for figure in figures)]
            for name in measured(rows, VARIANTS)
        ),
    )


def _attacked(rows: Rows, name: str, figure: str) -> str:
    """A mean with the standard error of one accuracy over the attacked images."""
    accuracy = np.mean(values(rows, Figure(name, figure)))
    images = min(ATTACKED, *(row["images"] for row in rows[name].values()))
    error = math.sqrt(accuracy * (1 - accuracy) / images)
    return f"{100 * accuracy:.2f} ± {100 * error:.1f}"


def slots(rows: Rows) -> str:
    lines = [
        [
            VARIANTS[name].label,
            FIRST[priority],
            *(mean(rows, name, f"capacity.{number}.{priority}") for number in SLOTS),
        ]
        for name in measured(rows, CURVES)
        for priority in PRIORITIES
    ]
    return markdown_table(["trained", "priority", *(f"{number} slots" for number in SLOTS)], lines)


def blocks(rows: Rows) -> str:
    lines = []
    for name in measured(rows, BLOCKS):
        for kind, label in {"class": VARIANTS[name].label, "position": ""}.items():
            own, baseline = (
                [mean(rows, name, f"{kind}{suffix}.{i}", 1, 3) for i in NUMBERS]
                for suffix in ("", "_null")
            )
            both = [f"{a} ({b})" if a else "" for a, b in zip(own, baseline, strict=True)]
            lines.append([label, kind, *both])
        random = [mean(rows, name, f"random.{i}") for i in NUMBERS]
        if any(random):
            lines.append(["", "random router", *random])
    return markdown_table(["model", "", *(f"block {i}" for i in NUMBERS)], lines)


def kept(rows: Rows) -> str:
    lines = []
    for name in measured(rows, KEPT):
        for kind in KINDS:
            shares = [mean(rows, name, f"kept.{i}.{kind}") for i in NUMBERS]
            if any(shares):
                lines.append([VARIANTS[name].label, kind.replace("_", " "), *shares])
    return markdown_table(["model", "kept", *(f"block {i}" for i in NUMBERS)], lines)


def changed(rows: Rows) -> str:
    """How many predictions depend on the batch, by model."""
    lines = [
        [VARIANTS[name].label, mean(rows, name, "batch")]
        for name in measured(rows, VARIANTS)
        if _has(rows, name, "batch")
    ]
    return markdown_table(["model", "predictions that change, percent"], lines)


def counts(found: Findings) -> str:
    """How many claims have each verdict, and how many chance would give."""
    words = [own.verdict for own in found.claims.values()]
    shown = ", ".join(f"{words.count(each)} {each}" for each in VERDICTS[::-1] if each in words)
    text = f"**{len(words)} claims: {shown or NOT_MEASURED}.**"
    if missing := len(CLAIMS) - len(words):
        text += f" {missing} more {'is' if missing == 1 else 'are'} not measured."
    orders = [name for name in found.claims if CLAIMS[name].says == "above"]
    corrected = sum(by_chance(len({*names} & {*orders})) for names in PAGES.values()) / 2
    text += (
        f" If nothing had an effect, chance would reproduce about {corrected:.1f} of the "
        f"{len(orders)} claims of an order and contradict as many; without the correction for "
        f"their number, {len(orders) * LEVEL / 2:.1f} and {len(orders) * LEVEL / 2:.1f}."
    )
    if alone := [each for each in found.claims.values() if each.basis == "seeds"]:
        text += (
            f" {len(alone)} of the claims compare figures that are no accuracies; their errors are "
            "over the three seeds alone."
        )
    if bounds := [each for each in found.claims.values() if each.basis == "seeds, bound"]:
        text += (
            f" The error over the images is not known for {len(bounds)} of the claims; a bound is "
            "used instead, which is larger."
        )
    return wrapped(text)


def claims(rows: Rows, found: Findings) -> str:
    """All measured claims, sorted by verdict."""
    lines = [
        [
            f"**{own.verdict}** ({own.basis})",
            CLAIMS[name].text,
            *_compared(rows, name, own),
            _linked(CLAIMS[name].source),
        ]
        for name, own in sorted(
            found.claims.items(), key=lambda each: VERDICTS.index(each[1].verdict)
        )
    ]
    return markdown_table(["verdict", "claim", "A", "B", *DIFFERENCE, "source"], lines)


def meanings(found: Findings) -> str:
    """The verdicts with their meanings; of a rare one only if a claim has it."""
    used = {own.verdict for own in found.claims.values()}
    lines = [line for line in MEANINGS.items() if line[0] in used or line[0] != "not contradicted"]
    return markdown_table(["verdict", "meaning"], lines)


def _linked(source: str) -> str:
    return source if source == "-" else f"[{source}](https://arxiv.org/abs/{source})"


def not_checked() -> str:
    """The claims that need something else, and what."""
    return markdown_table(["claim", "why not"], NOT_CHECKED.items())


def measured(rows: Rows, names: Iterable[str]) -> list[str]:
    """The models that have rows."""
    return [name for name in names if rows.get(name)]


def _has(rows: Rows, name: str, figure: str) -> bool:
    return bool(rows.get(name)) and all(figure in row["figures"] for row in rows[name].values())


def mean(rows: Rows, name: str, figure: str, scale: float = 100, digits: int = 2) -> str:
    """The mean over the seeds; empty if the model has no such figure."""
    if not _has(rows, name, figure):
        return ""
    return f"{scale * np.mean(values(rows, Figure(name, figure))):.{digits}f}"


def _spread(rows: Rows, figure: Figure) -> str:
    scale, digits = units(figure)
    own = scale * np.array(values(rows, figure))
    return f"{own.mean():.{digits}f} ({own.min():.{digits}f} to {own.max():.{digits}f})"


def difference(found: Findings, name: str) -> str:
    """The difference of a claim, and its standard error."""
    own = found.claims.get(name)
    return _difference(CLAIMS[name], own) if own else NOT_MEASURED


def _difference(claim: Claim, own: Judged) -> str:
    scale, digits = units(claim.first)
    return signed(own.difference, digits, scale=scale, bound=own.basis == "seeds, bound")


def units(figure: Figure) -> tuple[float, int]:
    """The factor and the number of digits of a figure: percent, or mutual information."""
    return (1, 3) if figure.name.startswith(("class", "position")) else (100, 2)


def models_csv(rows: Rows) -> str:
    """Every figure of every run.

    The stored rows call the chance baseline of a figure ``_null``.
    """
    lines = [
        {"model": name, "label": VARIANTS[name].label, "seed": seed}
        | {"steps": row["steps"], "flops_per_image": row["flops_per_image"]}
        | {figure.replace("_null", "_chance"): value for figure, value in row["figures"].items()}
        for name in measured(rows, VARIANTS)
        for seed, row in sorted(rows[name].items())
    ]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(key for line in lines for key in line)))
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()
