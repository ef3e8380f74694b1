"""The check of a GPU machine, on CPUs: its rows, and what ends one of them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.launch import gpu_rows
from scripts.launch.gpu_check import FIRST, ROWS

ROOT = Path(__file__).parents[2]


def start(out: Path, *options: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "scripts.launch.gpu_check", "--out", out, "--dry-run", *options],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
    )


def rows_in(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "dry_run.jsonl").read_text().splitlines()]


def test_the_rows_of_models_are_configs_of_the_repository_in_bfloat16() -> None:
    for name, row in ROWS.items():
        assert callable(getattr(gpu_rows, row.function))
        if row.function == "model":
            config = gpu_rows.config_of(gpu_rows.FULL, *row.arguments)
            assert config.model.dtype == "bfloat16"
            assert bool(config.model.sparse_blocks) == (not name.startswith("dense"))


@pytest.mark.process
@pytest.mark.slow
def test_the_gpu_check_measures_a_row_of_each_kind_and_makes_only_missing_and_failed_rows_again(
    tmp_path: Path,
) -> None:
    failing = start(tmp_path, JAX_PLATFORMS="nowhere")
    table, _ = failing.communicate()
    assert failing.returncode == 1 and "0 of 8 rows made, 8 failed" in table
    assert [row["row"] for row in rows_in(tmp_path)] == [
        name for name in ROWS if name in FIRST.values()
    ]
    assert all("nowhere" in row["error"] for row in rows_in(tmp_path))

    done = start(tmp_path)
    table, _ = done.communicate()
    made = {row["row"]: row for row in rows_in(tmp_path)}
    assert done.returncode == 0, made
    assert "skipped: attention: cuDNN's attention needs a GPU" in table
    figures = {
        (name, figure["what"]): figure["value"] for name in made for figure in made[name]["figures"]
    }
    stored = {what: value for (name, what), value in figures.items() if name == "stored runs"}
    outputs, gradients, choices = stored.values()
    assert outputs < 1e-5 and gradients < 1e-4 and choices == 0
    for name, row in made.items():
        assert row["machine"]["jax"] and row["machine"]["date"] and not row["error"]
        assert row["skipped"] or row["figures"], name
    for row in (("S/32", "step"), ("input, S/32", "without it"), ("ceilings", "large copy")):
        assert figures[row] > 0

    again = start(tmp_path)
    assert again.communicate()[0] == table and again.returncode == 0
    assert len(rows_in(tmp_path)) == 16


@pytest.mark.process
@pytest.mark.slow
def test_a_row_that_is_killed_is_written_and_a_signal_ends_the_check_with_its_table(
    tmp_path: Path,
) -> None:
    late = start(tmp_path / "late", "--seconds", "0.2")
    table, _ = late.communicate()
    (row,) = rows_in(tmp_path / "late")
    assert late.returncode == 1 and "0 of 8 rows made, 1 failed" in table
    assert row["row"] == "stored runs" and row["error"] == "killed after 0 s: --seconds"

    stopped = start(tmp_path / "stopped")
    while not (tmp_path / "stopped" / "log.txt").exists():  # until the first row has started
        assert stopped.poll() is None
    stopped.send_signal(signal.SIGTERM)
    table, _ = stopped.communicate()
    (row,) = rows_in(tmp_path / "stopped")
    assert stopped.returncode == 75 and "failed: stored runs: killed after" in table
    assert row["error"].endswith("SIGTERM")
