"""The parametric bootstrap: how estimates spread if the fitted mixture had made the targets."""

import copy
import warnings
from numbers import Integral
from typing import Any

import numpy as np
from sklearn.utils import check_random_state

from vmoe.classic.covariance import covariance
from vmoe.classic.summary import Summary, named_estimates


def bootstrap(model: Any, X: Any, n_refits: Any, random_state: Any) -> Summary:
    """Draws targets from a fitted estimator and refits it to them, from the fit itself.

    So the experts keep their places: no refit exchanges them, unless they hardly differ.

    Args:
        model: an estimator of `vmoe.classic`, which is not changed.
    """
    if not (isinstance(n_refits, Integral) and int(n_refits) >= 2):
        raise ValueError(f"n_refits={n_refits!r}: should be an integer of at least 2")
    names, estimates, is_positive = named_estimates(model._mixture, model._view, model._names())
    refits, unknown, last = [], np.zeros(len(names)), None
    for y in model._draw(X, int(n_refits), check_random_state(random_state)):
        refit = copy.copy(model).set_params(warm_start=True)
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            try:
                refit.fit(X, y)
            except (ValueError, np.linalg.LinAlgError) as error:
                last = error
                continue
        if not refit.converged_:
            continue
        refits.append(named_estimates(refit._mixture, refit._view, refit._names())[1])
        errors = np.diag(covariance(refit._mixture, refit._labeled_rows(X, y)).matrix)
        unknown += np.isnan(errors)
    notes = []
    if failed := int(n_refits) - len(refits):
        notes.append(
            f"{failed} of {n_refits} refits failed or did not converge, and are left out: a larger "
            "max_iter may help"
        )
    if len(refits) < 2:
        raise ValueError(f"bootstrap: {notes[0]}; the last error: {last}") from last
    kept = unknown <= len(refits) / 2  # the others stay where they start, and spread for no reason
    if not kept.all():
        notes.append(
            f"{np.sum(~kept)} parameters have no standard error: most refits do not determine "
            "them, or have them at a bound; summary says more"
        )
    found = np.where(kept, refits, np.nan)
    spread = np.atleast_2d(np.cov(found, rowvar=False))
    return Summary(names, estimates, is_positive, spread, notes, found)
