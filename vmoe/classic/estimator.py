"""What all mixtures share as estimators of scikit-learn: settings, checks, fitting, criteria."""

import copy
import warnings
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float
from sklearn.base import BaseEstimator, _fit_context
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from vmoe.classic import criteria, em, online
from vmoe.classic.columns import select_columns
from vmoe.classic.experts.interface import FittedExpert, Sizes
from vmoe.classic.experts.make import is_named, make_experts
from vmoe.classic.explain import Explanation, explain
from vmoe.classic.hard_tree import HardTree
from vmoe.classic.mixture import Mixture
from vmoe.classic.rows import Rows, View
from vmoe.classic.splits import Split, splits
from vmoe.classic.starts import GROUPINGS, start_posteriors
from vmoe.classic.tree import Gate, breadth_first, leaves

TRIAL = 2  # steps after which starts are compared
AT_LEAST_0 = Interval(Real, 0, None, closed="left")
AT_LEAST_1 = Interval(Integral, 1, None, closed="left")


class MixtureEstimator(BaseEstimator):
    """A mixture of experts; see ``MixtureOfExpertsRegressor`` for parameters and attributes."""

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "experts": "no_validation",  # make_experts
        "gate_features": "no_validation",  # select_columns
        "expert_features": "no_validation",
        "gate_penalty": [AT_LEAST_0],
        "expert_penalty": [AT_LEAST_0],
        "variance_floor": [AT_LEAST_0],
        "start": [StrOptions(set(GROUPINGS)), "array-like", dict],
        "n_init": [AT_LEAST_1],
        "tol": [AT_LEAST_0],
        "stopping": [StrOptions({"relative", "aitken"})],
        "max_iter": [AT_LEAST_1],
        "solver": [StrOptions({"em", "gradient"})],
        "combine": [StrOptions({"weighted", "argmax"})],
        "random_state": ["random_state"],
        "warm_start": ["boolean"],
        "decay": [Interval(Real, 0, 1, closed="right")],
    }

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "MixtureEstimator":
        """Fits the mixture.

        Args:
            X: rows of finite numbers (n, d), an array, DataFrame or sparse matrix; what the gates
                and the named experts see of a sparse matrix is made dense.
            y: targets (n,) or (n, q); for a classifier, classes (n,).
            sample_weight: weights (n,), not negative; an integer is the same as repeated rows.

        Raises:
            ValueError: an argument is wrong.
        """
        self.__dict__.pop("_memory", None)
        again = self.warm_start and hasattr(self, "_mixture")
        rows = self._training_rows(X, y, sample_weight, again)
        fits = [self._run(rows, again)]
        for _ in range(0 if again else self.n_init - 1):
            fits.append(self._run(rows, again, "random"))
        best = max(fits, key=lambda fit: fit.history[-1])
        if not best.converged:
            warnings.warn(
                f"no convergence in {len(best.history)} steps: increase max_iter or tol",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self._keep(best)

    def _learn(self, X: Any, y: Any, sample_weight: Any) -> "MixtureEstimator":
        """A batch of on-line EM; the first one is fitted as a whole."""
        first = not hasattr(self, "_memory")
        if first:
            rows = self._training_rows(X, y, sample_weight, False)
            if len(np.unique(rows.y)) < len(getattr(self, "classes_", [])):
                raise ValueError("y: the first batch of partial_fit should have every class")
            self._keep(self._run(rows, False))
            self._memory = online.Memory()
        else:
            rows = self._labeled_rows(X, y, sample_weight)
        online.learn(self._mixture, self._memory, rows, self.decay, move=not first)
        return self

    def _keep(self, fit: em.Fit) -> "MixtureEstimator":
        self._mixture = fit.mixture
        self.converged_ = fit.converged
        self.history_ = np.array(fit.history)
        self.lower_bound_ = fit.history[-1]
        self.n_iter_ = len(fit.history)
        return self

    def _run(self, rows: Rows, again: bool, start: Any = None) -> em.Fit:
        """One fit, from one start."""
        if again:
            return self._solve(copy.deepcopy(self._mixture), rows, None)
        mixture = self._new_mixture(rows)
        posterior = self._start(mixture, rows, self.start if start is None else start)
        return self._solve(mixture, rows, posterior)

    def _solve(
        self, mixture: Mixture, rows: Rows, posterior: Float[np.ndarray, "n e"] | None
    ) -> em.Fit:
        """A run of the solver."""
        stopping = em.Stopping(self.max_iter, self.tol, self.stopping)
        if self.solver == "em":
            return em.run(mixture, rows, posterior, stopping)
        from vmoe.classic import gradient  # the only module that needs JAX

        return gradient.run(mixture, rows, posterior, stopping)

    def _new_mixture(self, rows: Rows) -> Mixture:
        tree = self._tree(rows.gate.shape[1] - 1)
        experts = make_experts(self.experts, self._sizes(rows, len(leaves(tree))))
        experts.check_targets(rows.y)
        return Mixture(tree, experts, self.gate_penalty)

    def _tree(self, n_columns: int) -> Gate:
        """The gates, before their first fit."""
        raise NotImplementedError

    def _sizes(self, rows: Rows, n_experts: int) -> Sizes:
        """The sizes of the experts."""
        if len(rows) < n_experts:
            raise ValueError(f"n_samples={len(rows)} should be >= the {n_experts} experts")
        classes = getattr(self, "classes_", None)
        outputs = rows.y.shape[1] if classes is None else len(classes)
        return Sizes(
            n_experts=n_experts,
            n_columns=len(rows.view.expert_columns),
            n_outputs=outputs,
            penalty=self.expert_penalty,
            floor=least_variance(rows, self.variance_floor) if classes is None else None,
            classes=classes,
            random=self._random,
        )

    def _start(self, mixture: Mixture, rows: Rows, start: Any) -> Float[np.ndarray, "n e"] | None:
        """The responsibilities to start with; None if parameters were set instead."""
        if isinstance(start, str):
            data = rows.inputs(), rows.targets(), rows.weight
            return self._best(start_posteriors(start, mixture.tree, *data, self._random), rows)
        if isinstance(start, dict):
            self._set_parameters(mixture, rows.view, **start)
            return None
        posterior = np.asarray(start, float)
        shape = (len(rows), len(leaves(mixture.tree)))
        if posterior.shape != shape:
            raise ValueError(f"start has shape {posterior.shape}, expected {shape}")
        if np.any(posterior < 0) or not np.allclose(posterior.sum(axis=1), 1):
            raise ValueError("start: the responsibilities of a row should be >= 0 and sum to 1")
        return posterior

    def _best(
        self, posteriors: list[Float[np.ndarray, "n e"]], rows: Rows
    ) -> Float[np.ndarray, "n e"]:
        """The start with the largest log-likelihood after a few steps."""
        if len(posteriors) == 1:
            return posteriors[0]
        trial = em.Stopping(TRIAL, 0.0, "relative")
        reached = [em.run(self._new_mixture(rows), rows, p, trial).history[-1] for p in posteriors]
        return posteriors[int(np.argmax(reached))]

    def _set_parameters(
        self, mixture: Mixture, view: View, gate_coef: Any, expert_coef: Any, expert_std: Any = None
    ) -> None:
        """Sets parameters given as in ``gate_coef_`` and ``experts_``."""
        gates = breadth_first(mixture.tree)
        given = [gate_coef] if len(gates) == 1 else list(gate_coef)
        if len(given) != len(gates):
            raise ValueError(f"gate_coef has {len(given)} entries, expected {len(gates)}")
        for gate, coef in zip(gates, given, strict=True):
            coef = np.asarray(coef, float)
            if coef.shape != gate.coef.shape:
                raise ValueError(f"gate_coef has shape {coef.shape}, expected {gate.coef.shape}")
            gate.coef = view.gate_design.from_given(coef)
        if view.expert_design is None:
            raise ValueError("a start from parameters needs named experts of one kind")
        mixture.experts.set_parameters(expert_coef, expert_std, view.expert_design)

    def _training_rows(self, X: Any, y: Any, sample_weight: Any, again: bool) -> Rows:
        given, names = X, None
        X, y = self._check_data(X, y, reset=True)
        weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        if not weight.sum() > 0:
            raise ValueError("Sample weights must contain at least one non-zero number.")
        y = self._encode(y)
        self._random = check_random_state(self.random_state)
        if not again:
            names, count = getattr(self, "feature_names_in_", None), X.shape[1]
            gate = select_columns(self.gate_features, given, names, count, "gate_features")
            expert = select_columns(self.expert_features, given, names, count, "expert_features")
            self._view = View.of(X, weight, gate, expert, is_named(self.experts))
        return Rows(self._view, X, y, weight)

    def _check_data(self, X: Any, y: Any, reset: bool) -> tuple[Any, Any]:
        return validate_data(
            self, X, y, reset=reset, accept_sparse="csr", dtype=np.float64, **self._y_checks
        )

    def _rows(self, X: Any) -> Rows:
        """Rows to predict."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, accept_sparse="csr", dtype=np.float64)
        return Rows(self._view, X)

    def _labeled_rows(self, X: Any, y: Any, sample_weight: Any = None) -> Rows:
        """Rows with targets, after the fit."""
        check_is_fitted(self)
        X, y = self._check_data(X, y, reset=False)
        return Rows(self._view, X, self._codes(y), _check_sample_weight(sample_weight, X))

    def gate_proba(self, X: Any) -> Float[np.ndarray, "n e"]:
        """The probability of every expert given the row alone: the product of gates on its path."""
        rows = self._rows(X)
        return self._mixture.prior(rows)

    def responsibilities(self, X: Any, y: Any) -> Float[np.ndarray, "n e"]:
        """The probability of every expert given the row and its target."""
        rows = self._labeled_rows(X, y)
        return self._mixture.posterior(rows)[0]

    def aic(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Akaike's information criterion: the lower, the better."""
        rows = self._labeled_rows(X, y, sample_weight)
        return criteria.aic(self._mixture, rows)

    def bic(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The Bayesian information criterion: the lower, the better."""
        rows = self._labeled_rows(X, y, sample_weight)
        return criteria.bic(self._mixture, rows)

    def icl(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The integrated completed likelihood: BIC plus a term for unsure responsibilities."""
        rows = self._labeled_rows(X, y, sample_weight)
        return criteria.icl(self._mixture, rows)

    def explain(self, x: Any) -> Explanation:
        """The most probable path of one row through the gates.

        Args:
            x: one row, (d,) or (1, d).

        Raises:
            ValueError: there are several rows.
        """
        X = x if hasattr(x, "columns") else np.atleast_2d(x)
        rows = self._rows(X)
        if len(rows) != 1:
            raise ValueError(f"x has {len(rows)} rows, expected one")
        return explain(rows, self._mixture.tree, self._gate_names(), self.predict(X)[0])

    def splits(self, X: Any) -> list[Split]:
        """The gates, level by level, with their direction, entropy per row and covariance."""
        rows = self._rows(X)
        return splits(self._mixture, rows)

    def to_hard_tree(self) -> HardTree:
        """The decision tree in which a row goes to the most probable child of every gate."""
        check_is_fitted(self)
        return HardTree(self)

    def _gate_names(self, names: Any = None) -> list[str]:
        """The names of the columns that the gates see."""
        if names is None:
            names = getattr(self, "feature_names_in_", None)
        if names is None:
            names = [f"x{i}" for i in range(self.n_features_in_)]
        return [str(names[i]) for i in self._view.gate_columns]

    def _describe(self, expert: int) -> str:
        """A line about one expert, for pictures."""
        fitted = self.experts_[expert]
        if not isinstance(fitted, FittedExpert):
            return type(fitted).__name__
        if np.ndim(fitted.coef_) > 1:
            return fitted.kind
        intercept, *slopes = fitted.coef_
        terms = zip(slopes, self._view.expert_columns, strict=True)
        return " ".join([f"{intercept:.2g}", *(f"{slope:+.2g} x{i}" for slope, i in terms)][:3])

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


def least_variance(rows: Rows, floor: float) -> Float[np.ndarray, "q"]:
    """The least variance of an expert's outputs, from the fraction of the variance of y."""
    share = rows.weight / rows.weight.sum()
    variance = share @ (rows.y - share @ rows.y) ** 2
    return np.maximum(floor * np.where(variance > 0, variance, 1.0), np.finfo(float).tiny)
