"""The claims: a run gives a row once, and verdicts follow from rows by plain rules."""

import dataclasses
import json
import shutil
import signal
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from scripts.experiments import check_capacity, results
from scripts.experiments.claims import measure, observations, tables, variants, verdicts
from scripts.experiments.framework.pages import write_sections
from scripts.experiments.framework.runs import ROWS, Experiment, argument_parser, read_rows
from tests import script
from vmoe.data.pipeline import ORDER
from vmoe.data.reading import Reading
from vmoe.data.sources import open_source, sample
from vmoe.data.sources.builtin import path_of
from vmoe.evaluate import evaluate
from vmoe.factory import load

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"


def run(folder: Path, *options: str) -> None:
    folders = ("--workdir", folder / "runs", "--rows", folder / "rows.jsonl")
    script.experiment(
        "claims", *folders, "--jobs", "1", "--only", "dense", "--seeds", "0", *options
    )


@pytest.mark.process
@pytest.mark.slow
def test_a_run_is_trained_measured_and_gets_a_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script.commands_in_this_process(monkeypatch)
    one_block = dataclasses.replace(variants.VARIANTS["dense"], model={"depth": 1})
    monkeypatch.setitem(variants.VARIANTS, "dense", one_block)
    shutil.copyfile(path_of("fashion_mnist_sample"), tmp_path / "sample.npz")  # its own splits
    data = ("--data", f"arrays:{tmp_path / 'sample.npz'}")
    run(tmp_path, "--steps", "4", "--images", "16", *data)
    row = json.loads((tmp_path / "rows.jsonl").read_text())
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
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row | {"versions": {"jax": "0.1"}, "figures": figures}) + "\n")
    run(tmp_path, "--steps", "4", "--images", "64")
    assert not list((tmp_path / "runs").iterdir())
    tables = capsys.readouterr().out
    assert "| dense, equal steps | 7.00 | 4 | 87.50 | 87.50 |  |  |" in tables
    assert f"| dense, equal steps | {' | '.join(4 * ['50.00 ± 6.2'])} | 25.00 ± 5.4 |" in tables
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, "--steps", "4", "--images", "32")
    made = f"{path}: dense, seed 0: made with other images; use other --rows"
    assert made in str(caught.value)


def test_the_pages_of_results_show_the_stored_rows(tmp_path: Path) -> None:
    pages = {path.name: path for path in RESULTS.iterdir() if path.suffix in (".md", ".csv")}
    for name, path in pages.items():
        shutil.copyfile(path, tmp_path / name)
    results.write(results.Stored(ROWS), tmp_path)
    for name, path in pages.items():
        message = f"{name} is outdated: run python -m scripts.experiments results"
        assert (tmp_path / name).read_text() == path.read_text(), message


def test_a_saving_is_called_free_only_with_a_bound_of_the_loss() -> None:
    lines = [dict(line) for line in results.Stored(ROWS).lines("compute")]
    text = " ".join(check_capacity.sections(lines)["answer"].split())
    assert "**not measurably less** accurate (it loses at most 0.25 points, at 95%)" in text
    for line in lines:
        if line["data"] == "Fashion-MNIST":
            line["its error"] = "0.01"
    text = " ".join(check_capacity.sections(lines)["answer"].split())
    assert "the Fashion-MNIST model loses 0.1 points" in text


@pytest.mark.slow
def test_other_rows_change_the_answers_the_plots_and_the_table_of_answers(tmp_path: Path) -> None:
    shutil.copytree(ROWS, tmp_path / "rows")
    shutil.copytree(RESULTS, tmp_path / "pages", ignore=shutil.ignore_patterns("*.png"))
    path = tmp_path / "rows" / "claims.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if accuracy := {"dense": 0.9, "standard": 0.8746}.get(row["model"]):
            row["figures"]["accuracy"], row["correct"] = accuracy, {}
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    script.experiment("results", "--rows", tmp_path / "rows", "--pages", tmp_path / "pages")
    for name in ("sparse_or_dense", "README"):
        text = " ".join((tmp_path / "pages" / f"{name}.md").read_text().split())
        assert "at equal steps **no**" in text and "equal steps -2.54 ±" in text
    plots = {path.name for path in (tmp_path / "pages").glob("*.png")}
    from_data = {"mixtures_tone.png"}  # which the repository does not have
    assert plots == {path.name for path in RESULTS.glob("*.png")} - from_data


def test_a_page_without_a_section_is_named(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a: begin -->\nold\n<!-- a: end -->\nafter\n")
    write_sections(page, {"a": "new\n"})
    text = "before\n<!-- a: begin -->\n\nnew\n\n<!-- a: end -->\nafter\n"
    assert page.read_text() == text
    with pytest.raises(SystemExit, match="page.md: no section from <!-- b: begin -->"):
        write_sections(page, {"a": "newer", "b": "new"})
    assert page.read_text() == text


def numbers(folder: Path) -> Experiment:
    """An experiment that is to have rows of numbers."""
    folders = ["--workdir", str(folder), "--rows", str(folder / "rows.jsonl")]
    handler = signal.getsignal(signal.SIGTERM)
    made = Experiment(argument_parser("numbers", "Makes rows.").parse_args(folders))
    signal.signal(signal.SIGTERM, handler)
    return made


def test_a_row_of_an_earlier_version_without_a_needed_key_is_made_again(tmp_path: Path) -> None:
    rows = iter([{"x": 1}, {"x": 2, "correct": {}}])
    made, key = numbers(tmp_path), {"model": "a", "seed": 3}

    def row() -> dict[str, Any]:
        return made.once("a", 3, lambda: next(rows))

    assert row() == row() == key | {"x": 1}
    made.needs = "correct"
    assert row() == row() == key | {"x": 2, "correct": {}}
    assert numbers(tmp_path).stored == {("a", 3): row()}  # the last one of the file


def test_rows_that_are_made_at_once_are_lines_and_a_line_that_is_none_is_named(
    tmp_path: Path,
) -> None:
    made = numbers(tmp_path)

    def row(seed: int) -> dict[str, Any]:
        return made.once("b" * seed, seed, lambda: {"x": 1_000 * [seed]})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(row, range(100)))
    found = read_rows(made.path)
    assert sorted(found) == [*found] and len(found) == 100
    assert all(row["x"][0] == seed for of in found.values() for seed, row in of.items())
    with made.path.open("a") as file:
        file.write('{"model": "c"')
    with pytest.raises(SystemExit, match=r"rows.jsonl, line 101: no row; remove it"):
        read_rows(made.path)


@pytest.mark.slow
def test_the_figures_of_a_sparse_run_agree_with_each_other(tiny_run: Path) -> None:
    measured = measure.measure(tiny_run, 64)
    figures = measured["figures"]
    assert figures["attack.0"] == figures["accuracy"] > 0.2
    assert figures["attack.8"] <= figures["accuracy"]
    assert len({figures[f"capacity.0.{each}"] for each in measure.PRIORITIES}) == 1
    kinds = ("dropped", "class", "class_null", "position", "position_null", "random")
    assert {f"{kind}.0" for kind in kinds} <= set(figures)
    assert all(0 <= value <= 1 for value in figures.values())
    correct = {name: measure.unpack(each) for name, each in measured["correct"].items()}
    assert {name: each.mean() for name, each in correct.items()} == {
        name: value
        for name, value in figures.items()
        if name.startswith(("accuracy", "attack", "capacity", "random", "merged"))
    }
    np.testing.assert_array_equal(correct["attack.0"], correct["accuracy"])  # the same 64 images
    np.testing.assert_array_equal(correct["capacity.0.order"], correct["capacity.0.random"])
    images = sample(open_source("digits", "test"), 64)
    per_example = evaluate(load(tiny_run).model, images, Reading(64)).per_example
    np.testing.assert_array_equal(correct["accuracy"], per_example.correct)  # in the data's order


def test_every_model_is_measured_under_the_changes_that_it_allows() -> None:
    found = {
        name: {*measure.changes(variants.train_config(name).model)} for name in variants.MODELS
    }
    assert found["dense"] == found["dense_flops"] == found["dense_40_2000"] == {"attacks"}
    assert found["soft"] == {"attacks", "batch"}
    assert found["shared"] == {*measure.CHANGES} - {"merged"}  # a shared expert cannot be merged
    assert found["standard"] == {*measure.CHANGES}


@pytest.mark.process
def test_a_command_that_fails_is_named_with_its_message(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, "--steps", "4", "--data", "nowhere")
    message = str(caught.value)
    assert "-m vmoe train" in message and "exit status 2" in message and "nowhere" in message


def rows_of(
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
                row["correct"][name] = measure.pack(value)
    return rows


def first_right(*numbers: int, images: int = 1000) -> np.ndarray:
    """Seeds that are right on so many of the first images (seeds, images)."""
    return np.arange(images) < np.array(numbers)[:, None]


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Judges one claim, which stands alone on its page."""

    def judge(rows: Any, first: str, second: str, **says: Any) -> Any:
        figures = (verdicts.Figure(*each.split(":")) for each in (first, second))
        monkeypatch.setattr(verdicts, "CLAIMS", {"a": verdicts.Claim("", "", *figures, **says)})
        monkeypatch.setattr(verdicts, "PAGES", {"page": ("a",)})
        return verdicts.judge(rows).claims.get("a")

    return judge


def test_differences_with_the_same_error_have_the_same_verdict() -> None:
    """Three of -0.29 to -0.30 points, with errors over seeds and images of 0.19."""
    rows = read_rows(ROWS / "claims.jsonl")
    found = verdicts.judge(rows).claims
    three = [found[name] for name in ("bias_balanced", "shared", "half_bpr")]
    assert [round(100 * each.difference.mean, 1) for each in three] == [-0.3] * 3
    assert np.ptp([each.difference.error for each in three]) < 2e-4
    assert {each.verdict for each in three} == {"inconclusive"}
    larger, smaller = found["soft_expert_choice"], found["bias_balanced"]
    assert larger.difference.error < smaller.difference.error and larger.p <= smaller.p


def test_every_claim_stands_on_one_page() -> None:
    assert sorted(name for names in verdicts.PAGES.values() for name in names) == sorted(
        verdicts.CLAIMS
    )


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([0.81, 0.82, 0.83], [0.71, 0.72, 0.73], "reproduced"),
        ([0.71, 0.72, 0.73], [0.81, 0.82, 0.83], "contradicted"),
        ([0.81, 0.82, 0.83], [0.80, 0.80, 0.80], "inconclusive"),  # 3.5 errors, of 2 degrees
        ([0.82, 0.82, 0.82], [0.82, 0.82, 0.82], "inconclusive"),
    ],
)
def test_a_figure_that_is_no_accuracy_is_compared_over_the_seeds(
    judge: Any, first: Any, second: Any, expected: str
) -> None:
    rows = rows_of({"a:x": first, "b:x": second, "a:y": second})
    for other in ("b:x", "a:y"):
        found = judge(rows, "a:x", other)
        assert (found.verdict, found.basis) == (expected, "seeds")
    del rows["b"][2]
    assert judge(rows, "a:x", "b:x") is None  # a seed is missing


@pytest.mark.parametrize("same_models", [False, True])
@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((801, 801, 801), (800, 800, 800), "inconclusive"),  # one image, for each seed
        ((803, 803, 803), (800, 800, 800), "inconclusive"),  # 0.30 points, error 0.17
        ((830, 831, 832), (800, 801, 802), "reproduced"),  # 3 points, error 0.5
        ((800, 801, 802), (830, 831, 832), "contradicted"),
        ((800, 900, 901), (800, 800, 801), "inconclusive"),  # 6.7 points, error 3.4
        ((800, 800, 800), (800, 800, 800), "inconclusive"),
    ],
)
def test_a_difference_of_accuracies_is_compared_over_seeds_and_images(
    judge: Any,
    first: tuple[int, ...],
    second: tuple[int, ...],
    expected: str,
    same_models: bool,
) -> None:
    names = ("a:x", "a:y") if same_models else ("a:x", "b:x")
    correct = dict(zip(names, (first_right(*first), first_right(*second)), strict=True))
    found = judge(rows_of({}, correct), *names)
    assert (found.verdict, found.basis) == (expected, "seeds, images")


@pytest.mark.parametrize(
    ("says", "first", "expected"),
    [
        ("equal", (801, 802, 803), "not contradicted"),
        ("equal", (700, 802, 900), "inconclusive"),  # the same mean, but the interval is wide
        ("equal", (850, 851, 852), "contradicted"),
        ("equal", (750, 751, 752), "contradicted"),
        ("equal", (815, 816, 817), "inconclusive"),  # 1.5 points, error 0.4
        ("not below", (850, 851, 852), "not contradicted"),
        ("not below", (750, 751, 752), "contradicted"),
        ("not below", (785, 786, 787), "inconclusive"),
    ],
)
def test_an_accuracy_stays_the_same_only_if_its_interval_is_within_the_margin(
    judge: Any, says: str, first: tuple[int, ...], expected: str
) -> None:
    correct = {"a:x": first_right(*first), "b:x": first_right(800, 801, 802)}
    found = judge(rows_of({}, correct), "a:x", "b:x", says=says, margin=0.02)
    assert found.verdict == expected


def test_a_claim_of_equality_names_its_margin() -> None:
    for claim in verdicts.CLAIMS.values():
        assert bool(claim.margin) == (claim.says != "above"), claim.text
        assert not claim.margin or "half a point" in claim.text


@pytest.mark.parametrize(
    ("name", "first", "second", "expected", "basis"),
    [
        ("accuracy", 0.875, 0.867, "inconclusive", "seeds, bound"),  # 0.8 points; 1.96 x 0.47
        ("accuracy", 0.875, 0.865, "reproduced", "seeds, bound"),
        ("accuracy", 0.865, 0.875, "contradicted", "seeds, bound"),
        ("attack.8", 0.45, 0.39, "inconclusive", "seeds, bound"),  # 512 images; 1.96 x 3.1
        ("attack.8", 0.46, 0.39, "reproduced", "seeds, bound"),
        ("class.1", 0.875, 0.867, "reproduced", "seeds"),
    ],
)
def test_without_results_per_image_the_error_over_the_images_is_a_bound(
    judge: Any,
    name: str,
    first: float,
    second: float,
    expected: str,
    basis: str,
) -> None:
    rows = rows_of({f"a:{name}": [first] * 3, f"b:{name}": [second] * 3})
    for of in rows.values():
        for row in of.values():
            row["images"] = 10_000
    found = judge(rows, f"a:{name}", f"b:{name}")
    assert (found.verdict, found.basis) == (expected, basis)


def test_drawings_of_an_emoji_count_once_in_the_bound() -> None:
    recipe = {"sparse": [50.0] * 3, "dense": [50.0] * 3, "images": 384}
    alone = verdicts.difference_of_recipe(recipe).error
    assert alone == pytest.approx(100 * np.sqrt(0.5 / 384))
    alike = verdicts.difference_of_recipe(recipe | {"observations": 192}).error
    assert alike == pytest.approx(np.sqrt(2) * alone)
    (emoji,) = (each for each in results.Stored(ROWS).json("recipes") if each["config"] == "emoji")
    assert 2 * emoji["observations"] == emoji["images"]


def test_the_bound_exceeds_the_error_over_images_that_are_hard_for_all(judge: Any) -> None:
    rng = np.random.default_rng(1)
    hard = rng.random(2000)
    first, second = (hard + 0.3 * rng.random((3, 2000)) < bound for bound in (0.9, 0.85))
    rows = rows_of({}, {"a:accuracy": first, "b:accuracy": second})
    own = judge(rows, "a:accuracy", "b:accuracy")
    for of in rows.values():
        for row in of.values():
            row |= {"images": 2000, "correct": {}}
    bound = judge(rows, "a:accuracy", "b:accuracy")
    assert own.difference.error < bound.difference.error
    assert own.difference.mean == pytest.approx(bound.difference.mean)


def test_rows_of_different_images_are_not_compared(judge: Any) -> None:
    correct = {"a:x": first_right(7, 8, 9), "b:x": first_right(7, 8, 9)}
    rows = rows_of({}, correct)
    rows["b"][1]["labels"] = 8
    with pytest.raises(SystemExit, match="rows of different images"):
        judge(rows, "a:x", "b:x")


def test_the_table_of_claims_names_both_figures_and_is_sorted_by_verdict() -> None:
    correct = {
        "standard:accuracy": first_right(700, 710, 720),
        "dense:accuracy": first_right(810, 820, 830),
        "dense_flops:accuracy": first_right(718, 719, 740),
    }
    position = {"standard:position.1": [0.39, 0.4, 0.41], "standard:position.5": [0.1, 0.1, 0.1]}
    rows = rows_of(position, correct)
    for of in rows.values():
        for row in of.values():
            row["images"] = 1000
    found = verdicts.judge(rows)
    lines = tables.claims(rows, found).splitlines()[2:]
    assert [line.split("**")[1] for line in lines] == ["contradicted", "inconclusive", "reproduced"]
    assert (
        "| V-MoE: 71.00 (70.00 to 72.00) | dense: 82.00 (81.00 to 83.00) "
        "| -11.00 ± 1.23 | < 0.001 |"
    ) in lines[0]
    assert lines[0].startswith("| **contradicted** (seeds, images) | sparse is better")
    assert "| -1.57 ± 0.93 |" in lines[1]
    assert lines[2].startswith("| **reproduced** (seeds) |")
    assert (
        "| information in block 1: 0.400 (0.390 to 0.410) | in block 5: 0.100 (0.100 to 0.100) "
        "| +0.300 ± 0.006 | < 0.001 | - |"
    ) in lines[2]
    text = " ".join(tables.counts(found).split())
    assert "**3 claims: 1 reproduced, 1 inconclusive, 1 contradicted.**" in text
    assert f" {len(verdicts.CLAIMS) - 3} more are not measured." in text
    # of a page with one claim 1 in 20, of one with two the limit of many
    assert "chance would reproduce about 0.1 of the 3 claims of an order and contradict" in text
    assert "1 of the claims compare figures that are no accuracies" in text
    assert "a bound is used" not in text
    for row in rows["dense"].values():
        row["correct"] = {}
    found = verdicts.judge(rows)
    text = " ".join(tables.counts(found).split())
    assert "The error over the images is not known for 1 of the claims; a bound is used" in text
    assert "± at most" in tables.difference(found, "dense")
    assert "not contradicted" not in tables.meanings(found)  # no claim has this verdict


def test_an_observation_stands_only_while_the_rows_support_it() -> None:
    figures = {
        "standard:capacity.8.order": [0.8, 0.8, 0.8],
        "standard:capacity.8.random": [0.801, 0.82, 0.839],
        "class_token:capacity.8.order": [0.8, 0.8, 0.8],
        "class_token:capacity.8.random": [0.79, 0.82, 0.83],
    }

    def observed(every: Any) -> str:
        rows = rows_of(figures)
        for of in rows.values():
            for row in of.values():
                row["images"] = 10_000
        return " ".join(observations.observations(rows, every).split())

    text = observed(observations.CAPACITY)
    assert "(80.00 and 82.00; p = " in text and "the seeds do not agree" in text
    assert "instead of each image some" not in text  # the seeds differ
    figures["standard:capacity.8.random"] = [0.86, 0.86, 0.86]
    assert "p < 0.001, not corrected). The last images of a group lose" in observed(
        observations.CAPACITY
    )
    figures["standard:capacity.8.order"][0] = 0.87
    assert observed(observations.CAPACITY) == ""
    assert observations.observations({}, observations.SPECIALIZATION) == ""


def test_what_the_seeds_agree_on_is_not_called_a_rule_beside_a_test_that_cannot_tell() -> None:
    rows = read_rows(ROWS / "claims.jsonl")
    (own,) = (
        each
        for each in " ".join(
            observations.observations(rows, observations.SPECIALIZATION).split()
        ).split(" - ")
        if "random router costs" in each
    )
    assert "depends on its router most" not in own
    assert "for each seed: 13.4 points in block 1 and 0.5 in block 5 (p = 0.078" in own
