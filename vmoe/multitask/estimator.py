"""Models of several tasks for tables, with the methods of scikit-learn's estimators."""

import copy
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Float
from sklearn.base import BaseEstimator, _fit_context
from sklearn.utils import _safe_indexing, check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted, validate_data

from vmoe import forks
from vmoe.multitask.build import ARCHITECTURES, BodyConfig, new_model
from vmoe.multitask.columns import Table, TableEncoder, TableRows, is_category, rows_of
from vmoe.multitask.findings import equal_experts, unused_experts
from vmoe.multitask.model import MultiTask
from vmoe.multitask.tasks import KINDS, Classification, Task, kind_of, labels_of, targets_of
from vmoe.multitask.training import (
    EVAL_BATCH_SIZE,
    Data,
    Losses,
    Trainer,
    batches,
    decayed,
    forward,
)
from vmoe.multitask.values import as_pandas, is_missing, is_numeric
from vmoe.multitask.weighting import WEIGHTINGS

AT_LEAST_1 = Interval(Integral, 1, None, closed="left")
AT_LEAST_0 = Interval(Real, 0, None, closed="left")
POSITIVE = Interval(Real, 0, None, closed="neither")


class MultiTaskEstimator(BaseEstimator):
    """Several tasks on the rows of a table: classifications, regressions and counts.

    Args:
        architecture: "mmoe", a gate over the experts for each task (Ma et al. 2018); "one_gate",
            one gate for all; "shared_bottom", one network for all; "cross_stitch" (Misra et al.
            2016); "cgc" and "ple", experts of each task beside shared ones (Tang et al. 2020).
            With one task, "shared_bottom" is a plain network.
        kinds: "classification", "regression" or "count" by name of the task. By default a task
            whose targets have fractions is a regression, and any other a classification, with a
            warning if its numbers are many; so is one of pandas' type "category".
        n_experts: number of experts that tasks share.
        n_task_experts: number of experts of each task in "cgc" and "ple".
        n_layers: layers of "ple".
        expert_units: sizes of an expert's layers, each with a ReLU; for "shared_bottom" and
            "cross_stitch" those of the networks.
        tower_units: sizes of the hidden layers of each task's tower.
        expert: makes an expert, ``expert(width, rngs=rngs)``, from rows f[b width] to features; by
            default ReLU layers of ``expert_units``. Not for "cross_stitch".
        gate: "softmax" of a linear function, or "dselect_k" (Hazimeh et al. 2021).
        k: number of experts that "dselect_k" selects for a row.
        entropy_weight: weight of the entropy of "dselect_k" in the loss; a larger one makes the
            gate sparse sooner.
        embedding_size: size of a category's embedding.
        categorical: names or indices of all categorical columns; by default those columns of a
            DataFrame that are not numbers, or have pandas' type "category". Dates are categories.
        weighting: how the tasks' losses are weighted: "fixed", "uncertainty" (Kendall et al. 2018),
            "gradnorm" (Chen et al. 2018) or "dynamic_average" (Liu et al. 2019).
        task_weights: a factor of the loss by name of the task; 1 for all others.
        learning_rate: learning rate of Adam.
        weight_decay: as in AdamW, of the kernels of experts, networks and towers. Biases,
            embeddings, gates and cross-stitch matrices have none.
        batch_size: rows of a training step.
        max_epochs: passes over the rows at most.
        patience: epochs without a lower validation loss after which training ends. The validation
            loss is the sum of the tasks' mean losses, times ``task_weights``. The parameters of the
            best epoch are kept.
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
        history_: for each epoch "epoch", "train" and "validation", mean losses by task, and
            "gates", the mean loss of the gates.
        n_epochs_: number of epochs after which the parameters were kept.
        expert_names_: the experts in the order of ``expert_use``: "0", "1", ...; for "cgc" and
            "ple" those of the last layer: "income 0", ..., "shared 0", ...; none without gates.
        findings_: experts whose initial parameters were equal.
        n_features_in_: number of columns.
        feature_names_in_: their names, if ``fit`` got a DataFrame.
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "architecture": [StrOptions(set(ARCHITECTURES))],
        "kinds": [Mapping, None],
        "n_experts": [AT_LEAST_1],
        "n_task_experts": [AT_LEAST_1],
        "n_layers": [AT_LEAST_1],
        "expert_units": ["array-like"],
        "tower_units": ["array-like"],
        "expert": [callable, None],
        "gate": [StrOptions({"softmax", "dselect_k"})],
        "k": [AT_LEAST_1],
        "entropy_weight": [AT_LEAST_0],
        "embedding_size": [AT_LEAST_1],
        "categorical": ["array-like", None],
        "weighting": [StrOptions(set(WEIGHTINGS))],
        "task_weights": [Mapping, None],
        "learning_rate": [POSITIVE],
        "weight_decay": [AT_LEAST_0],
        "batch_size": [AT_LEAST_1],
        "max_epochs": [AT_LEAST_1],
        "patience": [AT_LEAST_1],
        "validation_fraction": [Interval(Real, 0, 1, closed="left")],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }
    _kinds = tuple(KINDS)
    _most_classes: ClassVar[float] = 30
    """As many whole numbers are classes by default without a warning."""

    def __init__(
        self,
        architecture: str = "mmoe",
        *,
        kinds: Mapping[str, str] | None = None,
        n_experts: int = 8,
        n_task_experts: int = 2,
        n_layers: int = 2,
        expert_units: Any = (16,),
        tower_units: Any = (8,),
        expert: Callable[..., nnx.Module] | None = None,
        gate: str = "softmax",
        k: int = 2,
        entropy_weight: Any = 0.01,
        embedding_size: int = 8,
        categorical: Any = None,
        weighting: str = "fixed",
        task_weights: Mapping[str, float] | None = None,
        learning_rate: Any = 1e-3,
        weight_decay: Any = 0.0,
        batch_size: int = 256,
        max_epochs: int = 100,
        patience: int = 10,
        validation_fraction: Any = 0.1,
        random_state: Any = None,
        verbose: int = 0,
    ):
        self.architecture = architecture
        self.kinds = kinds
        self.n_experts = n_experts
        self.n_task_experts = n_task_experts
        self.n_layers = n_layers
        self.expert_units = expert_units
        self.tower_units = tower_units
        self.expert = expert
        self.gate = gate
        self.k = k
        self.entropy_weight = entropy_weight
        self.embedding_size = embedding_size
        self.categorical = categorical
        self.weighting = weighting
        self.task_weights = task_weights
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.max_epochs = max_epochs
        self.patience = patience
        self.validation_fraction = validation_fraction
        self.random_state = random_state
        self.verbose = verbose

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any, *, validation: Any = None) -> "MultiTaskEstimator":
        """Trains the model.

        Args:
            X: rows (b, columns): a DataFrame, a table or record batch of pyarrow, or an array.
            y: the targets of each task by name: a dict of arrays (b,), a DataFrame, or a table of
                pyarrow. A target that is NaN, None or NA is missing, and counts in no loss.
            validation: a tuple of X and y of a validation split; by default some of the rows.

        Raises:
            ValueError: an argument is wrong; the message names the task or the column. Or this
                process was forked from one in which JAX had run, in which ``predict`` and others
                raise it too.
        """
        forks.computes()
        X, y = rows_of(X), as_pandas(y)
        new = copy.copy(self)  # has the columns; those of the last fit stay until this one succeeds
        validate_data(new, X, reset=True, skip_check_array=True)
        targets = targets_of(y, len(X))
        random = np.random.default_rng(check_random_state(self.random_state).randint(2**31))
        tasks = self._make_tasks(targets, {name for name in targets if is_category(y[name])})
        weights = self._weights(tasks)
        held_out = None
        if validation is not None:
            if not isinstance(validation, tuple) or len(validation) != 2:
                raise ValueError("validation: give a tuple of X and y")
            other = new._known(validation[0])
            held_out = other, targets_of(validation[1], len(other))
        elif self.validation_fraction:
            rows, others = self._split(tasks, targets, random)
            held_out = _rows_of(X, targets, others)
            X, targets = _rows_of(X, targets, rows)
        encoder = TableEncoder(X, self.categorical)
        for names, problem in (
            (encoder.constant, "one value only: leave them out"),
            (
                encoder.nearly_unique,
                "more categories than half the number of rows: convert them to numbers, or name "
                "them in categorical",
            ),
        ):
            if names:
                listed = ", ".join(map(repr, names))
                warnings.warn(
                    f"X: these columns have {problem}: {listed}", UserWarning, stacklevel=3
                )
        train = _data(encoder, tasks, X, targets, "training")
        validated = _data(encoder, tasks, *held_out, "validation") if held_out else None
        model = self._new_model(encoder, tasks, int(random.integers(2**31)))
        found = list(equal_experts(model))
        for finding in found:
            warnings.warn(finding, UserWarning, stacklevel=3)
        best = self._train(model, tasks, weights, (train, validated), random)
        self.model_, self.history_, self.n_epochs_ = best
        self.n_parameters_ = sum(
            x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param, graph=True))
        )
        self._encoder, self.tasks_, self.findings_ = encoder, tasks, found
        self.expert_names_ = self._expert_names()
        own = self.n_task_experts if self.architecture in ("cgc", "ple") else 0
        self._experts_seen = own + self.n_experts  # by the gate of a task
        validate_data(self, X, reset=True, skip_check_array=True)
        return self

    def _known(self, X: Any) -> Any:
        """X, with the columns of ``fit``."""
        X = rows_of(X)
        validate_data(self, X, reset=False, skip_check_array=True)
        return X

    def _make_tasks(
        self, targets: Mapping[str, np.ndarray], categories: Collection[str]
    ) -> dict[str, Task]:
        """The tasks; those whose targets are ``categories`` of pandas are classifications."""
        kinds = dict.fromkeys(categories, "classification") | dict(self.kinds or {})
        found: dict[str, Task] = {}
        for name in kinds:
            if name not in targets:
                raise ValueError(f"kinds: there is no task {name!r}, only {sorted(targets)}")
        for name, labeled in labels_of(targets).items():
            kind = kinds[name] if name in kinds else self._default_kind(targets[name], labeled)
            if kind not in self._kinds:
                choices = ", ".join(self._kinds)
                other = " or MultiTaskEstimator" if kind in list(KINDS) else ""
                raise ValueError(f"kinds: task {name!r}: {kind!r}: use {choices}{other}")
            found[name] = KINDS[kind](name, targets[name], labeled)
            if name not in kinds and is_numeric(targets[name]):
                self._warn_of_many_classes(found[name], int(labeled.sum()))
        return found

    def _warn_of_many_classes(self, task: Task, targets: int) -> None:
        """Warns of whole numbers that look like a regression and are classes by default."""
        most = min(self._most_classes, targets / 2)
        if isinstance(task, Classification) and len(task.classes) > most:
            name = task.name
            warnings.warn(
                f"task {name!r}: the numbers are {len(task.classes)} classes of {targets} targets: "
                f'for a regression, use MultiTaskEstimator(kinds={{{name!r}: "regression"}}); '
                f'for classes, kinds={{{name!r}: "classification"}} says so',
                UserWarning,
                stacklevel=5,  # _warn_of_many_classes, _make_tasks, fit, scikit-learn, the user
            )

    def _default_kind(self, targets: np.ndarray, labeled: np.ndarray) -> str:
        return kind_of(targets, labeled)

    def _weights(self, tasks: Mapping[str, Task]) -> list[float]:
        """The factor of each task's loss."""
        given = self.task_weights or {}
        for name, weight in given.items():
            if name not in tasks:
                raise ValueError(f"task_weights: there is no task {name!r}, only {sorted(tasks)}")
            if not (isinstance(weight, Real) and 0 < weight < np.inf):
                raise ValueError(f"task_weights: task {name!r}: {weight}: use a positive number")
        return [float(given.get(name, 1.0)) for name in tasks]

    def _split(
        self,
        tasks: Mapping[str, Task],
        targets: Mapping[str, np.ndarray],
        random: np.random.Generator,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Training and validation rows.

        The rows are sorted by their classes and cut into blocks; a random one of each is a
        validation row.
        """
        strata = []
        for name, task in tasks.items():
            labeled = ~is_missing(targets[name])
            strata.append(np.where(labeled, 0, -1))
            if isinstance(task, Classification):
                strata[-1][labeled] = task.encode(targets[name], labeled)[labeled]
        rows = len(strata[0])
        n = round(self.validation_fraction * rows)
        if not 0 < n < rows:
            raise ValueError(
                f"validation_fraction={self.validation_fraction} of {rows} rows is {n}: give more "
                "rows or a validation split, or use 0"
            )
        order = random.permutation(rows)
        order = order[np.lexsort([each[order] for each in reversed(strata)])]
        edges = np.arange(n + 1) * rows // n
        validation = order[random.integers(edges[:-1], edges[1:])]
        return np.setdiff1d(order, validation), validation

    def _units(self, name: str) -> tuple[int, ...]:
        """Sizes of layers."""
        units = tuple(getattr(self, name))
        if not all(isinstance(size, int | np.integer) and size > 0 for size in units):
            raise ValueError(f"{name}={units}: use integers from 1 on")
        return tuple(int(size) for size in units)

    def _new_model(self, encoder: TableEncoder, tasks: Mapping[str, Task], seed: int) -> MultiTask:
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
        rngs = nnx.Rngs(seed)
        inputs = TableRows(
            encoder.num_numbers, encoder.num_categories, self.embedding_size, rngs=rngs
        )
        config = BodyConfig(
            tasks=len(tasks),
            units=units,
            experts=self.n_experts,
            task_experts=self.n_task_experts,
            layers=self.n_layers,
            gate=self.gate,
            k=self.k,
            entropy_weight=self.entropy_weight,
            expert=self.expert,
        )
        outputs = {name: task.size for name, task in tasks.items()}
        towers = self._units("tower_units")
        return new_model(
            self.architecture, config, inputs.width, outputs, towers, inputs, rngs=rngs
        )

    def _train(
        self,
        model: MultiTask,
        tasks: Mapping[str, Task],
        weights: Sequence[float],
        data: tuple[Data, Data | None],
        random: np.random.Generator,
    ) -> tuple[MultiTask, list[dict[str, Any]], int]:
        """Trains until the validation loss no longer falls.

        Returns:
            the model with the best parameters, the history, and the number of their epoch.
        """
        train, validation = data
        graph, params = nnx.split(model, graph=True)
        trainer = Trainer(
            graph,
            tuple(tasks.values()),
            WEIGHTINGS[self.weighting](weights),
            optax.adamw(self.learning_rate, weight_decay=self.weight_decay, mask=decayed),
        )
        train_epoch, losses_of = jax.jit(trainer.epoch), jax.jit(trainer.losses)
        state = trainer.init(params)
        history: list[dict[str, Any]] = []
        best, kept, at = np.inf, state.params, 0
        rows = len(train.labeled[0])
        for epoch in range(1, self.max_epochs + 1):
            order = jnp.asarray(batches(random, rows, self.batch_size))
            state, losses = train_epoch(state, train, order)
            row = {"epoch": epoch, "gates": float(losses.gates), "train": _by_task(tasks, losses)}
            loss = -epoch  # without a validation split the last epoch is the best
            if validation is not None:
                row["validation"] = _by_task(tasks, losses_of(state.params, validation))
                loss = float(np.dot(weights, list(row["validation"].values())))
            self._check_finite(row)
            self._report(row)
            history.append(row)
            if loss < best:
                best, kept, at = loss, state.params, epoch
            elif epoch - at >= self.patience:
                break
        return nnx.merge(graph, kept), history, at

    def _check_finite(self, row: Mapping[str, Any]) -> None:
        for split in ("train", "validation"):
            for name, loss in row.get(split, {}).items():
                if not np.isfinite(loss):
                    raise ValueError(
                        f"the {split} loss of task {name!r} is {loss} in epoch {row['epoch']}: use "
                        f"a lower learning_rate than {self.learning_rate:g}"
                    )

    def _report(self, row: Mapping[str, Any]) -> None:
        if not self.verbose:
            return
        parts = [f"epoch {row['epoch']}/{self.max_epochs}"]
        for split in ("train", "validation"):
            if split in row:
                losses = ", ".join(f"{name} {loss:.4f}" for name, loss in row[split].items())
                parts.append(f"{split} {losses}")
        print("  ".join(parts), flush=True)

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

    def _outputs(self, X: Any) -> dict[str, Float[np.ndarray, "b q"]]:
        return self._forward(X)[0]

    def _forward(self, X: Any) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        """The outputs of each task, and the weights (t, b, e) of the experts."""
        check_is_fitted(self, "model_")
        forks.computes()
        table = self._encoder(self._known(X))
        graph, params = nnx.split(self.model_, graph=True)
        outputs, weights = [], []
        for start in range(0, len(table.numbers), EVAL_BATCH_SIZE):
            rows = Table(*(x[start : start + EVAL_BATCH_SIZE] for x in table))
            n = len(rows.numbers)
            # A power of two of rows: few programs are compiled, however many rows are predicted.
            more = (1 << (n - 1).bit_length()) - n
            padded = Table(*(np.pad(x, ((0, more), (0, 0)), mode="edge") for x in rows))
            made = jax.device_get(forward(graph, params, padded))
            outputs.append({name: each[:n] for name, each in made.outputs.items()})
            if made.weights is not None:
                weights.append(made.weights[:, :n])
        by_task = {name: np.concatenate([part[name] for part in outputs]) for name in self.tasks_}
        return by_task, np.concatenate(weights, axis=1) if weights else None

    def predict(self, X: Any) -> dict[str, np.ndarray]:
        """The prediction (b,) of each task: a class, a number, or the mean of a count."""
        return {name: self.tasks_[name].predict(x) for name, x in self._outputs(X).items()}

    def predict_proba(self, X: Any) -> dict[str, Float[np.ndarray, "b _"]]:
        """The probabilities of the classes, in the order of ``tasks_[name].classes``.

        Tasks that are no classifications are left out.
        """
        return {
            name: task.probabilities(outputs)
            for name, outputs in self._outputs(X).items()
            if isinstance(task := self.tasks_[name], Classification)
        }

    def scores(self, X: Any, y: Any) -> dict[str, float]:
        """The score of each task over the rows with a target.

        Accuracy for classifications, R² for regressions, the explained share of the deviance (D²)
        for counts. A class that was not in ``fit`` counts as a wrong prediction.

        Args:
            y: the targets of some or all tasks.

        Raises:
            ValueError: there is no such task, or its targets are missing or not of its kind.
        """
        outputs = self._outputs(X)
        targets = targets_of(y, len(next(iter(outputs.values()))))
        for name in targets:
            if name not in self.tasks_:
                raise ValueError(f"y: there is no task {name!r}, only {list(self.tasks_)}")
        return {
            name: self.tasks_[name].score(targets[name][labeled], outputs[name][labeled])
            for name, labeled in labels_of(targets).items()
        }

    def score(self, X: Any, y: Any) -> float:
        """The mean of ``scores``."""
        return float(np.mean(list(self.scores(X, y).values())))

    def expert_use(self, X: Any) -> dict[str, Float[np.ndarray, "e"]]:
        """The mean weight of each expert for each task, in the order of ``expert_names_``.

        Raises:
            ValueError: the model has no gates.
        """
        weights = self._forward(X)[1]
        if weights is None:
            raise ValueError("the model has no gates: fit another architecture, such as 'mmoe'")
        return dict(zip(self.tasks_, weights.mean(axis=1), strict=True))

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


def _rows_of(
    X: Any, targets: Mapping[str, np.ndarray], rows: np.ndarray
) -> tuple[Any, dict[str, np.ndarray]]:
    """Some rows of a table and of its targets."""
    return _safe_indexing(X, rows), {name: values[rows] for name, values in targets.items()}


def _data(
    encoder: TableEncoder,
    tasks: Mapping[str, Task],
    X: Any,
    targets: Mapping[str, np.ndarray],
    split: str,
) -> Data:
    """A split as the model reads it."""
    if set(targets) != set(tasks):
        raise ValueError(f"validation: y has the tasks {list(targets)}: expected {list(tasks)}")
    labeled = labels_of({name: targets[name] for name in tasks}, split)
    encoded = [task.encode(targets[name], labeled[name]) for name, task in tasks.items()]
    return Data(
        jax.tree.map(jnp.asarray, encoder(X)),
        tuple(jnp.asarray(each) for each in encoded),
        tuple(jnp.asarray(each) for each in labeled.values()),
    )


def _by_task(tasks: Mapping[str, Task], losses: Losses) -> dict[str, float]:
    return dict(zip(tasks, np.asarray(losses.tasks).tolist(), strict=True))
