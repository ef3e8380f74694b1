"""Targets: from y to rows with targets, to tasks, and to how much each counts."""

from collections.abc import Collection, Mapping
from numbers import Real
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from sklearn.utils.validation import _check_sample_weight

from vmoe.multitask.build import CHAINS
from vmoe.multitask.settings import Settings
from vmoe.multitask.splits import Split
from vmoe.multitask.tasks import KINDS, Classification, Task
from vmoe.multitask.values import as_list, as_pandas, as_values, is_missing, is_numeric

FEW = 20
"""As many whole numbers are no regression by default, however few targets there are."""
MANY = 30
"""As many whole numbers are classes by default without a warning."""


def split_of(X: Any, y: Any, sample_weight: Any = None) -> Split:
    """Rows with their targets and weights; those of weight 0 are left out.

    Raises:
        ValueError: as of ``targets_of`` and ``row_weights``.
    """
    rows = np.arange(len(X))
    every = Split(X, targets_of(y, len(X)), row_weights(sample_weight, X), rows)
    weight = every.sample_weight
    return every if weight is None or weight.all() else every.at(np.flatnonzero(weight))


def row_weights(sample_weight: Any, X: Any) -> Float[np.ndarray, "b"] | None:
    """The weight of each row, at most 1, as only their ratios count; None for None.

    Raises:
        ValueError: ``sample_weight`` is not a number from 0 on for each row, or all are 0.
    """
    if sample_weight is None:
        return None
    weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
    if not weight.any():
        raise ValueError("sample_weight: all weights are 0: give some rows more")
    return weight / weight.max()


def by_name(y: Any) -> tuple[Any, int | None]:
    """The targets of each task by name, and the number of axes of ``y`` if it is an array.

    The columns of an array (b, t) are the tasks "0", "1", ...; a vector (b,) is the task "0".

    Raises:
        ValueError: ``y`` has other axes, or is none of these.
    """
    y = as_pandas(y)
    if isinstance(y, Mapping) or hasattr(y, "columns"):
        return y, None
    array = y if hasattr(y, "ndim") else np.array(y, object)
    if array.ndim not in (1, 2):
        raise ValueError(
            f"y has shape {array.shape}: give an array (b,) or (b, tasks), or a dict, a DataFrame "
            "or an Arrow table with the targets of each task by name"
        )
    columns = array.T if array.ndim == 2 else [array]
    return {str(task): column for task, column in enumerate(columns)}, array.ndim


def targets_of(y: Any, rows: int) -> dict[str, np.ndarray]:
    """The targets of each task.

    Raises:
        ValueError: ``y`` names no tasks, one twice, or not by a string, or a task has no target for
            each row.
    """
    found: dict[str, np.ndarray] = {}
    for name, given in by_name(y)[0].items():
        if not isinstance(name, str):
            raise ValueError(f"y: the name of a task is {name!r}: use a string")
        if name in found:
            raise ValueError(f"y: there are two tasks {name!r}: rename one")
        values = as_values(f"task {name!r}", given)
        if values.shape != (rows,):
            raise ValueError(f"task {name!r}: targets of shape {values.shape} for {rows} rows of X")
        found[name] = values
    if not found:
        raise ValueError("y: there is no task")
    return found


def in_order(settings: Settings, targets: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The targets, in the order of the chain if there is one.

    Raises:
        ValueError: the chain does not name each task once, or the architecture has none.
    """
    chained = settings.architecture in CHAINS
    if settings.chain is None and not chained:
        return targets
    if not chained:
        raise ValueError(
            f"chain: {settings.architecture!r} has none: leave it out, or use 'esmm' or 'aitm'"
        )
    chain = [] if settings.chain is None else list(settings.chain)
    if sorted(map(str, chain)) != sorted(targets):
        raise ValueError(
            f"chain={settings.chain}: name each task once, in the order of their events: "
            f"{list(targets)}"
        )
    return {name: targets[name] for name in chain}


def new_tasks(
    settings: Settings, given: Split, categories: Collection[str]
) -> tuple[dict[str, Task], list[str]]:
    """The tasks, and those of whole numbers that look like regressions, to warn of.

    Args:
        categories: tasks whose targets are categories of pandas, which are classifications.

    Raises:
        ValueError: ``kinds`` names no task of these, or a kind that there is not; or the targets of
            a task do not fit its kind.
    """
    targets, weight = given.targets, given.sample_weight
    kinds = dict.fromkeys(categories, "classification") | dict(settings.kinds or {})
    found: dict[str, Task] = {}
    problems = []
    for name in kinds:
        if name not in targets:
            raise ValueError(f"kinds: there is no task {name!r}, only {sorted(targets)}")
    for name, labeled in labels_of(targets).items():
        default = kind_of(targets[name], labeled)
        kind = kinds.get(name, default if default in settings._kinds else settings._kinds[0])
        if kind not in settings._kinds:
            choices = ", ".join(settings._kinds)
            other = " or MultiTaskEstimator" if kind in list(KINDS) else ""
            raise ValueError(f"kinds: task {name!r}: {kind!r}: use {choices}{other}")
        task = found[name] = KINDS[kind](name, targets[name], labeled, weight)
        if name in kinds or len(settings._kinds) == 1 or not is_numeric(targets[name]):
            continue
        n = int(labeled.sum())
        if isinstance(task, Classification) and len(task.classes) > min(MANY, n / 2):
            problems.append(
                f"task {name!r}: the numbers are {len(task.classes)} classes of {n} targets: "
                f'for a regression, use MultiTaskEstimator(kinds={{{name!r}: "regression"}}); '
                f'for classes, kinds={{{name!r}: "classification"}} says so'
            )
    return found, problems


def labels_of(targets: Mapping[str, np.ndarray]) -> dict[str, Bool[np.ndarray, "b"]]:
    """Whether a target is there, for each task.

    Raises:
        ValueError: a task has none.
    """
    found = {name: ~is_missing(values) for name, values in targets.items()}
    for name, known in found.items():
        if not known.any():
            raise ValueError(f"task {name!r}: all targets are missing: leave the task out")
    return found


def kind_of(targets: np.ndarray, labeled: np.ndarray) -> str:
    """The kind by default: "regression" for numbers of three kinds, "classification" for others.

    They are a regression if one has a fraction; if one is above 2^53, or below -2^53; or if more
    than ``FEW`` of them, and more than half, are distinct. Infinite ones are a regression, too,
    which refuses them.
    """
    if not is_numeric(targets):
        return "classification"
    known = targets[labeled]
    values = known.astype(np.float64)
    known = values if known.dtype.kind == "f" else known  # float64 rounds 2^53 + 1
    whole = (known <= 2**53) & (known >= -(2**53)) & (values == np.round(values))
    many = len(np.unique(values)) > max(FEW, len(values) / 2)
    return "regression" if many or not whole.all() else "classification"


def filled(architecture: str, tasks: Mapping[str, Task], split: Split, place: str) -> Split:
    """Rows with the targets of a chain that follow: where an event did not happen, no later did.

    Args:
        architecture: of the model.
        tasks: in the order of the chain, if there is one.
        split: with targets of some or all of the tasks.
        place: which rows these are, for the error.

    Raises:
        ValueError: a task is no event, or an event happened without one before.
    """
    if architecture not in CHAINS:
        return split
    targets = split.targets
    found = dict(targets)
    before, without = "", np.zeros(len(next(iter(targets.values()))), bool)
    for name in (name for name in tasks if name in targets):
        task, known = tasks[name], ~is_missing(targets[name])
        if not isinstance(task, Classification) or task.size != 1:
            raise ValueError(
                f"chain: task {name!r} is no event: give two classes, such as False and True"
            )
        codes = np.full(len(known), -1)
        codes[known] = task.codes(targets[name][known])
        if len(wrong := np.flatnonzero(without & (codes == 1))):
            raise ValueError(
                f"chain: {place} row {split.numbers[wrong[0]]} has {name!r} without {before!r}: "
                "correct it, or the order of the chain"
            )
        if (follows := without & ~known).any():
            values, first = targets[name], task.classes[0]
            if values.dtype.kind == "O" or not known.any():  # no numbers beside text or dates
                values, first = values.astype(object), as_list(task.classes)[0]
            found[name] = np.where(follows, first, values)
        before, without = name, without | (codes == 0)
    return split._replace(targets=found)


def task_named(argument: str, name: str, tasks: Mapping[str, Task]) -> Task:
    """The task that an argument names.

    Raises:
        ValueError: there is no such task.
    """
    if name not in tasks:
        raise ValueError(f"{argument}: there is no task {name!r}, only {list(tasks)}")
    return tasks[name]


def loss_weights(settings: Settings, tasks: Mapping[str, Task]) -> list[float]:
    """The factor of each task's loss.

    Raises:
        ValueError: a weight is no positive number, or that of no task.
    """
    given = settings.task_weights or {}
    for name, weight in given.items():
        task_named("task_weights", name, tasks)
        if not (isinstance(weight, Real) and 0 < weight < np.inf):
            raise ValueError(f"task_weights: task {name!r}: {weight}: use a positive number")
    return [float(given.get(name, 1.0)) for name in tasks]


def class_weights(
    settings: Settings, tasks: Mapping[str, Task], given: Split
) -> dict[str, np.ndarray]:
    """The weights of the classes, for the tasks that have some.

    Raises:
        ValueError: ``class_weight`` names no classification, or its classes do not fit.
    """
    wanted = settings.class_weight
    if wanted is None:
        return {}
    if isinstance(wanted, str):
        wanted = {k: wanted for k, task in tasks.items() if isinstance(task, Classification)}
    found = {}
    for name, of_class in wanted.items():
        task = task_named("class_weight", name, tasks)
        if not isinstance(task, Classification):
            raise ValueError(f"class_weight: task {name!r} is no classification: leave it out")
        found[name] = task.class_weights(of_class, given.targets[name], given.sample_weight)
    return found
