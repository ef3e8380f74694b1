"""A fit: from rows with targets to a model, what trains it, and the epoch that is kept."""

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from vmoe.multitask.build import BodyConfig, new_model
from vmoe.multitask.columns import Table, TableEncoder, TableRows
from vmoe.multitask.expert_use import equal_experts
from vmoe.multitask.history import Watch, line_of
from vmoe.multitask.model import MultiTask
from vmoe.multitask.settings import Settings
from vmoe.multitask.splits import Split, data_at, drawn
from vmoe.multitask.targets import class_weights, loss_weights
from vmoe.multitask.tasks import Task
from vmoe.multitask.training import (
    Data,
    Epoch,
    Trainer,
    TrainerState,
    adamw,
    with_numbers,
    with_settings,
)
from vmoe.multitask.weighting import new_weighting


def divided(
    settings: Settings,
    tasks: Mapping[str, Task],
    given: Split,
    held_out: Split | None,
    random: np.random.Generator,
) -> tuple[Split, Data, Split | None, Data | None]:
    """The rows to train with and those of validation, each with their encoded targets.

    Args:
        held_out: the rows of validation; None to draw some, if there shall be any.
    """
    of_classes = class_weights(settings, tasks, given)
    data = given.data(tasks, of_classes, "training")
    if held_out is not None:
        return given, data, held_out, held_out.data(tasks, of_classes, "validation")
    if not settings.validation_fraction:
        return given, data, None, None
    rows, others = drawn(tasks, data, settings.validation_fraction, random)
    return (
        given.at(rows),
        data_at(rows, tasks, data, "training"),
        given.at(others),
        data_at(others, tasks, data, "validation"),
    )


def prepared(
    settings: Settings,
    tasks: Mapping[str, Task],
    given: Split,
    problems: Iterable[str],
    random: np.random.Generator,
) -> tuple[TableEncoder, Table, MultiTask, list[str]]:
    """An encoder with its rows, a new model, and experts of it that are equal.

    Args:
        problems: of the tasks, to warn of.
    """
    encoder = TableEncoder(
        embedding_size=settings.embedding_size,
        min_frequency=settings.min_frequency,
        hash_buckets=settings.hash_buckets,
        shared_embeddings=settings.shared_embeddings,
    )
    inputs = encoder.fit_transform(given.X, settings.categorical, given.sample_weight)
    seed = int(random.integers(2**31))
    model = model_of(settings, encoder, tasks, seed, float(settings.dropout))
    found = list(equal_experts(model))
    for problem in [*problems, *encoder.problems, *found]:
        warnings.warn(problem, UserWarning, stacklevel=4)  # fit, scikit-learn, the user
    return encoder, inputs, model, found


def model_of(
    settings: Settings,
    encoder: TableEncoder,
    tasks: Mapping[str, Task],
    seed: int,
    dropout: float = 0.0,
) -> MultiTask:
    """A new model."""
    units = settings.units("expert_units")
    if settings.architecture == "cross_stitch" and (settings.expert or not units):
        raise ValueError(
            "cross_stitch makes its layers from expert_units: give at least one, and leave out "
            "expert"
        )
    if settings.architecture != "shared_bottom" and not (settings.expert or units):
        raise ValueError(
            "expert_units=(): experts without a layer are all the same function: give at least "
            "one size"
        )
    if settings.gate != "softmax" and settings.gate_temperature != 1:
        raise ValueError(
            f"gate_temperature={settings.gate_temperature}: {settings.gate!r} has none: use 1, or "
            "gate='softmax'"
        )
    rngs = nnx.Rngs(seed)
    inputs = TableRows(encoder, rngs=rngs)
    config = BodyConfig(
        tasks=len(tasks),
        units=units,
        experts=settings.n_experts,
        task_experts=settings.n_task_experts,
        layers=settings.n_layers,
        gate=settings.gate,
        gate_units=settings.units("gate_units"),
        gate_temperature=settings.gate_temperature,
        k=settings.k,
        entropy_weight=settings.entropy_weight,
        calibrator_weight=settings.calibrator_weight,
        expert=settings.expert,
        dropout=dropout,
    )
    outputs = {name: task.size for name, task in tasks.items()}
    towers = settings.units("tower_units")
    return new_model(
        settings.architecture, config, inputs.width, outputs, towers, inputs, rngs=rngs
    )


def trainer_of(
    settings: Settings,
    tasks: Mapping[str, Task],
    graph: nnx.GraphDef,
    begin: nnx.State | TrainerState,
    rows: int,
) -> tuple[Trainer, TrainerState]:
    """What trains a model, and the state before the first step.

    Args:
        begin: the parameters of a new model, or the state of training that continues.
        rows: number of rows of an epoch.
    """
    weighting = new_weighting(settings.weighting, settings.weighting_params)
    losses = tuple(task.loss for task in tasks.values())
    trainer = Trainer(graph, losses, weighting, adamw(settings.schedule))
    state = begin if isinstance(begin, TrainerState) else trainer.init(begin)
    state = with_settings(state, loss_weights(settings, tasks), settings.ema_decay)
    steps = settings.max_epochs * -(-rows // settings.batch_size)
    return trainer, with_numbers(state, settings.learning_rate, settings.weight_decay, steps)


def trained(
    settings: Settings,
    epochs: Iterable[Epoch],
    watch: Watch,
    callbacks: Sequence[Callable[[dict[str, Any]], Any]],
) -> tuple[nnx.State, list[dict[str, Any]], int]:
    """Trains until ``monitor`` does not become better.

    Returns:
        the parameters of the best epoch, the history, and the number of the best epoch.
    """
    started, history = time.perf_counter(), list[dict[str, Any]]()
    best, kept, at = -np.inf, None, 0
    for number, epoch in enumerate(epochs, 1):
        history.append(row := row_of(settings, watch, epoch, number, started, settings.max_epochs))
        if kept is None or watch.goodness(row) > best:
            best, kept, at = watch.goodness(row), epoch.params, number
        stops = [callback(row) for callback in callbacks]
        if any(stops) or number - at >= settings.patience or number == settings.max_epochs:
            break
    return kept, history, at


def row_of(
    settings: Settings,
    watch: Watch,
    epoch: Epoch,
    number: int,
    started: float,
    max_epochs: int | None,
) -> dict[str, Any]:
    """The row of an epoch in the history, which is printed.

    Args:
        started: when training began, by ``time.perf_counter``.
        max_epochs: None if it is not known.

    Raises:
        ValueError: a loss is not finite.
    """
    row: dict[str, Any] = {"epoch": number, **watch.row_of(epoch)}
    row["seconds"] = time.perf_counter() - started
    for split in ("train", "validation"):
        for name, loss in row.get(split, {}).items():
            if not np.isfinite(loss):
                raise ValueError(
                    f"the {split} loss of task {name!r} is {loss} in epoch {number}: use a lower "
                    f"learning_rate than {settings.learning_rate:g}"
                )
    if settings.verbose:
        print(line_of(row, max_epochs), flush=True)
    return row
