"""Flat mixtures of experts: one gate (Jacobs et al. 1991), fitted by EM (Jordan & Jacobs 1994)."""

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import numpy as np
from sklearn.utils._param_validation import StrOptions

from vmoe.classic.estimator import AT_LEAST_1, MixtureEstimator
from vmoe.classic.partition import FixedGate, PartitionGate
from vmoe.classic.tasks import ClassificationMethods, RegressionMethods
from vmoe.classic.tree import TreeGate, grow


@dataclass(eq=False, repr=False)
class FlatMixture(MixtureEstimator):
    """A mixture with one gate."""

    n_experts: int = 2
    _: KW_ONLY
    gate: Any = "softmax"

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **MixtureEstimator._parameter_constraints,
        "n_experts": [AT_LEAST_1],
        "gate": [StrOptions({"softmax"}), PartitionGate],
    }

    _size: ClassVar[str] = "n_experts"

    def _least_size(self) -> int:
        return 1

    def _n_leaves(self) -> int:
        if isinstance(self.n_experts, bool):  # which scikit-learn's check takes for an integer
            raise ValueError(f"n_experts={self.n_experts}: expected an integer")
        return self.n_experts

    def _tree(self, n_columns: int) -> TreeGate:
        tree = grow((self.n_experts,), n_columns)
        if isinstance(self.gate, PartitionGate):
            self.gate.check_experts(self.n_experts)
            return FixedGate(tree.children, tree.coef, partition=self.gate)
        return tree

    @property
    def gate_coef_(self) -> np.ndarray:
        """The gate's coefficients (e, p), intercept first; the first expert's are zero.

        Raises:
            AttributeError: the gate is a partition.
        """
        coefs = self._gate_coefs()
        if isinstance(self._mixture.tree, FixedGate):
            raise AttributeError(f"gate_coef_: {self._mixture.tree.partition!r} has none")
        return coefs[0]


class MixtureOfExpertsRegressor(RegressionMethods, FlatMixture):
    """A regression by experts among which a softmax gate chooses softly, fitted by EM.

    p(y | x) = sum_e softmax(V x)_e p_e(y | x) (Jacobs, Jordan, Nowlan & Hinton 1991, with the EM
    algorithm of Jordan & Jacobs 1994). Where the M-step is exact, which it is for named experts,
    the penalized log-likelihood never falls.

    Args:
        n_experts: number of experts.
        experts: "linear" (Gaussian noise, each with a variance of its own; the default), "poisson"
            (counts), "student_t" (robust; the degrees of freedom are estimated), `StudentT(df)`, a
            regressor of scikit-learn, or a list with an entry for each expert; Poisson experts are
            not mixed with others. A regressor gets Gaussian noise of its own; after the last step,
            its variance is that of rows which were left out of a fit, in five folds; a warning
            names an expert for which four folds are too few rows. If its ``fit``
            names ``sample_weight``, the responsibilities are these weights; a Gaussian process gets
            them as noise; any other regressor, such as a search, is fitted to rows that are drawn
            by them.
        gate_features: the columns that the gate sees: indices, names, a mask, or a function of X
            that returns these; None for all, [] for constant mixing proportions.
        expert_features: the columns that the experts see.
        exposure: the column of X with the exposure of each row, such as a time, an area or a
            population: a Poisson expert's mean is its rate times this number, in ``fit`` and in
            every prediction. It is what R gives as ``offset=log(exposure)``. Gate and experts do
            not see it, unless ``gate_features`` or ``expert_features`` name it.
        gate: "softmax", or a `PartitionGate` that sends rows to experts by a fixed rule.
        gate_penalty: strength of the L2 penalty on the gate's slopes for standardized columns,
            against a log-likelihood that is a sum over the weighted rows.
        expert_penalty: the same for named experts; for linear experts in units of the noise, like
            ``alpha`` of scikit-learn's Ridge.
        variance_floor: the least variance of an expert, as a fraction of the variance of y (of its
            squared mean, if y is constant). Less than 1e-20 is rounding, and counts as that.
        start: where EM starts. "principal" groups the rows along the first principal direction of
            the standardized (x, y), and a second time along the first principal direction of the
            residuals of a linear fit. It keeps the grouping with the larger likelihood after two
            steps. Neither the number nor the order of rows matters. "random" draws rows and
            assigns every row to the nearest one; "kmeans" groups by k-means. An array of
            responsibilities (n, e) starts with an M-step. A dictionary of parameters starts with
            an E-step: ``gate_coef`` (e, p), ``expert_coef`` (e, p) or (e, q, p), and, for linear
            and Student t experts, ``expert_std`` (e,) or (e, q); for the latter also ``expert_df``
            (e,), in [2.1, 200]; without it, degrees of freedom that are estimated start at 4.
        n_init: starts, of which the best result is kept; all but the first are random.
        tol: EM stops if the log-likelihood has less than this left to rise per row (the sum of the
            weights is the number of rows), by Aitken's extrapolation of the last two rises.
        max_iter: EM steps at most.
        combine: "weighted" by the gate, or "argmax" for the most probable expert alone.
        random_state: seed of random starts, and of rows drawn for estimators without weights.
        warm_start: whether another ``fit`` continues from the last one. With the same rows and
            penalties, ``history_`` continues, unless ``variance_floor`` was raised above the
            variance of an expert.
        decay: the factor by which the past counts less with every row of ``partial_fit``.

    Attributes:
        gate_coef_: the gate's coefficients (e, p) with the intercept first.
        experts_: for each expert, a `FittedExpert` with ``coef_`` and ``std_``, or the fitted
            estimator.
        n_iter_: the number of steps in ``history_``.
        converged_: whether ``tol`` was reached.
        history_: the penalized log-likelihood after each step, summed over the weighted rows.
        lower_bound_: its last value, a sum, whereas that of ``GaussianMixture`` is a mean per row.
            The noise of regressors is then changed, as said above.
        expert_std_: the standard deviation of each expert's noise, also of an estimator's.

    >>> x = np.linspace(-1, 1, 200)[:, None]
    >>> model = MixtureOfExpertsRegressor(2).fit(x, np.abs(x[:, 0]))
    >>> bool(model.score(x, np.abs(x[:, 0])) > 0.99)
    True
    """


class MixtureOfExpertsClassifier(ClassificationMethods, FlatMixture):
    """A classifier of experts among which a softmax gate chooses softly, fitted by EM.

    P(y | x) = sum_e softmax(V x)_e P_e(y | x); see `MixtureOfExpertsRegressor` for what the two
    share.

    Args:
        experts: "logistic" (multinomial with several classes; the default), a classifier of
            scikit-learn with ``predict_proba``, or a list with an entry for each expert. An expert
            whose rows have only one class is a ``DummyClassifier``.
        combine: "weighted", "argmax", or "vote": each expert votes for its most probable class,
            and the gate weighs the votes.

    Attributes:
        classes_: the classes, sorted.
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **FlatMixture._parameter_constraints,
        "combine": [StrOptions({"weighted", "argmax", "vote"})],
    }
