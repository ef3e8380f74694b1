"""Read run folders and compare two of them."""

import csv
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import vmoe

TABLES = ("metrics", "evaluations", "experts")


def rows(workdir: Path, name: str = "metrics") -> list[dict[str, str]]:
    """The rows of a CSV file without ``images_per_second``, which differs between runs."""
    table = csv.DictReader((workdir / f"{name}.csv").read_text().splitlines())
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in table]


def reached(workdir: Path, step: int) -> bool:
    """Whether metrics.csv has a row of this step or a later one."""
    path = workdir / "metrics.csv"
    return path.exists() and any(int(row["step"] or 0) >= step for row in rows(workdir))


def parameters(workdir: Path, *, use_ema: bool = True) -> dict[str, Any]:
    return nnx.to_pure_dict(nnx.state(vmoe.load(workdir, use_ema=use_ema).model, nnx.Param))


def assert_same(one: Path, other: Path) -> None:
    """Parameters, their moving average and every CSV row are bitwise equal."""
    for use_ema in (False, True):
        trees = (parameters(folder, use_ema=use_ema) for folder in (one, other))
        jax.tree.map(np.testing.assert_array_equal, *trees)
    for name in TABLES:
        assert rows(one, name) == rows(other, name)


def assert_close(one: Path, other: Path, atol: float) -> None:
    """The moving averages of the parameters differ by at most ``atol``."""
    trees = map(parameters, (one, other))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), *trees)
