"""Experts by name, by example, or as a list that mixes kinds."""

import copy
from typing import Any

from sklearn.base import BaseEstimator, is_classifier, is_regressor

from vmoe.classic.experts.estimators import Estimators
from vmoe.classic.experts.interface import Experts, Sizes
from vmoe.classic.experts.linear import Linear
from vmoe.classic.experts.logistic import Logistic
from vmoe.classic.experts.mixed import Mixed
from vmoe.classic.experts.poisson import Poisson
from vmoe.classic.experts.student_t import StudentT

KINDS = {kind.name: kind for kind in (Linear, Poisson, StudentT, Logistic)}


def make_experts(wanted: Any, sizes: Sizes) -> Experts:
    """The experts that ``experts=`` asks for, before their first fit.

    Raises:
        ValueError: there is no such kind, it is for the other task, or a list has the wrong length.
    """
    classify = sizes.classes is not None
    if isinstance(wanted, list | tuple):
        if len(wanted) != sizes.n_experts:
            raise ValueError(f"experts has {len(wanted)} entries, expected {sizes.n_experts}")
        experts = Mixed([kind_of(one, classify) for one in wanted])
    else:
        experts = kind_of(wanted, classify)
    experts.allocate(sizes)
    return experts


def kind_of(wanted: Any, classify: bool) -> Experts:
    """The kind of experts that one entry of ``experts=`` names; None for the task's usual one.

    Raises:
        ValueError: there is no such kind, or it is for the other task.
    """
    if wanted is None:
        return Logistic() if classify else Linear()
    if isinstance(wanted, Experts):
        found = copy.copy(wanted)
    elif isinstance(wanted, BaseEstimator):
        if not (is_classifier(wanted) if classify else is_regressor(wanted)):
            raise ValueError(
                f"experts={wanted!r}: expected a {'classifier' if classify else 'regressor'}"
            )
        if classify and not hasattr(wanted, "predict_proba"):
            raise ValueError(f"experts={wanted!r}: expected a classifier with predict_proba")
        return Estimators(wanted)
    elif isinstance(wanted, str) and wanted in KINDS:
        found = KINDS[wanted]()
    else:
        names = sorted(name for name, kind in KINDS.items() if kind.classifies == classify)
        raise ValueError(f"experts={wanted!r}: expected one of {names} or an estimator")
    if found.classifies != classify:
        raise ValueError(f"experts={wanted!r}: these experts are for the other task")
    return found


def is_named(wanted: Any) -> bool:
    """Whether any of these experts reads standardized columns, which are dense."""
    each = wanted if isinstance(wanted, list | tuple) else [wanted]
    return not all(isinstance(one, BaseEstimator) for one in each)
