"""What all mixtures share as estimators of scikit-learn: their settings, and how they are fitted.

``fitted`` has what one asks of them afterwards.
"""

import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Int
from sklearn.base import _fit_context
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions

from vmoe.classic import em, online
from vmoe.classic.degenerate import degenerate_experts
from vmoe.classic.design import Design, moments, select_columns
from vmoe.classic.experts.interface import AT_FLOOR, Sizes, alive, in_shape
from vmoe.classic.experts.make import is_named, make_experts
from vmoe.classic.fitted import FittedMixture, checked_weight
from vmoe.classic.growth import split_worst
from vmoe.classic.mixture import Mixture
from vmoe.classic.partition import FixedGate
from vmoe.classic.rows import ColumnView, Rows, dense
from vmoe.classic.starts import GROUPINGS, first_largest, start_posteriors
from vmoe.classic.tree import TreeGate, breadth_first, leaves, origins

NEGLIGIBLE = 1e-12  # the least sum of the weights, in units of a penalty
NO_NOISE = 1e-20  # a variance below this part of y's is rounding, so it is the least floor
SAME = 1e-9  # the difference of two log-likelihoods of the same function, from rounding
TRIAL = 2  # steps after which starts are compared
AT_LEAST_0 = Interval(Real, 0, None, closed="left")
AT_LEAST_1 = Interval(Integral, 1, None, closed="left")


@dataclass(eq=False, repr=False)
class MixtureEstimator(FittedMixture):
    """A mixture of experts; see ``MixtureOfExpertsRegressor`` for parameters and attributes."""

    _: KW_ONLY
    experts: Any = None
    gate_features: Any = None
    expert_features: Any = None
    exposure: Any = None
    gate_penalty: float = 0.01
    expert_penalty: float = 0.01
    variance_floor: float = 1e-4
    start: Any = "principal"
    n_init: int = 1
    tol: float = 1e-5
    max_iter: int = 300
    combine: str = "weighted"
    random_state: Any = None
    warm_start: bool = False
    decay: float = 0.999

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "experts": "no_validation",  # make_experts
        "gate_features": "no_validation",  # select_columns
        "expert_features": "no_validation",
        "exposure": "no_validation",
        "gate_penalty": [AT_LEAST_0],
        "expert_penalty": [AT_LEAST_0],
        "variance_floor": [AT_LEAST_0],
        "start": [StrOptions(set(GROUPINGS)), "array-like", dict],
        "n_init": [AT_LEAST_1],
        "tol": [AT_LEAST_0],
        "max_iter": [AT_LEAST_1],
        "combine": [StrOptions({"weighted", "argmax"})],
        "random_state": ["random_state"],
        "warm_start": ["boolean"],
        "decay": [Interval(Real, 0, 1, closed="right")],
    }

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(
        self, X: Any, y: Any, sample_weight: Any = None, groups: Any = None
    ) -> "MixtureEstimator":
        """Fits the mixture.

        An error while fitting leaves an estimator that is not fitted; with ``warm_start``, it
        leaves the last fit.

        Args:
            X: rows of finite numbers (n, d), an array, DataFrame or sparse matrix; what the gates
                and the named experts see of a sparse matrix is made dense.
            y: targets (n,) or (n, q); for a classifier, classes (n,).
            sample_weight: weights (n,), not negative; an integer is the same as repeated rows, but
                there have to be as many rows as experts, whatever their weights. The sum of the
                weights is therefore the number of rows that the penalties compare with: weights
                that sum to 1 are like a single row. A mean of 1 keeps the number of rows. Repeated
                rows give another result with a start by "random" or "kmeans", with estimators that
                take no weights or count them otherwise themselves (``DecisionTreeClassifier``), and
                if classes can be separated without a penalty, so that there is no maximum.
            groups: the group of each row (n,), such as the person whose repeated measures they are;
                all rows of a group have the same expert (``| id`` in R's flexmix). The gates may
                then only see columns that are constant in every group. A group counts once for
                them, and a weight within its group alone: repeat groups instead. A search of
                scikit-learn passes groups here only with metadata routing (`LogLikelihoodScorer`).

        Raises:
            ValueError: an argument is wrong; or with ``warm_start``, what was fitted before has
                another number or kind of experts, other columns, outputs or classes.
        """
        self._random = check_random_state(self.random_state)
        if self.warm_start and hasattr(self, "_mixture"):
            rows = self._labeled_rows(X, y, sample_weight, groups)
            sizes = self._sizes(rows, len(leaves(self._mixture.tree)))
            mixture = self._continued(X, sizes)
            fits = [self._solved(mixture, rows, None, self._history_of(mixture, rows))]
        else:
            rows = self._training_rows(X, y, sample_weight, groups=groups)
            fits = self._fits(rows, self.start)
        fit = _best(fits)
        posterior, _ = fit.mixture.posterior(rows)
        unfinished = fit.mixture.experts.finish(rows, posterior * rows.weight[:, None])
        noise = [UserWarning(f"expert {e}: {problem}") for e, problem in unfinished.items()]
        for problem in [*self._problems(fit, rows), *noise]:
            warnings.warn(problem, stacklevel=3)  # fit, scikit-learn's check of settings, the user
        self._keep(fit, rows)
        return self

    def _learn(self, X: Any, y: Any, sample_weight: Any, classes: Any = None) -> Iterator[Warning]:
        """A batch of on-line EM; the first one is fitted as a whole. Gives what to warn of."""
        if hasattr(self, "_mixture"):
            self._validate_params()  # scikit-learn does so for the first batch alone
            if self._had_groups:
                raise ValueError(
                    "groups: the last fit had some, but partial_fit learns rows one by one: fit "
                    "again without groups"
                )
            rows = self._labeled_rows(X, y, sample_weight)
            sizes = replace(self._mixture.experts.sizes, penalty=self.expert_penalty)
            mixture = self._continued(X, sizes)
            online.learn(mixture, self._memory, rows, self.decay, move=True)
            self._mixture = mixture
            return
        self._random = check_random_state(self.random_state)
        rows = self._training_rows(X, y, sample_weight, classes)
        start, lacking = self.start, []
        if classes is not None:
            lacking = np.setdiff1d(np.arange(len(self.classes_)), rows.y[rows.weight > 0]).tolist()
            rows = online.with_classes(rows, lacking)
            if lacking and not isinstance(start, str | dict):
                start = np.tile(start, (1 + len(lacking), 1))
        fit = _best(self._fits(rows, start))
        yield from self._problems(fit, rows)
        self._keep(fit, rows)
        self._memory.cautious = bool(lacking)

    def _fits(self, rows: Rows, first: Any) -> list[em.Fit]:
        """A fit from each start; the first start is given, the others are random."""
        fits = []
        for start in [first, *["random"] * (self.n_init - 1)]:
            mixture = self._new_mixture(rows)
            fits.append(self._solved(mixture, rows, self._start(mixture, rows, start)))
        return fits

    def _solved(
        self,
        mixture: Mixture,
        rows: Rows,
        posterior: Float[np.ndarray, "n e"] | None,
        history: Sequence[float] = (),
    ) -> em.Fit:
        """A run of EM, and one after each split of a leaf of a tree that grows.

        Args:
            posterior: the responsibilities to start from; None for the mixture's own parameters.
            history: the log-likelihoods of the steps that led to the mixture.
        """
        stopping = em.Stopping(self.max_iter, self.tol)
        fit = em.run(mixture, rows, posterior, stopping, history)
        while len(leaves(fit.mixture.tree)) < self._grown_size():
            grown, split = split_worst(fit.mixture, rows)
            after = em.run(grown, rows, split, stopping)
            fit = em.Fit(after.mixture, fit.history + after.history, after.converged)
        return fit

    def _history_of(self, mixture: Mixture, rows: Rows) -> Sequence[float]:
        """The history of the last fit, if a warm start maximizes the same function as it did."""
        value = mixture.log_likelihood(rows) - mixture.penalty()
        same = np.isclose(value, self.history_[-1], rtol=SAME, atol=SAME)
        experts = mixture.experts
        allowed = np.all(AT_FLOOR * experts.variances() >= experts.sizes.floor)
        return self.history_.tolist() if same and allowed else ()

    def _problems(self, fit: em.Fit, rows: Rows) -> Iterator[Warning]:
        """What to warn of before a fit is kept, so that a warning as an error leaves no fit."""
        if not fit.converged:
            yield ConvergenceWarning(
                f"no convergence in {len(fit.history)} steps: increase max_iter or tol"
                if np.isfinite(fit.history[-1])
                else f"the log-likelihood is {fit.history[-1]}: the predictions of an expert are "
                "too large, or NaN"
            )
        for message in degenerate_experts(fit.mixture, rows).messages():
            yield ConvergenceWarning(message)
        total, experts = rows.weight.sum(), fit.mixture.experts.sizes.n_experts
        if total < experts and max(self.gate_penalty, self.expert_penalty):
            yield UserWarning(
                f"sample_weight: the weights sum to {total:g}, as if there were fewer rows than "
                f"the {experts} experts, so that the penalties decide: scale them to a mean of 1, "
                "or lower gate_penalty and expert_penalty"
            )

    def _keep(self, fit: em.Fit, rows: Rows) -> None:
        """Stores a fit, and the memory of its rows for later batches."""
        self._mixture, self._had_groups = fit.mixture, rows.groups is not None
        self.converged_ = fit.converged
        self.history_ = np.array(fit.history)
        self.lower_bound_ = fit.history[-1]
        self.n_iter_ = len(fit.history)
        self._memory = online.OnlineMemory()
        if type(fit.mixture.experts) in online.EXPERTS:
            online.learn(fit.mixture, self._memory, rows, self.decay, move=False)

    def _continued(self, X: Any, sizes: Sizes) -> Mixture:
        """A copy of the fitted mixture with the current settings."""
        old, view = self._mixture, self._view
        changed = ValueError(
            "the experts, their number, the gate or the columns that they see have changed since "
            "the last fit: fit again with warm_start=False"
        )
        if self._n_leaves() > len(leaves(old.tree)):
            raise changed
        fresh = self._tree(len(view.gate_columns))
        experts = make_experts(self.experts, replace(sizes, n_experts=len(leaves(fresh))))
        grown = origins(fresh, old.tree)
        experts.keep(grown)
        columns = self._columns(X)
        if not (
            all(map(np.array_equal, columns, view.columns()))
            and 0 < len(grown) <= self._grown_size()
            and experts.types() == old.experts.types()
        ):
            raise changed
        experts.resume(old.experts)
        tree = fresh if isinstance(fresh, FixedGate) else copy.deepcopy(old.tree)
        return Mixture(tree, experts, self.gate_penalty)

    _size: ClassVar[str]  # the setting that is the number of experts

    def _least_size(self) -> int:
        """The least number of experts that this setting can have."""
        raise NotImplementedError

    def _n_leaves(self) -> int:
        """The number of experts of the tree before growth."""
        raise NotImplementedError

    def _grown_size(self) -> int:
        """The number of experts after growth."""
        return self._n_leaves()

    def _new_mixture(self, rows: Rows) -> Mixture:
        sizes = self._sizes(rows, self._grown_size())  # before a tree of any size is built
        tree = self._tree(rows.gate.shape[1] - 1)
        experts = make_experts(self.experts, replace(sizes, n_experts=len(leaves(tree))))
        if self.exposure is not None and not experts.counts:
            raise ValueError(f"exposure={self.exposure!r}: only experts='poisson' have an exposure")
        experts.check_targets(rows.y)
        return Mixture(tree, experts, self.gate_penalty)

    def _tree(self, n_columns: int) -> TreeGate:
        """The gates, before their first fit."""
        raise NotImplementedError

    def _sizes(self, rows: Rows, n_experts: int) -> Sizes:
        """The sizes of the experts.

        Raises:
            ValueError: there are fewer rows than experts, or their weights are nothing: beside a
                much larger penalty, products of the rows would be rounding.
        """
        if len(rows) < n_experts:
            raise ValueError(f"n_samples={len(rows)} should be >= the {n_experts} experts")
        total, penalty = rows.weight.sum(), max(self.gate_penalty, self.expert_penalty)
        if total < NEGLIGIBLE * penalty:
            raise ValueError(
                f"sample_weight: the weights sum to {total:g}, which is nothing beside a penalty "
                f"of {penalty:g}: scale them to a mean of 1"
            )
        classes, floor = getattr(self, "classes_", None), 0.0
        if classes is None:
            _, variance = moments(rows.y, rows.weight, "y")
            least = max(self.variance_floor, NO_NOISE)
            floor = np.maximum(least * variance, np.finfo(float).tiny)
        return Sizes(
            n_experts=n_experts,
            n_columns=len(rows.view.expert_columns),
            n_outputs=rows.y.shape[1] if classes is None else len(classes),
            penalty=self.expert_penalty,
            floor=floor,
            classes=classes,
            random=self._random,
        )

    def _start(self, mixture: Mixture, rows: Rows, start: Any) -> Float[np.ndarray, "n e"] | None:
        """The responsibilities to start with; None if parameters were set instead."""
        if isinstance(mixture.tree, FixedGate) and isinstance(start, str):
            posterior = mixture.prior(rows)
            check_no_expert_is_empty(posterior, rows)
            return posterior
        if isinstance(start, str):
            found = start_posteriors(start, mixture.tree, rows, self._random)
            if len(found) == 1:
                return found[0]
            trial = em.Stopping(TRIAL, 0.0)
            tried = [em.run(self._new_mixture(rows), rows, each, trial) for each in found]
            return found[first_largest([fit.history[-1] for fit in tried])]
        if isinstance(start, dict):
            if unknown := set(start) - {"gate_coef", "expert_coef", "expert_std", "expert_df"}:
                raise ValueError(f"start has unknown parameters {sorted(unknown)}")
            if missing := {"gate_coef", "expert_coef"} - set(start):
                raise ValueError(f"start lacks the parameters {sorted(missing)}")
            self._set_parameters(mixture, rows.view, **start)
            return None
        posterior = np.asarray(start, float)
        shape = (len(rows), len(leaves(mixture.tree)))
        if posterior.shape != shape:
            raise ValueError(f"start has shape {posterior.shape}, expected {shape}")
        if np.any(posterior < 0) or not np.allclose(posterior.sum(axis=1), 1):
            raise ValueError("start: the responsibilities of a row should be >= 0 and sum to 1")
        check_no_expert_is_empty(posterior, rows)
        return posterior

    def _set_parameters(
        self,
        mixture: Mixture,
        view: ColumnView,
        gate_coef: Any,
        expert_coef: Any,
        expert_std: Any = None,
        expert_df: Any = None,
    ) -> None:
        """Sets parameters given as in ``gate_coef_`` and ``experts_``."""
        gates = breadth_first(mixture.tree)
        given = [gate_coef] if len(gates) == 1 and np.ndim(gate_coef) == 2 else list(gate_coef)
        if len(given) != len(gates):
            raise ValueError(f"gate_coef has {len(given)} entries, expected {len(gates)}")
        for gate, coef in zip(gates, given, strict=True):
            gate.coef = view.gate_design.from_given(in_shape("gate_coef", coef, gate.coef.shape))
        if view.expert_design is None:
            raise ValueError("a start from parameters needs named experts of one kind")
        mixture.experts.set_parameters(expert_coef, expert_std, expert_df, view.expert_design)

    def _training_rows(
        self, X: Any, y: Any, sample_weight: Any, classes: Any = None, groups: Any = None
    ) -> Rows:
        """Rows for a first fit, which determine columns, outputs or classes."""
        # A fit that fails leaves nothing of the old one.
        for name in [name for name in vars(self) if name.endswith("_")] + ["_mixture"]:
            self.__dict__.pop(name, None)
        given = X
        X, y = self._check_data(X, y, reset=True)
        weight = checked_weight(sample_weight, X)
        y = self._encode(y, classes)
        gate, expert, exposure = self._columns(given)
        gate_design = Design.of(dense(X[:, gate]), weight, "X")
        named = is_named(self.experts)
        expert_design = Design.of(dense(X[:, expert]), weight, "X") if named else None
        self._view = ColumnView(gate, expert, gate_design, expert_design, exposure)
        return self._grouped(Rows(self._view, X, y, weight), groups)

    def _columns(self, given: Any) -> list[Int[np.ndarray, "m"]]:
        """The columns of X that the gates and the experts see, and that of the exposure."""
        wanted = [] if self.exposure is None else self.exposure
        exposure = select_columns(wanted, given, "exposure")
        if self.exposure is not None and len(exposure) != 1:
            raise ValueError(f"exposure={self.exposure!r}: expected one column")
        found = []
        for name in ("gate_features", "expert_features"):
            columns = select_columns(getattr(self, name), given, name)
            found.append(
                np.setdiff1d(columns, exposure) if getattr(self, name) is None else columns
            )
        return [*found, exposure]


def check_no_expert_is_empty(posterior: Float[np.ndarray, "n e"], rows: Rows) -> None:
    """Raises a ValueError for responsibilities of a start in which an expert gets no row."""
    empty = np.flatnonzero(~alive(posterior * rows.weight[:, None]))
    if empty.size:
        raise ValueError(f"experts {empty.tolist()} start without any row")


def _best(fits: list[em.Fit]) -> em.Fit:
    """The fit with the largest log-likelihood that is finite; the first one if none is."""
    reached = [fit.history[-1] for fit in fits]
    return fits[int(np.argmax(np.where(np.isfinite(reached), reached, -np.inf)))]
