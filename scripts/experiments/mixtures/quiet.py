"""Fits whose number of steps is a setting, so that an end before convergence is no news."""

import warnings
from typing import Any

from sklearn.exceptions import ConvergenceWarning


def fit_quietly(model: Any, *arguments: Any, **options: Any) -> Any:
    """The result of ``model.fit``, without scikit-learn's warning that it has not converged."""
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        return model.fit(*arguments, **options)
