"""The interface of gates."""

from typing import NamedTuple, Protocol

from jaxtyping import Array, Float

from vmoe.config import MoEConfig
from vmoe.nn.keys import Rngs


class NoisyLogits(NamedTuple):
    """The outputs of a gate that determines the noise of its logits.

    Attributes:
        logits: the logits, without noise.
        noise_std: standard deviation of the noise in training; None for no noise.
    """

    logits: Float[Array, "g s e *c"]
    noise_std: Float[Array, "g s e *c"] | float | None


class Gate(Protocol):
    """The interface of a gate that a config names."""

    def __init__(self, width: int, tokens: int, config: MoEConfig, *, rngs: Rngs):
        """``tokens``: number of tokens per image, for gates whose slots depend on it."""

    def __call__(self, tokens: Float[Array, "g s d"]) -> Float[Array, "g s e *c"] | NoisyLogits:
        """The logits, without noise; ours are float32, at the highest precision."""
