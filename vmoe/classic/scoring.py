"""A scorer by held-out log-likelihood, which sees what a mixture is for.

R^2 and accuracy only compare means and most probable classes. Where the target is one of several
values, the number of experts changes neither; the log-likelihood sees it (a proper scoring rule:
Gneiting & Raftery 2007).
"""

from typing import Any

import numpy as np
from sklearn.metrics._scorer import _BaseScorer
from sklearn.pipeline import Pipeline

from vmoe.classic.estimator import MixtureEstimator


class LogLikelihoodScorer(_BaseScorer):
    """The mean of ``log_density`` over the rows, as ``scoring=`` of a search: more is better.

    It takes a fitted mixture, or a ``Pipeline`` or search that ends in one. ``sample_weight``
    weighs the mean; a search passes it after ``set_score_request(sample_weight=True)``, as to any
    scorer.
    A density has the unit 1 / y: compare scores of the same targets only.

    >>> from sklearn.model_selection import GridSearchCV
    >>> from vmoe.classic import MixtureOfExpertsRegressor
    >>> x = np.linspace(-1, 1, 200)[:, None]
    >>> search = GridSearchCV(
    ...     MixtureOfExpertsRegressor(), {"n_experts": [1, 2]}, scoring=LogLikelihoodScorer()
    ... )
    >>> search.fit(x, np.sin(99 * x[:, 0]) + 9 * (-1) ** np.arange(200)).best_params_
    {'n_experts': 2}
    """

    def __init__(self) -> None:
        super().__init__(_mean, 1, {})

    def __repr__(self) -> str:
        return "LogLikelihoodScorer()"

    def _score(self, _: Any, estimator: Any, X: Any, y: Any, **weight: Any) -> float:
        """The score; scikit-learn calls this with its cache of predictions, which has no y."""
        while not isinstance(estimator, MixtureEstimator):
            if isinstance(estimator, Pipeline):
                X = estimator[:-1].transform(X) if len(estimator) > 1 else X
                estimator = estimator[-1]
            elif hasattr(estimator, "best_estimator_"):  # of a fitted search
                estimator = estimator.best_estimator_
            else:
                break
        if not isinstance(estimator, MixtureEstimator):
            raise ValueError(
                f"estimator={estimator!r}: LogLikelihoodScorer needs a mixture of vmoe.classic, or "
                "a Pipeline or search that ends in one"
            )
        return self._score_func(y, estimator.log_density(X, y), **weight)


def _mean(y_true: Any, y_pred: np.ndarray, sample_weight: Any = None) -> float:
    """The mean of the log densities ``y_pred``; scikit-learn reads the argument's names."""
    return float(np.average(y_pred, weights=sample_weight))
