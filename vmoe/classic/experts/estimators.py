"""Experts that are estimators of scikit-learn, fitted again in every M-step.

A regressor gets Gaussian noise of its own around its predictions. During EM its variance is that of
the residuals. A flexible model has small ones for the rows that it has seen, so after the last step
the variance is that of rows which were left out: every expert is fitted once more to all folds but
one, for each of five folds. Where this fails, as for more neighbours than four folds have rows, the
variance stays that of the residuals, with a warning.

The M-step is not exact, so the log-likelihood may fall. It is a weighted fit, also of an estimator
that takes no weights:

- Estimators whose fit names ``sample_weight``, and pipelines that end in one, get the weights.
- A Gaussian process gets them as noise, alpha / weight, which is exact for a fixed kernel.
- Others are fitted to rows that are drawn in proportion to the weights. So are searches and others
  whose fit passes on any parameter, and Gaussian processes in a pipeline.
"""

import zlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy import stats
from scipy.sparse import csr_array
from sklearn.base import BaseEstimator, clone, is_classifier
from sklearn.dummy import DummyClassifier
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import has_fit_parameter

from vmoe.classic.design import Design
from vmoe.classic.experts.interface import DEAD, Experts, Sizes, alive, one_if_single
from vmoe.classic.experts.linear import squared_noise, std_from
from vmoe.classic.rows import Rows

LEAST = np.finfo(float).eps  # the least probability of a class, since trees predict zeros
FOLDS = 5  # parts of the rows; each is left out once


class Estimators(Experts):
    """Clones of one estimator, one per expert."""

    learned = ("models", "seen_std")

    def __init__(self, estimator: BaseEstimator):
        self.estimator = estimator

    def allocate(self, sizes: Sizes) -> None:
        super().allocate(sizes)
        self.new = [seeded(self.estimator, sizes.random) for _ in range(sizes.n_experts)]
        self.models = list(self.new)
        self.std = np.ones((sizes.n_experts, sizes.n_outputs))
        self._predicted: tuple[Rows, np.ndarray] | None = None  # for the E-step after an M-step

    def update(self, rows: Rows, mass: Float[np.ndarray, "n e"]) -> None:
        for e in np.flatnonzero(alive(mass)):
            self.models[e] = self._fitted(self.new[e], rows, mass[:, e])
        if self.sizes.classes is None:
            means = self.means(rows)
            self._update_std(rows, mass, means)
            self._predicted = rows, means

    def finish(self, rows: Rows, mass: Float[np.ndarray, "n e"]) -> dict[int, str]:
        self.seen_std = self.std.copy()  # with which EM can go on
        if self.sizes.classes is not None:
            return {}
        means, folds, problems = self.means(rows), folds_of(rows), {}
        for e in np.flatnonzero(alive(mass)).tolist():
            unseen = means[:, e].copy()
            try:
                for out in (folds == fold for fold in np.unique(folds[folds >= 0])):
                    seen = mass[:, e] * ~out
                    if seen.sum() > DEAD * mass[:, e].sum():  # otherwise nothing is left to learn
                        model = self._fitted(self.new[e], rows, seen)
                        unseen[out] = self._mean(model, rows.expert_given[out])
            except Exception as error:  # anyone's estimator, which could be fitted to all rows
                problems[e] = (
                    f"{self.new[e]!r} has the noise of rows that it has seen, which is too small "
                    "for a flexible model, as it could not be fitted to four fifths of the rows, "
                    f"or predict the others: {error}"
                )
            else:
                means[:, e] = unseen
        self._update_std(rows, mass, means)
        return problems

    def resume(self, other: Experts) -> None:
        super().resume(other)
        self.std = self.seen_std.copy()

    def _fitted(self, new: Any, rows: Rows, mass: Float[np.ndarray, "n"]) -> Any:
        """A clone of an expert, fitted to the rows that have a mass."""
        y = rows.y if self.sizes.classes is None else self.sizes.classes[rows.y]
        y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
        return fit_weighted(clone(new), rows.expert_given, y, mass, self.sizes.random)

    def _update_std(self, rows: Rows, mass: np.ndarray, means: np.ndarray) -> None:
        keep = alive(mass)
        squares = squared_noise(mass, rows.y[:, None] - means)
        self.std[keep] = std_from(squares[keep], mass.sum(axis=0)[keep], self.sizes.floor)

    def log_density(self, rows: Rows) -> Float[np.ndarray, "n e"]:
        last, self._predicted = self._predicted, None
        means = last[1] if last and last[0] is rows else self.means(rows)
        if self.sizes.classes is not None:
            return np.log(np.maximum(means[np.arange(len(rows)), :, rows.y], LEAST))
        return stats.norm.logpdf(rows.y[:, None], means, self.std).sum(axis=-1)

    def means(self, rows: Rows) -> Float[np.ndarray, "n e q"]:
        return np.stack([self._mean(model, rows.expert_given) for model in self.models], axis=1)

    def _mean(self, model: Any, x: Any) -> Float[np.ndarray, "n q"]:
        if self.sizes.classes is None:
            return np.asarray(model.predict(x), float).reshape(x.shape[0], -1)
        result = np.zeros((x.shape[0], self.sizes.n_outputs))
        known = np.searchsorted(self.sizes.classes, model.classes_)
        result[:, known] = model.predict_proba(x)
        return result

    def variances(self) -> Float[np.ndarray, "e q"]:
        return self.std**2

    def penalty(self) -> float:
        return 0.0

    def n_parameters(self) -> int:
        raise ValueError("aic, bic and icl need experts whose parameters can be counted")

    def distributions(self, rows: Rows) -> list[tuple[np.ndarray, Any]]:
        return [(np.arange(len(self.models)), stats.norm(self.means(rows), self.std))]

    def types(self) -> list[type]:
        return [type(self.estimator)]

    def keep(self, experts: list[int]) -> None:
        super().keep(experts)
        self.new = [self.new[e] for e in experts]
        self.models = [self.models[e] for e in experts]
        self.std = self.std[experts]

    def std_of(self, expert: int) -> Any:
        return one_if_single(self.std[expert])

    def fitted(self, design: Design | None) -> list[Any]:
        return list(self.models)


def folds_of(rows: Rows) -> Int[np.ndarray, "n"]:
    """A fold of each row, by chance; equal rows share one, whatever their number, order and form.

    The rows of a group share one, too. Rows of weight 0, which do not exist, have -1.
    """
    some = rows.weight > 0
    if rows.groups is None:
        y = np.ascontiguousarray(rows.y[some] + 0.0)  # of which -0.0 is 0.0
        contents = zip(_contents(rows.expert_given[some]), y, strict=True)
        keys = [x + target.tobytes() for x, target in contents]
    else:
        _, groups = np.unique(rows.groups[some], return_inverse=True)
        keys = [group.tobytes() for group in groups]
    shuffled = sorted(set(keys), key=lambda key: (zlib.crc32(key), key))
    fold = {key: i % FOLDS for i, key in enumerate(shuffled)}
    found = np.full(len(some), -1)
    found[some] = [fold[key] for key in keys]
    return found


def _contents(x: Any) -> Iterator[bytes]:
    """What each row has beside zeros, the same for an array as for a sparse matrix."""
    x = csr_array(x, copy=True)
    x.sum_duplicates()
    x.eliminate_zeros()
    columns = x.indices.astype(np.int64)
    return (columns[a:b].tobytes() + x.data[a:b].tobytes() for a, b in pairwise(x.indptr))


def seeded(estimator: BaseEstimator, random: np.random.RandomState) -> Any:
    """A clone with a seed for every ``random_state`` that is None, as in ensembles."""
    model = clone(estimator)
    names = [
        name
        for name, value in sorted(model.get_params().items())
        if value is None and name.rpartition("__")[2] == "random_state"
    ]
    return model.set_params(**{name: random.randint(2**31 - 1) for name in names})


def fit_weighted(
    model: Any,
    x: Any,
    y: np.ndarray,
    weights: Float[np.ndarray, "n"],
    random: np.random.RandomState,
) -> Any:
    """The model, fitted to weighted rows; a constant one if they have only one class.

    Args:
        model: an estimator that is not fitted.
        x: columns, an array or a sparse matrix.
        y: targets, or classes.
        weights: not negative.
        random: draws the rows of models without weights.
    """
    some = weights > DEAD * weights.max()  # the others, such as rows of weight 0, do not exist
    x, y, weights = x[some], y[some], weights[some]
    parameters = {}
    if has_fit_parameter(model, "sample_weight"):
        parameters["sample_weight"] = weights
    elif isinstance(model, Pipeline) and has_fit_parameter(model[-1], "sample_weight"):
        parameters[f"{model.steps[-1][0]}__sample_weight"] = weights
    elif isinstance(model, GaussianProcessRegressor):
        noise = np.broadcast_to(model.alpha, len(some))[some] / weights
        model = clone(model).set_params(alpha=noise)
    else:
        drawn = random.choice(len(weights), size=len(weights), p=weights / weights.sum())
        x, y = x[drawn], y[drawn]
    if is_classifier(model) and np.all(y == y[0]):
        return DummyClassifier().fit(x, y)  # many classifiers refuse a single class
    try:
        return model.fit(x, y, **parameters)
    except ValueError as error:
        raise ValueError(f"experts={model!r}: {error}") from error
