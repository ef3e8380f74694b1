"""How well a model classifies: what each image got, and the figures out of that."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

BINS = 15  # of the calibration error


class PerExample(NamedTuple):
    """What the images of a batch, or of a whole split, got; on the device or on the host.

    Attributes:
        labels: the right classes.
        guesses: the classes with the largest logits.
        in_top5: whether the right class is among the five likeliest.
        cross_entropy: of the softmax, in nats.
        brier: squared distance of the probabilities from the label, in [0, 2].
        confidence: the largest probability, in [0, 1].
    """

    labels: Int[Array | np.ndarray, "b"]
    guesses: Int[Array | np.ndarray, "b"]
    in_top5: Bool[Array | np.ndarray, "b"]
    cross_entropy: Float[Array | np.ndarray, "b"]
    brier: Float[Array | np.ndarray, "b"]
    confidence: Float[Array | np.ndarray, "b"]


def outcomes(logits: Float[Array, "b y"], labels: Float[Array, "b y"]) -> PerExample:
    """What each image got; probabilities are the softmax, whatever loss trained the model."""
    probabilities = jax.nn.softmax(logits)
    right = labels.argmax(-1)
    top = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1]
    return PerExample(
        labels=right,
        guesses=logits.argmax(-1),
        in_top5=(top == right[:, None]).any(-1),
        cross_entropy=optax.softmax_cross_entropy(logits, labels),
        brier=jnp.square(probabilities - labels).sum(-1),
        confidence=probabilities.max(-1),
    )


def calibration_error(confidence: Float[np.ndarray, "b"], correct: Bool[np.ndarray, "b"]) -> float:
    """Expected calibration error: mean gap between confidence and accuracy over 15 equal bins.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3.

    >>> calibration_error(np.array([0.9, 0.9]), np.array([True, False]))
    0.4
    """
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, weights=correct - confidence.astype(np.float64), minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def confusion(outcomes: PerExample, classes: int) -> Int[np.ndarray, "y x"]:
    """How many images of each class (rows) were taken for each class (columns).

    ``classes``: of the data; guesses beyond them stand in one more column.
    """
    guesses = np.minimum(outcomes.guesses, classes)
    counts = np.bincount(
        outcomes.labels * (classes + 1) + guesses, minlength=classes * (classes + 1)
    )
    counts = counts.reshape(classes, classes + 1)
    return counts if counts[:, -1].any() else counts[:, :-1]
