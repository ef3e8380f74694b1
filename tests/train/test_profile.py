"""A trace of some steps of a run."""

import gzip
import json
from pathlib import Path

import pytest

from tests.command import TINY
from tests.train.test_stops import signal_at_step
from vmoe import config as configs
from vmoe.config import TrainConfig
from vmoe.errors import Stopped, UsageError
from vmoe.train import train
from vmoe.train.profile import parse_steps


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    return configs.replace(configs.load(TINY), optim=dict(warmup_steps=0), steps=5)


def traced_steps(folder: Path) -> list[int]:
    """The steps in the trace of a folder, as a profiler shows them."""
    (path,) = folder.rglob("perfetto_trace.json.gz")
    with gzip.open(path) as file:
        trace = json.load(file)
    steps = [e["args"]["step_num"] for e in trace["traceEvents"] if e.get("name") == "train"]
    return sorted(map(int, steps))


def test_the_steps_of_profile_are_traced_once_in_the_life_of_a_run(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config, tmp_path, profile="2:4")
    folder = tmp_path / "profile" / "2-4"
    (trace,) = folder.rglob("perfetto_trace.json.gz")
    stderr = capsys.readouterr().err
    assert f"profile: open {trace} at https://ui.perfetto.dev" in stderr
    assert f"`xprof {folder}`" in stderr and list(folder.rglob("*.xplane.pb"))
    assert traced_steps(folder) == [2, 3, 4]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    train(configs.replace(config, steps=6), tmp_path, profile="2:4")
    assert f"profile: {folder} has a trace already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_run_that_stops_among_the_steps_keeps_their_trace_and_one_that_is_past_them_says_so(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with signal_at_step(3), pytest.raises(Stopped, match="checkpoint saved at step 3"):
        train(config, tmp_path, profile="2:5")
    assert traced_steps(tmp_path / "profile" / "2-5") == [2, 3]
    train(config, tmp_path, profile="3:4")
    stderr = capsys.readouterr().err
    assert "profile=3:4: the run is at step 3 already; nothing is traced" in stderr
    assert not (tmp_path / "profile" / "3-4").exists()


@pytest.mark.parametrize("text", ["10", "10:", ":15", "a:b", "15:10", "0:5", "10:101", "1:2:3"])
def test_other_steps_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=f"^profile={text}: give the first and the last step"):
        parse_steps(text, 100)
