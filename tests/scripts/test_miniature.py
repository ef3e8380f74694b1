"""The miniature: a row per model and seed, which is made once, and a table of all rows.

The commands that it runs have tests of their own.
"""

import json
from pathlib import Path

import pytest

from scripts.experiments import miniature
from scripts.experiments.framework.runs import read_rows
from tests import script
from vmoe.data.pipeline import ORDER

SHOTS = (1, 5, 10, 25)
VENDORS = ("google", "twitter")


def run(folder: Path, *options: str) -> None:
    folders = [f"--{name}={folder / name}" for name in ("workdir", "rows", "data")]
    script.experiment("miniature", "--jobs", "1", *folders, *options)


def write_row(path: Path, model: str, seed: int, value: float) -> None:
    figures = {f"probe.{shots}.{vendor}": value for shots in SHOTS for vendor in VENDORS}
    figures |= {"words": value, "finetuned.google": value + 0.1, "finetuned.twitter": value}
    row = {"model": model, "seed": seed, "steps": [4, 4], "flops_per_image": [9e6, 36.125e6]}
    row |= {
        "order": ORDER,
        "versions": {"jax": "0.1"},
        "figures": figures,
        "seconds": None if seed else 90,
    }
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def test_stored_rows_are_not_repeated_and_the_table_has_every_seed_and_the_mean(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1):
        write_row(tmp_path / "rows", "sparse", seed, (0.25, 0.5)[seed])
        write_row(tmp_path / "rows", "dense", seed, 0.125)
    run(tmp_path, "--seeds", "0", "1", "--steps", "4")
    assert not list((tmp_path / "workdir").iterdir())
    text = capsys.readouterr().out
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert lines[0][1:] == ["A: V-MoE", "B: dense", "A − B"]
    cells = {line[0]: line[1:] for line in lines[2:]}
    assert len(cells) == 1 + 2 * len(SHOTS) + 2
    assert cells["probe, shots per category: 5; an unseen style"] == [
        *("37.50 (25.00, 50.00)", "12.50 (12.50, 12.50)"),
        "+25.00 ± 12.50",
    ]
    assert cells["fine-tuned; the training style"][0] == "47.50 (35.00, 60.00)"
    assert "V-MoE: 4 and 4 steps, 9.00 and 36.12 MFLOPs per image, 1.5 minutes" in text


def test_the_answer_is_that_of_tests_and_not_of_the_order_of_the_seeds(tmp_path: Path) -> None:
    def answer(*of_sparse: float) -> str:
        for seed, value in enumerate(of_sparse):
            write_row(tmp_path / "rows", "sparse", seed, value)
            write_row(tmp_path / "rows", "dense", seed, (0.125, 0.25, 0.375)[seed])
        return " ".join(miniature.answer(read_rows(tmp_path / "rows")).split())

    ordered = answer(0.376, 0.45, 0.55)  # every seed is above every dense seed; p = 0.06
    assert "Cannot tell: V-MoE is clearly better in 0 and clearly worse in 0 of 11" in ordered
    assert "**Sometimes**: V-MoE is clearly better in 11 and" in answer(0.75, 0.76, 0.77)
    assert "**No**: V-MoE is clearly better in 0 and clearly worse in 11" in answer(0, -0.3, -0.4)


def test_missing_data_is_one_line_that_names_the_script_which_makes_it(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, "--seeds", "0", "--only", "dense")
    message = str(caught.value)
    assert f"{tmp_path / 'data' / 'google_words.csv'}: no such file" in message
    assert "python -m scripts.prepare.emoji" in message and "\n" not in message
