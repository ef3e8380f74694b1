"""Where the time of training goes, and how fast it is."""

import csv
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.command import TINY
from vmoe import config as configs
from vmoe.costs.chips import CHIPS, DEVICE_KINDS, chip_of
from vmoe.costs.flops import flops_to_logits
from vmoe.data.sources import Example, open_splits
from vmoe.data.sources.views import View
from vmoe.train import timing, train
from vmoe.train.timing import COLUMNS, StepTimer
from vmoe.workdir.layout import read_config

DELAY = 0.02  # seconds to read an image


class SlowSource(View):
    """Another source whose images take long to read."""

    def __getitem__(self, index: int) -> Example:
        time.sleep(DELAY)
        return self.source[index]


def timings(workdir: Path) -> list[dict[str, float | None]]:
    """The timing columns of metrics.csv; None where a cell is empty."""
    table = csv.DictReader((workdir / "metrics.csv").read_text().splitlines())
    return [{c: float(row[c]) if row[c] else None for c in COLUMNS} for row in table]


def test_the_seconds_of_a_step_add_up_to_a_batch_at_the_rate(tiny_run: Path) -> None:
    for row in timings(tiny_run):
        seconds = sum(row[column] or 0 for column in COLUMNS if column.startswith("seconds/"))
        assert row["images_per_second"]
        batch_size = read_config(tiny_run).batch_size
        assert seconds * row["images_per_second"] == pytest.approx(batch_size, rel=1e-4)


@pytest.mark.process
def test_a_step_takes_as_long_as_its_images_take_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configs.replace(
        configs.load(TINY), optim=dict(warmup_steps=0), batch_size=4, steps=24, log_every=8
    )
    monkeypatch.setattr(
        "vmoe.train.check.open_splits",
        lambda name, splits, checks: [
            SlowSource(source) if split == "train" else source
            for split, source in zip(splits, open_splits(name, splits, checks), strict=True)
        ],
    )
    train(config, tmp_path)
    row = timings(tmp_path)[-1]  # what was read ahead is used up
    assert row["seconds/data"] and row["seconds/device"]
    at_best = DELAY * config.batch_size / 2  # two threads read; a sleep can only last longer
    assert row["seconds/data"] + row["seconds/device"] > 0.9 * at_best


def test_model_flops_are_three_forward_passes_and_have_no_share_of_an_unknown_chip(
    tiny_run: Path,
) -> None:
    for row in timings(tiny_run):
        assert row["images_per_second"] and row["model_flops_per_second"] and row["mfu"] is None
        flops = 3 * flops_to_logits(read_config(tiny_run).model) * row["images_per_second"]
        assert row["model_flops_per_second"] == pytest.approx(flops, rel=1e-4)


def test_the_share_of_the_peak_is_that_of_all_devices() -> None:
    timer = StepTimer(batch_size=8, flops_per_image=100.0, peak_flops=1e6)
    timer.restart(0)
    row = timer.row(2)
    assert row["images_per_second"] and row["mfu"]
    assert row["mfu"] == pytest.approx(100 * row["images_per_second"] / 1e6)
    assert list(row) == list(COLUMNS)


def test_each_activity_gets_its_time_and_a_pause_belongs_to_no_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a clock that the test moves."""
    now = 0.0
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now))
    timer = StepTimer(4, None, None)
    timer.restart(10)
    for _ in range(2):
        for activity, seconds in (("data", 3.0), ("reporting", 1.0), ("pause", 5.0)):
            with timer.measure(activity):
                now += seconds
        now += 2
    row = timer.row(12)
    assert [row[f"seconds/{name}"] for name in ("data", "device", "reporting")] == [3, 2, 1]
    assert row["images_per_second"] == 4 / 6
    assert not any(timer.row(12).values())  # no step since


def test_a_chip_is_known_by_the_name_of_its_device() -> None:
    assert set(DEVICE_KINDS.values()) == set(CHIPS)
    assert chip_of("NVIDIA H100 80GB HBM3") == CHIPS["h100"]
    assert chip_of("NVIDIA H100 PCIe") is None  # it has another peak
