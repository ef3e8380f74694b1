"""Experts by name, by example, or as a list that mixes kinds."""

import copy
from typing import Any

from sklearn.base import BaseEstimator, is_classifier, is_regressor
from sklearn.utils import Tags, get_tags

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
        ValueError: there are no such experts, or a list has too few, too many, or some of counts
            beside others. A Gaussian at a common count would get any density.
    """
    classify = sizes.classes is not None
    if isinstance(wanted, list | tuple):
        if len(wanted) != sizes.n_experts:
            raise ValueError(f"experts has {len(wanted)} entries, expected {sizes.n_experts}")
        parts = [kind_of(one, classify) for one in wanted]
        if len({part.counts for part in parts}) > 1:
            raise ValueError(
                f"experts={wanted!r}: the probability of a count and a density cannot be compared: "
                "take 'poisson' for all experts or for none"
            )
        experts = Mixed(parts)
    else:
        experts = kind_of(wanted, classify)
    experts.allocate(sizes)
    return experts


def kind_of(wanted: Any, classify: bool) -> Experts:
    """The kind of experts that one entry of ``experts=`` names; None for the task's usual one."""
    if wanted is None:
        return Logistic() if classify else Linear()
    if isinstance(wanted, Experts):
        found = copy.copy(wanted)
    elif is_estimator(wanted):
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


def follow(wanted: Any, tags: Tags) -> None:
    """Sets the tags of a mixture that depend on its experts: what they refuse, it refuses.

    Args:
        wanted: ``experts=``, also one that ``make_experts`` would refuse.
    """
    each = wanted if isinstance(wanted, list | tuple) else [wanted]
    own = [get_tags(one) for one in each if is_estimator(one)]
    kinds = [KINDS.get(one) if isinstance(one, str) else type(one) for one in each]
    inputs, targets = tags.input_tags, tags.target_tags
    inputs.sparse = all(tag.input_tags.sparse for tag in own)
    inputs.positive_only = any(tag.input_tags.positive_only for tag in own)
    targets.positive_only = Poisson in kinds or any(t.target_tags.positive_only for t in own)
    tags.non_deterministic = any(tag.non_deterministic for tag in own)
    if tags.regressor_tags:
        targets.multi_output = all(tag.target_tags.multi_output for tag in own)
        tags.regressor_tags.poor_score = any(
            tag.regressor_tags.poor_score for tag in own if tag.regressor_tags
        )
    if tags.classifier_tags:
        found = [tag.classifier_tags for tag in own if tag.classifier_tags]
        tags.classifier_tags.multi_class = all(tag.multi_class for tag in found)
        tags.classifier_tags.poor_score = any(tag.poor_score for tag in found)


def is_named(wanted: Any) -> bool:
    """Whether any of these experts reads standardized columns, which are dense."""
    each = wanted if isinstance(wanted, list | tuple) else [wanted]
    return not all(map(is_estimator, each))


def is_estimator(wanted: Any) -> bool:
    """Whether an entry of ``experts=`` is an estimator of scikit-learn, not a kind of this room."""
    return isinstance(wanted, BaseEstimator) and not isinstance(wanted, Experts)
