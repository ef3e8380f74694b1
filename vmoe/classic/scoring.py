"""A scorer by held-out log-likelihood, which sees what a mixture is for.

R^2 and accuracy only compare means and most probable classes. Where the target is one of several
values, the number of experts changes neither; the log-likelihood sees it (a proper scoring rule:
Gneiting & Raftery 2007).
"""

from functools import partial
from typing import Any

from sklearn.metrics._scorer import _BaseScorer
from sklearn.pipeline import Pipeline

from vmoe.classic.estimator import MixtureEstimator
from vmoe.classic.fitted import checked_weight


class LogLikelihoodScorer(_BaseScorer):
    """The mean log-likelihood of a row in nats, as ``scoring=`` of a search: more is better.

    It takes a fitted mixture, or a ``Pipeline`` or search that ends in one. ``sample_weight``
    weighs the mean; a search passes it after ``set_score_request(sample_weight=True)``, as to any
    scorer. A density has the unit 1 / y: compare scores of the same targets only.

    For mixtures with groups, scikit-learn's metadata routing has to be on, the mixture has
    ``set_fit_request(groups=True)``, and the scorer ``set_score_request(groups=True)``. Without
    routing, only the splitter of a search sees ``groups``: it then compares mixtures of rows.

    >>> import numpy as np
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

    def _score(self, _: Any, estimator: Any, X: Any, y: Any, **each: Any) -> float:
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
        return self._score_func(y, partial(estimator.log_likelihood, X), **each)


def _mean(y_true: Any, y_pred: Any, sample_weight: Any = None, groups: Any = None) -> float:
    """The mean of ``y_pred``, a log-likelihood of targets; scikit-learn reads these names."""
    total = checked_weight(sample_weight, y_true).sum()
    return y_pred(y_true, sample_weight, groups) / float(total)
