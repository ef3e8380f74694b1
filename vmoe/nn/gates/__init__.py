"""Gates: modules that compute router logits from tokens.

A gate has the parameters; the router (``vmoe/routing``) assigns tokens to slots.
``RouterConfig.logits_per`` selects the gate of a layer. A gate is one file here and one line in
``GATES``. Any module that maps tokens to logits is a gate too.
"""

from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float

from vmoe.config import MoEConfig
from vmoe.nn.gates.linear import LinearGate
from vmoe.nn.gates.soft import SoftGate
from vmoe.nn.keys import Rngs


class NoisyLogits(NamedTuple):
    """The outputs of a gate that determines its own noise.

    Attributes:
        logits: the logits, without noise.
        noise_std: standard deviation of the noise in training; None for no noise.
    """

    logits: Float[Array, "g s e *c"]
    noise_std: Float[Array, "g s e *c"] | float | None


@runtime_checkable
class Gate(Protocol):
    """The interface of a gate that a config names."""

    def __init__(self, width: int, tokens: int, config: MoEConfig, *, rngs: Rngs):
        """``tokens``: number of tokens per image, for gates whose slots depend on it."""

    def __call__(self, tokens: Float[Array, "g s d"]) -> Float[Array, "g s e *c"] | NoisyLogits:
        """The logits, without noise."""


GATES: dict[str, type[Gate]] = {"expert": LinearGate, "slot": SoftGate}
"""The gate for each value of ``RouterConfig.logits_per``."""
