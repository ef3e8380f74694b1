"""Randomness in the forward pass: a key in training, None in evaluation."""

import jax
from jaxtyping import Array, Key

MaybeKey = Key[Array, ""] | None


def split(key: MaybeKey, n: int) -> list[MaybeKey]:
    """n independent keys; n times None where there is none."""
    return [None] * n if key is None else list(jax.random.split(key, n))
