"""Rows of a table with targets and weights, which are split for training and validation."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int
from sklearn.utils import _safe_indexing

from vmoe.multitask.tasks import Classification, Task
from vmoe.multitask.training import Data
from vmoe.multitask.values import is_missing


class Split(NamedTuple):
    """Rows of a table with what they are to predict.

    Attributes:
        X: a DataFrame or an array.
        targets: by name of the task.
        sample_weight: how much each row counts, more than 0; None for 1.
        numbers: of the rows as they were given, for errors.
    """

    X: Any
    targets: dict[str, np.ndarray]
    sample_weight: Float[np.ndarray, "b"] | None
    numbers: Int[np.ndarray, "b"]

    def at(self, rows: np.ndarray) -> "Split":
        """Some of the rows."""
        weight = self.sample_weight
        return Split(
            _safe_indexing(self.X, rows),
            {name: each[rows] for name, each in self.targets.items()},
            None if weight is None else weight[rows],
            self.numbers[rows],
        )

    def data(self, tasks: Mapping[str, Task], class_weights: Mapping[str, Any], name: str) -> Data:
        """The encoded targets with their weights, without inputs.

        Args:
            class_weights: the weights of the classes by name of the task, for some tasks.
            name: of the split, for errors.

        Raises:
            ValueError: the tasks are others, or one has no target in these rows.
        """
        if set(self.targets) != set(tasks):
            raise ValueError(
                f"y of the {name} rows has the tasks {list(self.targets)}: expected {list(tasks)}"
            )
        encoded, weights = [], []
        for k, task in tasks.items():
            weight = ~is_missing(self.targets[k])
            encoded.append(task.encode(self.targets[k], weight))
            if self.sample_weight is not None:
                weight = weight * self.sample_weight
            if k in class_weights:
                weight = weight * class_weights[k][encoded[-1]]
            weights.append(weight)
        check_labeled(tasks, weights, name)
        return Data(None, tuple(encoded), tuple(map(as_weights, weights)))


def as_weights(weights: np.ndarray) -> np.ndarray:
    """Weights as booleans, or as float32 of at most 1: only their ratios count in a mean."""
    return weights if weights.dtype == bool else (weights / weights.max()).astype(np.float32)


def check_labeled(tasks: Iterable[str], weights: Iterable[np.ndarray], name: str) -> None:
    """Raises a ValueError if a task has no target in the rows of a split."""
    for task, weight in zip(tasks, weights, strict=True):
        if not weight.any():
            raise ValueError(
                f"task {task!r}: no {name} row has a target that counts: give more targets"
            )


def data_at(rows: np.ndarray, tasks: Mapping[str, Task], data: Data, name: str) -> Data:
    """The encoded targets of some rows.

    Raises:
        ValueError: a task has no target in these rows.
    """
    found = jax.tree.map(lambda each: each[rows], data)
    check_labeled(tasks, found.weights, name)
    return found


def drawn(
    tasks: Mapping[str, Task], data: Data, fraction: float, random: np.random.Generator
) -> tuple[Int[np.ndarray, "_"], Int[np.ndarray, "_"]]:
    """Training rows, and validation rows that are drawn.

    The rows are sorted by their classes, or -1 where a target is missing, and cut into blocks; a
    random one of each is a validation row.

    Args:
        fraction: the share of validation rows.

    Raises:
        ValueError: this is none of the rows, or all.
    """
    strata = [
        np.where(weights > 0, codes if isinstance(task, Classification) else 0, -1)
        for task, codes, weights in zip(tasks.values(), data.targets, data.weights, strict=True)
    ]
    rows = len(strata[0])
    n = round(fraction * rows)
    if not 0 < n < rows:
        raise ValueError(
            f"validation_fraction={fraction} of {rows} rows is {n}: give more rows or a validation "
            "split, or use 0"
        )
    order = random.permutation(rows)
    order = order[np.lexsort([each[order] for each in reversed(strata)])]
    edges = np.arange(n + 1) * rows // n
    validation = order[random.integers(edges[:-1], edges[1:])]
    return np.setdiff1d(order, validation), validation
