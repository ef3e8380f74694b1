"""Models of several tasks for tables, with the methods of scikit-learn's estimators."""

import copy
import functools
import itertools
import os
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float
from scipy.special import log_expit
from sklearn.base import BaseEstimator, _fit_context
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted, validate_data

from vmoe import forks
from vmoe.multitask import saved
from vmoe.multitask.build import ARCHITECTURES, CHAINS, BodyConfig, new_model
from vmoe.multitask.chains import filled
from vmoe.multitask.columns import SIZE, Table, TableEncoder, TableRows, rows_of
from vmoe.multitask.expert_use import equal_experts, unused_experts
from vmoe.multitask.history import Watch, line_of, metrics_of, scorer_of
from vmoe.multitask.model import MultiTask
from vmoe.multitask.splits import Split, data_at, drawn, split_of
from vmoe.multitask.tasks import (
    KINDS,
    LEAST,
    UNBOUNDED,
    Classification,
    Task,
    kind_of,
    labels_of,
    targets_of,
    task_named,
)
from vmoe.multitask.training import (
    EVAL_BATCH_SIZE,
    SCHEDULES,
    Data,
    Epoch,
    Trainer,
    TrainerState,
    adamw,
    forward,
    with_numbers,
    with_settings,
    without_streams,
)
from vmoe.multitask.values import as_pandas, is_category, is_numeric
from vmoe.multitask.weighting import WEIGHTINGS, new_weighting

AT_LEAST_1 = Interval(Integral, 1, None, closed="left")
AT_LEAST_0 = Interval(Real, 0, None, closed="left")
POSITIVE = Interval(Real, 0, None, closed="neither")
KEPT = ("weighting", "dropout", "entropy_weight", "calibrator_weight")
"""Settings of the program of a training step, in addition to those of the model."""


class Setup(NamedTuple):
    """What training begins with.

    Attributes:
        inputs: the encoded rows.
        state: before the first step.
        findings: experts that are equal.
    """

    encoder: TableEncoder
    inputs: Table
    trainer: Trainer
    state: TrainerState
    findings: list[str]


@dataclass(eq=False, repr=False)
class MultiTaskEstimator(BaseEstimator):
    """Several tasks on the rows of a table: classifications, regressions and counts.

    Args:
        architecture: "mmoe", a gate over the experts for each task (Ma et al. 2018); "one_gate",
            one gate for all; "shared_bottom", one network for all; "cross_stitch" (Misra et al.
            2016); "cgc" and "ple", experts of each task beside shared ones (Tang et al. 2020). For
            a ``chain``: "esmm", a network for each task, whose probabilities are multiplied (Ma et
            al. 2018, arXiv 1804.07931); "aitm", networks that pass on their features (Xi et al.
            2021). With one task, "shared_bottom" is a plain network.
        chain: for "esmm" and "aitm", the names of all tasks in the order of their events, such as
            ``("click", "purchase")``. An event is the second class, such as True, and needs the one
            before: where that did not happen, a missing target counts as False.
        kinds: "classification", "regression" or "count" by name of the task. By default a task
            whose targets have fractions is a regression, and any other a classification, with a
            warning if its numbers are many; so is one of pandas' type "category".
        n_experts: number of experts that tasks share.
        n_task_experts: number of experts of each task in "cgc" and "ple".
        n_layers: layers of "ple".
        expert_units: sizes of an expert's layers, each with a ReLU; for "shared_bottom" and
            "cross_stitch", "esmm" and "aitm" those of the networks.
        tower_units: sizes of the hidden layers of each task's tower.
        expert: makes an expert, ``expert(width, rngs=rngs)``, from rows f[b width] to features; by
            default ReLU layers of ``expert_units``. Not for "cross_stitch".
        gate: "softmax" of a linear function, or "dselect_k" (Hazimeh et al. 2021).
        gate_units: sizes of the hidden layers of a gate, each with a ReLU.
        gate_temperature: divides the logits of "softmax"; the higher, the more equal are the
            weights of the experts.
        k: number of experts that "dselect_k" selects for a row.
        entropy_weight: weight of the entropy of "dselect_k" in the loss; a larger one makes the
            gate sparse sooner.
        calibrator_weight: weight of the calibrator of "aitm" in the loss: of the rise of the
            probability from an event to the next one.
        embedding_size: size of a category's embedding, or sizes by column; 8 for others.
        categorical: names or indices of all categorical columns; by default those columns of a
            DataFrame that are not numbers, or have pandas' type "category". Dates are categories.
            The values of a column may be lists; the embedding is then the mean of their values'.
        min_frequency: the number of rows of ``fit`` that a category has at least. Others share the
            embedding of missing and unknown ones.
        hash_buckets: for columns with very many categories, or new ones: the number of values of a
            hash, by column, which replaces the categories. Those of one hash share an embedding.
        shared_embeddings: lists of columns with the same categories, which share their embeddings.
        weighting: how the tasks' losses are weighted: "fixed", "uncertainty" (Kendall et al. 2018),
            "gradnorm" (Chen et al. 2018) or "dynamic_average" (Liu et al. 2019).
        weighting_params: settings of the weighting by name: "learning_rate" of the weights of
            "uncertainty" and "gradnorm", "alpha" of "gradnorm", "temperature" of "dynamic_average".
        task_weights: a factor of the loss by name of the task; 1 for all others.
        class_weight: weights of classes in the losses, of training and validation: by name of the
            task "balanced" or a dict by class; or "balanced" for all classifications.
        dropout: rate of dropout after each layer of ``expert_units`` and ``tower_units``.
        learning_rate: learning rate of Adam, at the start.
        schedule: how the learning rate changes over ``max_epochs``: "constant", or to 0 by "cosine"
            or "linear".
        ema_decay: decay at each step of an exponential moving average of the parameters, such as
            0.999, which is then evaluated and kept; None for no average.
        weight_decay: as in AdamW, of the kernels of experts, networks and towers. Biases,
            embeddings, gates and cross-stitch matrices have none.
        batch_size: rows of a training step.
        max_epochs: passes over the rows at most.
        monitor: what chooses the epoch whose parameters are kept: "loss", the sum of the tasks'
            mean losses on the validation rows, times ``task_weights``; or a tuple of a task and a
            metric of it, "loss" or one of ``scoring``.
        patience: epochs in which ``monitor`` does not become better, after which training ends.
        scoring: the metric of a task by its name: the name of a scorer of scikit-learn, such as
            "roc_auc" or "neg_mean_absolute_error", or "d2_poisson". By default "accuracy" for
            classifications, "r2" for regressions, and "d2_poisson", D², for counts.
        validation_fraction: share of the rows of ``fit`` that is drawn as the validation split, if
            none is given; 0 to train for ``max_epochs`` without one. The draw is stratified by the
            classes and missing targets of the first task, within them by those of the second, and
            so on. The classes, and the scale of targets, are those of all rows.
        random_state: seed of the parameters, the order of the rows and the validation split.
        verbose: 1 prints a line for each epoch.

    Attributes:
        tasks_: the tasks by name; a classification has ``classes``.
        model_: the trained `MultiTask`, a module of Flax NNX.
        n_parameters_: number of parameters.
        history_: for each epoch "epoch", "seconds" of training so far, "gates", the mean loss of
            the gates or of the calibrator of "aitm", and "train", the mean losses by task; of the
            validation rows "validation", the mean losses by task, "scores", the metrics by task,
            NaN where one is undefined, and "monitor". See `plot_history`.
        n_epochs_: number of epochs after which the parameters were kept.
        expert_names_: the experts in the order of ``expert_use``: "0", "1", ...; for "cgc" and
            "ple" those of the last layer: "income 0", ..., "shared 0", ...; none without gates.
        findings_: experts whose initial parameters were equal.
        n_features_in_: number of columns.
        feature_names_in_: their names, if ``fit`` got a DataFrame.
    """

    architecture: str = "mmoe"
    _: KW_ONLY
    kinds: Mapping[str, str] | None = None
    chain: Any = None
    n_experts: int = 8
    n_task_experts: int = 2
    n_layers: int = 2
    expert_units: Any = (16,)
    tower_units: Any = (8,)
    expert: Callable[..., nnx.Module] | None = None
    gate: str = "softmax"
    gate_units: Any = ()
    gate_temperature: Any = 1.0
    k: int = 2
    entropy_weight: Any = 0.01
    calibrator_weight: Any = 0.6
    embedding_size: Any = SIZE
    categorical: Any = None
    min_frequency: int = 1
    hash_buckets: Mapping[Any, int] | None = None
    shared_embeddings: Any = None
    weighting: str = "fixed"
    weighting_params: Mapping[str, float] | None = None
    task_weights: Mapping[str, float] | None = None
    class_weight: Any = None
    dropout: Any = 0.0
    learning_rate: Any = 1e-3
    schedule: str = "constant"
    ema_decay: float | None = None
    weight_decay: Any = 0.0
    batch_size: int = 256
    max_epochs: int = 100
    monitor: Any = "loss"
    patience: int = 10
    scoring: Mapping[str, str] | None = None
    validation_fraction: Any = 0.1
    random_state: Any = None
    verbose: int = 0

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "architecture": [StrOptions(set(ARCHITECTURES))],
        "kinds": [Mapping, None],
        "chain": ["array-like", None],
        "n_experts": [AT_LEAST_1],
        "n_task_experts": [AT_LEAST_1],
        "n_layers": [AT_LEAST_1],
        "expert_units": ["array-like"],
        "tower_units": ["array-like"],
        "expert": [callable, None],
        "gate": [StrOptions({"softmax", "dselect_k"})],
        "gate_units": ["array-like"],
        "gate_temperature": [POSITIVE],
        "k": [AT_LEAST_1],
        "entropy_weight": [AT_LEAST_0],
        "calibrator_weight": [AT_LEAST_0],
        "embedding_size": [AT_LEAST_1, Mapping],
        "categorical": ["array-like", None],
        "min_frequency": [AT_LEAST_1],
        "hash_buckets": [Mapping, None],
        "shared_embeddings": [list, tuple, None],
        "weighting": [StrOptions(set(WEIGHTINGS))],
        "weighting_params": [Mapping, None],
        "task_weights": [Mapping, None],
        "class_weight": [StrOptions({"balanced"}), Mapping, None],
        "dropout": [Interval(Real, 0, 1, closed="left")],
        "learning_rate": [POSITIVE],
        "schedule": [StrOptions(set(SCHEDULES))],
        "ema_decay": [Interval(Real, 0, 1 - 2**-24, closed="neither"), None],
        "weight_decay": [AT_LEAST_0],
        "batch_size": [AT_LEAST_1],
        "max_epochs": [AT_LEAST_1],
        "monitor": [StrOptions({"loss"}), "array-like"],
        "patience": [AT_LEAST_1],
        "scoring": [Mapping, None],
        "validation_fraction": [Interval(Real, 0, 1, closed="left")],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }
    _kinds = tuple(KINDS)
    _most_classes: ClassVar[float] = 30
    """As many whole numbers are classes by default without a warning."""

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Any = None,
        *,
        validation: Any = None,
        callbacks: Iterable[Callable[[dict[str, Any]], Any]] = (),
    ) -> "MultiTaskEstimator":
        """Trains the model.

        Args:
            X: rows (b, columns): a DataFrame, a table or record batch of pyarrow, or an array.
            y: the targets of each task by name: a dict of arrays (b,), a DataFrame, or a table of
                pyarrow. A target that is NaN, None or NA is missing, and counts in no loss.
            sample_weight: how much each row (b,) counts, from 0 on; None for 1. An integer counts
                as the row that often, in the losses, the scales and the scores; but an epoch has
                the steps of the rows that there are, the loss of "dselect_k" has no weights, and a
                row is in one split. So models are equal only if a batch has all rows. A row of
                weight 0 is left out.
            validation: a tuple of X and y of a validation split, and sample weights if they differ;
                by default some of the rows.
            callbacks: functions that get the row of ``history_`` after each epoch. If any of them
                returns a true value, training ends.

        Raises:
            ValueError: an argument is wrong; the message names the task or the column. Or this
                process was forked from one in which JAX had run, in which ``predict`` and others
                raise it too.
        """
        forks.computes()
        X, y = rows_of(X), as_pandas(y)
        new = copy.copy(self)  # what was fitted before stays until this fit succeeds
        validate_data(new, X, reset=True, skip_check_array=True)
        given = split_of(X, self._in_order(targets_of(y, len(X))), sample_weight)
        random = np.random.default_rng(check_random_state(self.random_state).randint(2**31))
        tasks, problems = self._make_tasks(
            given.targets,
            {name for name in given.targets if is_category(y[name])},
            given.sample_weight,
        )
        weights = self._weights(tasks)
        given = self._filled(given, tasks, "training")
        given, train, held_out, validated = new._splits(given, validation, tasks, random)
        watch = Watch(self.monitor, self.scoring, tasks, weights, held_out)
        setup = self._begin(given, tasks, problems, random)
        train = jax.device_put(train._replace(inputs=setup.inputs))
        if held_out is not None and validated is not None:
            validated = validated._replace(inputs=setup.encoder.transform(held_out.X))
            validated = jax.device_put(validated)
        trainer, state = setup.trainer, setup.state
        epochs = trainer.epochs(state, train, validated, random, self.batch_size)
        params, new.history_, new.n_epochs_ = self._train(epochs, watch, list(callbacks))
        new._keep(nnx.merge(trainer.graph, params), setup.encoder, tasks, setup.findings)
        new._training = None
        self.__dict__ = new.__dict__
        return self

    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> "MultiTaskEstimator":
        """Trains for one pass over rows, such as a batch of a table that is too large for memory.

        The first call learns scales, categories and classes, unless there is a fitted model; so its
        rows should be many, and drawn at random. Categories that come later are unknown, except in
        columns of ``hash_buckets``. There is no validation split, and ``history_`` gets a row.
        After ``fit`` or ``load``, the moments of Adam, averages and what the weighting has learned
        start anew. These settings may change between two calls: ``learning_rate``,
        ``weight_decay``, ``ema_decay``, ``batch_size``, ``weighting_params``, ``task_weights`` and
        ``class_weight``.

        Args:
            X: as in ``fit``; some of the rows have a target of each task.
            y: as in ``fit``.
            sample_weight: as in ``fit``.

        Raises:
            ValueError: an argument is wrong, a setting needs all rows, or one was changed that
                decides the model or the program of a training step.
        """
        forks.computes()
        self._check_partial()
        started = time.perf_counter()
        X, y = rows_of(X), as_pandas(y)
        new, first = copy.copy(self), not hasattr(self, "model_")
        validate_data(new, X, reset=first, skip_check_array=True)
        given = split_of(X, self._in_order(targets_of(y, len(X))), sample_weight)
        random = np.random.default_rng(check_random_state(self.random_state).randint(2**31))
        if first:
            categories = {name for name in given.targets if is_category(y[name])}
            tasks, problems = self._make_tasks(given.targets, categories, given.sample_weight)
            setup, new.history_ = self._begin(given, tasks, problems, random), []
        else:
            tasks = self.tasks_
            setup, random = self._resumed(given, random)
        given = self._filled(given, tasks, "training")
        train = given.data(tasks, self._class_weights(tasks, given), "training")
        train = jax.device_put(train._replace(inputs=setup.inputs))
        epochs = setup.trainer.epochs(setup.state, train, None, random, self.batch_size)
        epoch = next(epochs)
        watch = Watch("loss", None, tasks, self._weights(tasks), None)
        row = {"epoch": len(new.history_) + 1, **watch.row_of(epoch)}
        before = new.history_[-1]["seconds"] if new.history_ else 0.0
        row["seconds"] = before + time.perf_counter() - started
        self._check_and_report(row, None)
        new.history_, new.n_epochs_ = [*new.history_, row], row["epoch"]
        graph = setup.trainer.graph
        new._keep(nnx.merge(graph, epoch.params), setup.encoder, tasks, setup.findings)
        new._training = graph, epoch.state, random, {name: getattr(self, name) for name in KEPT}
        self.__dict__ = new.__dict__
        return self

    def _check_partial(self) -> None:
        """Raises a ValueError if a setting needs all rows."""
        weights = self.class_weight
        given = weights.values() if isinstance(weights, Mapping) else [weights]
        if any(isinstance(each, str) for each in given):
            raise ValueError("class_weight='balanced' needs all rows: give partial_fit a dict")
        if self.schedule != "constant":
            raise ValueError(
                f"schedule={self.schedule!r} needs the number of steps: partial_fit has 'constant'"
            )

    def _resumed(
        self, given: Split, random: np.random.Generator
    ) -> tuple["Setup", np.random.Generator]:
        """What training continues with, after ``partial_fit``, ``fit`` or ``load``."""
        saved.check_settings(self)
        inputs, found = self._encoder.transform(given.X), self.findings_
        if self._training is not None:
            graph, state, random, kept = self._training
            for name, before in kept.items():
                if (value := getattr(self, name)) != before:
                    raise ValueError(
                        f"{name}={value!r}, and in the last partial_fit it was {before!r}: set it "
                        "back, or fit again"
                    )
            state = with_settings(state, self._weights(self.tasks_), self.ema_decay)
            state = self._with_numbers(state, len(given.X))
            trainer = self._trainer(graph, self.tasks_)
            return Setup(self._encoder, inputs, trainer, state, found), copy.deepcopy(random)
        seed = int(random.integers(2**31))
        model = self._new_model(self._encoder, self.tasks_, seed, float(self.dropout))
        nnx.update(model, nnx.state(self.model_, nnx.Param, graph=True))
        trainer, state = self._before(model, self.tasks_, len(given.X))
        return Setup(self._encoder, inputs, trainer, state, found), random

    def _begin(
        self,
        given: Split,
        tasks: Mapping[str, Task],
        problems: Iterable[str],
        random: np.random.Generator,
    ) -> "Setup":
        """An encoder, a new model and its trainer for some rows.

        Args:
            problems: of the tasks, to warn of.
        """
        encoder = TableEncoder(
            embedding_size=self.embedding_size,
            min_frequency=self.min_frequency,
            hash_buckets=self.hash_buckets,
            shared_embeddings=self.shared_embeddings,
        )
        inputs = encoder.fit_transform(given.X, self.categorical, given.sample_weight)
        seed = int(random.integers(2**31))
        model = self._new_model(encoder, tasks, seed, float(self.dropout))
        found = list(equal_experts(model))
        for problem in [*problems, *encoder.problems, *found]:
            warnings.warn(problem, UserWarning, stacklevel=4)  # fit, scikit-learn, the user
        trainer, state = self._before(model, tasks, len(given.X))
        return Setup(encoder, inputs, trainer, state, found)

    def _before(
        self, model: MultiTask, tasks: Mapping[str, Task], rows: int
    ) -> tuple[Trainer, TrainerState]:
        """What trains a model, and the state before the first step.

        Args:
            rows: number of rows of an epoch.
        """
        graph, params = nnx.split(model, graph=True)
        trainer = self._trainer(graph, tasks)
        state = trainer.init(params, self._weights(tasks), self.ema_decay)
        return trainer, self._with_numbers(state, rows)

    def _with_numbers(self, state: TrainerState, rows: int) -> TrainerState:
        steps = self.max_epochs * -(-rows // self.batch_size)
        return with_numbers(state, self.learning_rate, self.weight_decay, steps)

    def _trainer(self, graph: nnx.GraphDef, tasks: Mapping[str, Task]) -> Trainer:
        weighting = new_weighting(self.weighting, self.weighting_params)
        losses = tuple(task.loss for task in tasks.values())
        return Trainer(graph, losses, weighting, adamw(self.schedule))

    def _keep(
        self, model: MultiTask, encoder: TableEncoder, tasks: dict[str, Task], found: list[str]
    ) -> None:
        """Sets what is known after training."""
        self.model_ = without_streams(model)
        self.n_parameters_ = sum(x.size for x in jax.tree.leaves(nnx.state(model, graph=True)))
        self._encoder, self.tasks_, self.findings_ = encoder, tasks, found
        self.expert_names_ = self._expert_names()
        self._fixed = saved.fixed_settings(self)
        own = self.n_task_experts if self.architecture in ("cgc", "ple") else 0
        self._experts_seen = own + self.n_experts  # by the gate of a task

    def _splits(
        self,
        given: Split,
        validation: Any,
        tasks: Mapping[str, Task],
        random: np.random.Generator,
    ) -> tuple[Split, Data, Split | None, Data | None]:
        """The rows to train with and those of validation, each with their encoded targets."""
        class_weights = self._class_weights(tasks, given)
        data = given.data(tasks, class_weights, "training")
        if validation is not None:
            if not isinstance(validation, tuple) or len(validation) not in (2, 3):
                raise ValueError(
                    "validation: give a tuple of X and y, or of X, y and sample weights"
                )
            X = self._known(validation[0])
            weight = validation[2] if len(validation) == 3 else None
            held_out = split_of(X, targets_of(validation[1], len(X)), weight)
            held_out = self._filled(held_out, tasks, "validation")
            return given, data, held_out, held_out.data(tasks, class_weights, "validation")
        if not self.validation_fraction:
            return given, data, None, None
        rows, others = drawn(tasks, data, self.validation_fraction, random)
        return (
            given.at(rows),
            data_at(rows, tasks, data, "training"),
            given.at(others),
            data_at(others, tasks, data, "validation"),
        )

    def _class_weights(self, tasks: Mapping[str, Task], given: Split) -> dict[str, np.ndarray]:
        """The weights of the classes, for the tasks that have some."""
        if self.class_weight is None:
            return {}
        wanted = self.class_weight
        if isinstance(wanted, str):
            wanted = {k: wanted for k, task in tasks.items() if isinstance(task, Classification)}
        found = {}
        for name, of_class in wanted.items():
            task = task_named("class_weight", name, tasks)
            if not isinstance(task, Classification):
                raise ValueError(f"class_weight: task {name!r} is no classification: leave it out")
            found[name] = task.class_weights(of_class, given.targets[name], given.sample_weight)
        return found

    def _train(
        self,
        epochs: Iterable[Epoch],
        watch: Watch,
        callbacks: Sequence[Callable[[dict[str, Any]], Any]],
    ) -> tuple[nnx.State, list[dict[str, Any]], int]:
        """Trains until ``monitor`` does not become better.

        Returns:
            the parameters of the best epoch, the history, and the number of the best epoch.
        """
        started = time.perf_counter()
        history: list[dict[str, Any]] = []
        best, kept, at = -np.inf, None, 0
        for number, epoch in enumerate(epochs, 1):
            row = {"epoch": number, **watch.row_of(epoch)}
            row["seconds"] = time.perf_counter() - started
            history.append(row)
            self._check_and_report(row, self.max_epochs)
            if kept is None or watch.goodness(row) > best:
                best, kept, at = watch.goodness(row), epoch.params, number
            stops = [callback(row) for callback in callbacks]
            if any(stops) or number - at >= self.patience or number == self.max_epochs:
                break
        return kept, history, at

    def _in_order(self, targets: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The targets, in the order of the chain if there is one."""
        chained = self.architecture in CHAINS
        if self.chain is None and not chained:
            return targets
        if not chained:
            raise ValueError(
                f"chain: {self.architecture!r} has none: leave it out, or use 'esmm' or 'aitm'"
            )
        chain = [] if self.chain is None else list(self.chain)
        if sorted(map(str, chain)) != sorted(targets):
            raise ValueError(
                f"chain={self.chain}: name each task once, in the order of their events: "
                f"{list(targets)}"
            )
        return {name: targets[name] for name in chain}

    def _filled(self, split: Split, tasks: Mapping[str, Task], name: str) -> Split:
        """Rows with the targets that follow from others, if the tasks are a chain."""
        if self.architecture not in CHAINS:
            return split
        return split._replace(targets=filled(tasks, split.targets, name))

    def _known(self, X: Any) -> Any:
        """X, with the columns of ``fit``."""
        X = rows_of(X)
        validate_data(self, X, reset=False, skip_check_array=True)
        return X

    def _make_tasks(
        self,
        targets: Mapping[str, np.ndarray],
        categories: Collection[str],
        sample_weight: np.ndarray | None = None,
    ) -> tuple[dict[str, Task], list[str]]:
        """The tasks, and those of whole numbers that look like regressions, to warn of.

        Args:
            categories: tasks whose targets are categories of pandas, which are classifications.
        """
        kinds = dict.fromkeys(categories, "classification") | dict(self.kinds or {})
        found: dict[str, Task] = {}
        problems = []
        for name in kinds:
            if name not in targets:
                raise ValueError(f"kinds: there is no task {name!r}, only {sorted(targets)}")
        for name, labeled in labels_of(targets).items():
            kind = kinds[name] if name in kinds else self._default_kind(targets[name], labeled)
            if kind not in self._kinds:
                choices = ", ".join(self._kinds)
                other = " or MultiTaskEstimator" if kind in list(KINDS) else ""
                raise ValueError(f"kinds: task {name!r}: {kind!r}: use {choices}{other}")
            task = found[name] = KINDS[kind](name, targets[name], labeled, sample_weight)
            if name in kinds or not is_numeric(targets[name]):
                continue
            n = int(labeled.sum())
            if isinstance(task, Classification) and len(task.classes) > min(
                self._most_classes, n / 2
            ):
                problems.append(
                    f"task {name!r}: the numbers are {len(task.classes)} classes of {n} targets: "
                    f'for a regression, use MultiTaskEstimator(kinds={{{name!r}: "regression"}}); '
                    f'for classes, kinds={{{name!r}: "classification"}} says so'
                )
        return found, problems

    def _default_kind(self, targets: np.ndarray, labeled: np.ndarray) -> str:
        return kind_of(targets, labeled)

    def _weights(self, tasks: Mapping[str, Task]) -> list[float]:
        """The factor of each task's loss."""
        given = self.task_weights or {}
        for name, weight in given.items():
            task_named("task_weights", name, tasks)
            if not (isinstance(weight, Real) and 0 < weight < np.inf):
                raise ValueError(f"task_weights: task {name!r}: {weight}: use a positive number")
        return [float(given.get(name, 1.0)) for name in tasks]

    def _units(self, name: str) -> tuple[int, ...]:
        """Sizes of layers."""
        units = tuple(getattr(self, name))
        if not all(isinstance(size, int | np.integer) and size > 0 for size in units):
            raise ValueError(f"{name}={units}: use integers from 1 on")
        return tuple(int(size) for size in units)

    def _new_model(
        self, encoder: TableEncoder, tasks: Mapping[str, Task], seed: int, dropout: float = 0.0
    ) -> MultiTask:
        units = self._units("expert_units")
        if self.architecture == "cross_stitch" and (self.expert or not units):
            raise ValueError(
                "cross_stitch makes its layers from expert_units: give at least one, and leave out "
                "expert"
            )
        if self.architecture != "shared_bottom" and not (self.expert or units):
            raise ValueError(
                "expert_units=(): experts without a layer are all the same function: give at "
                "least one size"
            )
        if self.gate != "softmax" and self.gate_temperature != 1:
            raise ValueError(
                f"gate_temperature={self.gate_temperature}: {self.gate!r} has none: use 1, or "
                "gate='softmax'"
            )
        rngs = nnx.Rngs(seed)
        inputs = TableRows(encoder, rngs=rngs)
        config = BodyConfig(
            tasks=len(tasks),
            units=units,
            experts=self.n_experts,
            task_experts=self.n_task_experts,
            layers=self.n_layers,
            gate=self.gate,
            gate_units=self._units("gate_units"),
            gate_temperature=self.gate_temperature,
            k=self.k,
            entropy_weight=self.entropy_weight,
            calibrator_weight=self.calibrator_weight,
            expert=self.expert,
            dropout=dropout,
        )
        outputs = {name: task.size for name, task in tasks.items()}
        towers = self._units("tower_units")
        return new_model(
            self.architecture, config, inputs.width, outputs, towers, inputs, rngs=rngs
        )

    def _check_and_report(self, row: Mapping[str, Any], max_epochs: int | None) -> None:
        """Prints the line of an epoch, and refuses losses that are not finite."""
        for split in ("train", "validation"):
            for name, loss in row.get(split, {}).items():
                if not np.isfinite(loss):
                    raise ValueError(
                        f"the {split} loss of task {name!r} is {loss} in epoch {row['epoch']}: use "
                        f"a lower learning_rate than {self.learning_rate:g}"
                    )
        if self.verbose:
            print(line_of(row, max_epochs), flush=True)

    def _expert_names(self) -> list[str]:
        match self.architecture:
            case "mmoe" | "one_gate":
                return [str(i) for i in range(self.n_experts)]
            case "cgc" | "ple":
                of_tasks = [
                    f"{name} {i}" for name in self.tasks_ for i in range(self.n_task_experts)
                ]
                return of_tasks + [f"shared {i}" for i in range(self.n_experts)]
        return []

    def _forward(self, X: Any) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        """The outputs of each task, and the weights (t, b, e) of the experts."""
        check_is_fitted(self, "model_")
        forks.computes()
        table = self._encoder.transform(self._known(X))
        graph, params = nnx.split(self.model_, graph=True)
        outputs, weights = [], []
        for start in range(0, len(table.numbers), EVAL_BATCH_SIZE):
            rows = jax.tree.map(lambda x, at=start: x[at : at + EVAL_BATCH_SIZE], table)
            n = len(rows.numbers)
            # A power of two of rows: few programs are compiled, however many rows are predicted.
            padding = (0, (1 << (n - 1).bit_length()) - n), (0, 0)
            padded = jax.tree.map(functools.partial(np.pad, pad_width=padding, mode="edge"), rows)
            by_task, own, _ = jax.device_get(forward(graph, params, padded))
            outputs.append({name: each[:n] for name, each in by_task.items()})
            if own is not None:
                weights.append(own[:, :n])
        by_task = {name: np.concatenate([part[name] for part in outputs]) for name in self.tasks_}
        return by_task, np.concatenate(weights, axis=1) if weights else None

    def predict(self, X: Any) -> dict[str, np.ndarray]:
        """The prediction (b,) of each task: a class, a number, or the mean of a count."""
        return {name: self.tasks_[name].predict(x) for name, x in self._forward(X)[0].items()}

    def predict_proba(self, X: Any) -> dict[str, Float[np.ndarray, "b _"]]:
        """The probabilities of the classes, in the order of ``tasks_[name].classes``.

        Tasks that are no classifications are left out. Those of a chain are of all rows, such as
        that of a click and a purchase (CTCVR); see ``conditional_proba``.
        """
        return {
            name: task.probabilities(outputs)
            for name, outputs in self._forward(X)[0].items()
            if isinstance(task := self.tasks_[name], Classification)
        }

    def conditional_proba(self, X: Any) -> dict[str, Float[np.ndarray, "b"]]:
        """The probability (b,) of each event of "esmm" but the first, given the one before.

        Such as that of a purchase after a click (CVR), also for rows without a click.

        Raises:
            ValueError: the architecture is another, which does not have such probabilities.
        """
        if self.architecture != "esmm":
            raise ValueError(f"{self.architecture!r} has no conditional probabilities: use 'esmm'")
        # a quotient of logarithms, since the probability of the event before may underflow
        logs = {k: log_expit(x[:, 0].astype(np.float64)) for k, x in self._forward(X)[0].items()}
        pairs = itertools.pairwise(logs)
        return {name: np.minimum(np.exp(logs[name] - logs[before]), 1) for before, name in pairs}

    def metric_of(self, task: str) -> str:
        """The name of the metric of a task, see ``scoring``."""
        check_is_fitted(self, "model_")
        return metrics_of(self.tasks_, self.scoring)[task]

    def scores(self, X: Any, y: Any, sample_weight: Any = None) -> dict[str, float]:
        """The score of each task over the rows with a target.

        By default accuracy for classifications, R² for regressions, the explained share of the
        deviance (D²) for counts; see ``scoring``. For the accuracy, a class that was not in ``fit``
        is a wrong prediction.

        Args:
            y: the targets of some or all tasks.
            sample_weight: how much each row counts; None for 1.

        Raises:
            ValueError: there is no such task, or its targets are missing or not of its kind, or the
                metric is undefined for them.
        """
        check_is_fitted(self, "model_")
        X, metrics = rows_of(X), metrics_of(self.tasks_, self.scoring)
        split = split_of(X, targets_of(y, len(X)), sample_weight)
        outputs = self._forward(split.X)[0]
        for name in split.targets:
            task_named("y", name, self.tasks_)
        split = self._filled(split, self.tasks_, "scored")
        labels_of(split.targets)
        return {
            name: scorer_of(self.tasks_[name], split, metrics[name])(outputs[name])
            for name in split.targets
        }

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The mean of ``scores``, where R² and D² count as -1 if they are less.

        They have no lower bound, so that of one bad task would decide the mean.
        """
        found = self.scores(X, y, sample_weight)
        metrics = metrics_of(self.tasks_, self.scoring)
        return float(
            np.mean(
                [
                    max(score, LEAST) if metrics[name] in UNBOUNDED else score
                    for name, score in found.items()
                ]
            )
        )

    def expert_use(self, X: Any) -> dict[str, Float[np.ndarray, "e"]]:
        """The mean weight of each expert for each task, in the order of ``expert_names_``.

        Raises:
            ValueError: the model has no gates.
        """
        weights = self._forward(X)[1]
        if weights is None:
            raise ValueError("the model has no gates: fit another architecture, such as 'mmoe'")
        return dict(zip(self.tasks_, weights.mean(axis=1), strict=True))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the fitted model to a file of safetensors and JSON, without pickle.

        It has the parameters, the settings, and what encodes tables and targets. A file that is
        there is replaced.

        Raises:
            ValueError: a setting is an object of another kind than numbers, strings, lists and
                dicts, such as ``expert``; or one that decides the model, what encodes tables or the
                tasks was changed after ``fit``.
        """
        check_is_fitted(self, "model_")
        saved.write(Path(path), self)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "MultiTaskEstimator":
        """The fitted model of a file that ``save`` wrote. Nothing in the file is executed.

        A model of your own subclass is loaded by ``load`` of that class.

        Raises:
            ValueError: the file is damaged, of another version, or has a model of another class.
        """
        known = (MultiTaskEstimator, MultiTaskClassifier, cls)
        return saved.read(
            Path(path), {each.__name__: each for each in known if issubclass(each, cls)}
        )

    def findings(self, X: Any) -> list[str]:
        """Experts that no task uses, and experts whose parameters are or were initially equal."""
        check_is_fitted(self, "model_")
        found = [*self.findings_, *equal_experts(self.model_)]
        if self.expert_names_:
            found += unused_experts(self.expert_use(X), self.expert_names_, self._experts_seen)
        return list(dict.fromkeys(found))


class MultiTaskClassifier(MultiTaskEstimator):
    """Several classifications on the rows of a table; see `MultiTaskEstimator`.

    >>> X = np.random.default_rng(0).normal(size=(400, 5))
    >>> y = {"positive": X[:, 0] > 0, "large": np.abs(X[:, 0]) > 1}
    >>> model = MultiTaskClassifier(n_experts=3, max_epochs=60, learning_rate=0.01, random_state=0)
    >>> probabilities = model.fit(X, y).predict_proba(X)
    >>> probabilities["large"].shape
    (400, 2)
    >>> model.score(X, y) > 0.9
    True
    """

    _kinds = ("classification",)
    _most_classes = np.inf

    def _default_kind(self, targets: np.ndarray, labeled: np.ndarray) -> str:
        return "classification"
