"""A mixture in memory: a tree of gates, and experts. Its E-step and M-step are what EM alternates.

P(y | x) = sum_e prior_e(x) P_e(y | x). E: h_e = prior_e P_e / sum of the same. M: every expert is
fitted to the rows weighted by h_e, every gate to the mass of its children (Jordan & Jacobs 1994,
section 3).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.special import logsumexp

from vmoe.classic.experts.interface import Experts
from vmoe.classic.experts.mixed import Mixed
from vmoe.classic.rows import Rows
from vmoe.classic.tree import TreeGate


@dataclass
class Mixture:
    """A tree of gates whose leaves are experts.

    Attributes:
        tree: the root; its leaves are 0, 1, ... from left to right.
        experts: the experts.
        gate_penalty: strength of the penalty of each gate.
    """

    tree: TreeGate
    experts: Experts
    gate_penalty: float

    def posterior(self, rows: Rows) -> tuple[Float[np.ndarray, "n e"], Float[np.ndarray, "n"]]:
        """The E-step: the responsibilities, and the log-likelihood of every row.

        The rows of a group have the responsibilities of the group, and equal parts by weight of its
        log-likelihood.

        A row that no expert can have made, which takes variances of almost 0, has the
        responsibilities of its prior; its log-likelihood is -inf, but 0 if its weight is.
        """
        prior = self.tree.log_prior(rows)
        joint = prior + rows.pooled(self.experts.log_density(rows))
        largest = joint.max(axis=1)
        lost = np.isneginf(largest)
        joint[lost] = prior[lost]
        posterior = np.exp(joint - np.where(lost, 0.0, largest)[:, None])
        total = posterior.sum(axis=1)
        posterior /= total[:, None]
        row = largest + np.log(total)
        return posterior, np.where(rows.weight > 0, row, 0.0) / rows.unit_weight

    def update(self, rows: Rows, posterior: Float[np.ndarray, "n e"]) -> None:
        """The M-step."""
        self.tree.update(rows, posterior * rows.share[:, None], self.gate_penalty)
        self.experts.update(rows, posterior * rows.weight[:, None])

    def penalty(self) -> float:
        """What the penalties subtract from the log-likelihood."""
        return self.tree.penalty(self.gate_penalty) + self.experts.penalty()

    def prior(self, rows: Rows) -> Float[np.ndarray, "n e"]:
        """The probability of every expert, given the row alone."""
        return np.exp(self.tree.log_prior(rows))

    def combined(self, rows: Rows, how: str) -> Float[np.ndarray, "n q"]:
        """The experts' predictions as one: means, or probabilities of the classes.

        Args:
            how: "weighted" by the prior; "argmax" takes the most probable expert's; in a "vote",
                each expert votes for its most probable class, with its prior as the weight.
        """
        prior, means = self.prior(rows), self.experts.means(rows)
        if how == "argmax":
            return np.take_along_axis(means, prior.argmax(axis=1)[:, None, None], axis=1)[:, 0]
        if how == "vote":
            means = np.eye(means.shape[2])[means.argmax(axis=2)]
        return np.einsum("ne,neq->nq", prior, means)

    def log_combined(self, rows: Rows, how: str) -> Float[np.ndarray, "n q"]:
        """The logarithm of ``combined`` for classes; only votes may be nothing, and then -inf."""
        if how == "vote":
            with np.errstate(divide="ignore"):
                return np.log(self.combined(rows, how))
        prior, each = self.tree.log_prior(rows), self.experts.log_proba(rows)
        if how == "argmax":
            return np.take_along_axis(each, prior.argmax(axis=1)[:, None, None], axis=1)[:, 0]
        return logsumexp(prior[:, :, None] + each, axis=1)

    def n_parameters(self) -> int:
        """The number of free parameters."""
        return self.tree.n_parameters() + self.experts.n_parameters()

    def log_likelihood(self, rows: Rows) -> float:
        """The log-likelihood, summed over the weighted rows."""
        return float(rows.weight @ self.posterior(rows)[1])

    def aic(self, rows: Rows) -> float:
        """Akaike's information criterion; like the others, the lower, the better."""
        return 2 * self.n_parameters() - 2 * self.log_likelihood(rows)

    def bic(self, rows: Rows) -> float:
        """The Bayesian information criterion; the sum of the weights is the sample size."""
        size = np.log(rows.weight.sum())
        return float(size * self.n_parameters() - 2 * self.log_likelihood(rows))

    def icl(self, rows: Rows) -> float:
        """The integrated completed likelihood (Biernacki, Celeux & Govaert 2000).

        BIC - 2 sum_t w_t log max_e h_te, which also counts how unsure the responsibilities are.
        """
        posterior, _ = self.posterior(rows)
        sure = np.log(posterior.max(axis=1))
        return self.bic(rows) - 2 * float(rows.share @ sure)


def parts(mixture: Mixture) -> list[Experts]:
    """The experts, as parts that are of one kind each."""
    experts = mixture.experts
    return experts.parts if isinstance(experts, Mixed) else [experts]
