"""The parameters of a mixture with their errors, as flexmix prints ``summary(refit(model))``."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import norm

from vmoe.classic.covariance import covariance
from vmoe.classic.mixture import Mixture
from vmoe.classic.parameters import Block, blocks
from vmoe.classic.rows import Rows

HEADER = ("estimate", "std. error", "z value", "Pr(>|z|)")
LEAST_P = 2e-16  # that is shown, as R does


@dataclass(frozen=True, repr=False)
class Summary:
    """Gate and expert parameters, for columns as they were given; ``print`` shows the table.

    A gate's coefficients are log odds of a child against its first child. A logistic expert's are
    log odds of a class against the first class. ``std_`` is an expert's standard deviation, or the
    scale of a Student t expert; ``df_`` are its degrees of freedom, if they are estimated.

    Attributes:
        names: the part and the name of every parameter, as ("expert 0", "x1").
        estimates: their values (c,).
        is_positive: which of them are an expert's ``std_`` or ``df_`` (c,).
        covariance: (c, c); NaN for parameters without an error, which ``notes`` explain.
        notes: what is missing or off, one line each.
        refits: the estimates of a bootstrap's refits (m, c); None for errors by the information.
    """

    names: list[tuple[str, str]]
    estimates: Float[np.ndarray, "c"]
    is_positive: Bool[np.ndarray, "c"]
    covariance: Float[np.ndarray, "c c"]
    notes: list[str]
    refits: Any = None

    @property
    def standard_errors(self) -> Float[np.ndarray, "c"]:
        """The standard errors."""
        return np.sqrt(np.diag(self.covariance))

    @property
    def z_values(self) -> Float[np.ndarray, "c"]:
        """The estimates in units of their errors; NaN for those that are never 0."""
        return np.where(self.is_positive, np.nan, self.estimates / self.standard_errors)

    @property
    def p_values(self) -> Float[np.ndarray, "c"]:
        """How probable so large a ``z_values`` is if the parameter is 0 (Wald's test)."""
        return 2 * norm.sf(np.abs(self.z_values))

    def interval(self, level: Any = 0.95) -> Float[np.ndarray, "c 2"]:
        """Confidence intervals: Wald's, on a log scale if positive; a bootstrap's quantiles.

        Raises:
            ValueError: the level is not in (0, 1).
        """
        if not 0 < level < 1:
            raise ValueError(f"level={level!r}: should be in (0, 1)")
        tails = np.array([(1 - level) / 2, (1 + level) / 2])
        if self.refits is not None:
            return np.quantile(self.refits, tails, axis=0).T
        error, value = self.standard_errors[:, None], self.estimates[:, None]
        found = value + norm.ppf(tails) * error
        error, value = error[self.is_positive], value[self.is_positive]
        with np.errstate(over="ignore"):
            found[self.is_positive] = value * np.exp(norm.ppf(tails) * error / value)
        return found

    def __repr__(self) -> str:
        how = "the observed information"
        if self.refits is not None:
            how = f"a parametric bootstrap of {len(self.refits)} refits"
        width = max(len(name) for _, name in self.names) + 2
        lines, last = [f"errors by {how}"], ""
        columns = self.estimates, self.standard_errors, self.z_values, self.p_values
        for (part, name), *values in zip(self.names, *columns, strict=True):
            if part != last:
                lines.append(f"\n{part:<{width}}" + "".join(f"{word:>12}" for word in HEADER))
            texts = [f"{x:.4g}" if np.isfinite(x) else "-" for x in values]
            if values[-1] < LEAST_P:
                texts[-1] = f"< {LEAST_P:g}"
            lines.append(f"  {name:<{width - 2}}" + "".join(f"{text:>12}" for text in texts))
            last = part
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)])


def summarize(mixture: Mixture, rows: Rows, columns: list[str]) -> Summary:
    """The table with errors by the information.

    Args:
        rows: the rows of the fit.
        columns: the names of all columns.

    Raises:
        ValueError: the mixture has no parameters.
    """
    found = covariance(mixture, rows)
    return Summary(*named_estimates(mixture, rows.view, columns), found.matrix, found.notes)


def named_estimates(
    mixture: Mixture, view: Any, columns: list[str]
) -> tuple[list[tuple[str, str]], Float[np.ndarray, "c"], Bool[np.ndarray, "c"]]:
    """The names and values of all parameters, and which are positive by nature.

    Raises:
        ValueError: the mixture has no parameters.
    """
    every = blocks(mixture)
    names = [name for block in every for name in _names(block, view, columns)]
    if not names:
        raise ValueError("there are no parameters: the gate is a rule, the experts are estimators")
    is_positive = [np.arange(len(block.slope)) >= block.coef.size for block in every]
    return (
        names,
        np.concatenate([block.given(view) for block in every]),
        np.concatenate(is_positive),
    )


def _names(block: Block, view: Any, columns: list[str]) -> list[tuple[str, str]]:
    seen = view.gate_columns if block.is_gate else view.expert_columns
    each = ["(intercept)", *(columns[i] for i in seen)]
    ahead = [f"{line}: " if line else "" for line in block.lines]
    names = [line + name for line in ahead for name in each]
    names += [f"{line}std_" for line in ahead[: block.std.size]] + ["df_"] * block.df.size
    return [(block.part, name) for name in names]
