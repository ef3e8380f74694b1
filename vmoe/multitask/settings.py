"""The settings of an estimator: their bounds, and those that decide a fitted model."""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
from flax import nnx
from sklearn.base import BaseEstimator
from sklearn.utils._param_validation import Interval, StrOptions

from vmoe.errors import one_line, shortened
from vmoe.multitask.build import ARCHITECTURES
from vmoe.multitask.columns import SIZE
from vmoe.multitask.tasks import KINDS
from vmoe.multitask.training import SCHEDULES
from vmoe.multitask.weighting import WEIGHTINGS

AT_LEAST_1 = Interval(Integral, 1, None, closed="left")
AT_LEAST_0 = Interval(Real, 0, None, closed="left")
POSITIVE = Interval(Real, 0, None, closed="neither")
PROGRAM = ("weighting", "dropout", "entropy_weight", "calibrator_weight")
"""Settings of the program of a training step, in addition to those of the model."""
FREE = {  # settings of training and of scores
    *("weighting", "weighting_params", "task_weights", "class_weight", "dropout", "learning_rate"),
    *("schedule", "ema_decay", "weight_decay", "batch_size", "max_epochs", "monitor", "patience"),
    *("scoring", "validation_fraction", "random_state", "verbose"),
    *("entropy_weight", "calibrator_weight"),
}


@dataclass(eq=False, repr=False)
class Settings(BaseEstimator):
    """The settings of a ``MultiTaskEstimator``, which says what they mean."""

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
    """Kinds of tasks, the first one by default for targets of none of them."""

    def units(self, name: str) -> tuple[int, ...]:
        """Sizes of layers."""
        units = tuple(getattr(self, name))
        if not all(isinstance(size, int | np.integer) and size > 0 for size in units):
            raise ValueError(f"{name}={units}: use integers from 1 on")
        return tuple(int(size) for size in units)


def names_of(settings: Settings) -> set[str]:
    """The names of the settings, also of those that the ``__init__`` of a subclass leaves out."""
    fields = {field.name for field in dataclasses.fields(settings)}
    return fields | settings.get_params(deep=False).keys()


def kept(settings: Settings, names: Iterable[str]) -> dict[str, Any]:
    """Settings by name, as ``normal`` makes them."""
    return {name: normal(getattr(settings, name)) for name in sorted(names)}


def normal(value: Any) -> Any:
    """A copy of a setting that equals those of other types with the same elements."""
    if hasattr(value, "__array__"):
        value = np.asarray(value).tolist()
    if isinstance(value, bool):
        return str(value)  # a mask of columns is no list of their indices
    if callable(value) or isinstance(value, str) or not isinstance(value, Collection):
        return value
    if isinstance(value, Mapping):
        return {key: normal(each) for key, each in value.items()}
    return tuple(map(normal, value))


def check_settings(
    settings: Settings,
    before: Mapping[str, Any],
    place: str = "fit",
    remedy: str = "fit again, or set it back",
) -> None:
    """Raises a ValueError if a setting is another than it was.

    Args:
        before: settings of ``kept``.
        place: what had them.
    """
    for name, then in before.items():
        if (value := normal(getattr(settings, name))) != then:
            now, was = (shortened(one_line(repr(each)), 100) for each in (value, then))
            if now == was:
                was = "another function" if callable(value) else "another value"
            raise ValueError(f"{name}={now}, and in {place} it was {was}: {remedy}")
