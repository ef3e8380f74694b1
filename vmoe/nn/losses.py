"""Losses of the logits."""

import optax
from jaxtyping import Array, Float


def cross_entropy(
    logits: Float[Array, "b y"], labels: Float[Array, "b y"], kind: str
) -> Float[Array, "b"]:
    """The cross-entropy of each image, in nats.

    Args:
        labels: a probability for each class.
        kind: "softmax" over the classes, or "sigmoid" of each class, summed over the classes.
    """
    if kind == "sigmoid":
        return optax.sigmoid_binary_cross_entropy(logits, labels).sum(-1)
    return optax.softmax_cross_entropy(logits, labels)
