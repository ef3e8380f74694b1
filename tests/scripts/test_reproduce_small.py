"""The small reproduction: a run gives a row once, and verdicts follow from rows by plain rules."""

import itertools
import json
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from tests import script
from vmoe.data.pipeline import ORDER
from vmoe.data.sources import open_source, sample
from vmoe.data.sources.builtin import path_of
from vmoe.evaluate import evaluate
from vmoe.factory import load

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"


@pytest.fixture(scope="module")
def reproduction() -> Any:
    """The modules of the script."""
    parts = (
        f"reproduction.{name}" for name in ("claims", "measure", "observations", "show", "variants")
    )
    names = (*parts, "experiments", "results")
    return {name.rpartition(".")[2]: script.module(name) for name in names}


def run(folder: Path, *options: str) -> None:
    folders = ("--workdir", folder / "runs", "--rows", folder / "rows")
    script.run(
        "reproduce_small", *folders, "--jobs", "1", "--only", "dense", "--seeds", "0", *options
    )


@pytest.mark.slow
def test_a_run_is_trained_measured_and_gets_a_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copyfile(path_of("fashion_mnist_sample"), tmp_path / "sample.npz")  # its own splits
    data = ("--data", f"arrays:{tmp_path / 'sample.npz'}")
    run(tmp_path, "--steps", "4", "--images", "16", *data)
    row = json.loads((tmp_path / "rows" / "dense-0.json").read_text())
    assert (row["model"], row["seed"], row["steps"], row["images"]) == ("dense", 0, 4, 16)
    assert row["figures"]["attack.0"] == row["figures"]["accuracy"]  # the same 16 images
    assert row["versions"]["jax"]
    assert f"| {100 * row['figures']['accuracy']:.2f} |" in capsys.readouterr().out
    assert row["correct"].keys() == {"accuracy", "attack.8", "attack.8.projected"}


def test_a_run_with_a_row_is_not_repeated_and_stands_in_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {"accuracy": 0.875} | {f"attack.{strength}": 0.5 for strength in (0, 1, 2, 4, 8)}
    figures["attack.8.projected"] = 0.25
    row = {"model": "dense", "seed": 0, "steps": 4, "images": 64, "flops_per_image": 7e6}
    row |= {"order": ORDER, "correct": {}}
    (tmp_path / "rows").mkdir()
    path = tmp_path / "rows" / "dense-0.json"
    path.write_text(json.dumps(row | {"versions": {"jax": "0.1"}, "figures": figures}))
    run(tmp_path, "--steps", "4", "--images", "64")
    assert not list((tmp_path / "runs").iterdir())
    tables = capsys.readouterr().out
    assert "| dense, equal steps | 7.00 | 4 | 87.50 | 87.50 |  |  |" in tables
    assert f"| dense, equal steps | {' | '.join(4 * ['50.00'])} | 25.00 |" in tables
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, "--steps", "4", "--images", "32")
    assert f"{path}: made with other images; use other --rows" in str(caught.value)


def test_the_pages_of_results_show_the_stored_rows(
    reproduction: dict[str, Any], tmp_path: Path
) -> None:
    pages = {path.name: path for path in RESULTS.iterdir() if path.suffix in (".md", ".csv")}
    for name, path in pages.items():
        shutil.copyfile(path, tmp_path / name)
    reproduction["results"].write(ROOT / "scripts" / "rows", tmp_path)
    for name, path in pages.items():
        message = f"{name} is outdated: run python scripts/results.py"
        assert (tmp_path / name).read_text() == path.read_text(), message


@pytest.mark.slow
def test_other_rows_change_the_answers_the_plots_and_the_table_of_answers(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "scripts" / "rows", tmp_path / "rows")
    shutil.copytree(RESULTS, tmp_path / "pages", ignore=shutil.ignore_patterns("*.png"))
    for model, accuracy in {"dense": 0.9, "standard": 0.8746}.items():
        for path in (tmp_path / "rows" / "reproduce_small").glob(f"{model}-*.json"):
            row = json.loads(path.read_text())
            row["figures"]["accuracy"], row["correct"] = accuracy, {}
            path.write_text(json.dumps(row))
    script.run("results", "--rows", tmp_path / "rows", "--pages", tmp_path / "pages")
    for name in ("sparse_or_dense", "README"):
        text = " ".join((tmp_path / "pages" / f"{name}.md").read_text().split())
        assert "at equal steps **no**" in text and "equal steps -2.54 ±" in text
    plots = {path.name for path in (tmp_path / "pages").glob("*.png")}
    from_data = {"mixtures_tone.png"}  # which the repository does not have
    assert plots == {path.name for path in RESULTS.glob("*.png")} - from_data


def test_a_page_without_a_section_is_named(reproduction: dict[str, Any], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a: begin -->\nold\n<!-- a: end -->\nafter\n")
    reproduction["experiments"].write_sections(page, {"a": "new\n"})
    text = "before\n<!-- a: begin -->\n\nnew\n\n<!-- a: end -->\nafter\n"
    assert page.read_text() == text
    with pytest.raises(SystemExit, match="page.md: no section from <!-- b: begin -->"):
        reproduction["experiments"].write_sections(page, {"a": "newer", "b": "new"})
    assert page.read_text() == text


def test_a_row_of_an_earlier_version_without_a_needed_key_is_made_again(
    reproduction: dict[str, Any], tmp_path: Path
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    experiments = reproduction["experiments"].Experiments(tmp_path / "runs", tmp_path / "rows", 1)
    signal.signal(signal.SIGTERM, handler)
    rows = iter([{"x": 1}, {"x": 2, "correct": {}}])

    def row() -> dict[str, Any]:
        return experiments.once("a", lambda: next(rows), needs=needs)

    needs = ""
    assert row() == row() == {"x": 1}
    needs = "correct"
    assert row() == row() == {"x": 2, "correct": {}}


@pytest.mark.slow
def test_the_figures_of_a_sparse_run_agree_with_each_other(
    reproduction: dict[str, Any], tiny_run: Path
) -> None:
    measured = reproduction["measure"].measure(tiny_run, 64)
    figures = measured["figures"]
    assert figures["attack.0"] == figures["accuracy"] > 0.2
    assert figures["attack.8"] <= figures["accuracy"]
    assert len({figures[f"capacity.0.{each}"] for each in reproduction["measure"].PRIORITIES}) == 1
    kinds = ("dropped", "class", "class_null", "position", "position_null", "random")
    assert {f"{kind}.0" for kind in kinds} <= set(figures)
    assert all(0 <= value <= 1 for value in figures.values())
    correct = {
        name: reproduction["measure"].unpack(each) for name, each in measured["correct"].items()
    }
    assert {name: each.mean() for name, each in correct.items()} == {
        name: value
        for name, value in figures.items()
        if name.startswith(("accuracy", "attack", "capacity", "random", "merged"))
    }
    np.testing.assert_array_equal(correct["attack.0"], correct["accuracy"])  # the same 64 images
    np.testing.assert_array_equal(correct["capacity.0.order"], correct["capacity.0.random"])
    images = sample(open_source("digits", "test"), 64)
    per_example = evaluate(load(tiny_run).model, images, batch_size=64).per_example
    np.testing.assert_array_equal(correct["accuracy"], per_example.correct)  # in the data's order


def test_every_model_is_measured_under_the_changes_that_it_allows(
    reproduction: dict[str, Any],
) -> None:
    variants, measure = reproduction["variants"], reproduction["measure"]
    found = {
        name: {each.__name__ for each in measure.changes(variants.train_config(name).model)}
        for name in variants.VARIANTS
    }
    limited = {"capacities", "kept"}
    assert found["dense"] == found["dense_flops"] == found["soft"] == set()
    assert found["shared"] == {"random_routers"} | limited  # a shared expert cannot be merged
    assert found["standard"] == {"random_routers", "merged"} | limited


def test_a_command_that_fails_is_named_with_its_message(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, "--steps", "4", "--data", "nowhere")
    message = str(caught.value)
    assert "-m vmoe train" in message and "exit status 2" in message and "nowhere" in message


def rows_of(
    reproduction: dict[str, Any],
    figures: dict[str, list[float]],
    correct: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> Any:
    """Invented rows.

    Args:
        figures: the values of the figures "VARIANT:NAME" for seeds 0, 1, 2.
        correct: figures of which each seed has its correct images (seeds, images).
    """
    rows: dict[str, dict[int, Any]] = {}
    for key, values in {**figures, **correct}.items():
        variant, _, name = key.partition(":")
        for seed, value in enumerate(values):
            new = {"figures": {}, "correct": {}, "labels": 7}
            row = rows.setdefault(variant, {}).setdefault(seed, new)
            row["figures"][name] = float(np.mean(value))
            if key in correct:
                row["correct"][name] = reproduction["measure"].pack(value)
    return rows


def first_right(*numbers: int, images: int = 1000) -> np.ndarray:
    """Seeds that are right on so many of the first images (seeds, images)."""
    return np.arange(images) < np.array(numbers)[:, None]


@pytest.mark.parametrize(
    ("first", "second", "expected", "holds"),
    [
        ([3, 4, 5], [0, 1, 2], "reproduced", ("above",)),
        ([3, 4, 5], [0, 1, 3], "inconclusive", ("above",)),  # the worst equals the best
        ([0, 1, 2], [3, 4, 5], "contradicted", ("above",)),
        ([0, 1, 2], [1, 2, 3], "not contradicted", ("none",)),
        ([3, 4, 5], [0, 1, 2], "contradicted", ("none",)),  # by chance in 1 of 10 cases
        ([0, 1, 2], [1, 2, 3], "not contradicted", ("above", "none")),
        ([3, 4, 5], [0, 1, 2], "reproduced", ("above", "none")),
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
    rows = rows_of(reproduction, {"a:x": first, "b:x": second})
    assert claims.verdict(claim, rows) == f"{expected} by the seeds alone"
    del rows["b"][2]
    assert claims.verdict(claim, rows) == "not measured"  # a seed is missing


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3], [0, 1, 2], "reproduced"),  # the ranges overlap
        ([1, 2, 3], [0, 2, 2], "inconclusive"),
        ([0, 1, 2], [1, 2, 3], "contradicted"),
    ],
)
def test_figures_of_the_same_models_are_compared_seed_by_seed(
    reproduction: dict[str, Any], first: list[float], second: list[float], expected: str
) -> None:
    claims = reproduction["claims"]
    claim = claims.Claim("", "", claims.Figure("a", "x"), claims.Figure("a", "y"))
    rows = rows_of(reproduction, {"a:x": first, "a:y": second})
    assert claims.verdict(claim, rows) == f"{expected} by the seeds alone"


@pytest.mark.parametrize("images", [False, True])
def test_equal_figures_of_the_same_models_are_contradicted_by_the_images_alone(
    reproduction: dict[str, Any], images: bool
) -> None:
    """Three seeds agree by chance in one of four cases, which is too often for a verdict."""
    claims = reproduction["claims"]
    claim = claims.Claim("", "", claims.Figure("a", "x"), claims.Figure("a", "y"), ("none",))
    correct = {"a:x": first_right(808, 809, 810), "a:y": first_right(800, 801, 802)}
    figures = {name: [float(each.mean()) for each in value] for name, value in correct.items()}
    rows = rows_of(reproduction, {}, correct) if images else rows_of(reproduction, figures)
    expected = "contradicted" if images else "inconclusive by the seeds alone"
    assert claims.verdict(claim, rows) == expected
    overlapping = {"a:x": [0.8, 0.7, 0.9], "a:y": [0.9, 0.7, 0.8]}
    alone = claims.verdict(claim, rows_of(reproduction, overlapping))
    assert alone == "not contradicted by the seeds alone"


@pytest.mark.parametrize("same_models", [False, True])
@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((801, 801, 801), (800, 800, 800), "inconclusive"),  # one image, for each seed
        ((803, 803, 803), (800, 800, 800), "inconclusive"),  # 0.30 points, error 0.17
        ((808, 809, 810), (800, 801, 802), "reproduced"),  # 0.80 points, error 0.27
        ((800, 801, 802), (808, 809, 810), "contradicted"),
        ((800, 900, 901), (800, 800, 801), "inconclusive"),  # a seed is no better
        ((800, 800, 800), (800, 800, 800), "inconclusive"),
    ],
)
def test_a_difference_needs_the_seeds_and_two_paired_standard_errors_over_the_images(
    reproduction: dict[str, Any],
    first: tuple[int, ...],
    second: tuple[int, ...],
    expected: str,
    same_models: bool,
) -> None:
    claims = reproduction["claims"]
    names = ("a:x", "a:y") if same_models else ("a:x", "b:x")
    correct = dict(zip(names, (first_right(*first), first_right(*second)), strict=True))
    claim = claims.Claim("", "", *(claims.Figure(*name.split(":")) for name in names))
    assert claims.verdict(claim, rows_of(reproduction, {}, correct)) == expected


@pytest.mark.parametrize(
    ("name", "first", "second", "expected"),
    [
        ("accuracy", 0.875, 0.867, "inconclusive by a bound"),  # 0.8 points; 2 x 0.47
        ("accuracy", 0.875, 0.865, "reproduced by a bound"),
        ("accuracy", 0.865, 0.875, "contradicted by a bound"),
        ("attack.8", 0.45, 0.39, "inconclusive by a bound"),  # 512 images; 2 x 3.1
        ("attack.8", 0.46, 0.39, "reproduced by a bound"),
        ("class.1", 0.875, 0.867, "reproduced by the seeds alone"),
    ],
)
def test_without_results_per_image_a_difference_of_accuracies_needs_two_bounds_of_their_error(
    reproduction: dict[str, Any], name: str, first: float, second: float, expected: str
) -> None:
    claims = reproduction["claims"]
    claim = claims.Claim("", "", claims.Figure("a", name), claims.Figure("b", name))
    rows = rows_of(reproduction, {f"a:{name}": [first] * 3, f"b:{name}": [second] * 3})
    for of in rows.values():
        for row in of.values():
            row["images"] = 10_000
    assert claims.verdict(claim, rows) == expected


def test_the_bound_exceeds_the_error_over_images_that_are_hard_for_all(
    reproduction: dict[str, Any],
) -> None:
    claims = reproduction["claims"]
    rng = np.random.default_rng(1)
    hard = rng.random(2000)
    first, second = (hard + 0.3 * rng.random((3, 2000)) < bound for bound in (0.9, 0.85))
    claim = claims.Claim("", "", *(claims.Figure(each, "accuracy") for each in "ab"))
    rows = rows_of(reproduction, {}, {"a:accuracy": first, "b:accuracy": second})
    error = claims.margin(claim, rows).error
    assert error < claims.error_bound(first.mean(), second.mean(), 2000)


def test_the_errors_of_a_margin_are_over_the_seeds_and_over_the_same_images(
    reproduction: dict[str, Any],
) -> None:
    claims = reproduction["claims"]
    rng = np.random.default_rng(0)
    hard = rng.random(2000)  # images that are hard for one model are hard for all
    first, second = (hard + 0.3 * rng.random((3, 2000)) < bound for bound in (0.9, 0.85))
    claim = claims.Claim("", "", claims.Figure("a", "x"), claims.Figure("b", "x"))
    rows = rows_of(reproduction, {}, {"a:x": first, "b:x": second})
    mean, over_seeds, error, _ = claims.margin(claim, rows)
    parts = (part.mean(1) for part in (first, second))  # of each seed
    assert over_seeds == pytest.approx(np.sqrt(sum(part.var(ddof=1) / 3 for part in parts)))
    means = first.mean(0) - second.mean(0)
    draws = rng.integers(2000, size=(2000, 2000))  # the bootstrap as the oracle
    assert mean == pytest.approx(means.mean())
    assert error == pytest.approx(means[draws].mean(1).std(), rel=0.05)
    rows["b"][1]["labels"] = 8
    with pytest.raises(SystemExit, match="rows of different images"):
        claims.margin(claim, rows)


@pytest.mark.parametrize("paired", [False, True])
def test_the_probability_of_a_difference_by_chance_is_that_of_all_orders_of_the_seeds(
    reproduction: dict[str, Any], paired: bool
) -> None:
    claims = reproduction["claims"]
    figures = (claims.Figure("a", "x"), claims.Figure("a" if paired else "b", "y"))
    orders = [
        claims.order(values[:3], values[3:], paired=paired)
        for values in itertools.permutations(range(6))
    ]
    separate = np.mean([order != "none" for order in orders])
    assert claims.chance(claims.Claim("", "", *figures)) == pytest.approx(separate)


def test_the_table_of_claims_names_both_figures_and_is_sorted_by_verdict(
    reproduction: dict[str, Any],
) -> None:
    claims, show = reproduction["claims"], reproduction["show"]
    correct = {
        "standard:accuracy": first_right(700, 710, 720),
        "dense:accuracy": first_right(800, 810, 850),
        "dense_flops:accuracy": first_right(718, 719, 740),
    }
    position = {"standard:position.1": [0.3, 0.4, 0.5], "standard:position.5": [0.1, 0.1, 0.1]}
    rows = rows_of(reproduction, position, correct)
    for of in rows.values():
        for row in of.values():
            row["images"] = 1000
    lines = show.claims(rows).splitlines()[2:]
    assert [line.split("**")[1] for line in lines] == ["contradicted", "inconclusive", "reproduced"]
    assert (
        "| V-MoE: 71.00 (70.00 to 72.00) | dense: 82.00 (80.00 to 85.00) | -11.00 ± 1.63 | 0.91 |"
    ) in lines[0]
    assert lines[0].startswith("| **contradicted** (seeds, images) | sparse is better")
    assert "| -1.57 ± 0.92 | 0.26 |" in lines[1]  # the seeds overlap
    assert lines[2].startswith("| **reproduced** (seeds) |")
    assert (
        "| information in block 1: 0.400 (0.300 to 0.500) | in block 5: 0.100 (0.100 to 0.100) "
        "| +0.300 ± 0.058 | - | - |"
    ) in lines[2]
    text = " ".join(show.counts(rows).split())
    assert "**3 claims: 1 reproduced, 1 inconclusive, 1 contradicted.**" in text
    assert f" {len(claims.CLAIMS) - 3} more are not measured." in text
    chance = "chance would reproduce about 0.2 of the claims at most"  # 1 / 20 + 1 / 20 + 1 / 8
    assert chance in text
    assert "The three seeds agree with 1 of the claims." in text
    assert "not known yet" not in text
    assert "1 of the claims that are reproduced or contradicted compare other figures" in text
    for row in rows["dense"].values():
        row["correct"] = {}
    text = " ".join(show.counts(rows).split())
    assert "For 1 of the 2 claims about accuracies this error is not known yet; a bound" in text
    assert "not contradicted" not in show.meanings(rows)  # no claim has this verdict
    assert "| -2 of 1,000 |" in show.narrow(rows)  # 718 and 720 images


def test_an_observation_stands_only_while_the_rows_support_it(
    reproduction: dict[str, Any],
) -> None:
    module = reproduction["observations"]
    figures = {
        "standard:capacity.8.order": [0.8, 0.8, 0.8],
        "standard:capacity.8.random": [0.81, 0.82, 0.83],
        "class_token:capacity.8.order": [0.8, 0.8, 0.8],
        "class_token:capacity.8.random": [0.79, 0.82, 0.83],
    }
    text = " ".join(module.observations(rows_of(reproduction, figures), module.CAPACITY).split())
    assert "(80.00 and 82.00)" in text and "there is no such difference" in text
    figures["standard:capacity.8.order"][0] = 0.82
    assert module.observations(rows_of(reproduction, figures), module.CAPACITY) == ""
    assert module.observations({}, module.SPECIALIZATION) == ""
