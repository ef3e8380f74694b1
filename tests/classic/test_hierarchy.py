"""Hierarchical mixtures, and mixtures read as soft decision trees."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from numpy.testing import assert_allclose
from sklearn.exceptions import ConvergenceWarning

from tests.classic import problems
from tests.classic.golden import EXACT, FOLDER, Golden
from vmoe.classic import (
    HierarchicalMixtureClassifier,
    HierarchicalMixtureRegressor,
    MixtureOfExpertsRegressor,
    plot_tree,
)

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def fit_stored(stored: Golden, steps: int) -> Any:
    """The stored problem after so many steps from the stored parameters."""
    b = stored.meta["branching"]
    coef = stored["start/expert_coef"]
    start = {
        "gate_coef": [stored["start/gate_level0"], *stored["start/gate_level1"]],
        "expert_coef": coef.reshape(b * b, *coef.shape[2:]),
    }
    if not stored.classifies:
        start["expert_std"] = stored["start/expert_sigma"].ravel()
    kind = HierarchicalMixtureClassifier if stored.classifies else HierarchicalMixtureRegressor
    with pytest.warns(ConvergenceWarning):
        model = kind((b, b), start=start, max_iter=steps, **EXACT)
        return model.fit(stored["x"], stored["y"])


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize(
    "name", ["hme_binary_depth2_regression", "hme_branching3_depth2_classification"]
)
def test_the_first_steps_equal_a_plain_loop(name: str, steps: int) -> None:
    stored = Golden(FOLDER / f"{name}.npz")
    b, model, step = stored.meta["branching"], fit_stored(stored, steps), f"step{steps}"
    assert_allclose(model.history_, stored["loglik_trace"][1 : steps + 1], rtol=1e-9)
    assert_allclose(model.gate_coef_[0], stored[f"{step}/gate_level0"], rtol=1e-9, atol=1e-9)
    assert_allclose(model.gate_coef_[1:], stored[f"{step}/gate_level1"], rtol=1e-9, atol=1e-9)
    coef = np.stack([expert.coef_ for expert in model.experts_])
    coef = coef - coef[:, :1] if stored.classifies else coef
    expected = stored[f"{step}/expert_coef"]
    assert_allclose(coef.reshape(expected.shape), expected, rtol=1e-9, atol=1e-9)
    joint = model.responsibilities(stored["x"], stored["y"]).reshape(-1, b, b)
    h0, h1 = stored[f"{step}/h_level0"], stored[f"{step}/h_level1"]
    assert_allclose(joint, h0[:, :, None] * h1, atol=1e-9)
    if not stored.classifies:
        std = np.array([expert.std_ for expert in model.experts_])
        assert_allclose(std.reshape(b, b), stored[f"{step}/expert_sigma"], rtol=1e-9)


def test_the_penalized_log_likelihood_never_falls_in_a_deep_uneven_tree() -> None:
    for seed, branching in enumerate([(2, 2), (3, 2), (1, 3), (2, 1, 2)]):
        x, y = problems.two_planes(seed)
        model = HierarchicalMixtureRegressor(branching, max_iter=15, tol=0.0)
        history = model.fit(x, y).history_
        assert np.all(np.diff(history) >= -1e-9 * np.abs(history[1:]))


def test_a_tree_of_one_gate_is_the_flat_mixture() -> None:
    x, y = problems.two_planes(0)
    tree = HierarchicalMixtureRegressor((3,)).fit(x, y)
    flat = MixtureOfExpertsRegressor(3).fit(x, y)
    assert_allclose(tree.predict(x), flat.predict(x))
    assert_allclose(tree.gate_coef_[0], flat.gate_coef_)


def test_growing_splits_the_leaf_that_does_not_fit_and_raises_the_likelihood() -> None:
    x = np.linspace(-1, 1, 300)[:, None]
    y = np.where(x[:, 0] < 0, 1.0, np.abs(x[:, 0] - 0.5)) + 0.01 * np.sin(99 * x[:, 0])
    small = HierarchicalMixtureRegressor((2,)).fit(x, y)
    grown = HierarchicalMixtureRegressor((2,), growth=3).fit(x, y)
    assert len(grown.experts_) == 3 and len(grown.gate_coef_) == 2
    assert grown.lower_bound_ > small.lower_bound_ + 100
    assert grown.score(x, y) > 0.99


def test_the_children_of_a_split_start_apart() -> None:
    x, y = problems.two_planes(1)
    grown = HierarchicalMixtureRegressor((1,), growth=2, max_iter=1).fit(x, y)
    one, other = grown.experts_
    assert np.abs(one.coef_ - other.coef_).max() > 0.1


def test_an_explanation_follows_the_most_probable_path() -> None:
    x, y = problems.crossed(0, rows=200)
    model = HierarchicalMixtureClassifier((2, 2), max_iter=20).fit(x, y)
    for row in x[:10]:
        found = model.explain(row)
        assert found.probability == pytest.approx(np.prod([s.probability for s in found.steps]))
        assert found.probability == pytest.approx(model.gate_proba(row[None])[0, found.expert])
        assert found.expert == model.to_hard_tree().apply(row[None])[0]
        assert found.prediction == model.predict(row[None])[0]
        step = found.steps[0]
        intercept = np.diff(model.gate_coef_[0] @ np.r_[1, x.mean(axis=0)])[0]
        odds = np.log(step.probability / (1 - step.probability))
        sign = 1 if step.child == 1 else -1
        assert odds == pytest.approx(sign * intercept + sum(step.pulls.values()), abs=1e-6)
        assert str(found).splitlines()[-1].endswith(str(found.prediction))


def test_the_hard_tree_of_sharp_gates_agrees_with_the_mixture() -> None:
    x = np.linspace(-1, 1, 400)[:, None]
    model = MixtureOfExpertsRegressor(2).fit(x, np.sign(x[:, 0]) * 5 + x[:, 0])
    assert model.to_hard_tree().agreement(x) > 0.98
    y = 5 * (-1) ** np.arange(400) + x[:, 0]
    soft = MixtureOfExpertsRegressor(2, gate_features=[]).fit(x, y)
    assert soft.to_hard_tree().agreement(x) < 0.5


def test_a_hard_tree_stays_as_it_is_if_the_mixture_changes() -> None:
    x, y = problems.two_planes(0)
    model = MixtureOfExpertsRegressor(2, max_iter=3).fit(x, y)
    tree = model.to_hard_tree()
    expected = [tree.predict(x).tolist(), tree.agreement(x)]
    for change in (model.partial_fit, model.fit):
        model.set_params(combine="argmax")
        change(5 * x, -y)
        assert [tree.predict(x).tolist(), tree.agreement(x)] == expected


def test_the_covariance_of_a_split_is_that_of_a_logistic_regression_if_experts_are_far_apart() -> (
    None
):
    x, _ = problems.two_planes(0, rows=200)
    right = np.random.default_rng(1).random(200) < 1 / (1 + np.exp(-x[:, 0]))
    y = np.where(right, 50.0, -50.0) + 5 * problems.inputs(2, 200)[:, 0]
    model = HierarchicalMixtureRegressor((2,), gate_penalty=0.0, max_iter=9).fit(x, y)
    (split,) = model.splits(x, y)
    p = model.gate_proba(x)[:, 1]
    columns = np.column_stack([np.ones(len(x)), x])
    information = (columns * (p * (1 - p))[:, None]).T @ columns
    assert_allclose(split.covariance, np.linalg.inv(information), rtol=1e-6)
    assert_allclose(split.entropy, -(p * np.log(p) + (1 - p) * np.log1p(-p)), rtol=1e-6)
    slopes = model.gate_coef_[0][1, 1:] * x.std(axis=0)
    assert_allclose(split.direction[1], slopes / np.linalg.norm(slopes), rtol=1e-6)


def test_the_covariance_of_splits_is_larger_if_the_expert_of_a_row_is_not_known() -> None:
    x, y = problems.two_planes(0, rows=200)
    model = HierarchicalMixtureRegressor((2,)).fit(x, y + problems.inputs(1, 200)[:, 0])
    (split,) = model.splits(x, y + problems.inputs(1, 200)[:, 0])
    p = model.gate_proba(x)[:, 1]
    columns = np.column_stack([np.ones(len(x)), x])
    known = np.linalg.inv((columns * (p * (1 - p))[:, None]).T @ columns)
    assert np.all(np.linalg.eigvalsh(split.covariance - known) > 0)
    assert np.diag(split.covariance)[0] > 1.5 * np.diag(known)[0]


def test_the_covariance_of_splits_counts_integer_weights_as_repeated_rows() -> None:
    x, y = problems.two_planes(0)
    weight = np.arange(80) % 3
    model = HierarchicalMixtureRegressor((2,)).fit(x, y, weight)
    many = model.splits(x.repeat(weight, axis=0), y.repeat(weight))
    for weighted, repeated in zip(model.splits(x, y, weight), many, strict=True):
        assert weighted.covariance.shape == (3, 3) and np.isfinite(weighted.covariance).all()
        assert_allclose(weighted.covariance, repeated.covariance, rtol=1e-6)
    with pytest.raises(ValueError, match="Negative values"):
        model.splits(x, y, weight - 1)
    with pytest.raises(TypeError, match="missing .* argument: 'y'"):
        model.splits(x)


def test_rows_reach_a_gate_with_the_probability_of_its_parent() -> None:
    x, y = problems.two_planes(0)
    root, left, right = (
        HierarchicalMixtureRegressor((2, 2), gate_penalty=1.0).fit(x, y).splits(x, y)
    )
    assert (root.depth, left.depth, right.depth) == (0, 1, 1)
    assert_allclose(left.reach, root.probabilities[:, 0])
    assert_allclose(left.reach + right.reach, 1)


def test_the_picture_has_a_curve_per_child_at_each_gate() -> None:
    x, y = problems.two_planes(0)
    model = HierarchicalMixtureRegressor((2, 3), max_iter=5).fit(x, y)
    ax = plot_tree(model, feature_names=["width", "height"])
    assert [len(gate.lines) for gate in ax.child_axes] == [3, 3, 2]
    assert "width" in ax.child_axes[-1].get_title()
    ax.figure.canvas.draw()
    plt.close(ax.figure)


def test_the_leaves_of_a_picture_name_the_class_that_is_most_probable_for_the_mean_row() -> None:
    x, y = problems.crossed(0, classes=3)
    x = 100 + 5 * x
    for target, names in ((y, ["a", "b", "c"]), (np.minimum(y, 1), ["yes", "no"])):
        model = HierarchicalMixtureClassifier(max_iter=5).fit(x, np.array(names)[target])
        means = model._mixture.experts.means(model._rows(x.mean(axis=0, keepdims=True)))[0]
        ax = plot_tree(model)
        for text, p in zip(ax.texts, means, strict=True):
            expected = f"class {model.classes_[p.argmax()]} ({p.max():.2f})"
            assert text.get_text().splitlines()[1] == expected and "x0" in text.get_text()
        plt.close(ax.figure)


def test_a_branch_ends_behind_the_title_of_its_gate() -> None:
    x, y = problems.two_planes(0)
    ax = plot_tree(HierarchicalMixtureRegressor(max_iter=2).fit(x, y))
    for gate in ax.child_axes:
        box = gate.title.get_bbox_patch()
        assert box is not None and box.get_facecolor() == (1.0, 1.0, 1.0, 1.0)
        assert all(branch.zorder < gate.zorder for branch in ax.lines)
    plt.close(ax.figure)


@pytest.mark.parametrize("branching", [(), (2, 0), (1.5,), "two", ((2, 2),)])
def test_a_bad_branching_is_a_value_error(branching: Any) -> None:
    x, y = problems.two_planes(0)
    with pytest.raises(ValueError, match="branching"):
        HierarchicalMixtureRegressor(branching).fit(x, y)


def test_every_expert_of_a_grown_tree_has_its_noise() -> None:
    x, y = problems.two_planes(0, rows=60)
    grown = HierarchicalMixtureRegressor((2,), experts=["linear", "student_t"], growth=3).fit(x, y)
    assert len(grown.expert_std_) == len(grown.experts_) == 3
