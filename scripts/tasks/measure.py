"""The experiments by name."""

import argparse
import json
from typing import Any

from figures import Experiment

from tasks import census, drawings, synthetic


def _synthetic(model: str, p: float) -> Experiment:
    return Experiment(
        1, lambda options, seed: synthetic.measure(model, p, synthetic.SIZES[options.size])
    )


def _people(options: argparse.Namespace) -> dict[str, str]:
    return {f"census, {name}": census.checksum(options.data, name) for name in ("train", "test")}


def _search(pair: str, model: str) -> Experiment:
    return Experiment(
        1,
        lambda options, seed: census.search(options.data, pair, model, census.SIZES[options.size]),
        _people,
    )


def _census(pair: str, model: str) -> Experiment:
    def figures(options: argparse.Namespace, seed: int) -> dict[str, Any]:
        searched = options.rows / f"search_{pair}_{model}-0.json"
        if not searched.exists():
            raise SystemExit(f"{searched}: no such file: run --only search_{pair}_{model} first")
        found = json.loads(searched.read_text())["figures"]
        return census.measure(options.data, pair, model, seed, census.SIZES[options.size], found)

    return Experiment(10, figures, _people, later=True)


def _images(options: argparse.Namespace) -> dict[str, str]:
    return {
        f"emoji, {split}": drawings.checksum(options.emoji, split) for split in ("train", "test")
    }


def _drawings(gates: int) -> Experiment:
    return Experiment(
        3,
        lambda options, seed: drawings.measure(
            options.emoji, gates, seed, drawings.SIZES[options.size]
        ),
        _images,
    )


CENSUS = {f"{pair}_{model}": (pair, model) for pair in census.PAIRS for model in census.MODELS}
EXPERIMENTS: dict[str, Experiment] = {
    **{
        f"synthetic_{model}_{p}": _synthetic(model, p)
        for p in synthetic.RELATED
        for model in synthetic.UNITS
    },
    **{f"search_{name}": _search(*own) for name, own in CENSUS.items()},
    **{f"census_{name}": _census(*own) for name, own in CENSUS.items()},
    **{f"drawings_{gates}": _drawings(gates) for gates in (1, 2)},
    "drawings_probe": Experiment(
        1,
        lambda options, seed: drawings.probe(options.emoji, drawings.SIZES[options.size]),
        _images,
    ),
}
