"""On-line EM (Jordan & Jacobs 1994, section 5): every batch is seen once.

The M-step is a step of recursive least squares: the curvature of each gate and expert is a sum over
the past that decays by a factor per row, and a batch moves the coefficients by its inverse times
the batch's gradient. For linear experts this is weighted least squares with forgetting; for gates
and logistic experts it is Newton's method on line.
"""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from vmoe.classic.experts.interface import Experts
from vmoe.classic.experts.linear import Linear, residuals
from vmoe.classic.experts.logistic import Logistic
from vmoe.classic.grams import solve, weighted_grams
from vmoe.classic.mixture import Mixture
from vmoe.classic.multinomial import Multinomial
from vmoe.classic.partition import FixedGate
from vmoe.classic.rows import Rows
from vmoe.classic.tree import Gate


@dataclass
class Memory:
    """What is left of the past, which decays: the curvatures by name, and the noise.

    Attributes:
        curvature: the curvature of each gate and expert.
        squares: the weighted squared residuals of linear experts (e, q).
        mass: the mass of each expert (e,).
    """

    curvature: dict[str, np.ndarray] = field(default_factory=dict)
    squares: np.ndarray = field(default_factory=lambda: np.zeros(()))
    mass: np.ndarray = field(default_factory=lambda: np.zeros(()))


EXPERTS = (Linear, Logistic)


def check_experts(experts: Experts) -> None:
    """Raises a ValueError for experts other than linear and logistic ones."""
    if type(experts) not in EXPERTS:
        raise ValueError("partial_fit needs experts='linear' or experts='logistic'")


def learn(mixture: Mixture, memory: Memory, rows: Rows, decay: float, move: bool) -> None:
    """One batch: an E-step, then a step of every gate and expert.

    Args:
        decay: the factor by which the past counts less with every row.
        move: False only to remember the rows, to which the mixture has been fitted already.
    """
    experts = mixture.experts
    posterior, _ = mixture.posterior(rows)
    mass = posterior * rows.weight[:, None]
    kept = decay ** float(rows.weight.sum())
    _learn_gate(mixture.tree, "gate", rows, mass, (memory, mixture.gate_penalty, kept, move))
    if isinstance(experts, Linear):
        _learn_linear(experts, memory, rows, mass, kept, move)
    else:
        classes = np.eye(experts.sizes.n_outputs)[rows.y]
        for e in range(mass.shape[1]):
            settings = (memory, experts.sizes.penalty, kept, move)
            target = mass[:, e, None] * classes
            experts.coef[e] = _newton(experts.coef[e], f"{e}", rows.expert, target, settings)


def _learn_gate(gate: Gate, name: str, rows: Rows, mass: np.ndarray, settings: tuple) -> None:
    if isinstance(gate, FixedGate):
        return
    gate.coef = _newton(gate.coef, name, rows.gate, gate.child_masses(mass), settings)
    for k, (child, part) in enumerate(zip(gate.children, gate.parts(mass), strict=True)):
        if isinstance(child, Gate):
            _learn_gate(child, f"{name}.{k}", rows, part, settings)


def _newton(
    coef: np.ndarray, name: str, x: np.ndarray, target: np.ndarray, settings: tuple
) -> Float[np.ndarray, "k p"]:
    """Coefficients of a multinomial regression after a batch; the penalty only stabilizes."""
    memory, penalty, kept, move = settings
    if len(coef) < 2:
        return coef
    coef = coef - coef[0]
    function = Multinomial(x, np.ascontiguousarray(target.T), target.sum(axis=1), 0.0)
    _, p = function.evaluate(coef)
    memory.curvature[name] = kept * memory.curvature.get(name, 0.0) + function.curvature(p)
    if not move:
        return coef
    some = penalty * np.eye(len(memory.curvature[name]))
    return function.moved(coef, solve(memory.curvature[name] + some, function.gradient(coef, p)))


def _learn_linear(
    experts: Linear, memory: Memory, rows: Rows, mass: np.ndarray, kept: float, move: bool
) -> None:
    past = memory.curvature.get("experts", 0.0)
    memory.curvature["experts"] = kept * past + weighted_grams(rows.expert, mass.T)
    if move:
        some = experts.sizes.penalty * np.eye(experts.coef.shape[-1])
        left = residuals(rows, experts.coef)
        gradient = np.einsum("ne,neq,np->eqp", mass, left, rows.expert)
        grams = (memory.curvature["experts"] + some)[:, None]
        experts.coef += solve(np.broadcast_to(grams, (*gradient.shape, grams.shape[-1])), gradient)
    squares = np.einsum("ne,neq->eq", mass, residuals(rows, experts.coef) ** 2)
    memory.squares = kept * memory.squares + squares
    memory.mass = kept * memory.mass + mass.sum(axis=0)
    if move:
        variance = memory.squares / np.maximum(memory.mass, np.finfo(float).tiny)[:, None]
        experts.std = np.sqrt(np.maximum(variance, experts.sizes.floor))
