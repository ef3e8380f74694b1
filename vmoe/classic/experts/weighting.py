"""A weighted fit of an estimator, also of one that takes no weights.

- Estimators whose fit has ``sample_weight``, and pipelines that end in one, get the weights.
- A Gaussian process gets them as noise, alpha / weight, which is exact for a fixed kernel.
- Others are fitted to rows that are drawn in proportion to the weights.
"""

from typing import Any

import numpy as np
from jaxtyping import Float
from sklearn.base import clone
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import has_fit_parameter

from vmoe.classic.experts.interface import DEAD


def fit_weighted(
    model: Any,
    x: Any,
    y: np.ndarray,
    weights: Float[np.ndarray, "n"],
    random: np.random.RandomState,
) -> Any:
    """The model, fitted to weighted rows.

    Args:
        model: an estimator that is not fitted.
        x: columns, an array or a sparse matrix.
        y: targets, or classes.
        weights: not negative.
        random: draws the rows of models without weights.
    """
    some = weights > DEAD * weights.max()  # the others, such as rows of weight 0, do not exist
    x, y, weights = x[some], y[some], weights[some]
    if has_fit_parameter(model, "sample_weight"):
        return model.fit(x, y, sample_weight=weights)
    if isinstance(model, Pipeline) and has_fit_parameter(model[-1], "sample_weight"):
        return model.fit(x, y, **{f"{model.steps[-1][0]}__sample_weight": weights})
    if isinstance(model, GaussianProcessRegressor):
        noise = np.broadcast_to(model.alpha, len(some))[some] / weights
        return clone(model).set_params(alpha=noise).fit(x, y)
    drawn = random.choice(len(weights), size=len(weights), p=weights / weights.sum())
    return model.fit(x[drawn], y[drawn])
