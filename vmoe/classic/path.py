"""The choice of the number of experts: mixtures of each number, their criteria, and what is odd.

R's flexmix has ``stepFlexmix`` for this, with restarts and information criteria. Here a held-out
score stands beside them: the mean log-likelihood of rows that were left out of a fit. It needs no
count of parameters, so it also compares experts that are estimators of scikit-learn.
"""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from numbers import Integral
from typing import Any

import numpy as np
from scipy.sparse import issparse
from sklearn.base import clone, is_classifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import (
    GroupKFold,
    KFold,
    StratifiedGroupKFold,
    StratifiedKFold,
    check_cv,
)
from sklearn.utils import _safe_indexing

from vmoe.classic.degenerate import degenerate_experts
from vmoe.classic.estimator import MixtureEstimator
from vmoe.classic.rows import Rows

LOWER_IS_BETTER = ("aic", "bic", "icl")
CRITERIA = (*LOWER_IS_BETTER, "held_out")
PANELS = {
    "criterion, lower is better": LOWER_IS_BETTER,
    "held-out log-likelihood, higher is better": ("held_out",),
}
DEGENERATE = ("copies", "empty", "at_floor")


@dataclass(frozen=True)
class MixturePath:
    """Mixtures with several numbers of experts; ``print`` shows them as a table.

    Attributes:
        estimators: the mixtures, each fitted to all rows.
        table: columns by name, for ``pandas.DataFrame``, with an entry for each mixture:
            n_experts; n_parameters; log_likelihood, summed over the weighted rows; aic, bic and icl
            (the lower, the better; NaN if the parameters cannot be counted); held_out, the mean
            log-likelihood of a held-out row (the higher, the better), and held_out_error, its
            standard error over the folds (NaN without folds); converged; and the experts that are
            copies, empty or at_floor, as in `DegenerateExperts`.
    """

    estimators: list[Any]
    table: dict[str, list[Any]]

    def best(self, criterion: str = "bic") -> Any:
        """The mixture that is best by "aic", "bic", "icl" or "held_out".

        Raises:
            ValueError: there is no such criterion, or it has no value for any mixture.
        """
        return self.estimators[self._best(criterion)]

    def _best(self, criterion: str) -> int:
        if criterion not in CRITERIA:
            raise ValueError(f"criterion={criterion!r}: expected one of {list(CRITERIA)}")
        values = self.table[criterion]
        if not self._known(criterion):
            others = list(filter(self._known, CRITERIA))
            raise ValueError(f"criterion={criterion!r} has no values here: take one of {others}")
        return int(np.nanargmin(values) if criterion in LOWER_IS_BETTER else np.nanargmax(values))

    def __str__(self) -> str:
        """The table; a star marks the best mixture by each criterion."""
        columns = []
        for name, values in self.table.items():
            cells = list(map(FORMATS[name], values))
            if name in CRITERIA and self._known(name):
                best = self._best(name)
                cells = [f"{cell}{'*' if i == best else ' '}" for i, cell in enumerate(cells)]
            width = max(map(len, (name, *cells)))
            columns.append([each.rjust(width) for each in (name, *cells)])
        return "\n".join("  ".join(line) for line in zip(*columns, strict=True))

    def plot(self, axes: Any = None) -> Any:
        """Draws the criteria that have values, and the held-out score with its standard error.

        A filled point is the best mixture by its criterion; a mixture on a grey band has degenerate
        experts.

        Args:
            axes: axes of matplotlib, one for the criteria and one for the score; new ones if None.

        Returns:
            the axes.
        """
        panels = [(label, names) for label, names in PANELS.items() if self._known(names[0])]
        if axes is None:
            import matplotlib.pyplot as plt

            size = (5 * len(panels), 4)
            _, axes = plt.subplots(
                1, len(panels), figsize=size, layout="constrained", squeeze=False
            )
        for ax, (label, names) in zip(np.ravel(axes), panels, strict=True):
            for name in names:
                self._draw(ax, name)
            for number, *odd in zip(*map(self.table.get, ("n_experts", *DEGENERATE)), strict=True):
                if any(odd):
                    ax.axvline(number, color="0.9", linewidth=8, zorder=0)
            ax.set(xlabel="experts", xticks=self.table["n_experts"], ylabel=label)
            ax.legend()
        return np.ravel(axes)

    def _draw(self, ax: Any, name: str) -> None:
        values, numbers = self.table[name], self.table["n_experts"]
        error = self.table["held_out_error"] if name == "held_out" else None
        (line, *_) = ax.errorbar(numbers, values, error, marker="o", mfc="w", capsize=3, label=name)
        best = self._best(name)
        ax.plot(numbers[best], values[best], "o", color=line.get_color(), zorder=3)

    def _known(self, criterion: str) -> bool:
        return not np.isnan(self.table[criterion]).all()


def mixture_path(
    estimator: Any,
    X: Any,
    y: Any,
    n_experts: Iterable[int] | None = None,
    *,
    cv: Any = 5,
    sample_weight: Any = None,
    groups: Any = None,
) -> MixturePath:
    """Fits mixtures with several numbers of experts, to choose one of them.

    Each is the best of the ``n_init`` starts of the estimator. Steps without convergence and
    degenerate experts are in the table, so there are no warnings of these. Other warnings are of
    the fits to all rows.

    Args:
        estimator: a mixture of `vmoe.classic`. A hierarchy grows to the numbers of experts.
        X: rows, as for its ``fit``.
        y: their targets.
        n_experts: the numbers; None for six from 1 on, or for a hierarchy from its own tree's on.
        cv: folds for the held-out score: a number or a splitter of scikit-learn; None for no score.
            By a number, folds are drawn, always the same ones; they keep groups together, and the
            shares of classes.
        sample_weight: weights, as for ``fit``.
        groups: the group of each row, as for ``fit``.

    Raises:
        ValueError: it is another estimator, or one of the fits refuses its settings or data.

    >>> from vmoe.classic import MixtureOfExpertsRegressor
    >>> rng = np.random.default_rng(0)
    >>> x = rng.uniform(-1, 1, (200, 1))
    >>> y = np.abs(x[:, 0]) + 0.05 * rng.normal(size=200)
    >>> path = mixture_path(MixtureOfExpertsRegressor(), x, y, [1, 2, 3])
    >>> path.best("bic").n_experts, path.best("held_out").n_experts
    (2, 2)
    """
    if not isinstance(estimator, MixtureEstimator):
        raise ValueError(f"estimator={estimator!r}: expected an estimator of vmoe.classic")
    if n_experts is None:
        least = estimator._least_size()
        n_experts = range(least, least + 6)
    X = X.tocsr() if issparse(X) else X  # rows of other formats cannot be taken
    data = [X, y, sample_weight, groups]
    folds = list(_folds(estimator, X, y, groups, cv))
    estimators, lines = [], []
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        for number in n_experts:
            new = clone(estimator).set_params(**{estimator._size: number})
            model = clone(new).fit(*data)
            estimators.append(model)
            line = _described(model, model._labeled_rows(*data))
            with warnings.catch_warnings(action="ignore", category=UserWarning):
                scores = [_held_out(clone(new), data, *fold) for fold in folds]
            lines.append({"n_experts": number} | line | _averaged(scores))
    return MixturePath(estimators, {name: [line[name] for line in lines] for name in FORMATS})


def _folds(
    estimator: Any, X: Any, y: Any, groups: Any, cv: Any
) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    if cv is None:
        return []
    if isinstance(cv, Integral):
        rows, whole = (
            (StratifiedKFold, StratifiedGroupKFold)
            if is_classifier(estimator)
            else (KFold, GroupKFold)
        )
        kind = rows if groups is None else whole
        cv = kind(cv, shuffle=True, random_state=0)  # rows are often sorted
    return check_cv(cv).split(X, y, groups)


def _described(model: Any, rows: Rows) -> dict[str, Any]:
    """What is known of a fitted mixture from its own rows."""
    mixture = model._mixture
    try:
        criteria = {name: getattr(mixture, name)(rows) for name in LOWER_IS_BETTER}
        criteria["n_parameters"] = mixture.n_parameters()
    except ValueError:  # estimators of scikit-learn do not tell how many parameters they have
        criteria = dict.fromkeys([*LOWER_IS_BETTER, "n_parameters"], np.nan)
    return {
        "log_likelihood": mixture.log_likelihood(rows),
        **criteria,
        "converged": model.converged_,
        **asdict(degenerate_experts(mixture, rows)),
    }


def _held_out(
    model: Any, data: list[Any], train: np.ndarray, test: np.ndarray
) -> tuple[float, float]:
    """The log-likelihood of the rows of one fold, and their weight."""
    seen, left_out = (
        [None if each is None else _safe_indexing(each, some) for each in data]
        for some in (train, test)
    )
    rows = model.fit(*seen)._labeled_rows(*left_out)
    return model._mixture.log_likelihood(rows), float(rows.weight.sum())


def _averaged(scores: list[tuple[float, float]]) -> dict[str, float]:
    """The mean log-likelihood of a row, and its standard error over the folds."""
    if not scores:
        return {"held_out": np.nan, "held_out_error": np.nan}
    sums, weights = np.transpose(scores)
    error = np.std(sums / weights, ddof=1) / np.sqrt(len(scores)) if len(scores) > 1 else np.nan
    return {"held_out": float(sums.sum() / weights.sum()), "held_out_error": float(error)}


FORMATS: dict[str, Callable[[Any], str]] = {
    "n_experts": str,
    "n_parameters": "{:.0f}".format,
    "log_likelihood": "{:.1f}".format,
    **dict.fromkeys(LOWER_IS_BETTER, "{:.1f}".format),
    "held_out": "{:.4f}".format,
    "held_out_error": "{:.4f}".format,
    "converged": lambda converged: "yes" if converged else "no",
    **dict.fromkeys(DEGENERATE, lambda experts: ",".join(map(str, experts)) or "-"),
}
"""The columns of ``MixturePath.table``, and how they are printed."""
