"""The free parameters of a mixture in one order: gates level by level, then experts."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy.linalg import block_diag

from vmoe.classic.design import Design
from vmoe.classic.experts.interface import Experts
from vmoe.classic.experts.linear import Linear
from vmoe.classic.experts.logistic import Logistic
from vmoe.classic.experts.poisson import Poisson
from vmoe.classic.experts.student_t import LEAST, MOST, StudentT
from vmoe.classic.grams import slopes_only
from vmoe.classic.mixture import Mixture, parts
from vmoe.classic.multinomial import centered
from vmoe.classic.partition import FixedGate
from vmoe.classic.rows import ColumnView
from vmoe.classic.tree import TreeGate, breadth_first

NONE = np.zeros(0), np.zeros(0), np.zeros(0, bool)
"""``std``, ``df`` and ``at_bound`` of a block without them."""


@dataclass(frozen=True)
class Block:
    """The free parameters of a gate or an expert: coefficients, then those that are positive.

    Attributes:
        part: "gate", "gate 1" (level by level, if there are several) or "expert 0".
        lines: what each row of ``coef`` is for: a child or class; empty for the only one.
        is_gate: whether it is a gate's.
        coef: (m, p) for standardized columns: of all children, or classes, but the first, or of all
            outputs.
        std: the standard deviations of an expert's outputs; empty without noise.
        df: the degrees of freedom; empty if they are not estimated.
        at_bound: which of ``positive`` are at a bound, and so are not estimated.
        slope: the gradient of the penalty in the coefficients and the logarithms of ``positive``.
        curvature: its Hessian.
    """

    part: str
    lines: list[str]
    is_gate: bool
    coef: Float[np.ndarray, "m p"]
    std: Float[np.ndarray, "q"]
    df: Float[np.ndarray, "_"]
    at_bound: Bool[np.ndarray, "_"]
    slope: Float[np.ndarray, "c"]
    curvature: Float[np.ndarray, "c c"]

    @property
    def positive(self) -> Float[np.ndarray, "_"]:
        """The parameters that are estimated on a log scale."""
        return np.r_[self.std, self.df]

    def design(self, view: ColumnView) -> Design:
        """How the columns of the coefficients are standardized."""
        design = view.gate_design if self.is_gate else view.expert_design
        assert design is not None
        return design

    def given(self, view: ColumnView) -> Float[np.ndarray, "c"]:
        """The parameters for columns as they were given."""
        return np.r_[self.design(view).to_given(self.coef).ravel(), self.positive]

    def to_given(self, view: ColumnView) -> Float[np.ndarray, "c c"]:
        """The derivative of ``given`` in the coefficients and the logarithms of ``positive``."""
        (m, p) = self.coef.shape
        change = self.design(view).to_given(np.eye(p)).T
        return block_diag(np.kron(np.eye(m), change), np.diag(self.positive))

    def units(self) -> Float[np.ndarray, "c"]:
        """Natural units of the parameters: the noise for coefficients of experts that have some."""
        unit = self.std if self.std.size else np.ones(len(self.coef))
        return np.r_[np.repeat(unit, self.coef.shape[1]), np.ones(self.positive.size)]

    def fixed(self) -> Bool[np.ndarray, "c"]:
        """Which parameters are at a bound, and so are not estimated."""
        return np.r_[np.zeros(self.coef.size, bool), self.at_bound]


def blocks(mixture: Mixture) -> list[Block]:
    """All free parameters; a partition and estimators of scikit-learn have none."""
    found, experts = [], itertools.chain.from_iterable(map(_expert_blocks, parts(mixture)))
    if not isinstance(mixture.tree, FixedGate):
        gates = breadth_first(mixture.tree)
        for i, gate in enumerate(gates):
            lines = [_name(child, gates) for child in gate.children[1:]]
            penalty = _of_outcomes(gate.coef, mixture.gate_penalty)
            part, coef = f"gate {i}" if len(gates) > 1 else "gate", gate.coef[1:] - gate.coef[0]
            found.append(Block(part, lines, True, coef, *NONE, *penalty))
    found += [Block(f"expert {i}", *of) for i, of in enumerate(experts)]
    return [block for block in found if block.coef.size]


def _name(child: TreeGate | int, gates: list[TreeGate]) -> str:
    if isinstance(child, int):
        return f"expert {child}"
    return f"gate {next(i for i, gate in enumerate(gates) if gate is child)}"


def _expert_blocks(kind: Experts) -> Iterator[tuple[Any, ...]]:
    """What ``Block`` has for every expert of a kind, after its part."""
    strength, classes = kind.sizes.penalty, kind.sizes.classes
    for i, coef in enumerate(kind.coef):
        lines = [f"y{j}" for j in range(len(coef))] if len(coef) > 1 else [""]
        if isinstance(kind, Logistic):
            lines = [f"class {name}" for name in classes[1:]] if len(classes) > 2 else [""]
            penalty = _of_outcomes(coef, strength)
            yield lines[: len(coef) - 1], False, coef[1:] - coef[0], *NONE, *penalty
        elif isinstance(kind, Linear):
            std, df = kind.std[i], np.zeros(0)
            if isinstance(kind, StudentT) and kind.df is None:
                df = kind.df_[[i]]
            at_bound = np.r_[kind.at_floor()[i], np.isclose(df, LEAST) | np.isclose(df, MOST)]
            slope, curvature = _in_units_of_noise(coef, std, strength)
            slope, curvature = np.r_[slope, 0 * df], block_diag(curvature, np.diag(0 * df))
            yield lines, False, coef, std, df, at_bound, slope, curvature
        elif isinstance(kind, Poisson):
            curvature = strength * np.kron(np.eye(len(coef)), slopes_only(coef.shape[1]))
            yield lines, False, coef, *NONE, curvature @ coef.ravel(), curvature
        else:
            yield [], False, coef[:0], *NONE, np.zeros(0), np.zeros((0, 0))


def _of_outcomes(coef: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """The derivatives of ``multinomial.penalty_of`` for all outcomes but the first."""
    k, p = coef.shape
    curvature = strength * np.kron(np.eye(k - 1) - 1 / k, slopes_only(p))
    return strength * centered(coef)[1:].ravel(), curvature


def _in_units_of_noise(
    coef: np.ndarray, std: np.ndarray, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    """The derivatives of ``Linear.penalty`` for one expert."""
    (q, p), slopes = coef.shape, coef * np.r_[0.0, np.ones(coef.shape[1] - 1)]
    pull = strength * slopes / std[:, None] ** 2
    squares = np.sum(pull * slopes, axis=1)
    diagonal = np.kron(np.diag(strength / std**2), slopes_only(p))
    crossed = block_diag(*(-2 * pull[:, :, None])) if q else np.zeros((0, 0))
    curvature = np.block([[diagonal, crossed], [crossed.T, 2 * np.diag(squares)]])
    return np.r_[pull.ravel(), -squares], curvature
