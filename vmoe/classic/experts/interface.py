"""What EM needs from experts: a weighted fit, log densities, and predictions.

One object holds all experts of one kind, with the expert as an axis of its arrays, so that they
share matrix products.
"""

import copy
import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float

from vmoe.classic.design import Design
from vmoe.classic.rows import Rows

AT_FLOOR = 1 + 1e-9  # a variance up to so many floors is at the floor
DEAD = 1e-12  # an expert keeps its parameters if its share of the mass is at most this


@dataclass(frozen=True)
class Sizes:
    """What experts are made for.

    Attributes:
        n_experts: the number of experts.
        n_columns: columns that they see, without the intercept's.
        n_outputs: outputs, or classes.
        penalty: strength of the penalty on the slopes.
        floor: the least variance of every output; 0 for classes.
        classes: the classes as the user gave them; None for a regression.
        random: the source of random numbers.
    """

    n_experts: int
    n_columns: int
    n_outputs: int
    penalty: float
    floor: Any
    classes: Any
    random: np.random.RandomState


@dataclass(frozen=True)
class FittedExpert:
    """The parameters of one expert, for columns as they were given.

    Attributes:
        kind: "linear", "logistic", "poisson" or "student_t".
        coef_: coefficients with the intercept first: (p,), or a row for every output or class; with
            two classes (p,), for the log odds of the second.
        std_: the standard deviation (linear) or the scale (student_t), one per output if there
            are several; None for other kinds. Its square is at least ``variance_floor`` times the
            variance of y, and the slopes add ``expert_penalty`` |slopes|^2 / mass to it (for
            standardized columns and the expert's mass of rows). Set both to 0 if the noise is far
            below the spread of y and its size matters.
        df_: the degrees of freedom (student_t), given or estimated; None for other kinds.
    """

    kind: str
    coef_: Any
    std_: Any = None
    df_: Any = None


class Experts(ABC):
    """All experts of one kind."""

    name: ClassVar[str]
    classifies: ClassVar[bool] = False
    counts: bool = False  # whether targets have probabilities instead of densities
    learned: ClassVar[tuple[str, ...]] = ("coef",)  # the attributes that a fit changes
    coef: Float[np.ndarray, "e q p"]  # for standardized columns
    sizes: Sizes

    def allocate(self, sizes: Sizes) -> None:
        """Makes room for these sizes; the parameters are zero before the first fit."""
        self.sizes = sizes
        self.coef = np.zeros((sizes.n_experts, sizes.n_outputs, sizes.n_columns + 1))

    def check_targets(self, y: np.ndarray) -> None:
        """Raises a ValueError if experts of this kind cannot have such targets."""
        return

    @abstractmethod
    def update(self, rows: Rows, mass: Float[np.ndarray, "n e"]) -> None:
        """The M-step: fits every expert to the rows, weighted by its mass."""

    @abstractmethod
    def log_density(self, rows: Rows) -> Float[np.ndarray, "n e"]:
        """The logarithm of each expert's density at the rows' targets."""

    @abstractmethod
    def means(self, rows: Rows) -> Float[np.ndarray, "n e q"]:
        """Each expert's mean, or its probabilities of the classes."""

    def finish(self, rows: Rows, mass: Float[np.ndarray, "n e"]) -> dict[int, str]:
        """What follows the last M-step, for the masses after it; what to warn of, by expert."""
        return {}

    def variances(self) -> Float[np.ndarray, "e q"]:
        """The variance, or the squared scale, of each expert's noise; inf if it has no bound."""
        return np.full((self.sizes.n_experts, self.sizes.n_outputs), np.inf)

    def at_floor(self) -> Bool[np.ndarray, "e q"]:
        """Which variances have the least value."""
        return self.variances() <= AT_FLOOR * self.sizes.floor

    def log_proba(self, rows: Rows) -> Float[np.ndarray, "n e q"]:
        """The logarithm of each expert's probabilities of the classes."""
        with np.errstate(divide="ignore"):
            return np.log(self.means(rows))

    def penalty(self) -> float:
        """What is subtracted from the log-likelihood, besides the gates' penalty."""
        return 0.5 * self.sizes.penalty * float(np.sum(self.coef[..., 1:] ** 2))

    def n_parameters(self) -> int:
        """The number of free parameters of all experts."""
        return self.coef.size

    def distributions(self, rows: Rows) -> list[tuple[np.ndarray, Any]]:
        """Pairs of experts' indices and their distribution, of scipy.stats: (n, e, q)."""
        raise NotImplementedError

    def types(self) -> list[type]:
        """The type of each expert; one entry if all are of one kind."""
        return [type(self)]

    def resume(self, other: "Experts") -> None:
        """Takes the parameters of other experts of the same kind and sizes."""
        for name in self.learned:
            setattr(self, name, copy.deepcopy(getattr(other, name)))

    def keep(self, experts: list[int]) -> None:
        """Keeps only the experts with these indices, in this order; they may repeat."""
        self.sizes = dataclasses.replace(self.sizes, n_experts=len(experts))
        self.coef = self.coef[experts]

    def set_parameters(self, coef: Any, std: Any, df: Any, design: Design) -> None:
        """Sets parameters in the form of ``fitted``, with the expert as the first axis."""
        for name, value in (("std", std), ("df", df)):
            if value is not None:
                raise ValueError(f"start: expert_{name} is not a parameter of {self.name} experts")
        self.coef = design.from_given(in_shape("expert_coef", coef, self.coef.shape))

    def fitted(self, design: Design | None) -> list[Any]:
        """The experts, one by one."""
        assert design is not None
        coefs = design.to_given(self.coef)
        return [
            FittedExpert(self.name, one_if_single(c), self.std_of(i), self.df_of(i))
            for i, c in enumerate(coefs)
        ]

    def std_of(self, expert: int) -> Any:
        """``FittedExpert.std_`` of an expert."""
        return None

    def df_of(self, expert: int) -> Any:
        """``FittedExpert.df_`` of an expert."""
        return None


def in_shape(name: str, values: Any, shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
    """The values in a shape, in which the second axis may be missing if it has one entry."""
    values = np.asarray(values, float)
    if shape[1:2] == (1,) and values.shape == (shape[0], *shape[2:]):
        values = values[:, None]
    if values.shape != shape:
        raise ValueError(f"start: {name} has shape {values.shape}, expected {shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"start: {name} should be finite")
    return values.copy()


def one_if_single(values: np.ndarray) -> Any:
    """The values without their first axis if it has one entry."""
    return values[0] if len(values) == 1 else values


def alive(mass: Float[np.ndarray, "n e"]) -> Bool[np.ndarray, "e"]:
    """Which experts have a mass that is not negligible."""
    total = mass.sum(axis=0)
    return total > DEAD * total.sum()
