"""On-line EM (Jordan & Jacobs 1994, section 5): every batch is seen once.

The M-step is a step of recursive least squares: the curvature of each gate and expert is a sum over
the past that decays by a factor per row, and a batch moves the coefficients by its inverse times
the batch's gradient. For linear experts this is weighted least squares with forgetting; for gates
and logistic experts it is Newton's method on line.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
from jaxtyping import Float

from vmoe.classic.experts.linear import Linear, residuals, squared_noise, std_from
from vmoe.classic.experts.logistic import Logistic
from vmoe.classic.grams import solve, weighted_grams
from vmoe.classic.mixture import Mixture
from vmoe.classic.multinomial import Multinomial
from vmoe.classic.newton import Newton
from vmoe.classic.partition import FixedGate
from vmoe.classic.rows import Rows
from vmoe.classic.tree import TreeGate

EXPERTS = (Linear, Logistic)


@dataclass
class OnlineMemory:
    """Sums over past rows, which decay.

    Attributes:
        curvature: the curvature of each gate and expert, by name.
        squares: the weighted squared residuals of linear experts (e, q).
        mass: the mass of each expert (e,).
        cautious: whether logistic experts go to the maximum of what a batch and the past say. The
            single step that they take otherwise is too long for a class that the past hardly has.
    """

    curvature: dict[str, np.ndarray] = field(default_factory=dict)
    squares: np.ndarray = field(default_factory=lambda: np.zeros(()))
    mass: np.ndarray = field(default_factory=lambda: np.zeros(()))
    cautious: bool = False

    def decay(self, factor: float) -> None:
        """Multiplies every sum by a factor."""
        self.curvature = {name: factor * past for name, past in self.curvature.items()}
        self.squares, self.mass = factor * self.squares, factor * self.mass

    def add(self, name: str, curvature: np.ndarray) -> None:
        """Adds the curvature of a gate or expert for a batch."""
        self.curvature[name] = self.curvature.get(name, 0.0) + curvature


def can_learn(estimator: Any) -> bool:
    """Whether an estimator has ``partial_fit``; if not, a ValueError says what it needs."""
    wanted = estimator.experts
    names = [kind.name for kind in EXPERTS]
    if wanted is None or type(wanted) in EXPERTS or (isinstance(wanted, str) and wanted in names):
        return True
    raise ValueError(f"experts={wanted!r}: partial_fit needs one of {names}")


def learn(mixture: Mixture, memory: OnlineMemory, rows: Rows, decay: float, move: bool) -> None:
    """One batch: an E-step, then a step of every gate and expert.

    Args:
        memory: sums over the past, to which the batch is added.
        decay: the factor by which the past counts less with every row.
        move: False only to remember the rows, to which the mixture has been fitted already.
    """
    experts = mixture.experts
    posterior, _ = mixture.posterior(rows)
    mass = posterior * rows.weight[:, None]
    share = posterior * rows.share[:, None]
    memory.decay(decay ** float(rows.weight.sum()))
    batch = _Batch(rows, memory, move)
    batch.learn_gate(mixture.tree, "gate", share, mixture.gate_penalty)
    if isinstance(experts, Linear):
        batch.learn_linear(experts, mass)
    elif isinstance(experts, Logistic):
        batch.learn_logistic(experts, mass)


def with_classes(rows: Rows, lacking: list[int]) -> Rows:
    """The rows, and for each class that they lack one row of it, spread over all of them.

    Without it, the intercept of the class would have no maximum.
    """
    if not lacking:
        return rows
    stack = scipy.sparse.vstack if scipy.sparse.issparse(rows.given) else np.vstack
    given = stack([rows.given] * (1 + len(lacking)))
    y = np.concatenate([rows.y, np.repeat(lacking, len(rows))])
    spread = np.tile(rows.weight / rows.weight.sum(), len(lacking))
    return Rows(rows.view, given, y, np.concatenate([rows.weight, spread]))


class BesidePast(NamedTuple):
    """A batch's log-likelihood, less what the past loses if coefficients leave their values.

    Attributes:
        batch: the multinomial regression of the batch.
        past: the curvature of the past.
        start: the coefficients so far.
    """

    batch: Multinomial
    past: np.ndarray
    start: np.ndarray

    @property
    def total_mass(self) -> float:
        return self.batch.total_mass

    def evaluate(self, coef: np.ndarray) -> tuple[float, np.ndarray]:
        value, p = self.batch.evaluate(coef)
        away = (coef - self.start)[1:].ravel()
        return value - 0.5 * float(away @ self.past @ away), p

    def gradient(self, coef: np.ndarray, p: np.ndarray) -> np.ndarray:
        return self.batch.gradient(coef, p) - self.past @ (coef - self.start)[1:].ravel()

    def curvature(self, p: np.ndarray) -> np.ndarray:
        return self.batch.curvature(p) + self.past

    def moved(self, coef: np.ndarray, step: np.ndarray) -> np.ndarray:
        return self.batch.moved(coef, step)


@dataclass(frozen=True)
class _Batch:
    """A batch; see ``learn``."""

    rows: Rows
    memory: OnlineMemory
    move: bool

    def learn_gate(self, gate: TreeGate, name: str, mass: np.ndarray, penalty: float) -> None:
        """A step of a gate and of those below."""
        if isinstance(gate, FixedGate):
            return
        masses = gate.child_masses(mass)
        gate.coef = self.newton(gate.coef, name, self.rows.gate, masses, penalty)
        for k, (child, part) in enumerate(zip(gate.children, gate.parts(mass), strict=True)):
            if isinstance(child, TreeGate):
                self.learn_gate(child, f"{name}.{k}", part, penalty)

    def learn_logistic(self, experts: Logistic, mass: np.ndarray) -> None:
        """A step of every logistic expert."""
        classes = np.eye(experts.sizes.n_outputs)[self.rows.y]
        for e, coef in enumerate(experts.coef):
            target = mass[:, e, None] * classes
            penalty = experts.sizes.penalty
            experts.coef[e] = self.newton(coef, f"{e}", self.rows.expert, target, penalty)

    def newton(
        self, coef: np.ndarray, name: str, x: np.ndarray, target: np.ndarray, penalty: float
    ) -> Float[np.ndarray, "k p"]:
        """Adds a multinomial regression to the memory; returns its coefficients after a step.

        The penalty only keeps the curvature from being singular.
        """
        if len(coef) < 2:
            return coef
        coef = coef - coef[0]
        function = Multinomial(x, np.ascontiguousarray(target.T), target.sum(axis=1), 0.0)
        _, p = function.evaluate(coef)
        past = self.memory.curvature.get(name) if self.memory.cautious else None
        self.memory.add(name, function.curvature(p))
        if not self.move:
            return coef
        curvature = self.memory.curvature[name]
        ridge = penalty * np.eye(len(curvature))
        if past is not None:
            return Newton().maximize(BesidePast(function, past + ridge, coef), coef)
        return function.moved(coef, solve(curvature + ridge, function.gradient(coef, p)))

    def learn_linear(self, experts: Linear, mass: np.ndarray) -> None:
        """A step of all linear experts."""
        rows, memory = self.rows, self.memory
        memory.add("experts", weighted_grams(rows.expert, mass.T))
        if self.move:
            ridge = experts.sizes.penalty * np.eye(experts.coef.shape[-1])
            left = residuals(rows, experts.coef)
            gradient = np.einsum("ne,neq,np->eqp", mass, left, rows.expert)
            grams = memory.curvature["experts"] + ridge
            steps = [solve(gram, g.T).T for gram, g in zip(grams, gradient, strict=True)]
            experts.coef += np.stack(steps)
        memory.squares = memory.squares + squared_noise(mass, residuals(rows, experts.coef))
        memory.mass = memory.mass + mass.sum(axis=0)
        if self.move:
            total = np.maximum(memory.mass, np.finfo(float).tiny)
            experts.std = std_from(memory.squares, total, experts.sizes.floor)
