"""Repeats published results of multi-task models: docs/results/multitask.md.

    python -m scripts.prepare.census data/census
    python -m scripts.prepare.emoji data/emoji
    python -m scripts.experiments multitask     # measures what is missing; prints
    python -m scripts.experiments results       # then writes docs/results

    synthetic_MODEL       Ma et al. 2018, figure 4: two related tasks, five times 40 seeds at once
    rate_MODEL            the search for the rates of each model, which runs first
    census_PAIR_MODEL     the same, tables 1 and 2: two pairs of tasks on Census-Income, ten seeds
    search_PAIR_MODEL     the search for the settings of each census model, three seeds, runs first
    drawings_GATES        category and vendor of emoji, with one gate or two, three seeds

The figures of a run are a line of scripts/experiments/rows/multitask.jsonl. A run with such a line
is not repeated. The command can be stopped at any time and started again. ``--tiny`` tries it in
seconds.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import flax
import jax

from scripts.experiments.framework.figures import Part, figures_parser, measured
from scripts.experiments.framework.pages import figures_of
from scripts.experiments.framework.runs import read_rows
from scripts.experiments.multitask import census, drawings, synthetic
from scripts.experiments.multitask.tables import TABLES


def _rate(model: str) -> Part:
    return Part(1, lambda options, seed: synthetic.search(model, synthetic.SIZES[options.size]))


def _synthetic(model: str) -> Part:
    def figures(options: argparse.Namespace, seed: int) -> dict[str, Any]:
        rates = _searched(options, f"rate_{model}")[0]["rate"]
        return synthetic.measure(model, seed, synthetic.SIZES[options.size], rates)

    return Part(5, figures, later=True)


def _searched(options: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    """What a search found, by seed, which has to be measured.

    Raises:
        SystemExit: it was not.
    """
    if not (searched := figures_of(read_rows(options.rows), name)):
        raise SystemExit(f"{options.rows}: no row of {name}: run --only {name} first")
    return searched


def _people(options: argparse.Namespace) -> dict[str, str]:
    return {f"census, {name}": census.checksum(options.data, name) for name in ("train", "test")}


def _search(pair: str, model: str) -> Part:
    return Part(
        census.SEARCHED,
        lambda options, seed: census.search(
            options.data, pair, model, seed, census.SIZES[options.size]
        ),
        _people,
    )


def _census(pair: str, model: str) -> Part:
    def figures(options: argparse.Namespace, seed: int) -> dict[str, Any]:
        setting = census.best(pair, _searched(options, f"search_{pair}_{model}"))
        return census.measure(options.data, pair, model, seed, census.SIZES[options.size], setting)

    return Part(10, figures, _people, later=True)


def _images(options: argparse.Namespace) -> dict[str, str]:
    return {
        f"emoji, {split}": drawings.checksum(options.emoji, split) for split in ("train", "test")
    }


def _drawings(gates: int) -> Part:
    return Part(
        3,
        lambda options, seed: drawings.measure(
            options.emoji, gates, seed, drawings.SIZES[options.size]
        ),
        _images,
    )


CENSUS = {f"{pair}_{model}": (pair, model) for pair in census.PAIRS for model in census.MODELS}
PARTS: dict[str, Part] = {
    **{f"rate_{model}": _rate(model) for model in synthetic.UNITS},
    **{f"synthetic_{model}": _synthetic(model) for model in synthetic.UNITS},
    **{f"search_{name}": _search(*own) for name, own in CENSUS.items()},
    **{f"census_{name}": _census(*own) for name, own in CENSUS.items()},
    **{f"drawings_{gates}": _drawings(gates) for gates in (1, 2)},
    "drawings_probe": Part(
        1,
        lambda options, seed: drawings.probe(options.emoji, drawings.SIZES[options.size]),
        _images,
    ),
}
"""What is measured, by name."""


def main(arguments: Sequence[str]) -> None:
    parser = figures_parser("multitask", __doc__, PARTS, data="census", emoji="emoji")
    measured(parser.parse_args(arguments), PARTS, (flax, jax), TABLES)
