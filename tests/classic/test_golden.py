"""Mixtures by EM equal R's flexmix and mixtools, step by step, from the same starts."""

from typing import Any

import numpy as np
import pytest

from tests.classic.golden import FOLDER, Golden, flexmix


def assert_close(found: Any, stored: Any, tolerance: float) -> None:
    """Differences are relative to max(1, |stored|)."""
    stored = np.asarray(stored)
    assert np.shape(found) == stored.shape
    difference = np.abs(found - stored) / np.maximum(1, np.abs(stored))
    assert difference.max() <= tolerance


def assert_state(model: Any, stored: Golden, step: str, tolerance: float) -> None:
    """Every stored number of this step."""
    x, y = stored.columns(), stored["y"]
    assert_close(model.lower_bound_, stored[f"{step}/loglik"], tolerance)
    assert_close(model.responsibilities(x, y), stored[f"{step}/posterior"], tolerance)
    coef = np.stack([expert.coef_ for expert in model.experts_])
    expected = stored[f"{step}/expert_coef"]
    assert_close(coef - coef[:, :1] if coef.ndim == 3 else coef, expected, tolerance)
    if f"{step}/gate_coef" in stored.arrays:
        assert_close(model.gate_coef_, stored[f"{step}/gate_coef"], tolerance)
    if f"{step}/gate_prob" in stored.arrays:
        assert_close(model.gate_proba(x), stored[f"{step}/gate_prob"], tolerance)
    if f"{step}/mixing" in stored.arrays:
        assert_close(model.gate_proba(x)[0], stored[f"{step}/mixing"], tolerance)
    if f"{step}/expert_sigma" in stored.arrays:
        std = np.array([expert.std_ for expert in model.experts_])
        assert_close(std, stored[f"{step}/expert_sigma"], tolerance)


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("stored", flexmix())
def test_the_first_steps_equal_flexmix(stored: Golden, steps: int) -> None:
    model = stored.fit(steps, stored["start/posterior"])
    assert_state(model, stored, f"step{steps}", 1e-9)


@pytest.mark.parametrize("stored", flexmix())
def test_after_as_many_steps_results_and_predictions_equal_flexmix(stored: Golden) -> None:
    model = stored.fit(int(stored["final/n_iter"]), stored["start/posterior"])
    assert_state(model, stored, "final", 1e-8)
    data = stored.columns(), stored["y"], stored.arrays.get("weights")
    assert model._mixture.n_parameters() == stored["final/df"]
    for criterion in ("aic", "bic", "icl"):
        assert_close(getattr(model, criterion)(*data), stored[f"final/{criterion}"], 1e-8)
    if stored.meta["converged"]:  # otherwise flexmix predicts with one more fit of the gate
        assert_predictions(model, stored)


def assert_predictions(model: Any, stored: Golden) -> None:
    """Predictions for new rows."""
    x = stored.columns("_new")
    assert_close(model.gate_proba(x), stored["final/gate_prob_new"], 1e-8)
    expected = stored["final/predict_new"]
    if not stored.classifies:
        assert_close(model.predict(x), expected, 1e-8)
    else:
        found = model.predict_proba(x)
        assert_close(found if expected.ndim == 2 else found[:, 1], expected, 1e-8)


def parameters(stored: Golden) -> dict[str, Any]:
    gate = stored["start/gate_coef"] if "start/gate_coef" in stored.arrays else None
    if gate is None:
        mixing = np.log(stored["start/mixing"])
        gate = (mixing - mixing[0])[:, None]
    return {
        "gate_coef": gate,
        "expert_coef": stored["start/expert_coef"],
        "expert_std": stored["start/expert_sigma"],
    }


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("name", ["mixtools_regmix_simulated_k2", "mixtools_hme_simulated"])
def test_the_first_steps_from_parameters_equal_mixtools(name: str, steps: int) -> None:
    stored = Golden(FOLDER / f"{name}.npz")
    assert_state(stored.fit(steps, parameters(stored)), stored, f"step{steps}", 1e-9)


@pytest.mark.parametrize(
    "name, tolerance", [("mixtools_regmix_simulated_k2", 2e-6), ("mixtools_hme_simulated", 3e-5)]
)
def test_the_limit_equals_mixtools(name: str, tolerance: float) -> None:
    stored = Golden(FOLDER / f"{name}.npz")
    model = stored.fit(100, parameters(stored))
    assert_state(model, stored, "final", tolerance)
    assert_close(model.lower_bound_, stored["final/loglik"], 1e-9)
