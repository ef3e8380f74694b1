"""Gates: modules that compute router logits from tokens.

A gate has the parameters and draws the noise; the router (``vmoe/routing``) assigns tokens to
slots. ``RouterConfig.logits_per`` selects the gate of a layer. A gate is one file here and one
line in ``GATES``.
"""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float

from vmoe.config import MoEConfig
from vmoe.nn.gates.linear import LinearGate
from vmoe.nn.gates.soft import SoftGate
from vmoe.nn.keys import MaybeKey, Rngs


@runtime_checkable
class Gate(Protocol):
    """The interface of every gate."""

    def __init__(self, width: int, tokens: int, config: MoEConfig, *, rngs: Rngs):
        """``tokens``: number of tokens per image, for gates whose slots depend on it."""

    def __call__(self, tokens: Float[Array, "g s d"]) -> Float[Array, "g s e *c"]:
        """The logits, without noise; float32 for any dtype of the tokens."""

    def noise(self, shape: tuple[int, ...], key: MaybeKey) -> Float[Array, "g s e *c"] | None:
        """Noise for logits of the given shape; None if the key is None, as in evaluation."""


GATES: dict[str, type[Gate]] = {"expert": LinearGate, "slot": SoftGate}
"""The gate for each value of ``RouterConfig.logits_per``."""
