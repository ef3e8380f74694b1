"""Models of several tasks for tables, with the methods of scikit-learn's estimators."""

import copy
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import KW_ONLY, dataclass
from numbers import Integral, Real
from typing import Any, ClassVar

import jax
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
from vmoe.multitask.expert_use import equal_experts, unused_experts
from vmoe.multitask.model import MultiTask
from vmoe.multitask.tasks import (
    KINDS,
    Classification,
    Task,
    check_labeled,
    kind_of,
    labels_of,
    targets_of,
)
from vmoe.multitask.training import (
    EVAL_BATCH_SIZE,
    Data,
    Trainer,
    decayed,
    forward,
)
from vmoe.multitask.values import as_pandas, is_numeric
from vmoe.multitask.weighting import WEIGHTINGS

AT_LEAST_1 = Interval(Integral, 1, None, closed="left")
AT_LEAST_0 = Interval(Real, 0, None, closed="left")
POSITIVE = Interval(Real, 0, None, closed="neither")


@dataclass(eq=False, repr=False)
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

    architecture: str = "mmoe"
    _: KW_ONLY
    kinds: Mapping[str, str] | None = None
    n_experts: int = 8
    n_task_experts: int = 2
    n_layers: int = 2
    expert_units: Any = (16,)
    tower_units: Any = (8,)
    expert: Callable[..., nnx.Module] | None = None
    gate: str = "softmax"
    k: int = 2
    entropy_weight: Any = 0.01
    embedding_size: int = 8
    categorical: Any = None
    weighting: str = "fixed"
    task_weights: Mapping[str, float] | None = None
    learning_rate: Any = 1e-3
    weight_decay: Any = 0.0
    batch_size: int = 256
    max_epochs: int = 100
    patience: int = 10
    validation_fraction: Any = 0.1
    random_state: Any = None
    verbose: int = 0

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
        new = copy.copy(self)  # what was fitted before stays until this fit succeeds
        validate_data(new, X, reset=True, skip_check_array=True)
        targets = targets_of(y, len(X))
        random = np.random.default_rng(check_random_state(self.random_state).randint(2**31))
        tasks, problems = self._make_tasks(
            targets, {name for name in targets if is_category(y[name])}
        )
        weights = self._weights(tasks)
        labels, held_out = _labels(tasks, targets, "training"), None
        if validation is not None:
            if not isinstance(validation, tuple) or len(validation) != 2:
                raise ValueError("validation: give a tuple of X and y")
            other = new._known(validation[0])
            targets = targets_of(validation[1], len(other))
            held_out = other, _labels(tasks, targets, "validation")
        elif self.validation_fraction:
            rows, others = self._split(tasks, labels, random)
            (X, labels), held_out = (
                (_safe_indexing(X, each), _labels_at(each, tasks, labels, split))
                for each, split in ((rows, "training"), (others, "validation"))
            )
        encoder = TableEncoder()
        train = labels._replace(inputs=encoder.fit_transform(X, self.categorical))
        train, validated = jax.device_put(train), None
        if held_out is not None:
            other, labels = held_out
            validated = labels._replace(inputs=encoder.transform(other))
            validated = jax.device_put(validated)
        model = self._new_model(encoder, tasks, int(random.integers(2**31)))
        found = list(equal_experts(model))
        for problem in [*problems, *encoder.problems, *found]:
            warnings.warn(problem, UserWarning, stacklevel=3)  # fit, scikit-learn, the user
        graph, params = nnx.split(model, graph=True)
        trainer = Trainer(
            graph,
            tuple(tasks.values()),
            WEIGHTINGS[self.weighting](weights),
            optax.adamw(self.learning_rate, weight_decay=self.weight_decay, mask=decayed),
        )
        params, new.history_, new.n_epochs_ = trainer.fit(
            params,
            train,
            validated,
            random,
            batch_size=self.batch_size,
            max_epochs=self.max_epochs,
            patience=self.patience,
            on_epoch=self._check_and_report,
        )
        new.model_ = nnx.merge(graph, params)
        new.n_parameters_ = sum(x.size for x in jax.tree.leaves(params))
        new._encoder, new.tasks_, new.findings_ = encoder, tasks, found
        new.expert_names_ = new._expert_names()
        own = self.n_task_experts if self.architecture in ("cgc", "ple") else 0
        new._experts_seen = own + self.n_experts  # by the gate of a task
        self.__dict__ = new.__dict__
        return self

    def _known(self, X: Any) -> Any:
        """X, with the columns of ``fit``."""
        X = rows_of(X)
        validate_data(self, X, reset=False, skip_check_array=True)
        return X

    def _make_tasks(
        self, targets: Mapping[str, np.ndarray], categories: Collection[str]
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
            task = found[name] = KINDS[kind](name, targets[name], labeled)
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
            if name not in tasks:
                raise ValueError(f"task_weights: there is no task {name!r}, only {sorted(tasks)}")
            if not (isinstance(weight, Real) and 0 < weight < np.inf):
                raise ValueError(f"task_weights: task {name!r}: {weight}: use a positive number")
        return [float(given.get(name, 1.0)) for name in tasks]

    def _split(
        self, tasks: Mapping[str, Task], labels: Data, random: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Training and validation rows.

        The rows are sorted by their classes and cut into blocks; a random one of each is a
        validation row.
        """
        strata = [
            np.where(labeled, codes if isinstance(task, Classification) else 0, -1)
            for task, codes, labeled in zip(
                tasks.values(), labels.targets, labels.labeled, strict=True
            )
        ]
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

    def _check_and_report(self, row: Mapping[str, Any]) -> None:
        """Prints the losses of an epoch, and refuses any that is not finite."""
        parts = [f"epoch {row['epoch']}/{self.max_epochs}"]
        for split in ("train", "validation"):
            losses = row.get(split, {})
            for name, loss in losses.items():
                if not np.isfinite(loss):
                    raise ValueError(
                        f"the {split} loss of task {name!r} is {loss} in epoch {row['epoch']}: use "
                        f"a lower learning_rate than {self.learning_rate:g}"
                    )
            if losses:
                listed = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
                parts.append(f"{split} {listed}")
        if self.verbose:
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

    def _forward(self, X: Any) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        """The outputs of each task, and the weights (t, b, e) of the experts."""
        check_is_fitted(self, "model_")
        forks.computes()
        table = self._encoder.transform(self._known(X))
        graph, params = nnx.split(self.model_, graph=True)
        outputs, weights = [], []
        for start in range(0, len(table.numbers), EVAL_BATCH_SIZE):
            rows = Table(*(x[start : start + EVAL_BATCH_SIZE] for x in table))
            n = len(rows.numbers)
            # A power of two of rows: few programs are compiled, however many rows are predicted.
            more = (1 << (n - 1).bit_length()) - n
            padded = Table(*(np.pad(x, ((0, more), (0, 0)), mode="edge") for x in rows))
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

        Tasks that are no classifications are left out.
        """
        return {
            name: task.probabilities(outputs)
            for name, outputs in self._forward(X)[0].items()
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
        outputs = self._forward(X)[0]
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


def _labels(tasks: Mapping[str, Task], targets: Mapping[str, np.ndarray], split: str) -> Data:
    """The encoded targets of a split, without inputs."""
    if set(targets) != set(tasks):
        raise ValueError(f"validation: y has the tasks {list(targets)}: expected {list(tasks)}")
    labeled = labels_of({name: targets[name] for name in tasks}, split)
    encoded = tuple(task.encode(targets[name], labeled[name]) for name, task in tasks.items())
    return Data(None, encoded, tuple(labeled.values()))


def _labels_at(rows: np.ndarray, tasks: Mapping[str, Task], labels: Data, split: str) -> Data:
    """The encoded targets of some rows."""
    found = jax.tree.map(lambda each: each[rows], labels)
    check_labeled(dict(zip(tasks, found.labeled, strict=True)), split)
    return found
