"""Models of several tasks for tables, with the methods of scikit-learn's estimators.

``fit`` goes from X and y to a loss: ``targets`` makes tasks of y, ``splits`` has the rows,
``columns`` encodes them, ``fitting`` makes the model and keeps an epoch, ``training`` has the steps
and ``tasks`` the loss of each kind; ``history`` judges the epochs.
"""

import copy
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float
from scipy.special import log_expit
from sklearn.base import _fit_context
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from vmoe.host import forks
from vmoe.multitask import fitting, saved, targets
from vmoe.multitask.build import GATED
from vmoe.multitask.columns import TableEncoder, rows_of
from vmoe.multitask.expert_use import equal_experts, unused_experts
from vmoe.multitask.history import Watch, metrics_of, scorer_of
from vmoe.multitask.model import MultiTask
from vmoe.multitask.settings import FREE, PROGRAM, Settings, check_settings, kept, names_of
from vmoe.multitask.splits import Split
from vmoe.multitask.tasks import LEAST, UNBOUNDED, Classification, Task
from vmoe.multitask.training import EVAL_BATCH_SIZE, forward, without_streams
from vmoe.multitask.values import is_category


class MultiTaskEstimator(Settings):
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
        kinds: "classification", "regression" or "count" by name of the task. By default the
            targets decide between the first two (docs/multitask.md, "Rows and targets").
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

    _y_ndim: int | None = None
    """The number of axes of y in ``fit``, if it was an array; None if it had the tasks by name."""

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = tags.target_tags.multi_output = tags.input_tags.string = True
        return tags

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
                pyarrow; or an array (b, t), whose tasks are "0", "1", ..., or a vector (b,) of one
                task, "0". A target that is NaN, None or NA is missing, and counts in no loss.
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
        new = copy.copy(self)  # what was fitted before stays until this fit succeeds
        given, categories, random = new._given(X, y, sample_weight, reset=True)
        tasks, problems = targets.new_tasks(self, given, categories)
        given = targets.filled(self.architecture, tasks, given, "training")
        held_out = None
        if validation is not None:
            if not isinstance(validation, tuple) or len(validation) not in (2, 3):
                raise ValueError("validation: give a tuple of X and y, or of X, y and weights")
            held_out = targets.split_of(new._known(validation[0]), *validation[1:])
            held_out = targets.filled(self.architecture, tasks, held_out, "validation")
        given, train, held_out, validated = fitting.divided(self, tasks, given, held_out, random)
        weights = targets.loss_weights(self, tasks)
        watch = Watch(self.monitor, self.scoring, tasks, weights, held_out)
        encoder, inputs, model, found = fitting.prepared(self, tasks, given, problems, random)
        train = jax.device_put(train._replace(inputs=inputs))
        if held_out is not None and validated is not None:
            validated = jax.device_put(validated._replace(inputs=encoder.transform(held_out.X)))
        graph, params = nnx.split(model, graph=True)
        trainer, state = fitting.trainer_of(self, tasks, graph, params, len(given.X))
        epochs = trainer.epochs(state, train, validated, random, self.batch_size)
        params, new.history_, new.n_epochs_ = fitting.trained(self, epochs, watch, list(callbacks))
        new._keep(nnx.merge(graph, params), encoder, tasks, found)
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
        of_classes = self.class_weight
        of_classes = of_classes.values() if isinstance(of_classes, Mapping) else [of_classes]
        if any(isinstance(each, str) for each in of_classes):
            raise ValueError("class_weight='balanced' needs all rows: give partial_fit a dict")
        if self.schedule != "constant":
            raise ValueError(
                f"schedule={self.schedule!r} needs the number of steps: partial_fit has 'constant'"
            )
        started = time.perf_counter()
        new, first = copy.copy(self), not hasattr(self, "model_")
        given, categories, random = new._given(X, y, sample_weight, reset=first)
        if first:
            tasks, problems = targets.new_tasks(self, given, categories)
            encoder, inputs, model, found = fitting.prepared(self, tasks, given, problems, random)
            (graph, begin), new.history_ = nnx.split(model, graph=True), []
        else:
            check_settings(self, self._fixed)
            tasks, encoder, found = self.tasks_, self._encoder, self.findings_
            inputs = encoder.transform(given.X)
            graph, begin, random = self._resumed(random)
        given = targets.filled(self.architecture, tasks, given, "training")
        train = given.data(tasks, targets.class_weights(self, tasks, given), "training")
        train = jax.device_put(train._replace(inputs=inputs))
        trainer, state = fitting.trainer_of(self, tasks, graph, begin, len(given.X))
        epochs = trainer.epochs(state, train, None, random, self.batch_size)
        epoch = next(epochs)
        watch = Watch("loss", None, tasks, targets.loss_weights(self, tasks), None)
        started -= new.history_[-1]["seconds"] if new.history_ else 0.0
        row = fitting.row_of(self, watch, epoch, len(new.history_) + 1, started, None)
        new.history_, new.n_epochs_ = [*new.history_, row], row["epoch"]
        new._keep(nnx.merge(graph, epoch.params), encoder, tasks, found)
        new._training = graph, epoch.state, random, kept(self, PROGRAM)
        self.__dict__ = new.__dict__
        return self

    def _given(
        self, X: Any, y: Any, sample_weight: Any, reset: bool
    ) -> tuple[Split, set[str], np.random.Generator]:
        """The rows of a fit, the tasks whose targets are categories of pandas, and a generator."""
        X = self._known(X, reset, y)
        y, ndim = targets.by_name(y)
        if reset:
            self._y_ndim = ndim
        given = targets.split_of(X, y, sample_weight)
        given = given._replace(targets=targets.in_order(self, given.targets))
        categories = {name for name in given.targets if is_category(y[name])}
        seed = check_random_state(self.random_state).randint(2**31)
        return given, categories, np.random.default_rng(seed)

    def _resumed(self, random: np.random.Generator) -> tuple[nnx.GraphDef, Any, Any]:
        """The graph, state and generator that ``partial_fit``, ``fit`` or ``load`` left."""
        if self._training is not None:
            graph, state, random, before = self._training
            check_settings(self, before, "the last partial_fit")
            return graph, state, copy.deepcopy(random)
        seed = int(random.integers(2**31))
        model = fitting.model_of(self, self._encoder, self.tasks_, seed, float(self.dropout))
        nnx.update(model, nnx.state(self.model_, nnx.Param, graph=True))
        return *nnx.split(model, graph=True), random

    def _keep(
        self, model: MultiTask, encoder: TableEncoder, tasks: dict[str, Task], found: list[str]
    ) -> None:
        """Sets what is known after training."""
        self.model_ = without_streams(model)
        self.n_parameters_ = sum(x.size for x in jax.tree.leaves(nnx.state(model, graph=True)))
        self._encoder, self.tasks_, self.findings_ = encoder, tasks, found
        own = self.n_task_experts if self.architecture in ("cgc", "ple") else 0
        names = [f"{name} {i}" for name in tasks for i in range(own)]
        names += [f"shared {i}" if own else str(i) for i in range(self.n_experts)]
        self.expert_names_ = names if self.architecture in GATED else []
        self._experts_seen = own + self.n_experts  # by the gate of a task
        self._fixed = kept(self, names_of(self) - FREE)

    def _known(self, X: Any, reset: bool = False, y: Any = "no_validation") -> Any:
        """X, with the columns of ``fit``, which ``reset`` sets."""
        X = rows_of(X)
        validate_data(self, X, y, reset=reset, skip_check_array=True)
        return X

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

    def predict(self, X: Any) -> Any:
        """The prediction (b,) of each task: a class, a number, or the mean of a count.

        They are a dict by name; or, if ``fit`` got an array as y, an array with its axes.
        """
        outputs = self._forward(X)[0]
        found = {name: task.predict(outputs[name]) for name, task in self.tasks_.items()}
        if self._y_ndim != 2:
            return self._as_y(found)
        kinds = {"f" if x.dtype.kind in "biu" else x.dtype.kind for x in found.values()}
        return np.stack(self._as_y(found), axis=1, dtype=object if len(kinds) > 1 else None)

    def predict_proba(self, X: Any) -> Any:
        """The probabilities (b, classes), in the order of ``tasks_[name].classes``.

        They are a dict by name, without tasks that are no classifications. If ``fit`` got an array
        as y, they are a list with one array for each column; for a vector, this array alone. Those
        of a chain are of all rows, such as that of a click and a purchase (CTCVR); see
        ``conditional_proba``.

        Raises:
            ValueError: ``fit`` got an array as y, and a task of it is no classification.
        """
        found = {
            name: task.probabilities(outputs)
            for name, outputs in self._forward(X)[0].items()
            if isinstance(task := self.tasks_[name], Classification)
        }
        without = [name for name in self.tasks_ if name not in found]
        if without and self._y_ndim:
            raise ValueError(
                f"task {without[0]!r} is no classification and has no probabilities: use predict, "
                "or fit with a dict or a DataFrame as y"
            )
        return self._as_y(found)

    def _as_y(self, found: dict[str, Any]) -> Any:
        """What there is of each task: by name, a list for the columns of y, or that of a vector."""
        if self._y_ndim is None:
            return found
        columns = [found[str(i)] for i in range(len(found))]
        return columns if self._y_ndim == 2 else columns[0]

    def conditional_proba(self, X: Any) -> dict[str, Float[np.ndarray, "b"]]:
        """The probability (b,) of each event of "esmm" but the first, given the one before.

        Such as that of a purchase after a click (CVR), also for rows without a click.

        Raises:
            ValueError: the model has another architecture, without such probabilities.
        """
        check_is_fitted(self, "model_")
        if (fitted := self._fixed["architecture"]) != "esmm":
            raise ValueError(f"{fitted!r} has no conditional probabilities: use 'esmm'")
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
        split = targets.split_of(X, y, sample_weight)
        outputs = self._forward(split.X)[0]
        for name in split.targets:
            targets.task_named("y", name, self.tasks_)
        split = targets.filled(self._fixed["architecture"], self.tasks_, split, "scored")
        targets.labels_of(split.targets)
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
        least = {name: LEAST if metrics[name] in UNBOUNDED else -np.inf for name in found}
        return float(np.mean([max(each, least[name]) for name, each in found.items()]))

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
                tasks was changed after ``fit``; or one that the ``__init__`` of a subclass does not
                take is another than it makes.
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
