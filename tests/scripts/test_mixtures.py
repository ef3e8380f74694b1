"""The classic results: each experiment gives a row, and the page says what the rows say."""

import csv
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from scripts.experiments.framework.runs import ROWS, read_rows
from scripts.experiments.mixtures import (
    answer,
    arm,
    command,
    methods,
    plots,
    trees,
    vowels,
)
from scripts.experiments.mixtures import tables as page
from scripts.prepare import mixtures as prepare
from tests import script

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "results" / "mixtures.md"
QUICK = ("arm_linear", "arm_cart")
"""Experiments that take less than a second at the tiny size."""


@pytest.fixture(name="tables", scope="session")
def made_tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables with the columns and sizes of the real ones, and other numbers."""
    folder, rng = tmp_path_factory.mktemp("tables"), np.random.default_rng(0)
    x = rng.uniform(1.3, 3.0, 150)
    tuned = np.where(rng.random(150) < 0.6, 2.0, x) + rng.normal(0, 0.05, 150)
    write(folder / "tone.csv", ("stretchratio", "tuned"), zip(x, tuned, strict=True))
    x = rng.uniform(0.4, 4.0, 88)
    ratio = np.where(rng.random(88) < 0.5, 1.2 - 0.1 * x, 0.6 + 0.1 * x)
    ratio += rng.normal(0, 0.05, 88)
    write(folder / "no.csv", ("NO", "Equivalence"), zip(x, ratio, strict=True))
    x = rng.uniform(0, 10, 200)
    yn = np.where(rng.random(200) < 0.5, 5 * x, 40 - (x - 5) ** 2) + rng.normal(0, 3, 200)
    write(folder / "npreg.csv", ("x", "yn", "yp"), zip(x, yn, rng.poisson(4, 200), strict=True))
    write(folder / "vowels.csv", ("speaker", "kind", "vowel", "F0", "F1", "F2", "F3"), spoken(rng))
    return folder


def spoken(rng: np.random.Generator) -> Iterator[tuple[Any, ...]]:
    """76 speakers who say the four vowels twice, apart from each other."""
    means = {"iy": (300, 2500), "ih": (450, 2100), "aa": (850, 1200), "ah": (700, 1300)}
    for speaker, (name, mean) in itertools.product(range(1, 77), 2 * list(means.items())):
        formants = rng.normal((*mean, 2800), (30, 60, 100))
        yield speaker, "m", name, 120, *formants.round(1)


def write(path: Path, header: tuple[str, ...], rows: Any) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def row(name: str, tables: Path, capsys: pytest.CaptureFixture[str], seed: int = 0) -> Any:
    """The row that the script prints of an experiment at the tiny size."""
    script.experiment("mixtures", "--tiny", "--row", name, str(seed), "--data", tables)
    return json.loads(capsys.readouterr().out)


def numbers(value: Any) -> list[float]:
    """All numbers in nested lists and dictionaries."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for each in value for number in numbers(each)]
    return [value] if isinstance(value, int | float) else []


def experiments() -> list[Any]:
    names = set(command.PARTS)
    names.remove("trees_digits")  # the same code as trees_wine, for ten times as long
    return [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in sorted(names)
    ]


@pytest.mark.parametrize("name", experiments())
def test_every_experiment_gives_finite_figures(
    name: str, tables: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = row(name, tables, capsys)
    assert made.keys() == {"figures", "seconds", "versions"}
    found = numbers(made["figures"])
    assert found and np.isfinite(found).all()
    assert made["versions"].keys() == {"python", "numpy", "scipy", "sklearn"}


@pytest.mark.process
@pytest.mark.slow
def test_a_run_makes_missing_rows_once_and_keeps_sizes_and_data_apart(
    tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [f"--{name}={tmp_path / name}" for name in ("workdir", "rows")]
    words = [*folders, f"--data={tables}", "--jobs=1", "--only", "tone", "arm_linear"]
    picture = tmp_path / "tone.png"
    script.experiment("mixtures", *words, "--tiny", "--seeds", "3", "--picture", picture)
    made = (tmp_path / "rows").read_text()
    assert {model: [*of] for model, of in read_rows(tmp_path / "rows").items()} == {
        "arm_linear": [3],
        "tone": [3],
    }
    assert "| linear |" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    script.experiment("mixtures", *words, "--tiny", "--seeds", "3")
    assert (tmp_path / "rows").read_text() == made
    with pytest.raises(SystemExit, match="tone, seed 3: made with other size; use other --rows"):
        script.experiment("mixtures", *words, "--seeds", "3")


def test_missing_data_is_one_line_that_names_the_script_which_makes_it(tmp_path: Path) -> None:
    folders = [f"--{name}={tmp_path / name}" for name in ("workdir", "rows", "data")]
    with pytest.raises(SystemExit) as caught:
        script.experiment("mixtures", *folders, "--only", "tone")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'data' / 'tone.csv'}: no such file")
    assert "python -m scripts.prepare.mixtures" in message and "\n" not in message


def test_two_lines_are_found_with_their_slopes(
    tables: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = row("tone", tables, capsys)["figures"]
    flat, steep = figures["lines"]
    np.testing.assert_allclose(flat[:2], (2, 0), atol=0.05)
    np.testing.assert_allclose(steep[:2], (0, 1), atol=0.05)
    assert int(np.argmin([each["icl"] for each in figures["constant"]])) == 1


def test_other_data_do_not_agree_with_the_results_of_r(
    tables: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {"stored": {0: row("stored", tables, capsys)}}
    assert not answer.agrees(rows)
    for figures in rows["stored"][0]["figures"].values():
        for of in figures.values():
            of |= dict.fromkeys(of, 1e-10)
    assert answer.agrees(rows)


# The tests of significance


def test_the_combined_f_statistic_is_the_ratio_of_alpaydins_sums() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        differences = rng.normal(size=(5, 2))
        above, below = 0.0, 0.0
        for first, second in differences:  # Alpaydin 1999, equation 7, term by term
            mean = (first + second) / 2
            above += first**2 + second**2
            below += (first - mean) ** 2 + (second - mean) ** 2
        statistic, p = trees.combined_f(differences)
        assert statistic == pytest.approx(above / (2 * below))
        assert 0 < p < 1


def test_the_p_value_of_the_f_test_is_the_share_of_ratios_of_chi_squares_above() -> None:
    rng = np.random.default_rng(0)
    ratios = (rng.normal(size=(200_000, 10)) ** 2).mean(1)
    ratios /= (rng.normal(size=(200_000, 5)) ** 2).mean(1)
    differences = rng.normal(0.8, 1, (5, 2))
    statistic, p = trees.combined_f(differences)
    assert p == pytest.approx((ratios > statistic).mean(), abs=0.005)


def test_equal_models_have_a_p_value_of_one() -> None:
    assert trees.combined_f(np.zeros((5, 2))) == (0.0, 1.0)
    assert trees.combined_f(np.ones((5, 2)))[1] == 0
    assert trees.mcnemar(0, 0) == 1


@pytest.mark.parametrize(("first", "second"), [(1, 9), (3, 4), (0, 5), (6, 6)])
def test_mcnemars_p_value_is_the_share_of_all_ways_in_which_coins_can_fall(
    first: int, second: int
) -> None:
    total = first + second
    falls = [sum(coins) for coins in itertools.product((0, 1), repeat=total)]
    uneven = [abs(2 * heads - total) >= abs(first - second) for heads in falls]
    assert trees.mcnemar(first, second) == pytest.approx(np.mean(uneven))


# What the experiments are made of


def test_the_arms_energy_changes_by_the_work_of_its_torques_alone() -> None:
    rng = np.random.default_rng(0)
    angles, velocities, torques = np.split(arm.sample(50, rng)[0], 3, axis=1)
    for friction in (0 * arm.FRICTION, arm.FRICTION):
        pull = arm.accelerations(angles, velocities, torques, friction)

        def energy(t: float, pull: np.ndarray = pull) -> np.ndarray:
            return arm.energy(angles + velocities * t + pull * t**2 / 2, velocities + pull * t)

        power = (energy(1e-5) - energy(-1e-5)) / 2e-5
        expected = ((torques - friction * velocities) * velocities).sum(1)
        np.testing.assert_allclose(power, expected, rtol=1e-5, atol=1e-5)


def test_the_first_batch_on_line_is_larger_and_each_pass_has_every_row() -> None:
    batches = list(methods.Online(passes=2, batch_size=50)._batches(1_120))
    assert list(map(len, batches)) == [1_000, 50, 50, 20, *[50] * 22, 20]
    for one_pass in (batches[:4], batches[4:]):
        assert sorted(np.concatenate(one_pass)) == list(range(1_120))


def test_the_chosen_settings_have_the_least_error_on_validation_rows() -> None:
    found = methods.measure("cart", 0, 0.1, None)
    settings, errors = zip(*found["validation"], strict=True)
    assert len(set(errors)) == 5 and found["settings"] == settings[int(np.argmin(errors))]
    assert methods.measure("linear", 0, 0.1, None)["validation"] == []


@pytest.mark.parametrize("kind", ["Mixture", "Network"])
def test_the_gradient_of_a_system_is_the_slope_of_its_error(kind: str) -> None:
    system, rng = getattr(vowels, kind)(3), np.random.default_rng(0)
    x, y = rng.normal(size=(20, 3)), (rng.random(20) < 0.5).astype(float)
    x[:, -1] = 1
    parameters = system.start(3, rng)

    def error(parameters: tuple[np.ndarray, np.ndarray]) -> float:
        if kind == "Network":
            return float(np.mean((system.output(parameters, x) - y) ** 2) / 2)
        total = 0.0
        for row, target in zip(x, y, strict=True):  # equation 1.3 of the paper, row by row
            gate = np.exp(parameters[0] @ row)
            outputs = 1 / (1 + np.exp(-parameters[1] @ row))
            total -= np.log(gate / gate.sum() @ np.exp(-((target - outputs) ** 2) / 2))
        return total / len(x)

    for number, slopes in enumerate(system.gradient(parameters, x, y)):
        for index in np.ndindex(slopes.shape):
            values = []
            for change in (1e-6, -1e-6):
                moved = [each.copy() for each in parameters]
                moved[number][index] += change
                values.append(error(tuple(moved)))
            assert slopes[index] == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-8)


def test_no_speaker_is_in_training_and_test_rows(tables: Path) -> None:
    data = vowels.split(tables)
    assert len(data.x) == 50 * 8 and len(data.x_test) == 25 * 8
    both = {tuple(each) for each in data.x} & {tuple(each) for each in data.x_test}
    assert not both and data.y.mean() == data.y_test.mean() == 0.5


# The page


def stored_rows(seeds: int = 2) -> dict[str, dict[int, Any]]:
    """Rows of vowels, the arm and one data set of the trees, made up; two different ones repeat."""
    runs = {
        "gradient_4": {"8.0": [100, 120], "16.0": [50, None], "32.0": [None, None]},
        "gradient_8": {"8.0": [90, 110], "16.0": [80, 81], "32.0": [None, None]},
        "network_6": {"8.0": [300, 310], "16.0": [200, 220], "32.0": [None, None]},
        "network_12": {"8.0": [300, None], "16.0": [None, 220], "32.0": [None, None]},
    }
    accuracies = {"train": 0.9, "test": 0.875}
    vowels = {
        seed: {
            system: {step: {"passes": of[seed % 2]} | accuracies for step, of in steps.items()}
            for system, steps in runs.items()
        }
        | {name: {"passes": 3 + seed} | accuracies for name in ("em_4", "em_8")}
        for seed in range(seeds)
    }
    errors = {"soft": 4.0, "logistic": 5.0, "cart": 9.0, "forest": 4.0, "boosting": 3.0}
    tests = {
        model: {"f": 3.0, "p": 0.002 if model == "cart" else 0.2, "mcnemar": 0.5, "alone": [2, 1]}
        for model in errors
        if model != "soft"
    }
    trees = {"errors": {model: [[e, e]] * 5 for model, e in errors.items()}, "tests": tests}

    def arm(error: float, number: int, **settings: Any) -> dict[str, Any]:
        return {"error": error, "passes": number, "settings": settings}

    every = {
        "vowels": vowels,
        "arm_linear": {seed: arm(0.3 + 0.02 * (seed % 2), 1) for seed in range(seeds)},
        "arm_hierarchy": {
            seed: arm(0.1 + 0.02 * (seed % 2), 30 + 10 * (seed % 2), passes=35)
            for seed in range(seeds)
        },
        "trees_breast_cancer": {0: trees},
    }
    made = {"versions": {"numpy": "2.0"}, "seconds": 1800, "data": {"tone": "abc"}}
    return {
        name: {seed: made | {"figures": figures} for seed, figures in of.items()}
        for name, of in every.items()
    }


def cells(table: str) -> dict[str, list[str]]:
    """The lines of a table by their first cell or, in a table of data and models, by the second."""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    return {line[0]: line[1:] for line in lines}


def test_the_step_of_a_system_has_the_fewest_passes_of_those_with_which_most_runs_end() -> None:
    table = cells(page.vowels(stored_rows()))
    assert table["4 experts, gradient descent"][:4] == ["1,124 (23)", "110 (10)", "2 of 2", "8"]
    assert table["8 experts, gradient descent"][1:4] == ["80 (0)", "2 of 2", "16"]
    assert table["network of 12 hidden units"][1:4] == ["220 (0)", "1 of 2", "16"]
    assert table["4 experts, EM"][:4] == ["-", "4 (0)", "2 of 2", "-"]
    assert table["4 experts, EM"][4:] == ["90.0 ± 0.0", "87.5 ± 0.0"]


def test_errors_of_the_arm_stand_beside_the_papers() -> None:
    table = cells(page.arm(stored_rows()))
    assert table["linear"] == ["0.310 (0.300 to 0.320)", "0.31", "+0.00", "1", "1", "-"]
    assert table["hierarchy by EM, 16 experts"] == [
        *("0.110 (0.100 to 0.120)", "0.10", "+0.01", "35", "35", "passes 35")
    ]
    assert len(table) == 2


def test_the_soft_tree_is_better_only_where_the_f_test_says_so() -> None:
    rows = stored_rows()
    assert answer.verdicts(rows, "cart")["better"] == ["breast_cancer"]
    assert answer.verdicts(rows, "boosting")["neither"] == ["breast_cancer"]
    assert "| CART | 9.00 (9.00 to 9.00) | -5.00 | **0.002** |" in page.trees(rows)


def test_the_share_of_intervals_with_the_truth_is_that_of_all_rows() -> None:
    def figures(covered: int, sets: int, error: float) -> dict[str, Any]:
        of = {"covered": covered, "error": error, "spread": 0.3}
        return {"figures": {name: {"slope": value} for name, value in of.items()} | {"sets": sets}}

    rows = {
        "coverage_information": {0: figures(475, 500, 0.25)},
        "coverage_information_1000": {0: figures(450, 500, 0.15)},
        "coverage_bootstrap": {0: figures(20, 20, 0.2), 1: figures(17, 20, 0.4)},
    }
    information, of_1000, bootstrap = page.covered(rows).splitlines()[2:]
    assert information == "| observed information | 300 | 500 | slope | 95.0 | 0.250 | 0.300 |"
    assert of_1000 == "| observed information | 1,000 | 500 | slope | 90.0 | 0.150 | 0.300 |"
    assert bootstrap == "| parametric bootstrap | 300 | 40 | slope | 92.5 | 0.300 | - |"


def test_the_answer_has_a_part_for_each_experiment_that_was_measured() -> None:
    rows = stored_rows(6)
    text = " ".join(answer.answer(rows).split())
    assert "On the vowels, experts need fewer passes than a network: **yes**" in text
    assert "beats a linear model of the arm: **yes**" in text
    assert "arm: linear 0.31 (paper 0.31), hierarchy 0.11 (paper 0.10)" in text
    assert "tone" not in text and "CART on **1 of 1** data sets" in text
    empty = page.sections({}, "a machine")
    assert set(empty) == set(re.findall("<!-- (.*): begin -->", PAGE.read_text()))
    assert all("Not measured yet." in section for section in empty.values())


def test_a_run_that_does_not_end_has_the_most_passes() -> None:
    rows = stored_rows(6)
    for seed in (1, 3, 5):
        rows["vowels"][seed]["figures"]["gradient_4"]["8.0"]["passes"] = None
    text = " ".join(answer.answer({"vowels": rows["vowels"]}).split())
    assert "experts need fewer passes than a network: cannot tell" in text
    assert "of 4 experts 50 (paper 1,124; 3 of 6 runs end)" in text
    assert "of a network of 6 units 210 (paper 2,209)" in text


def test_one_number_is_less_than_another_only_where_a_test_says_so() -> None:
    less = answer.less
    assert less([1, 2, 3, 4, 90], [50, 51, 52, 53, 54]) == "cannot tell"
    assert less([*range(24), 90], range(50, 75)) == "**yes**"
    assert less(range(50, 75), [*range(24), np.inf]) == "**no**"


def test_an_answer_has_all_rows_that_it_compares() -> None:
    rows = stored_rows()
    text = answer.answer({"arm_hierarchy": rows["arm_hierarchy"]})
    assert "Not measured yet" in text and "arm" not in text


def test_the_soft_tree_is_counted_on_the_data_sets_that_were_measured() -> None:
    (trees,) = stored_rows()["trees_breast_cancer"].values()
    level = json.loads(json.dumps(trees))
    level["figures"]["tests"]["cart"]["p"] = 0.5
    rows = {"trees_wine": {0: trees}, "trees_digits": {0: level}}
    text = " ".join(answer.answer(rows).split())
    assert "soft tree errs less than CART on **1 of 2** data sets" in text
    assert "CART 1 and 0, random forest 0 and 0" in text


def test_a_soft_tree_is_better_only_after_the_correction_for_all_tests_of_the_table() -> None:
    (trees,) = stored_rows()["trees_breast_cancer"].values()
    trees["figures"]["tests"]["cart"]["p"] = 0.03  # of four tests
    rows = {"trees_wine": {0: trees}}
    assert answer.verdicts(rows, "cart")["neither"] == ["wine"]
    assert "| -5.00 | 0.030 |" in page.trees(rows)
    stored = read_rows(ROWS / "mixtures.jsonl")
    assert answer.verdicts(stored, "cart")["better"] == ["digits"]


def test_figures_are_drawn_from_any_part_of_the_rows() -> None:
    rows = stored_rows()
    labels = [entry.label for entry in vowels.SYSTEMS.values()][::-1]
    arm = ["hierarchy by EM, 16 experts", "linear"]
    trees = ["breast cancer\n569 rows, 2 classes"]
    for some, expected in (
        ({}, [[], [], []]),
        ({"vowels": rows["vowels"]}, [labels, [], []]),
        (rows, [labels, arm, trees]),
    ):
        axes = plots.plot(some).axes
        assert [[label.get_text() for label in ax.get_yticklabels()] for ax in axes] == expected
    dots = {tuple(line.get_xdata()) for line in axes[0].lines}
    assert {(100, 120), (110,), (1124,)} <= dots  # the runs of 4 experts, their mean, the paper's


def test_committed_rows_are_full_ones_of_the_known_data(tables: Path) -> None:
    known = prepare.CHECKSUMS
    options = SimpleNamespace(data=tables)
    rows = read_rows(ROWS / "mixtures.jsonl")
    assert rows.keys() == command.PARTS.keys()
    for name, part in command.PARTS.items():
        assert [*rows[name]] == [*range(part.seeds)], name
        for row in rows[name].values():
            assert row["size"] == "full", name
            assert row["data"] == {table: known[table] for table in part.data(options)}, name


# The preparation


def test_a_table_with_other_numbers_is_refused_by_name() -> None:
    text = prepare.as_csv([("x", "y"), (1.5, 2)])
    assert text == "x,y\n1.5,2\n"
    with pytest.raises(SystemExit, match=r"tone\.csv: SHA-256 \w{64}, expected 00: other versions"):
        prepare.check({"tone": text}, {"tone": "00"})


def test_a_missing_package_is_one_line_that_says_where_the_commands_are(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        script.run("prepare.mixtures", tmp_path / "out", "--debian", tmp_path)
    assert re.search(
        "No module named '(parselmouth|rdata)'.*starts with the commands", str(caught.value)
    )
    assert not (tmp_path / "out").exists()
