"""The comparison of routers: a run gives a row once, and the best on validation stands first."""

import json
from pathlib import Path

import pytest

from scripts.experiments import routers
from tests import script
from tests.command import TINY
from vmoe.data.pipeline import ORDER


def run(folder: Path, *options: str) -> None:
    folders = [f"--{name}={folder / name}" for name in ("workdir", "rows")]
    script.experiment("routers", "--jobs", "1", *folders, *options)


def table(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")][2:]


def test_stored_rows_are_compared_with_token_choice_and_the_best_on_validation_is_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = []
    tests = {
        "token_choice": (0.5, 0.75, 0.625),
        "hash": (0.875, 1.0, 0.875),
        "switch": (0.25, 0.375, 0.75),
        "dense": (0.25, 0.25, 0.375),
    }
    for model, accuracies in tests.items():
        for seed, accuracy in enumerate(accuracies):
            row = {"model": model, "seed": seed, "steps": 4, "order": ORDER, "versions": {}}
            row |= {"test": accuracy, "validation": 1 - accuracy, "flops_per_image": 5e6}
            if model != "dense":
                row |= {"dropped": 0.125, "load": {"1": [0.5, 0.25, 0.25], "3": [0.4, 0.4, 0.2]}}
            rows.append(json.dumps(row) + "\n")
    (tmp_path / "rows").write_text("".join(rows))
    run(tmp_path, "--only", *tests, "--steps", "4")
    assert not list((tmp_path / "workdir").iterdir())
    lines = {line[0]: line[1:7] for line in table(capsys.readouterr().out)}
    assert list(lines)[0] == "dense" and list(lines)[-1] == "hash of the position"
    assert lines["dense"] == ["70.83", "29.17 (25.00 to 37.50)", "below", "-", "-", "5.00"]
    assert lines["hash of the position"][1:5] == [
        "91.67 (87.50 to 100.00)",
        "above",
        "1.35",
        "12.5",
    ]
    assert lines["Switch, k = 1"][2] == "within the spread"
    assert lines["token choice, k = 2"][2] == "-"


@pytest.mark.process
@pytest.mark.slow
def test_a_model_is_trained_evaluated_and_gets_a_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script.commands_in_this_process(monkeypatch)
    monkeypatch.setattr(routers, "CONFIG", TINY)
    run(tmp_path, "--only", "hash", "--seeds", "0", "--steps", "4")
    row = json.loads((tmp_path / "rows").read_text())
    assert (row["model"], row["seed"], row["steps"]) == ("hash", 0, 4)
    assert (row["images_validation"], row["images_test"]) == (180, 360)
    assert {block: len(load) for block, load in row["load"].items()} == {"0": 4}
    (line,) = table(capsys.readouterr().out)
    assert line[:2] == ["hash of the position", f"{100 * row['validation']:.2f}"]
