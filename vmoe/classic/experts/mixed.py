"""Experts of several kinds in one mixture."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from vmoe.classic.design import Design
from vmoe.classic.experts.interface import Experts, Sizes, alive
from vmoe.classic.rows import Rows


class Mixed(Experts):
    """A list of experts, each of its own kind."""

    def __init__(self, parts: Sequence[Experts]):
        """Args: parts: an entry for each expert, before ``allocate``."""
        self.parts = list(parts)
        self.counts = all(part.counts for part in parts)

    def allocate(self, sizes: Sizes) -> None:
        self.sizes = sizes
        for part in self.parts:
            part.allocate(dataclasses.replace(sizes, n_experts=1))

    def check_targets(self, y: np.ndarray) -> None:
        for part in self.parts:
            part.check_targets(y)

    def update(self, rows: Rows, mass: Float[np.ndarray, "n e"]) -> None:
        for e in np.flatnonzero(alive(mass)):
            self.parts[e].update(rows, mass[:, [e]])

    def finish(self, rows: Rows, mass: Float[np.ndarray, "n e"]) -> dict[int, str]:
        mass = np.where(alive(mass), mass, 0.0)  # a part does not see the others' mass
        each = [part.finish(rows, mass[:, [e]]) for e, part in enumerate(self.parts)]
        return {e: found[0] for e, found in enumerate(each) if found}

    def log_density(self, rows: Rows) -> Float[np.ndarray, "n e"]:
        return np.concatenate([part.log_density(rows) for part in self.parts], axis=1)

    def means(self, rows: Rows) -> Float[np.ndarray, "n e q"]:
        return np.concatenate([part.means(rows) for part in self.parts], axis=1)

    def variances(self) -> Float[np.ndarray, "e q"]:
        return np.concatenate([part.variances() for part in self.parts])

    def log_proba(self, rows: Rows) -> Float[np.ndarray, "n e q"]:
        return np.concatenate([part.log_proba(rows) for part in self.parts], axis=1)

    def penalty(self) -> float:
        return sum(part.penalty() for part in self.parts)

    def n_parameters(self) -> int:
        return sum(part.n_parameters() for part in self.parts)

    def distributions(self, rows: Rows) -> list[tuple[np.ndarray, Any]]:
        pairs = [(e, part.distributions(rows)) for e, part in enumerate(self.parts)]
        return [(np.array([e]), frozen) for e, found in pairs for _, frozen in found]

    def types(self) -> list[type]:
        return [kind for part in self.parts for kind in part.types()]

    def resume(self, other: Experts) -> None:
        assert isinstance(other, Mixed)
        for part, one in zip(self.parts, other.parts, strict=True):
            part.resume(one)

    def keep(self, experts: list[int]) -> None:
        self.sizes = dataclasses.replace(self.sizes, n_experts=len(experts))
        self.parts = [copy.copy(self.parts[e]) for e in experts]
        for part in self.parts:
            part.keep([0])

    def set_parameters(self, coef: Any, std: Any, df: Any, design: Design) -> None:
        raise ValueError("a start from parameters needs named experts of one kind")

    def std_of(self, expert: int) -> Any:
        return self.parts[expert].std_of(0)

    def fitted(self, design: Design | None) -> list[Any]:
        return [expert for part in self.parts for expert in part.fitted(design)]
