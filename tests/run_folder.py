"""Compare and damage run folders."""

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import vmoe
from scripts.kill_test import TABLES, rows


def parameters(workdir: Path, *, use_ema: bool = True) -> dict[str, Any]:
    return nnx.to_pure_dict(nnx.state(vmoe.load(workdir, use_ema=use_ema).model, nnx.Param))


def with_corrupt_newest(run: Path, workdir: Path, *, step: int, newest: int) -> None:
    """Copies a run, and a step of it as its newest one, whose data files are truncated."""
    shutil.copytree(run, workdir)
    corrupt = workdir / "checkpoints" / str(newest)
    shutil.copytree(workdir / "checkpoints" / str(step), corrupt)
    for path in corrupt.rglob("d/*"):
        path.write_bytes(path.read_bytes()[:100])


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
