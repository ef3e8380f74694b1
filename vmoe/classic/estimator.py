"""What all mixtures share as estimators of scikit-learn: settings, checks, fitting, criteria."""

import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import issparse
from sklearn.base import BaseEstimator, _fit_context
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import (
    assert_all_finite,
    check_array,
    check_consistent_length,
    check_random_state,
    column_or_1d,
)
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from vmoe.classic import em, online
from vmoe.classic.bootstrap import bootstrap
from vmoe.classic.covariance import covariance
from vmoe.classic.degenerate import DegenerateExperts, degenerate_experts
from vmoe.classic.design import Design, moments, select_columns
from vmoe.classic.experts.interface import AT_FLOOR, Sizes, alive, in_shape
from vmoe.classic.experts.make import is_named, make_experts
from vmoe.classic.explain import Explanation, explain
from vmoe.classic.growth import split_worst
from vmoe.classic.hard_tree import HardTree
from vmoe.classic.mixture import Mixture
from vmoe.classic.partition import FixedGate, check_learned
from vmoe.classic.rows import ColumnView, Rows, dense
from vmoe.classic.splits import Split, splits
from vmoe.classic.starts import GROUPINGS, first_largest, start_posteriors
from vmoe.classic.summary import Summary, summarize
from vmoe.classic.tree import TreeGate, breadth_first, leaves, origins

NEGLIGIBLE = 1e-12  # the least sum of the weights, in units of a penalty
NO_NOISE = 1e-20  # a variance below this part of y's is rounding, so it is the least floor
SAME = 1e-9  # the difference of two log-likelihoods of the same function, from rounding
TRIAL = 2  # steps after which starts are compared
AT_LEAST_0 = Interval(Real, 0, None, closed="left")
AT_LEAST_1 = Interval(Integral, 1, None, closed="left")


@dataclass(eq=False, repr=False)
class MixtureEstimator(BaseEstimator):
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
    solver: str = "em"
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
        "solver": [StrOptions({"em", "gradient"})],
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
        """A run of the solver, and one after each split of a leaf of a tree that grows.

        Args:
            posterior: the responsibilities to start from; None for the mixture's own parameters.
            history: the log-likelihoods of the steps that led to the mixture.
        """
        run = em.run
        if self.solver == "gradient":
            from vmoe.classic import gradient  # the only module that needs JAX

            run = gradient.run
        stopping = em.Stopping(self.max_iter, self.tol)
        fit = run(mixture, rows, posterior, stopping, history)
        while len(leaves(fit.mixture.tree)) < self._grown_size():
            grown, split = split_worst(fit.mixture, rows)
            after = run(grown, rows, split, stopping)
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

    def _grouped(self, rows: Rows, groups: Any) -> Rows:
        """The rows in groups, which have to be constant for the gates."""
        if groups is None:
            return rows
        if not hasattr(groups, "dtype"):  # NumPy would make strings of what is mixed or missing
            groups = np.array(groups, dtype=object)
        try:
            groups = column_or_1d(check_array(groups, ensure_2d=False, dtype=None))
            check_consistent_length(rows.given, groups)
            _, first, index = np.unique(groups, return_index=True, return_inverse=True)
        except (TypeError, ValueError) as error:
            raise ValueError(
                "groups: expected one number or string per row (n,), of one kind and none missing: "
                f"{error}"
            ) from error
        differs = rows.gate_given != rows.gate_given[first][index]
        if differs.any():
            row, column = np.argwhere(differs)[0]
            name = self._names()[self._view.gate_columns[column]]
            raise ValueError(
                f"groups: the gate sees {name}, which is not constant in group {groups[row]}: "
                "set gate_features to columns that are, or to [] for constant proportions"
            )
        return replace(rows, groups=index)

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

    def _check_data(self, X: Any, y: Any, reset: bool) -> tuple[Any, Any]:
        X, y = validate_data(
            self, X, y, reset=reset, accept_sparse="csr", dtype=np.float64, **self._y_checks
        )
        assert_all_finite(y, input_name="y")  # None among numbers is NaN only now
        if y.dtype.kind == "O" and any(label is None for label in y.ravel()):
            raise ValueError("Input y contains None: leave out the rows without a class")
        return X, y

    def _rows(self, X: Any, sample_weight: Any = None) -> Rows:
        """Rows without targets."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, accept_sparse="csr", dtype=np.float64)
        return Rows(self._view, X, None, checked_weight(sample_weight, X))

    def _labeled_rows(self, X: Any, y: Any, sample_weight: Any = None, groups: Any = None) -> Rows:
        """Rows with targets, after the fit."""
        check_is_fitted(self)
        X, y = self._check_data(X, y, reset=False)
        y, outputs = self._codes(y), self._mixture.experts.sizes.n_outputs
        if y.ndim == 2 and y.shape[1] != outputs:
            raise ValueError(f"y has {y.shape[1]} outputs, expected {outputs}")
        self._mixture.experts.check_targets(y)
        rows = Rows(self._view, X, y, checked_weight(sample_weight, X))
        return self._grouped(rows, groups)

    def _rows_of_units(self, X: Any, y: Any, sample_weight: Any, groups: Any) -> Rows:
        """Rows with targets for what counts units, in groups if the fit had some."""
        rows = self._labeled_rows(X, y, sample_weight, groups)
        if self._had_groups and groups is None:
            raise ValueError(
                "groups: the fit had groups, without which rows would count one by one: give the "
                "group of each row"
            )
        return rows

    def _combined(self, X: Any) -> Float[np.ndarray, "n q"]:
        """The experts' predictions as one, as ``combine`` says."""
        rows = self._rows(X)
        self._validate_params()  # combine may have changed since the fit
        return self._mixture.combined(rows, self.combine)

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_mixture")

    def gate_proba(self, X: Any) -> Float[np.ndarray, "n e"]:
        """The probability of every expert given the row alone: the product of gates on its path."""
        rows = self._rows(X)
        return self._mixture.prior(rows)

    def responsibilities(
        self, X: Any, y: Any, sample_weight: Any = None, groups: Any = None
    ) -> Float[np.ndarray, "n e"]:
        """The probability of every expert given the row and its target, or given its group's.

        Weights matter in groups alone: there, an integer is the same as repeated rows. Arguments
        and errors are those of ``log_likelihood``.
        """
        rows = self._rows_of_units(X, y, sample_weight, groups)
        return self._mixture.posterior(rows)[0]

    def log_density(self, X: Any, y: Any) -> Float[np.ndarray, "n"]:
        """The log density of each row's target, of the whole mixture, whatever ``combine`` is.

        It is in nats, and of each row alone, also after a fit with groups. For counts and classes
        it is the logarithm of their probability, for several outputs the joint density. For
        numbers between counts, it has the gamma function in the place of the factorial (`Poisson`).
        Classifiers of scikit-learn as experts give no class less than 2.2e-16. (scikit-learn's
        ``score_samples`` sees X alone.)

        Args:
            X: rows (n, d).
            y: their targets (n,) or (n, q), or their classes (n,).

        Raises:
            ValueError: rows or targets are not such as the fit had.
        """
        rows = self._labeled_rows(X, y)
        return self._mixture.posterior(rows)[1]

    def log_likelihood(
        self, X: Any, y: Any, sample_weight: Any = None, groups: Any = None
    ) -> float:
        """The log-likelihood in nats, summed over the weighted rows, without the penalties.

        A group counts with the joint density of its rows, given that they have one expert.

        Args:
            X: rows (n, d).
            y: their targets (n,) or (n, q), or their classes (n,).
            sample_weight: weights (n,), as in ``fit``.
            groups: the group of each row (n,), as in ``fit``; needed if the fit had some.

        Raises:
            ValueError: rows, targets or weights are not such as the fit had, or ``groups`` are
                missing.
        """
        rows = self._rows_of_units(X, y, sample_weight, groups)
        return self._mixture.log_likelihood(rows)

    def degenerate_experts(
        self, X: Any, y: Any, sample_weight: Any = None, groups: Any = None
    ) -> DegenerateExperts:
        """The experts that are copies of others, have less than a row, or the least variance.

        Arguments and errors are those of ``log_likelihood``.
        """
        rows = self._rows_of_units(X, y, sample_weight, groups)
        return degenerate_experts(self._mixture, rows)

    def aic(self, X: Any, y: Any, sample_weight: Any = None, groups: Any = None) -> float:
        """Akaike's information criterion, 2 c - 2 ``log_likelihood`` for c free parameters.

        The lower, the better, as of ``bic`` and ``icl``. The arguments are those of
        ``log_likelihood``.

        Raises:
            ValueError: as for ``log_likelihood``, or an expert is an estimator of scikit-learn,
                whose parameters cannot be counted.
        """
        rows = self._rows_of_units(X, y, sample_weight, groups)
        return self._mixture.aic(rows)

    def bic(self, X: Any, y: Any, sample_weight: Any = None, groups: Any = None) -> float:
        """The Bayesian information criterion, c log n - 2 ``log_likelihood``.

        n is the sum of the weights of the rows, also of rows in groups. Arguments and errors are
        those of ``aic``.
        """
        rows = self._rows_of_units(X, y, sample_weight, groups)
        return self._mixture.bic(rows)

    def icl(self, X: Any, y: Any, sample_weight: Any = None, groups: Any = None) -> float:
        """The integrated completed likelihood (Biernacki, Celeux & Govaert 2000).

        It is ``bic`` minus twice the sum over rows, or groups, of the logarithm of the largest
        responsibility, which punishes unsure ones. Arguments and errors are those of ``aic``.
        """
        rows = self._rows_of_units(X, y, sample_weight, groups)
        return self._mixture.icl(rows)

    def explain(self, x: Any) -> Explanation:
        """The most probable path of one row through the gates.

        Args:
            x: one row, (d,) or (1, d); also a row of a DataFrame or of a sparse matrix.

        Raises:
            ValueError: there are several rows, or the gate is a partition.
        """
        X = x.to_frame().T if hasattr(x, "to_frame") else x
        X = X if hasattr(X, "columns") or issparse(X) else np.atleast_2d(X)
        rows = self._rows(X)
        check_learned(self._mixture.tree)
        if len(rows) != 1:
            raise ValueError(f"x has {len(rows)} rows, expected one")
        names = [self._names()[i] for i in self._view.gate_columns]
        return explain(rows, self._mixture.tree, names, self.predict(X)[0])

    def splits(self, X: Any, y: Any, sample_weight: Any = None, groups: Any = None) -> list[Split]:
        """The gates, level by level, with their direction, entropy per row and covariance.

        A warning says why parts of a covariance are NaN, or if these rows have another maximum.

        Args:
            X: rows (n, d).
            y: their targets, for the covariance.
            sample_weight: weights (n,) for the covariance, as in ``fit``.
            groups: the group of each row (n,); needed if the fit had some.

        Raises:
            ValueError: the gate is a partition, a weight is negative, or ``groups`` are missing.
        """
        rows = self._rows_of_units(X, y, sample_weight, groups)
        check_learned(self._mixture.tree)
        found = covariance(self._mixture, rows)
        for note in found.notes:
            warnings.warn(f"covariance: {note}", stacklevel=2)
        return splits(self._mixture, rows, found.matrix)

    def summary(self, X: Any, y: Any, sample_weight: Any = None, groups: Any = None) -> Summary:
        """All parameters with standard errors by the observed information, as a table to print.

        Experts that are estimators of scikit-learn count as known.

        Args:
            X: the rows of ``fit``.
            y: their targets.
            sample_weight: their weights.
            groups: their groups; needed if the fit had some.

        Raises:
            ValueError: there are no parameters: the gate is a rule and the experts estimators; or
                ``groups`` are missing.
        """
        rows = self._rows_of_units(X, y, sample_weight, groups)
        return summarize(self._mixture, rows, self._names())

    def bootstrap(self, X: Any, n_refits: Any = 200, random_state: Any = None) -> Summary:
        """The table of ``summary`` with errors by a parametric bootstrap.

        Each refit starts at the fit and has targets that are drawn from the mixture for the rows of
        X, which all count alike: repeat rows of larger weight. It holds where the information does
        not, as near a bound or for few rows. Small ``tol`` and large ``max_iter`` matter: refits
        that stop early spread too little.

        Args:
            X: the rows of ``fit``.
            n_refits: the number of refits; those that fail are counted in ``notes``.
            random_state: seed of the targets.

        Raises:
            ValueError: there are no parameters, fewer than two refits succeed, or the fit had
                groups.
        """
        check_is_fitted(self)
        if self._had_groups:
            raise ValueError(
                "the fit had groups, but a bootstrap draws rows one by one: see summary for errors "
                "of parameters"
            )
        return bootstrap(self, X, n_refits, random_state)

    def to_hard_tree(self) -> HardTree:
        """The decision tree in which a row goes to the most probable child of every gate."""
        check_is_fitted(self)
        fitted = copy.copy(self)  # later fits make new parts and change no old ones
        return HardTree(fitted, fitted._mixture, fitted._rows, fitted._decide)

    def _names(self, given: Any = None) -> list[str]:
        """The names of the columns of X."""
        names = getattr(self, "feature_names_in_", None) if given is None else given
        if names is None:
            return [f"x{i}" for i in range(self.n_features_in_)]
        if len(names) != self.n_features_in_:
            raise ValueError(
                f"feature_names has {len(names)} entries, expected {self.n_features_in_}"
            )
        return [str(name) for name in names]

    @property
    def experts_(self) -> list[Any]:
        """The experts: ``FittedExpert`` records, or fitted estimators."""
        check_is_fitted(self)
        return self._mixture.experts.fitted(self._view.expert_design)

    def _gate_coefs(self) -> list[Float[np.ndarray, "k p"]]:
        """The coefficients of every gate, level by level, for columns as they were given."""
        check_is_fitted(self)
        to_given = self._view.gate_design.to_given
        return [to_given(gate.coef) for gate in breadth_first(self._mixture.tree)]


def checked_weight(sample_weight: Any, X: Any) -> Float[np.ndarray, "n"]:
    """The weights as an array."""
    weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
    if not weight.sum() > 0:
        raise ValueError("Sample weights must contain at least one non-zero number.")
    return weight


def check_no_expert_is_empty(posterior: Float[np.ndarray, "n e"], rows: Rows) -> None:
    """Raises a ValueError for responsibilities of a start in which an expert gets no row."""
    empty = np.flatnonzero(~alive(posterior * rows.weight[:, None]))
    if empty.size:
        raise ValueError(f"experts {empty.tolist()} start without any row")


def _best(fits: list[em.Fit]) -> em.Fit:
    """The fit with the largest log-likelihood that is finite; the first one if none is."""
    reached = [fit.history[-1] for fit in fits]
    return fits[int(np.argmax(np.where(np.isfinite(reached), reached, -np.inf)))]
