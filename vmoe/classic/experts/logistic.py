"""Logistic experts: each is a multinomial regression of the classes."""

from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.special import log_softmax

from vmoe.classic.design import Design
from vmoe.classic.experts.interface import Experts, FittedExpert, Sizes, alive
from vmoe.classic.experts.linear import linear
from vmoe.classic.multinomial import fit_multinomial, penalty_of
from vmoe.classic.newton import Newton
from vmoe.classic.rows import Rows


class Logistic(Experts):
    """Logistic experts, multinomial with several classes; ``experts="logistic"``."""

    name = "logistic"
    classifies = True

    def allocate(self, sizes: Sizes) -> None:
        super().allocate(sizes)
        self.newton = [Newton() for _ in range(sizes.n_experts)]

    def keep(self, experts: list[int]) -> None:
        super().keep(experts)
        self.newton = [Newton() for _ in experts]

    def update(self, rows: Rows, mass: Float[np.ndarray, "n e"]) -> None:
        classes = np.eye(self.sizes.n_outputs)[rows.y]
        for e in np.flatnonzero(alive(mass)):
            targets = mass[:, e, None] * classes
            self.coef[e] = fit_multinomial(
                rows.expert, targets, self.sizes.penalty, self.coef[e], self.newton[e]
            )

    def log_density(self, rows: Rows) -> Float[np.ndarray, "n e"]:
        return self.log_proba(rows)[np.arange(len(rows)), :, rows.y]

    def means(self, rows: Rows) -> Float[np.ndarray, "n e q"]:
        return np.exp(self.log_proba(rows))

    def log_proba(self, rows: Rows) -> Float[np.ndarray, "n e q"]:
        return log_softmax(linear(rows, self.coef), axis=-1)

    def penalty(self) -> float:
        return penalty_of(self.coef, self.sizes.penalty)

    def n_parameters(self) -> int:
        return self.coef[:, 1:].size

    def set_parameters(self, coef: Any, std: Any, df: Any, design: Design) -> None:
        """Also from the log odds of the second of two classes: (e, p)."""
        coef = np.asarray(coef, float)
        if self.sizes.n_outputs == 2 and coef.ndim == 2:
            coef = np.stack([np.zeros_like(coef), coef], axis=1)
        super().set_parameters(coef, std, df, design)

    def fitted(self, design: Design | None) -> list[FittedExpert]:
        """With two classes, the coefficients are of the log odds of the second one."""
        experts = super().fitted(design)
        if self.sizes.n_outputs != 2:
            return experts
        return [FittedExpert(self.name, expert.coef_[1] - expert.coef_[0]) for expert in experts]
