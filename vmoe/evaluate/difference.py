"""The difference of two evaluations of the same images."""

from typing import NamedTuple

import numpy as np

from vmoe.analysis.statistics import error_of_difference
from vmoe.errors import UsageError
from vmoe.evaluate.classification import Evaluation
from vmoe.nn.inputs import has_label


class Difference(NamedTuple):
    """How much more accurate one model is than another.

    Attributes:
        accuracy: of the first minus that of the second, in [-1, 1].
        standard_error: of the difference, over the images.
    """

    accuracy: float
    standard_error: float


def paired_difference(first: Evaluation, second: Evaluation) -> Difference:
    """The difference in accuracy of two models, or of two settings of one, on the same images.

    Images on which both are right, or both are wrong, do not count, so its standard error is
    smaller than that of two samples. Images without a label are left out. Of training it says
    nothing: another seed may differ more.

    Raises:
        UsageError: the evaluations are not of the same images.
    """
    if not np.array_equal(first.per_example.labels, second.per_example.labels):
        raise UsageError(
            f"evaluations of {first.data} ({first.images} images) and {second.data} "
            f"({second.images}): the labels differ, evaluate the same images"
        )
    labelled = has_label(np.asarray(first.per_example.labels))
    of_first, of_second = (
        np.asarray(each.per_example.correct, float)[labelled] for each in (first, second)
    )
    difference = float((of_first - of_second).mean())
    return Difference(difference, error_of_difference(of_first, of_second))
