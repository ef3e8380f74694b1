"""A weighted fit of an estimator, also of one that takes no weights.

- Estimators whose fit names ``sample_weight``, and pipelines that end in one, get the weights.
- A Gaussian process gets them as noise, alpha / weight, which is exact for a fixed kernel.
- Others are fitted to rows that are drawn in proportion to the weights. So are searches and others
  whose fit passes on any parameter, and Gaussian processes in a pipeline.
"""

from typing import Any

import numpy as np
from jaxtyping import Float
from sklearn.base import clone, is_classifier
from sklearn.dummy import DummyClassifier
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
    """The model, fitted to weighted rows; a constant one if they have only one class.

    Args:
        model: an estimator that is not fitted.
        x: columns, an array or a sparse matrix.
        y: targets, or classes.
        weights: not negative.
        random: draws the rows of models without weights.

    Raises:
        ValueError: the model cannot be fitted to these rows.
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
