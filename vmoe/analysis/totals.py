"""How much each expert of a sparse block is used: the sums by which a router is judged."""

import dataclasses
import math

import numpy as np
from jaxtyping import Float, Int


@dataclasses.dataclass
class ExpertTotals:
    """Sums over the tokens of one sparse block. Soft routing makes no choices.

    Attributes:
        tokens: number of tokens.
        gates: sum of each expert's gates.
        entropy: sum of the entropies of the tokens' gates, in nats.
        choices: number of choices of each expert, before any is dropped.
        kept: number of these that got a slot.
        unprocessed: number of tokens without a slot at any expert.
    """

    tokens: int
    gates: Float[np.ndarray, "e"]
    entropy: float
    choices: Int[np.ndarray, "e"]
    kept: Int[np.ndarray, "e"]
    unprocessed: int

    @property
    def load(self) -> Float[np.ndarray, "e"]:
        """Each expert's fraction of all choices, before any is dropped.

        Equal to the importance if tokens do not choose.
        """
        if not self.choices.any():
            return self.importance
        return self.choices / max(1, self.choices.sum())

    @property
    def importance(self) -> Float[np.ndarray, "e"]:
        """Mean gate of each expert."""
        return self.gates / max(1, self.tokens)

    @property
    def dropped(self) -> float:
        """Fraction of the choices that got no slot."""
        return 1 - self.kept.sum() / max(1, self.choices.sum()) if self.choices.sum() else 0.0

    @property
    def gate_entropy(self) -> float:
        """Mean entropy of the gates, in nats: from 0 (one expert) to ln e (even)."""
        return self.entropy / max(1, self.tokens) + 0.0  # not -0.0, of gates 0 and 1

    @property
    def relative_entropy(self) -> float:
        """The gate entropy as a fraction of ln e; 1 for a single expert."""
        e = len(self.gates)
        return self.gate_entropy / math.log(e) if e > 1 else 1.0
