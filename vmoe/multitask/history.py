"""The curves of a training run: what is measured after an epoch, and how it is shown."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vmoe.multitask.splits import Split
from vmoe.multitask.targets import task_named
from vmoe.multitask.tasks import Task
from vmoe.multitask.training import Epoch
from vmoe.multitask.values import is_missing

LOSS = "loss"


class Watch:
    """Measures epochs, and judges them by what is monitored."""

    def __init__(
        self,
        monitor: str | Sequence[str],
        scoring: Mapping[str, str] | None,
        tasks: Mapping[str, Task],
        weights: Sequence[float],
        held_out: Split | None,
    ):
        """
        Args:
            monitor, scoring: see ``MultiTaskEstimator``.
            weights: the factor of each task's loss in the sum of losses.
            held_out: the validation rows; None if there are none, and the last epoch is the best.

        Raises:
            ValueError: there is no such task, or nothing to monitor it on.
        """
        self.tasks, self.weights, self.held_out = tasks, weights, held_out
        metrics = metrics_of(tasks, scoring)
        self._scorers = {
            name: scorer_of(tasks[name], held_out, metric)
            for name, metric in metrics.items()
            if held_out is not None
        }
        self._named, self._task, self._metric = set(scoring or {}), None, LOSS
        if isinstance(monitor, str):
            return
        if len(monitor) != 2 or not all(isinstance(name, str) for name in monitor):
            raise ValueError(
                f"monitor={monitor!r}: use {LOSS!r}, or a tuple of a task and a metric"
            )
        if held_out is None:
            raise ValueError(
                f"monitor={monitor!r} needs validation rows: use a validation_fraction above 0"
            )
        self._task, self._metric = monitor
        self._monitored = scorer_of(
            task_named("monitor", self._task, tasks), held_out, self._metric
        )

    def row_of(self, epoch: Epoch) -> dict[str, Any]:
        """What the history has of an epoch.

        Raises:
            ValueError: a metric that ``scoring`` or ``monitor`` names is undefined.
        """
        row: dict[str, Any] = {
            "train": self._by_task(epoch.train.tasks),
            "gates": float(epoch.train.gates),
        }
        if epoch.validation is None:
            return row
        losses, outputs = jax.device_get(epoch.validation)
        by_name = dict(zip(self.tasks, outputs, strict=True))
        row["validation"] = self._by_task(losses.tasks)
        if not np.isfinite(losses.tasks).all():
            return row  # there is nothing to score, and training ends with an error
        row["scores"] = {name: self._score(name, by_name[name]) for name in self.tasks}
        if self._task is None:
            row["monitor"] = float(np.dot(self.weights, list(row["validation"].values())))
        elif self._metric == LOSS:
            row["monitor"] = row["validation"][self._task]
        else:
            row["monitor"] = self._monitored(by_name[self._task])
        return row

    def _by_task(self, losses: Any) -> dict[str, float]:
        return dict(zip(self.tasks, np.asarray(losses).tolist(), strict=True))

    def _score(self, name: str, outputs: np.ndarray) -> float:
        """The score on the validation rows; NaN for a default metric that is undefined."""
        try:
            return self._scorers[name](outputs)
        except ValueError:
            if name in self._named:
                raise
            return np.nan

    def goodness(self, row: Mapping[str, Any]) -> float:
        """How good an epoch is; more is better. Without validation rows a later one is better."""
        if self.held_out is None:
            return row["epoch"]
        return -row["monitor"] if self._metric == LOSS else row["monitor"]


def metrics_of(tasks: Mapping[str, Task], scoring: Mapping[str, str] | None) -> dict[str, str]:
    """The name of the metric of each task.

    Args:
        scoring: by name of the task; the others have the metric of their kind.
    """
    for name in scoring or {}:
        task_named("scoring", name, tasks)
    return {name: task.metric for name, task in tasks.items()} | dict(scoring or {})


def scorer_of(task: Task, split: Split, metric: str) -> Callable[[np.ndarray], float]:
    """The score of a task's outputs over the rows with a target, which are encoded once."""
    targets, weight = split.targets[task.name], split.sample_weight
    labeled = ~is_missing(targets)
    weight = None if weight is None else weight[labeled]
    truth = functools.cache(lambda: task.truth(targets[labeled], metric))
    return lambda outputs: task.score(truth(), outputs[labeled], metric, weight)


def line_of(row: Mapping[str, Any], max_epochs: int | None) -> str:
    """The line that is printed for an epoch.

    Args:
        row: of ``MultiTaskEstimator.history_``.
        max_epochs: None if the number of epochs is not known.
    """
    parts = [f"epoch {row['epoch']}" + (f"/{max_epochs}" if max_epochs else "")]
    for name in ("train", "validation", "scores"):
        if values := row.get(name):
            listed = ", ".join(f"{task} {value:.4f}" for task, value in values.items())
            parts.append(f"{name} {listed}")
    return "  ".join([*parts, f"{row['seconds']:.1f} s"])


def plot_history(model: Any, *, axes: Any = None) -> Any:
    """Draws the losses of each task by epoch, and its score on the validation rows at the right.

    A vertical line is the epoch whose parameters were kept.

    Args:
        model: a fitted estimator of `vmoe.multitask`.
        axes: axes of matplotlib, one for each task; new ones if None.

    Returns:
        the axes of the losses.
    """
    tasks, history = list(model.tasks_), model.history_
    if axes is None:
        import matplotlib.pyplot as plt

        size = (4.2 * len(tasks) + 0.4, 3.4)
        axes = plt.figure(figsize=size, layout="constrained").subplots(1, len(tasks))
    epochs = [row["epoch"] for row in history]

    def curve(kind: str, name: str) -> list[float]:
        return [row.get(kind, {}).get(name, np.nan) for row in history]  # some epochs have none

    for name, ax in zip(tasks, np.atleast_1d(axes), strict=True):
        for split, color in (("train", "C7"), ("validation", "C0")):
            losses = curve(split, name)
            if not np.isnan(losses).all():
                ax.plot(epochs, losses, color, label=split)
        scores = curve("scores", name)
        if not np.isnan(scores).all():
            right = ax.twinx()
            right.plot(epochs, scores, "C1--")
            right.set_ylabel(model.metric_of(name), color="C1")
        ax.axvline(model.n_epochs_, color="k", linewidth=0.8, linestyle=":", label="kept")
        ax.set(title=name, xlabel="epoch", ylabel="loss")
        ax.xaxis.get_major_locator().set_params(integer=True)
        # below the panel, where no curve is
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, frameon=False)
    return axes
