"""Kinds of tasks: from targets to numbers, from outputs to losses and predictions."""

from collections.abc import Mapping
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from scipy.special import expit, softmax
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.metrics import d2_tweedie_score, get_scorer, make_scorer

from vmoe.multitask.values import as_list, as_numbers, exact, is_missing, type_of

D2_POISSON = "d2_poisson"
"""The share of the Poisson deviance that is explained, for which scikit-learn has no scorer."""
SCORERS = {D2_POISSON: make_scorer(d2_tweedie_score, power=1)}
LEAST = -1.0
"""In the mean of the scores of several tasks, none of the metrics below counts less: R² and D² have
no lower bound, so that of one bad task would decide it."""
UNBOUNDED = ("r2", D2_POISSON)


class Task:
    """A task with its targets. A subclass is a kind.

    A target is missing where it is NaN, None or pandas' NA; missing ones count in no loss.

    Attributes:
        name: the name of the task, for errors.
        size: number of outputs of the task's tower.
        metric: the name of the scorer by default.
    """

    name: str
    size = 1
    metric: str

    def __init__(
        self,
        name: str,
        targets: np.ndarray,
        labeled: np.ndarray,
        sample_weight: Float[np.ndarray, "b"] | None = None,
    ):
        """Learns from the targets that are there, see ``learn``.

        Args:
            targets: all targets (b,).
            labeled: whether a target is there (b,).
            sample_weight: how much a row counts in scales of the targets; None for 1.

        Raises:
            ValueError: the targets are not of this kind, or all equal.
        """
        self.name = name
        self.learn(targets[labeled], None if sample_weight is None else sample_weight[labeled])

    def learn(self, targets: np.ndarray, sample_weight: Float[np.ndarray, "b"] | None) -> None:
        """Learns from targets, none of which is missing, what the kind needs to know of them."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    def encode(self, targets: np.ndarray, labeled: np.ndarray) -> np.ndarray:
        """Targets as float32 or int32; 0 for missing ones.

        Raises:
            ValueError: a target is not of this kind.
        """
        raise NotImplementedError

    @staticmethod
    def loss(outputs: Float[Array, "b q"], targets: Array) -> Float[Array, "b"]:
        """The loss of each row."""
        raise NotImplementedError

    def predict(self, outputs: Float[np.ndarray, "b q"]) -> np.ndarray:
        """Predictions (b,) in the form of the targets."""
        raise NotImplementedError

    def score(
        self,
        truth: np.ndarray,
        outputs: Float[np.ndarray, "b q"],
        metric: str,
        sample_weight: Float[np.ndarray, "b"] | None = None,
    ) -> float:
        """How well outputs predict targets, none of which is missing; more is better.

        Args:
            truth: the targets (b,) as ``truth`` makes them for the metric.
            metric: the name of a scorer of scikit-learn, or "d2_poisson". For those that have a
                positive class, it is the last one.

        Raises:
            ValueError: the metric is not for such a task, or is undefined for these targets.
        """
        given = {} if sample_weight is None else {"sample_weight": sample_weight}
        try:
            scorer = SCORERS[metric] if metric in SCORERS else get_scorer(metric)
            found = float(scorer(self.predictor(), outputs, truth, **given))
        except (ValueError, TypeError, AttributeError) as error:
            first = str(error).strip().split("\n")[0]
            raise ValueError(f"task {self.name!r}: {metric}: {first}") from error
        if not np.isfinite(found):
            raise ValueError(f"task {self.name!r}: {metric} is {found}: use another metric")
        return found

    def truth(self, targets: np.ndarray, metric: str) -> np.ndarray:
        """Targets as a scorer compares them with the predictions of ``predictor``."""
        raise NotImplementedError

    def predictor(self) -> BaseEstimator:
        """Predicts from outputs f[b q], with the methods that scorers call."""
        return OutputRegressor(self)


class OutputRegressor(RegressorMixin, BaseEstimator):
    """The predictions of a regression or a count, from its outputs."""

    def __init__(self, task: Task):
        self.task = task

    def predict(self, X: Float[np.ndarray, "b q"]) -> np.ndarray:
        return self.task.predict(X)


class OutputClassifier(ClassifierMixin, BaseEstimator):
    """The codes and probabilities of the classes of a classification, from its outputs."""

    def __init__(self, task: "Classification"):
        self.task, self.classes_ = task, np.arange(len(task.classes))

    def predict_proba(self, X: Float[np.ndarray, "b q"]) -> np.ndarray:
        return self.task.probabilities(X)

    def predict(self, X: Float[np.ndarray, "b q"]) -> np.ndarray:
        return self.predict_proba(X).argmax(axis=1)


class Classification(Task):
    """Classification, with cross-entropy as the loss.

    Attributes:
        classes: the classes, sorted. Two have one output, the logit of the second.
    """

    metric = "accuracy"

    def learn(self, targets: np.ndarray, sample_weight: Float[np.ndarray, "b"] | None) -> None:
        self.type = type_of(f"task {self.name!r}", targets)
        self.classes = exact(np.unique(targets))
        if len(self.classes) < 2:
            raise ValueError(
                f"task {self.name!r}: all targets are {self.classes[0]}, 1 class: leave the task "
                "out"
            )
        self.size = 1 if len(self.classes) == 2 else len(self.classes)

    def encode(self, targets: np.ndarray, labeled: np.ndarray) -> np.ndarray:
        encoded = np.zeros(len(targets), np.int32)
        encoded[labeled] = self._known_codes(targets[labeled])
        return encoded

    def codes(self, targets: np.ndarray) -> Int[np.ndarray, "b"]:
        """The index of the class of each target, none of which is missing; -1 for unknown ones."""
        found = type_of(f"task {self.name!r}", targets)
        if found not in (self.type, None):
            raise ValueError(
                f"task {self.name!r}: targets of type {found}, and the classes are of type "
                f"{self.type}: convert them"
            )
        known = {value: code for code, value in enumerate(as_list(self.classes))}
        return np.array([known.get(value, -1) for value in as_list(targets)], np.int32)

    def _known_codes(self, targets: np.ndarray) -> Int[np.ndarray, "b"]:
        codes = self.codes(targets)
        if (unknown := codes < 0).any():
            first = as_list(targets[unknown])[0]
            raise ValueError(
                f"task {self.name!r}: class {first!r} was in no target when the classes were "
                "learned: leave its rows out"
            )
        return codes

    @staticmethod
    def loss(outputs: Float[Array, "b q"], targets: Array) -> Float[Array, "b"]:
        if outputs.shape[1] == 1:
            return optax.sigmoid_binary_cross_entropy(outputs[:, 0], targets)
        return optax.softmax_cross_entropy_with_integer_labels(outputs, targets)

    def probabilities(self, outputs: Float[np.ndarray, "b q"]) -> np.ndarray:
        """The probability of each class, in the order of ``classes``."""
        if self.size == 1:
            return np.hstack([expit(-outputs), expit(outputs)])
        return softmax(outputs, axis=1)

    def predict(self, outputs: Float[np.ndarray, "b q"]) -> np.ndarray:
        return self.classes[self.probabilities(outputs).argmax(axis=1)]

    def truth(self, targets: np.ndarray, metric: str) -> np.ndarray:
        """The codes of the classes. For the accuracy, a class that is not in fit is a code, -1."""
        return self.codes(targets) if metric == "accuracy" else self._known_codes(targets)

    def predictor(self) -> BaseEstimator:
        return OutputClassifier(self)

    def class_weights(
        self, class_weight: Any, targets: np.ndarray, sample_weight: Any
    ) -> Float[np.ndarray, "q"]:
        """The weight of each class.

        Args:
            class_weight: "balanced", for weights in inverse proportion to the classes' frequencies,
                or a dict of weights by class, 1 for all others.
            targets: missing ones among them.
            sample_weight: of the targets; None for 1.

        Raises:
            ValueError: a class is not in fit, or a weight is no number from 0 on.
        """
        place = f"class_weight: task {self.name!r}"
        if isinstance(class_weight, str) and class_weight == "balanced":
            labeled = ~is_missing(targets)
            weight = None if sample_weight is None else sample_weight[labeled]
            counts = np.bincount(self.codes(targets[labeled]), weight, len(self.classes))
            return counts.sum() / (len(counts) * counts)
        if not isinstance(class_weight, Mapping):
            raise ValueError(f'{place}: {class_weight!r}: use "balanced" or a dict by class')
        found, known = np.ones(len(self.classes)), as_list(self.classes)
        for value, weight in class_weight.items():
            if value not in known:
                raise ValueError(f"{place}: there is no class {value!r}, only {known}")
            if not (isinstance(weight, Real) and 0 <= float(weight) < np.inf):
                raise ValueError(f"{place}: class {value!r}: {weight!r}: use a number from 0 on")
            found[known.index(value)] = weight
        return found


class Numbers(Task):
    """Targets that are numbers, of which the mean is learned; one output.

    Attributes:
        mean: of the targets.
        symbol: of the metric by default, which is undefined for equal targets.
    """

    symbol: str

    def learn(self, targets: np.ndarray, sample_weight: Float[np.ndarray, "b"] | None) -> None:
        values = self.numbers(targets)
        self._check_differ(values, "leave the task out")
        with np.errstate(over="ignore"):
            self.mean = float(np.average(values, weights=sample_weight))

    def numbers(self, targets: np.ndarray) -> Float[np.ndarray, "b"]:
        """Targets as float64; NaN for missing ones."""
        return as_numbers(f"task {self.name!r}", targets, 'use kind "classification"')

    def scaled(self, values: Float[np.ndarray, "b"]) -> Float[np.ndarray, "b"]:
        """Numbers as the loss has them."""
        raise NotImplementedError

    def encode(self, targets: np.ndarray, labeled: np.ndarray) -> np.ndarray:
        values = np.where(labeled, self.scaled(self.numbers(targets)), 0)
        with np.errstate(over="ignore"):
            encoded = values.astype(np.float32)
        if not np.isfinite(encoded).all():
            raise ValueError(
                f"task {self.name!r}: a target is too far from the learned mean for float32"
            )
        return encoded

    def truth(self, targets: np.ndarray, metric: str) -> np.ndarray:
        values = self.numbers(targets)
        if metric == self.metric:
            remedy = f"{self.symbol} is undefined: score rows whose targets differ"
            self._check_differ(values, remedy)
        return values

    def _check_differ(self, values: Float[np.ndarray, "b"], remedy: str) -> None:
        if values.min() == values.max():
            raise ValueError(f"task {self.name!r}: all targets are {values[0]:g}: {remedy}")


class Regression(Numbers):
    """Regression, with the squared error of standardized targets as the loss."""

    metric, symbol = "r2", "R²"

    def learn(self, targets: np.ndarray, sample_weight: Float[np.ndarray, "b"] | None) -> None:
        super().learn(targets, sample_weight)
        with np.errstate(over="ignore"):
            squares = (self.numbers(targets) - self.mean) ** 2
            self.std = float(np.sqrt(np.average(squares, weights=sample_weight)))
        if not 0 < self.std < np.inf:
            raise ValueError(
                f"task {self.name!r}: targets of standard deviation {self.std}: scale them"
            )

    def scaled(self, values: Float[np.ndarray, "b"]) -> Float[np.ndarray, "b"]:
        return (values - self.mean) / self.std

    @staticmethod
    def loss(outputs: Float[Array, "b q"], targets: Array) -> Float[Array, "b"]:
        return jnp.square(outputs[:, 0] - targets)

    def predict(self, outputs: Float[np.ndarray, "b q"]) -> np.ndarray:
        return self.mean + self.std * outputs[:, 0].astype(np.float64)


class Count(Numbers):
    """Counts, with half the Poisson deviance, divided by the mean of the targets, as the loss.

    The mean of a row is the mean of the targets times the exponential of the output.
    """

    metric, symbol = D2_POISSON, "D²"

    def numbers(self, targets: np.ndarray) -> Float[np.ndarray, "b"]:
        values = super().numbers(targets)
        wrong = values[~((values >= 0) & (values == np.round(values))) & ~np.isnan(values)]
        if len(wrong):
            raise ValueError(
                f"task {self.name!r}: {wrong[0]:g} is no count: counts are integers from 0 on"
            )
        return values

    def scaled(self, values: Float[np.ndarray, "b"]) -> Float[np.ndarray, "b"]:
        return values / self.mean

    @staticmethod
    def loss(outputs: Float[Array, "b q"], targets: Array) -> Float[Array, "b"]:
        log_mean = outputs[:, 0]
        best = jax.scipy.special.xlogy(targets, targets) - targets
        return jnp.exp(log_mean) - targets * log_mean + best

    def predict(self, outputs: Float[np.ndarray, "b q"]) -> np.ndarray:
        return self.mean * np.exp(outputs[:, 0].astype(np.float64))


KINDS: dict[str, type[Task]] = {
    "classification": Classification,
    "regression": Regression,
    "count": Count,
}
