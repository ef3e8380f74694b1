"""How well a model classifies: sums over a batch, so that batches add up."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Num

Sums = dict[str, Num[Array, ""]]


def classification_sums(
    logits: Float[Array, "b y"], labels: Float[Array, "b y"], valid: Bool[Array, "b"]
) -> Sums:
    """Images, correct first guesses and cross-entropy in nats, over the valid images."""
    correct = logits.argmax(-1) == labels.argmax(-1)
    entropy = optax.softmax_cross_entropy(logits, labels)
    return {
        "images": valid.sum(),
        "correct": (correct & valid).sum(),
        "cross_entropy": jnp.where(valid, entropy, 0.0).sum(),
    }
