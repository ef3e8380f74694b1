"""What differs between regression and classification: the targets, and the form of predictions."""

import warnings
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float
from sklearn.base import ClassifierMixin, RegressorMixin, _fit_context
from sklearn.utils import column_or_1d, get_tags
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import (
    _check_partial_fit_first_call,
    check_classification_targets,
)
from sklearn.utils.validation import check_is_fitted

from vmoe.classic.experts.make import follow
from vmoe.classic.online import can_learn
from vmoe.classic.predictive import PredictiveDistribution


class RegressionMethods(RegressorMixin):
    """Targets are numbers, with any number of outputs that the experts can have."""

    _y_checks: ClassVar[dict[str, Any]] = {"multi_output": True, "y_numeric": True}

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        follow(self.experts, tags)
        return tags

    def _encode(self, y: np.ndarray, classes: None) -> Float[np.ndarray, "n q"]:
        if y.ndim == 2 and y.shape[1] == 1 and not get_tags(self).target_tags.multi_output:
            y = column_or_1d(y, warn=True)
        self._single = y.ndim == 1
        return self._codes(y)

    def _codes(self, y: np.ndarray) -> Float[np.ndarray, "n q"]:
        y = y.astype(np.float64)
        return y[:, None] if y.ndim == 1 else y

    def predict(self, X: Any) -> np.ndarray:
        """The mean (n,), or (n, q) if y was a matrix, as ``combine`` says."""
        return self._decide(self._combined(X))

    @available_if(can_learn)
    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        """On-line EM: the first batch is fitted as a whole, later ones move the mixture once.

        The first batch should have many more rows than the experts together have coefficients for
        an output: later ones hardly mend what it gets wrong.

        Only estimators with linear experts have this method. ``n_iter_``, ``history_``,
        ``lower_bound_`` and ``converged_`` describe the first batch, or the last ``fit``, whose
        least variance holds for later batches too; these follow changed penalties and ``decay``.

        Raises:
            ValueError: the settings of a later batch need other experts, gates or columns, or the
                last fit had groups.
        """
        for problem in self._learn(X, y, sample_weight):
            warnings.warn(problem, stacklevel=3)
        return self

    @property
    def expert_std_(self) -> list[Any]:
        """The standard deviation of each expert's noise, or the scale of Student t experts.

        An entry is one number, or (q,) for several outputs; for Poisson experts, it is None.
        """
        check_is_fitted(self)
        experts = self._mixture.experts
        return [experts.std_of(e) for e in range(experts.sizes.n_experts)]

    def predict_dist(self, X: Any) -> PredictiveDistribution:
        """The distribution of y for every row, as moments, density, quantiles and samples.

        It is the distribution of the whole mixture, whatever ``combine`` is. Its noise is that of
        ``expert_std_``, to which ``expert_penalty`` and ``variance_floor`` add (`FittedExpert`).
        """
        rows = self._rows(X)
        parts = self._mixture.experts.distributions(rows)
        discrete = self._mixture.experts.counts
        log_prior = self._mixture.tree.log_prior(rows)
        return PredictiveDistribution(log_prior, parts, self._single, discrete)

    def _draw(self, X: Any, n_samples: int, random: np.random.RandomState) -> np.ndarray:
        """Targets drawn from the whole mixture: (n_samples, n) or (n_samples, n, q)."""
        return self.predict_dist(X).sample(n_samples, random)

    def _decide(self, means: Float[np.ndarray, "n q"]) -> np.ndarray:
        """Means in the form of y."""
        return means[:, 0] if self._single else means


class ClassificationMethods(ClassifierMixin):
    """Targets are classes."""

    _y_checks: ClassVar[dict[str, Any]] = {}

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        follow(self.experts, tags)
        return tags

    def _encode(self, y: np.ndarray, classes: Any) -> np.ndarray:
        check_classification_targets(y)
        self.classes_ = np.unique(y if classes is None else classes)
        return self._codes(y)

    def _codes(self, y: np.ndarray) -> np.ndarray:
        unknown = np.setdiff1d(y, self.classes_)
        if len(unknown):
            raise ValueError(f"y contains previously unseen classes: {unknown.tolist()}")
        return np.searchsorted(self.classes_, y)

    @available_if(can_learn)
    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> Any:
        """On-line EM: the first batch is fitted as a whole, later ones move the mixture once.

        The first batch should have many more rows than the experts together have coefficients for
        a class: later ones hardly mend what it gets wrong.

        Only estimators with logistic experts have this method. ``n_iter_``, ``history_``,
        ``lower_bound_`` and ``converged_`` describe the first batch, or the last ``fit``. Later
        batches follow changed penalties and ``decay``.

        Args:
            classes: all classes; needed for the first batch alone, if it lacks one. Such a class
                counts as one row there, spread over all rows, and batches then take some Newton
                steps rather than one.

        Raises:
            ValueError: a later batch comes with other classes, its settings need other experts,
                gates or columns, or the last fit had groups.
        """
        if hasattr(self, "_mixture") and classes is not None:
            _check_partial_fit_first_call(self, classes)
        for problem in self._learn(X, y, sample_weight, classes):
            warnings.warn(problem, stacklevel=3)
        return self

    def predict_proba(self, X: Any) -> Float[np.ndarray, "n q"]:
        """The probabilities of the classes, in the order of ``classes_``, as ``combine`` says."""
        return self._combined(X)

    def predict_log_proba(self, X: Any) -> Float[np.ndarray, "n q"]:
        """The logarithm of ``predict_proba``, finite also where that rounds to 0 or 1."""
        rows = self._rows(X)
        self._validate_params()  # combine may have changed since the fit
        return self._mixture.log_combined(rows, self.combine)

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class of each row."""
        return self._decide(self.predict_proba(X))

    def _draw(self, X: Any, n_samples: int, random: np.random.RandomState) -> np.ndarray:
        """Classes drawn from the whole mixture: (n_samples, n)."""
        reached = self._mixture.combined(self._rows(X), "weighted").cumsum(axis=1)[:, :-1]
        drawn = random.random_sample((n_samples, len(reached), 1)) > reached
        return self.classes_[drawn.sum(axis=2)]

    def _decide(self, probabilities: Float[np.ndarray, "n q"]) -> np.ndarray:
        """The most probable classes."""
        return self.classes_[probabilities.argmax(axis=1)]
