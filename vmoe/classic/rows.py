"""The rows that a mixture is fitted to, or predicts for, as the gates and the experts see them."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from vmoe.classic.design import Design


@dataclass(frozen=True)
class ColumnView:
    """What the gates and the experts see of a row.

    Attributes:
        gate_columns: indices of the columns that the gates see.
        expert_columns: indices of the columns that the experts see.
        gate_design: how the gates' columns are standardized.
        expert_design: the same for experts; None if all experts are estimators of scikit-learn.
        exposure_column: the index of the column with the exposure; empty if there is none.
    """

    gate_columns: Int[np.ndarray, "_"]
    expert_columns: Int[np.ndarray, "_"]
    gate_design: Design
    expert_design: Design | None
    exposure_column: Int[np.ndarray, "_"]

    def columns(self) -> list[Int[np.ndarray, "_"]]:
        """The indices of all three."""
        return [self.gate_columns, self.expert_columns, self.exposure_column]


@dataclass
class Rows:
    """Weighted rows, with targets if they have any.

    Attributes:
        view: what the gates and the experts see.
        given: all columns, an array or a sparse matrix in CSR form.
        y: targets (n, q), or the index of each row's class; None for rows to predict.
        weight: the weight of each row.
        groups: the index of each row's group, whose rows have one expert; None if every row has an
            expert of its own. A *unit* is a group or, without groups, a row.
    """

    view: ColumnView
    given: Any
    y: Any
    weight: Float[np.ndarray, "n"]
    groups: Int[np.ndarray, "n"] | None = None

    @cached_property
    def gate(self) -> Float[np.ndarray, "n p"]:
        """The standardized columns of the gates, after the intercept's."""
        return self.view.gate_design.matrix(self.gate_given)

    @cached_property
    def gate_given(self) -> Float[np.ndarray, "n d"]:
        """The columns of the gates as they were given."""
        return dense(self.given[:, self.view.gate_columns])

    @cached_property
    def expert(self) -> Float[np.ndarray, "n p"]:
        """The standardized columns of the experts, after the intercept's."""
        assert self.view.expert_design is not None
        return self.view.expert_design.matrix(dense(self.given[:, self.view.expert_columns]))

    @cached_property
    def expert_given(self) -> Any:
        """The columns of the experts as they were given."""
        return self.given[:, self.view.expert_columns]

    @cached_property
    def log_exposure(self) -> Float[np.ndarray, "n"]:
        """The logarithm of the exposure; zeros if there is none."""
        if not len(self.view.exposure_column):
            return np.zeros(len(self))
        exposure = dense(self.given[:, self.view.exposure_column])[:, 0]
        if not np.all(exposure > 0):
            row = int(np.argmin(exposure))
            raise ValueError(f"exposure: row {row} has {exposure[row]:g}, expected more than 0")
        return np.log(exposure)

    @property
    def unit(self) -> Any:
        """The index of each row's unit."""
        return slice(None) if self.groups is None else self.groups

    def sums(self, values: Float[np.ndarray, "n *m"]) -> Float[np.ndarray, "u *m"]:
        """The sum of values over every unit."""
        if self.groups is None:
            return values
        result = np.zeros((self.groups.max() + 1, *values.shape[1:]))
        np.add.at(result, self.groups, values)
        return result

    @cached_property
    def unit_weight(self) -> Float[np.ndarray, "n"]:
        """The weight of each row's group, 1 if it has none; ones without groups."""
        if self.groups is None:
            return np.ones(len(self))
        total = self.sums(self.weight)
        return np.where(total > 0, total, 1.0)[self.groups]

    @cached_property
    def share(self) -> Float[np.ndarray, "n"]:
        """How much each row counts for the gates: its weight; together, a group counts once."""
        return self.weight / self.unit_weight

    def pooled(self, log_density: Float[np.ndarray, "n e"]) -> Float[np.ndarray, "n e"]:
        """The log density of each row's unit, in which a row's counts with its weight."""
        if self.groups is None:
            return log_density
        some = self.weight[:, None] > 0  # another row may be one that no expert can have made
        return self.sums(self.weight[:, None] * np.where(some, log_density, 0.0))[self.groups]

    def inputs(self) -> Float[np.ndarray, "n m"]:
        """Standardized inputs for a start, without columns that only estimators see."""
        new = ~np.isin(self.view.expert_columns, self.view.gate_columns)
        if self.view.expert_design is None or not new.any():
            return self.gate[:, 1:]
        return np.hstack([self.gate[:, 1:], self.expert[:, 1:][:, new]])

    def targets(self) -> Float[np.ndarray, "n m"]:
        """Standardized targets, per exposure, for a start; with classes, an indicator of each."""
        targets = (
            self.y / np.exp(self.log_exposure)[:, None]
            if self.y.ndim == 2
            else np.eye(self.y.max() + 1)[self.y]
        )
        return Design.of(targets, self.weight, "y").matrix(targets)[:, 1:]

    def __len__(self) -> int:
        return self.given.shape[0]


def dense(columns: Any) -> np.ndarray:
    """The columns as an array."""
    return columns.toarray() if hasattr(columns, "toarray") else columns
