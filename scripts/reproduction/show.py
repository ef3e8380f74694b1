"""The results of the small reproduction as Markdown and CSV: answers, tables and verdicts."""

import csv
import io
import textwrap
from collections.abc import Iterable

import numpy as np
from experiments import Rows, markdown_table, percents

from reproduction.claims import (
    BOUND,
    CLAIMS,
    NOT_CHECKED,
    NOT_MEASURED,
    SEEDS_ALONE,
    VERDICTS,
    Claim,
    Figure,
    chance,
    margin,
    seeds_agree,
    values,
    verdict,
    word,
)
from reproduction.measure import ATTACKED, PRIORITIES, SLOTS, STRENGTHS
from reproduction.variants import VARIANTS
from vmoe.analysis.statistics import KINDS

CURVES = ("standard", "class_token", "half", "half_bpr")
BLOCKS = ("standard", "all_blocks", "class_token", "expert_choice")
KEPT = ("standard", "all_blocks", "class_token")
DIFFERENCE = ("A − B", "error over the images")
FEW = 10
"""Images that should not decide a verdict."""
NUMBERS = range(6)
"""The blocks of a model."""
FIRST = {"order": "in order", "random": "at random"} | {
    name: f"{name.replace('_', ' ')} first" for name in ("largest_gate", "sum_of_gates")
}


MEANINGS = {
    "reproduced": "the claimed order holds, by the seeds and, for accuracies, by the images",
    "contradicted": "another order holds, by the seeds and, for accuracies, by the images",
    "not contradicted": "the claim is that nothing changes, and neither exceeds the other",
    "inconclusive": "the seeds overlap, or the difference is below two errors over the images, or "
    "chance alone gives the verdict in more than 1 of 8 cases",
}


def wrapped(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def comparisons(rows: Rows, names: Iterable[str]) -> str:
    """The verdicts on some claims."""
    lines = [
        [claim.text, *_compared(rows, claim), _shown(text)]
        for claim, text in _verdicts(rows).items()
        if claim in [CLAIMS[name] for name in names]
    ]
    return markdown_table(["claim", "A", "B", *DIFFERENCE, "verdict"], lines)


def _compared(rows: Rows, claim: Claim) -> list[str]:
    """Both figures with their labels, the difference, and its error over the images."""
    cells = [
        f"{label}: {_spread(rows, figure)}"
        for label, figure in zip(claim.labels, (claim.first, claim.second), strict=True)
    ]
    return [*cells, difference(rows, claim), _over_images(rows, claim)]


def _over_images(rows: Rows, claim: Claim) -> str:
    _, _, error, bound = margin(claim, rows)
    if bound is None:
        return "-"
    return f"at most {100 * bound:.2f}" if error is None else f"{100 * error:.2f}"


def _shown(text: str) -> str:
    """A verdict with what it rests on."""
    found = {SEEDS_ALONE: "seeds", BOUND: "seeds, bound"}.get(text.removeprefix(word(text)))
    return f"{word(text)} ({found or 'seeds, images'})"


def models(rows: Rows) -> str:
    columns = ["model", "MFLOPs per image", "steps", "accuracy by seed", "mean"]
    columns += ["changed by batch", "experts merged"]
    lines = []
    for name in _measured(rows, VARIANTS):
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
            [VARIANTS[name].label, *(mean(rows, name, figure) for figure in figures)]
            for name in _measured(rows, VARIANTS)
        ),
    )


def slots(rows: Rows) -> str:
    lines = [
        [
            VARIANTS[name].label,
            FIRST[priority],
            *(mean(rows, name, f"capacity.{number}.{priority}") for number in SLOTS),
        ]
        for name in _measured(rows, CURVES)
        for priority in PRIORITIES
    ]
    return markdown_table(["trained", "priority", *(f"{number} slots" for number in SLOTS)], lines)


def blocks(rows: Rows) -> str:
    lines = []
    for name in _measured(rows, BLOCKS):
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
    for name in _measured(rows, KEPT):
        for kind in KINDS:
            shares = [mean(rows, name, f"kept.{i}.{kind}") for i in NUMBERS]
            if any(shares):
                lines.append([VARIANTS[name].label, kind.replace("_", " "), *shares])
    return markdown_table(["model", "kept", *(f"block {i}" for i in NUMBERS)], lines)


def changed(rows: Rows) -> str:
    """How many predictions depend on the batch, by model."""
    lines = [
        [VARIANTS[name].label, mean(rows, name, "batch")]
        for name in _measured(rows, VARIANTS)
        if _has(rows, name, "batch")
    ]
    return markdown_table(["model", "predictions that change, percent"], lines)


def counts(rows: Rows) -> str:
    """How many claims have each verdict, and how many are reproduced by chance."""
    measured = _verdicts(rows)
    words = [word(text) for text in measured.values()]
    shown = ", ".join(f"{words.count(each)} {each}" for each in VERDICTS[::-1] if each in words)
    expected = sum(chance(claim) / 2 for claim in measured if "above" in claim.holds)
    agree = sum(seeds_agree(claim, rows) for claim in measured)
    margins = [margin(claim, rows) for claim in measured]
    accuracies = [each for each in margins if each.bound is not None]
    unknown = sum(each.error is None for each in accuracies)
    alone = sum(
        text.endswith(SEEDS_ALONE) and word(text) != "inconclusive" for text in measured.values()
    )
    text = f"**{len(measured)} claims: {shown or 'not measured'}.**"
    if missing := len(CLAIMS) - len(measured):
        text += f" {missing} more {'is' if missing == 1 else 'are'} not measured."
    text += (
        f" The three seeds agree with {agree} of the claims. For accuracies this is not enough: "
        "the difference must also exceed two standard errors over the test images."
    )
    if unknown:
        text += (
            f" For {unknown} of the {len(accuracies)} claims about accuracies this error is not "
            "known yet; a bound is used instead, which is larger."
        )
    if alone:
        text += (
            f" {alone} of the claims that are reproduced or contradicted compare other figures and "
            "rest on the three seeds alone."
        )
    text += (
        f" If nothing had an effect, chance would reproduce about {expected:.1f} of the claims at "
        "most."
    )
    return wrapped(text)


def claims(rows: Rows) -> str:
    """All measured claims, sorted by verdict."""
    lines = [
        [
            f"**{_shown(text).replace(' (', '** (')}",
            claim.text,
            *_compared(rows, claim),
            _linked(claim.source),
        ]
        for claim, text in sorted(
            _verdicts(rows).items(),
            key=lambda each: VERDICTS.index(word(each[1])),
        )
    ]
    return markdown_table(["verdict", "claim", "A", "B", *DIFFERENCE, "source"], lines)


def meanings(rows: Rows) -> str:
    """The verdicts with their meanings; of a rare one only if a claim has it."""
    used = {word(text) for text in _verdicts(rows).values()}
    lines = [line for line in MEANINGS.items() if line[0] in used or line[0] != "not contradicted"]
    return markdown_table(["verdict", "meaning"], lines)


def narrow(rows: Rows) -> str:
    """The claims whose seeds a few images separate, or keep together."""
    lines = []
    for claim in _verdicts(rows):
        row = next(iter(rows[claim.first.variant].values()))
        attacked = claim.first.name.startswith("attack")
        if not attacked and claim.first.name != "accuracy":
            continue
        images = min(ATTACKED, row["images"]) if attacked else row["images"]
        high, low = sorted((values(rows, claim.first), values(rows, claim.second)), key=np.mean)[
            ::-1
        ]
        gap = round((min(high) - max(low)) * images)
        if abs(gap) <= FEW:
            lines.append([claim.text, f"{gap} of {images:,}"])
    columns = ["claim", "images between the nearest seeds"]
    return markdown_table(columns, lines) if lines else "None."


def _linked(source: str) -> str:
    return source if source == "-" else f"[{source}](https://arxiv.org/abs/{source})"


def not_checked() -> str:
    """The claims that need something else, and what."""
    return markdown_table(["claim", "why not"], NOT_CHECKED.items())


def _verdicts(rows: Rows) -> dict[Claim, str]:
    """The verdicts on the measured claims."""
    every = {claim: verdict(claim, rows) for claim in CLAIMS.values()}
    return {claim: text for claim, text in every.items() if text != NOT_MEASURED}


def _measured(rows: Rows, names: Iterable[str]) -> list[str]:
    return [name for name in names if rows.get(name)]


def _has(rows: Rows, name: str, figure: str) -> bool:
    return bool(rows.get(name)) and all(figure in row["figures"] for row in rows[name].values())


def mean(rows: Rows, name: str, figure: str, scale: float = 100, digits: int = 2) -> str:
    """The mean over the seeds; empty if the model has no such figure."""
    if not _has(rows, name, figure):
        return ""
    return f"{scale * np.mean(values(rows, Figure(name, figure))):.{digits}f}"


def _spread(rows: Rows, figure: Figure) -> str:
    scale, digits = _units(figure)
    own = scale * np.array(values(rows, figure))
    return f"{own.mean():.{digits}f} ({own.min():.{digits}f} to {own.max():.{digits}f})"


def difference(rows: Rows, claim: Claim) -> str:
    """The difference and its standard error over the seeds."""
    if verdict(claim, rows) == NOT_MEASURED:
        return NOT_MEASURED
    mean, over_seeds, _, _ = margin(claim, rows)
    scale, digits = _units(claim.first)
    return f"{scale * mean:+.{digits}f} ± {scale * over_seeds:.{digits}f}"


def _units(figure: Figure) -> tuple[float, int]:
    """The factor and the number of digits of a figure: percent, or mutual information."""
    return (1, 3) if figure.name.startswith(("class", "position")) else (100, 2)


def tables(rows: Rows) -> dict[str, str]:
    """CSV files by name: every figure of every run.

    The stored rows call the chance baseline of a figure ``_null``.
    """
    lines = [
        {"model": name, "label": VARIANTS[name].label, "seed": seed}
        | {"steps": row["steps"], "flops_per_image": row["flops_per_image"]}
        | {figure.replace("_null", "_chance"): value for figure, value in row["figures"].items()}
        for name in _measured(rows, VARIANTS)
        for seed, row in sorted(rows[name].items())
    ]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(key for line in lines for key in line)))
    writer.writeheader()
    writer.writerows(lines)
    return {"models.csv": out.getvalue()}
