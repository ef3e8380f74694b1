"""Gates: modules that make router logits from tokens.

A gate owns its parameters and the noise; where the tokens go is for the router to decide
(``vmoe/routing``). Which gate a layer has follows from the logits that its router reads
(``RouterConfig.logits_per``). A gate is one file here and one line in ``GATES``.
"""

from typing import Protocol

from jaxtyping import Array, Float

from vmoe.config import MoEConfig
from vmoe.nn.gates.linear import LinearGate
from vmoe.nn.gates.soft import SoftGate
from vmoe.nn.keys import MaybeKey, Rngs


class Gate(Protocol):
    """What every gate is."""

    def __init__(self, width: int, tokens: int, config: MoEConfig, *, rngs: Rngs):
        """``tokens``: of an image, for gates whose number of slots depends on it."""

    def __call__(self, tokens: Float[Array, "g s d"]) -> Float[Array, "g s e *c"]:
        """The logits, without noise, in float32 whatever the dtype of the tokens."""

    def noise(self, shape: tuple[int, ...], key: MaybeKey) -> Float[Array, "g s e *c"] | None:
        """The noise for logits of a shape; None without a key, as in evaluation."""


GATES: dict[str, type[Gate]] = {"expert": LinearGate, "slot": SoftGate}
"""The gate for each value of ``RouterConfig.logits_per``."""
