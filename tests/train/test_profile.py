"""A trace of some steps of a run."""

import gzip
import json
import re
from pathlib import Path

import pytest

from tests.command import TINY
from tests.train.test_stops import signal_at_step
from vmoe import config as configs
from vmoe.config import Preprocessing, TrainConfig
from vmoe.data.pipeline import empty_batch
from vmoe.errors import Stopped, UsageError
from vmoe.train import train
from vmoe.train.profile import Profiler, parse_steps
from vmoe.train.report import Report
from vmoe.train.state import abstract_state
from vmoe.train.step import make_train_step


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    return configs.replace(configs.load(TINY), steps=60, batch_size=8)


def traced_steps(folder: Path) -> list[int]:
    """The steps in the trace of a folder, as a profiler shows them."""
    (path,) = folder.rglob("perfetto_trace.json.gz")
    with gzip.open(path) as file:
        trace = json.load(file)
    steps = [e["args"]["step_num"] for e in trace["traceEvents"] if e.get("name") == "train"]
    return sorted(map(int, steps))


@pytest.mark.process
def test_the_steps_of_profile_are_traced_once_in_the_life_of_a_run(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that stops among the steps keeps the trace of the steps that it has taken."""
    with signal_at_step(3), pytest.raises(Stopped, match="checkpoint saved at step 3"):
        train(config, tmp_path, profile="2:5")
    assert traced_steps(tmp_path / "profile" / "2-5") == [2, 3]
    with signal_at_step(7), pytest.raises(Stopped):
        train(config, tmp_path, profile="5:6")
    folder = tmp_path / "profile" / "5-6"
    (trace,) = folder.rglob("perfetto_trace.json.gz")
    stderr = capsys.readouterr().err
    assert f"profile: open {trace} at https://ui.perfetto.dev" in stderr
    assert f"`xprof {folder}`" in stderr and list(folder.rglob("*.xplane.pb"))
    assert traced_steps(folder) == [5, 6]
    before = {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*")}
    with Report(tmp_path, config) as report:
        for steps in ((5, 6), (3, 6)):
            with Profiler(tmp_path, steps, report) as profiler:
                for step in (4, 5, 6):
                    profiler.start(step)
                    profiler.stop(step, ())
    stderr = capsys.readouterr().err
    assert f"profile: {folder} has a trace already; nothing is traced" in stderr
    assert "profile=3:6: the run is at step 3 already; nothing is traced" in stderr
    assert {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*")} == before


@pytest.mark.parametrize("text", ["10", "10:", ":15", "a:b", "15:10", "0:5", "10:101", "1:2:3"])
def test_other_steps_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=f"^profile={text}: give the first and the last step"):
        parse_steps(text, 100)


def test_the_parts_of_a_step_have_names_in_its_program() -> None:
    """In the locations of its operations, which a profiler shows."""
    model = dict(depth=2, sparse_blocks=(1,))
    config = configs.replace(
        configs.load(TINY), model=model, steps=200, ema_decay=0.9, data=dict(mixup=0.2)
    )
    batch = empty_batch(config.batch_size, 1, Preprocessing(config.model.image_size))
    program = make_train_step(config).lower(abstract_state(config), batch)
    names = re.findall(r'loc\("jit\(step\)/([^"]*)"', program.as_text(debug_info=True))
    paths = [re.findall(r"\w+", name) for name in names]  # without the parentheses of jvp(block1)
    parts = {"embed", "attention", "mlp", "moe", "pool", "head"}
    for path in paths:
        if path[-1] == "dot_general":
            assert parts.intersection(path), path
    inner = ("block0 attention", "block0 mlp", "block1 moe gate", "block1 moe experts")
    inner += ("block1 moe router", "block1 moe dispatch", "block1 moe combine")
    for part in (*inner, *parts, "mixing", "loss", "optimizer", "ema", "norms"):
        assert any(part in " ".join(path) for path in paths), part
