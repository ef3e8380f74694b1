"""Compare and damage run folders."""

import csv
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import vmoe
from vmoe.checkpoints.checksums import checksums
from vmoe.checkpoints.restore import restore
from vmoe.data.pipeline import Read, training_batches
from vmoe.nn.inputs import to_float
from vmoe.train import timing
from vmoe.train.state import abstract_state, checkpoint_items
from vmoe.workdir import layout

TABLES = tuple(Path(name).stem for name in layout.TABLES)


def rows(workdir: Path, name: str = "metrics") -> list[dict[str, str]]:
    """The rows of a CSV file without the timing columns, which differ between runs.

    A missing file has no rows: a run without few-shot probes has no fewshot.csv.
    """
    try:
        lines = (workdir / f"{name}.csv").read_text().splitlines()
    except FileNotFoundError:  # not asked before reading: a run may set its file aside meanwhile
        lines = []
    table = csv.DictReader(lines)
    return [{k: v for k, v in row.items() if k not in timing.COLUMNS} for row in table]


def last_step(workdir: Path, name: str = "metrics") -> int:
    """The step of the newest complete row of a CSV file; 0 if there is none."""
    complete = [row for row in rows(workdir, name) if None not in row.values()]
    return int(complete[-1]["step"]) if complete else 0


def arrays(workdir: Path, step: int) -> dict[str, str]:
    """The checksums of all arrays of a checkpoint, which is verified as it is restored."""
    target = checkpoint_items(abstract_state(layout.read_config(workdir)))
    return checksums(restore(workdir / "checkpoints" / str(step), **target))


def differences(one: Path, other: Path, steps: int) -> list[str]:
    """The differences between two finished runs, one line each."""
    ours, theirs = arrays(one, steps), arrays(other, steps)
    names = sorted({*ours, *theirs})
    different = [f"array {name}" for name in names if ours.get(name) != theirs.get(name)]
    for name in TABLES:
        ours, theirs = rows(one, name), rows(other, name)
        pairs = zip(ours, theirs, strict=False)
        different += [f"{name}.csv, step {mine['step']}" for mine, yours in pairs if mine != yours]
        if len(ours) != len(theirs):
            different.append(f"{name}.csv: {len(ours)} rows and {len(theirs)}")
    return different


def parameters(workdir: Path, *, use_ema: bool = True) -> dict[str, Any]:
    return nnx.to_pure_dict(nnx.state(vmoe.load(workdir, use_ema=use_ema).model, nnx.Param))


class Poisoned:
    """``training_batches`` of which some have NaN pixels."""

    def __init__(self, numbers: Collection[int], *arguments: Any, **options: Any):
        self._numbers, self._batches = numbers, training_batches(*arguments, **options)

    def __getitem__(self, number: int) -> Read:
        read = self._batches[number]
        images = to_float(read.batch.images)  # of all batches, so that one program takes them
        if number in self._numbers:
            images[:] = np.nan
        return read._replace(batch=read.batch._replace(images=images))


def with_corrupt_newest(run: Path, workdir: Path, *, step: int, newest: int) -> None:
    """Copies a run, and adds a copy of a step as its newest step, with truncated data files."""
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
