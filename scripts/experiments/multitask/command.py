"""Repeats published results of multi-task models: docs/results/multitask.md.

    python -m scripts.prepare.census data/census
    python -m scripts.prepare.emoji data/emoji
    python -m scripts.experiments multitask     # measures what is missing; prints
    python -m scripts.experiments results       # then writes docs/results

    synthetic_MODEL_P     Ma et al. 2018, figure 4: two tasks of relatedness p, 50 seeds at once
    census_PAIR_MODEL     the same, tables 1 and 2: two pairs of tasks on Census-Income, ten seeds
    search_PAIR_MODEL     the search for the settings of each census model, which runs first
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


def _synthetic(model: str, p: float) -> Part:
    return Part(1, lambda options, seed: synthetic.measure(model, p, synthetic.SIZES[options.size]))


def _people(options: argparse.Namespace) -> dict[str, str]:
    return {f"census, {name}": census.checksum(options.data, name) for name in ("train", "test")}


def _search(pair: str, model: str) -> Part:
    return Part(
        1,
        lambda options, seed: census.search(options.data, pair, model, census.SIZES[options.size]),
        _people,
    )


def _census(pair: str, model: str) -> Part:
    def figures(options: argparse.Namespace, seed: int) -> dict[str, Any]:
        search = f"search_{pair}_{model}"
        if not (searched := figures_of(read_rows(options.rows), search)):
            raise SystemExit(f"{options.rows}: no row of {search}: run --only {search} first")
        (found,) = searched
        return census.measure(options.data, pair, model, seed, census.SIZES[options.size], found)

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
    **{
        f"synthetic_{model}_{p}": _synthetic(model, p)
        for p in synthetic.RELATED
        for model in synthetic.UNITS
    },
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
