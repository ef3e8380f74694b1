"""Losses of the logits."""

import jax
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from scipy.special import expit, softmax


@jax.named_scope("loss")
def cross_entropy(
    logits: Float[Array, "b y"], labels: Float[Array, "b y"], kind: str
) -> Float[Array, "b"]:
    """The cross-entropy of each image, in nats.

    Args:
        labels: a probability for each class.
        kind: "softmax" over the classes, or the "sigmoid" loss summed over the classes.
    """
    if kind == "sigmoid":
        return optax.sigmoid_binary_cross_entropy(logits, labels).sum(-1)
    return optax.softmax_cross_entropy(logits, labels)


def likeliest(
    logits: Float[np.ndarray, "*x y"], count: int, *, sigmoid: bool
) -> tuple[Int[np.ndarray, "*x z"], Float[np.ndarray, "*x z"]]:
    """The classes with the largest logits, and their probabilities, which may be rounded to 1.

    Args:
        count: maximum number of classes.
        sigmoid: take each class's sigmoid as its probability, instead of the softmax.
    """
    every = expit(logits) if sigmoid else softmax(logits, axis=-1)
    top = np.argsort(-logits, axis=-1, kind="stable")[..., :count]
    return top, np.take_along_axis(every, top, axis=-1)
