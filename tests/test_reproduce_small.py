"""The small reproduction: a run gives a row once, and verdicts follow from rows by plain rules."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vmoe.data.sources.samples import path_of

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "reproduce_small.py"


@pytest.fixture(scope="module")
def reproduction() -> Any:
    """The modules of the script."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from reproduction import claims, measure, show

    yield {"claims": claims, "measure": measure, "show": show}
    sys.path.remove(str(ROOT / "scripts"))


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--workdir", str(folder / "runs"), "--jobs", "1"]
    command += ["--rows", str(folder / "rows"), "--only", "dense", "--seeds", "0", *options]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_a_run_is_trained_measured_and_gets_a_row(tmp_path: Path) -> None:
    shutil.copyfile(path_of("fashion_mnist_sample"), tmp_path / "sample.npz")  # its own splits
    data = ("--data", f"arrays:{tmp_path / 'sample.npz'}")
    result = run(tmp_path, "--steps", "4", "--images", "16", *data)
    assert result.returncode == 0, result.stderr
    row = json.loads((tmp_path / "rows" / "dense-0.json").read_text())
    assert (row["model"], row["seed"], row["steps"], row["images"]) == ("dense", 0, 4, 16)
    assert row["figures"]["attack.0"] == row["figures"]["accuracy"]  # the same 16 images
    assert row["versions"]["jax"]
    assert f"| {100 * row['figures']['accuracy']:.2f} |" in result.stdout


def test_a_run_with_a_row_is_not_repeated_and_stands_in_the_section(tmp_path: Path) -> None:
    figures = {"accuracy": 0.875} | {f"attack.{strength}": 0.5 for strength in (0, 1, 2, 4, 8)}
    figures["attack.8.projected"] = 0.25
    row = {"model": "dense", "seed": 0, "steps": 4, "images": 64, "flops_per_image": 7e6}
    (tmp_path / "rows").mkdir()
    path = tmp_path / "rows" / "dense-0.json"
    path.write_text(json.dumps(row | {"versions": {"jax": "0.1"}, "figures": figures}))
    readme = tmp_path / "README.md"
    begin, end = (f"<!-- scripts/reproduce_small.py: {word} -->" for word in ("begin", "end"))
    readme.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    result = run(tmp_path, "--steps", "4", "--images", "64", "--write", str(readme))
    assert result.returncode == 0, result.stderr
    assert not list((tmp_path / "runs").iterdir())
    attacked = " | ".join(4 * ["50.00"])
    line = f"| dense, equal steps | 7.00 | 4 | 87.50 | 87.50 | {attacked} | 25.00 |  |  |"
    text = readme.read_text()
    assert line in result.stdout and line in text
    assert text.startswith(f"before\n{begin}\n") and text.endswith(f"{end}\nafter\n")
    assert "old" not in text and "Not checked: pruning by the change of" in text
    for plot in ("capacity", "models"):
        assert f"(rows/{plot}.png)" in text
        assert (tmp_path / "rows" / f"{plot}.png").read_bytes().startswith(b"\x89PNG")
    other = run(tmp_path, "--steps", "4", "--images", "32")
    assert other.returncode == 1
    assert f"{path}: made with other images; use other --rows" in other.stderr


@pytest.mark.slow
def test_the_figures_of_a_sparse_run_agree_with_each_other(
    reproduction: dict[str, Any], tiny_run: Path
) -> None:
    figures = reproduction["measure"].measure(tiny_run, 64)
    assert figures["attack.0"] == figures["accuracy"] > 0.2
    assert figures["attack.8"] <= figures["accuracy"]
    assert len({figures[f"capacity.0.{each}"] for each in reproduction["measure"].PRIORITIES}) == 1
    kinds = ("dropped", "class", "class_null", "position", "position_null", "random")
    assert {f"{kind}.1" for kind in kinds} <= set(figures)
    assert figures["batch.alone"] == 0
    assert all(0 <= value <= 1 for value in figures.values())


def test_a_command_that_fails_is_named_with_its_message(tmp_path: Path) -> None:
    result = run(tmp_path, "--steps", "4", "--data", "nowhere")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    message = result.stderr.splitlines()[-1]
    assert "-m vmoe train" in message and "exit status 2" in message and "nowhere" in message


def rows_of(figures: dict[str, list[float]]) -> Any:
    """Invented rows: the values of the figures "VARIANT:NAME" for seeds 0, 1, 2."""
    rows: dict[str, dict[int, Any]] = {}
    for key, values in figures.items():
        variant, _, name = key.partition(":")
        for seed, value in enumerate(values):
            row = rows.setdefault(variant, {}).setdefault(seed, {"figures": {}})
            row["figures"][name] = value
    return rows


@pytest.mark.parametrize(
    ("first", "second", "expected", "holds"),
    [
        ([3, 4, 5], [0, 1, 2], "reproduced", ("above",)),
        ([3, 4, 5], [0, 1, 3], "within the spread", ("above",)),  # the worst equals the best
        ([0, 1, 2], [3, 4, 5], "contradicted", ("above",)),
        ([0, 1, 2], [1, 2, 3], "reproduced", ("overlapping",)),
        ([3, 4, 5], [0, 1, 2], "contradicted", ("overlapping",)),
        ([0, 1, 2], [1, 2, 3], "reproduced", ("above", "overlapping")),
        ([3, 4], [0, 1], "not measured", ("above",)),  # a seed is missing
    ],
)
def test_other_models_are_compared_by_their_ranges(
    reproduction: dict[str, Any],
    first: list[float],
    second: list[float],
    expected: str,
    holds: tuple[str, ...],
) -> None:
    claims = reproduction["claims"]
    claim = claims.Claim("", "", claims.Figure("a", "x"), claims.Figure("b", "x"), holds)
    assert claims.verdict(claim, rows_of({"a:x": first, "b:x": second})) == expected


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3], [0, 1, 2], "reproduced"),  # the ranges overlap
        ([1, 2, 3], [0, 2, 2], "within the spread"),
        ([0, 1, 2], [1, 2, 3], "contradicted"),
    ],
)
def test_figures_of_the_same_models_are_compared_seed_by_seed(
    reproduction: dict[str, Any], first: list[float], second: list[float], expected: str
) -> None:
    claims = reproduction["claims"]
    claim = claims.Claim("", "", claims.Figure("a", "x"), claims.Figure("a", "y"))
    assert claims.verdict(claim, rows_of({"a:x": first, "a:y": second})) == expected


def test_the_section_states_every_measured_claim_and_what_contradicts_it(
    reproduction: dict[str, Any],
) -> None:
    claims = reproduction["claims"]
    rows = rows_of({"standard:accuracy": [0.7, 0.71, 0.72], "dense:accuracy": [0.8, 0.81, 0.85]})
    assert "| 71.00 (70.00 to 72.00) | 82.00 (80.00 to 85.00) | **contradicted** |" in (
        reproduction["show"].claims(rows)
    )
    text = reproduction["show"].surprises(rows)
    assert text == (
        "Contradicted: sparse is better than dense at equal steps. "
        f"Not measured: {len(claims.CLAIMS) - 1} of {len(claims.CLAIMS)} claims."
    )
