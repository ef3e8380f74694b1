"""The soft tree and other classifiers on the same data: 5x2 cross-validation.

In each of five repetitions the rows are halved at random, and each half is the test set once; the
vowels are halved by speaker. Settings are chosen within the training half, whose folds part no
speaker either. The first of these ten splits is also McNemar's test set.

Dietterich (Neural Computation 10, 1998) compares five tests of whether one classifier errs less
than another on data of the same kind. These are two of them, the first as Alpaydin combined it
(Neural Computation 11, 1999).
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binomtest, f
from sklearn.base import BaseEstimator
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier

from scripts.experiments.mixtures.data import read_vowels
from scripts.experiments.mixtures.quiet import fit_quietly
from vmoe.classic import HierarchicalMixtureClassifier

REPETITIONS, FOLDS = 5, 2
SKLEARN = {"breast_cancer": load_breast_cancer, "wine": load_wine, "digits": load_digits}
LABELS = {
    "breast_cancer": "breast cancer, 569 rows, 2 classes",
    "wine": "wine, 178 rows, 3 classes",
    "digits": "digits, 1,797 rows, 10 classes",
    "vowels": "vowels, 1,520 rows, 10 classes",
}
MODELS = {
    "soft": "soft tree",
    "logistic": "logistic regression",
    "cart": "CART",
    "forest": "random forest",
    "boosting": "boosting",
}


class Rows(NamedTuple):
    """Inputs (n, d), classes (n,), and the groups (n,) that no split parts."""

    x: np.ndarray
    y: np.ndarray
    groups: np.ndarray


def rows_of(name: str, folder: Path, limit: int | None) -> Rows:
    """A data set.

    Args:
        name: a key of ``LABELS``.
        limit: uses only so many groups.
    """
    if name == "vowels":
        table = read_vowels(folder)
        rows = Rows(table.formants, np.unique(table.vowels, return_inverse=True)[1], table.speakers)
    else:
        x, y = SKLEARN[name](return_X_y=True)
        rows = Rows(x, y, np.arange(len(y)))
    kept = np.isin(
        rows.groups, np.random.default_rng(0).permutation(np.unique(rows.groups))[:limit]
    )
    return Rows(*(each[kept] for each in rows))


def make(name: str, seed: int, size: dict[str, Any]) -> BaseEstimator:
    """A classifier that chooses its settings within the rows of its fit.

    Args:
        name: a key of ``MODELS``.
        size: "branchings" of the soft tree that are tried and its "steps" of EM, "trees" of the
            forest, "rounds" of boosting, and "folds" that choose settings; with 0, the first ones
            of a grid are taken.
    """
    models: dict[str, tuple[Any, dict[str, Any]]] = {
        "soft": (
            HierarchicalMixtureClassifier(max_iter=size["steps"], random_state=seed),
            {"branching": size["branchings"], "expert_penalty": [1.0, 10.0]},
        ),
        "logistic": (LogisticRegression(max_iter=5_000), {"C": [1.0, 0.1, 100.0]}),
        "cart": (
            DecisionTreeClassifier(random_state=seed),
            {"ccp_alpha": [0.003, 0.0, 0.001, 0.01]},
        ),
        "forest": (
            RandomForestClassifier(size["trees"], random_state=seed),
            {"max_features": ["sqrt", 0.5]},
        ),
        "boosting": (
            HistGradientBoostingClassifier(max_iter=size["rounds"], random_state=seed),
            {"learning_rate": [0.2, 0.05]},
        ),
    }
    return chosen(*models[name], size["folds"])


def chosen(model: Any, grid: dict[str, Any], folds: int) -> BaseEstimator:
    """A model behind inputs of mean 0 and variance 1, with the best settings of a grid."""
    pipeline = make_pipeline(StandardScaler(), model)
    step = pipeline.steps[-1][0]
    settings = {f"{step}__{name}": values for name, values in grid.items()}
    if not folds:
        return pipeline.set_params(**{name: values[0] for name, values in settings.items()})
    return GridSearchCV(pipeline, settings, cv=StratifiedGroupKFold(folds), error_score="raise")


def measure(name: str, folder: Path, limit: int | None, size: dict[str, Any]) -> dict[str, Any]:
    """The errors of all models in the ten splits of a data set, and the tests.

    Args:
        name: a key of ``LABELS``.
        limit: uses only so many rows, or speakers.
        size: as for ``make``.

    Returns:
        "errors" (5, 2) by model; for each model but the soft tree, "f" and its "p" from the
        combined F test, and McNemar's "p" with the rows that one model alone predicts correctly.
    """
    rows = rows_of(name, folder, limit)
    right: dict[str, list[np.ndarray]] = {model: [] for model in MODELS}
    for repetition in range(REPETITIONS):
        for train, test in halves(rows, repetition):
            groups = {"groups": rows.groups[train]} if size["folds"] else {}
            for model, own in right.items():
                fitted = make(model, repetition, size)
                fit_quietly(fitted, rows.x[train], rows.y[train], **groups)
                own.append(fitted.predict(rows.x[test]) == rows.y[test])
    errors = {model: errors_of(own) for model, own in right.items()}
    return {
        "errors": {model: own.tolist() for model, own in errors.items()},
        "tests": {
            model: tests(errors["soft"] - errors[model], right["soft"][0], right[model][0])
            for model in MODELS
            if model != "soft"
        },
    }


def halves(rows: Rows, repetition: int) -> Any:
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=repetition)
    return folds.split(rows.x, rows.y, rows.groups)


def errors_of(right: list[np.ndarray]) -> np.ndarray:
    """The errors in percent, (5, 2)."""
    return 100 - 100 * np.array([own.mean() for own in right]).reshape(REPETITIONS, FOLDS)


def tests(differences: np.ndarray, soft: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    statistic, p = combined_f(differences)
    alone = [int((soft & ~other).sum()), int((other & ~soft).sum())]
    return {"f": statistic, "p": p, "mcnemar": mcnemar(*alone), "alone": alone}


def combined_f(differences: np.ndarray) -> tuple[float, float]:
    """The combined 5x2cv F test.

    Args:
        differences: the error of one model minus that of another, (5, 2): in each of five
            repetitions the rows are halved at random, and each half is the test set once.

    Returns:
        The statistic, about F(10, 5) if the models err equally, and its p-value. If nothing varies,
        the p-value is 1 without a difference, and otherwise 0.
    """
    variances = ((differences - differences.mean(1, keepdims=True)) ** 2).sum(1)
    squares = (differences**2).sum()
    if not squares:
        return 0.0, 1.0
    with np.errstate(divide="ignore"):
        statistic = squares / (2 * variances.sum())
    return float(statistic), float(f.sf(statistic, REPETITIONS * FOLDS, REPETITIONS))


def mcnemar(first_alone: int, second_alone: int) -> float:
    """McNemar's exact test on one test set.

    Args:
        first_alone: rows that the first model alone predicts correctly.
        second_alone: rows that the second model alone predicts correctly.

    Returns:
        The p-value: how likely fair coins would split these rows at least as unevenly.
    """
    discordant = first_alone + second_alone
    return float(binomtest(first_alone, discordant).pvalue) if discordant else 1.0
