"""What one asks of a fitted mixture: likelihoods, criteria, errors of parameters, paths, splits."""

import copy
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.sparse import issparse
from sklearn.base import BaseEstimator
from sklearn.utils import assert_all_finite, check_array, check_consistent_length, column_or_1d
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from vmoe.classic.bootstrap import bootstrap
from vmoe.classic.covariance import covariance
from vmoe.classic.degenerate import DegenerateExperts, degenerate_experts
from vmoe.classic.explain import Explanation, explain
from vmoe.classic.hard_tree import HardTree
from vmoe.classic.mixture import Mixture
from vmoe.classic.partition import check_learned
from vmoe.classic.rows import ColumnView, Rows
from vmoe.classic.splits import Split, splits
from vmoe.classic.summary import Summary, summarize
from vmoe.classic.tree import breadth_first


class FittedMixture(BaseEstimator):
    """A mixture once it is fitted, and the rows that its methods take.

    Mixtures inherit these methods; see ``MixtureEstimator`` for how they are fitted.
    """

    combine: str
    _mixture: Mixture
    _view: ColumnView
    _had_groups: bool

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


def checked_weight(sample_weight: Any, X: Any) -> Float[np.ndarray, "n"]:
    """The weights as an array."""
    weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
    if not weight.sum() > 0:
        raise ValueError("Sample weights must contain at least one non-zero number.")
    return weight
