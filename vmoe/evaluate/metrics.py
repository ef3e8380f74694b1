"""Metrics of classification, per image and for a whole split."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy.sparse import csr_array

from vmoe import distributed
from vmoe.config.train import Loss
from vmoe.errors import Failure
from vmoe.nn.inputs import is_label, label_vectors
from vmoe.nn.losses import cross_entropy

BINS = 15  # bins of confidence for the calibration error


class PerExample(NamedTuple):
    """The metrics of each image of a batch, or of a whole split; on the device or on the host.

    Attributes:
        labels: the true classes; padded with -1.
        predictions: the classes with the largest logits.
        correct: whether the prediction is one of the labels.
        in_top5: whether a label is among the classes of the five largest logits.
        cross_entropy: in nats; with the sigmoid, summed over the classes.
        brier: squared distance between the probabilities and the targets, summed over the classes;
            in [0, 2] for the softmax.
        confidence: the largest probability, in [0, 1].
        label_probability: the probability of the label; the geometric mean for several labels.
    """

    labels: Int[Array | np.ndarray, "b l"]
    predictions: Int[Array | np.ndarray, "b"]
    correct: Bool[Array | np.ndarray, "b"]
    in_top5: Bool[Array | np.ndarray, "b"]
    cross_entropy: Float[Array | np.ndarray, "b"]
    brier: Float[Array | np.ndarray, "b"]
    confidence: Float[Array | np.ndarray, "b"]
    label_probability: Float[Array | np.ndarray, "b"]


def check_finite(
    values: Float[Array | np.ndarray, "b *x"], place: Any = "", what: str = "logits"
) -> None:
    """Checks that no value of an image is NaN or infinite, so that no class is made up from it.

    Args:
        values: such as the logits of each image, or what is computed from them.
        place: what the message starts with, such as the name of the data.
        what: the values, in words.

    Raises:
        Failure: some are not finite; every process with the same values raises it.
    """
    finite = np.isfinite(np.asarray(values)).reshape(len(values), -1).all(axis=-1)
    if count := int((~finite).sum()):
        message = f"{count} of {len(values)} images have {what} that are NaN or infinite"
        raise distributed.synchronized(Failure(f"{place}: {message}" if place else message))


def per_example(logits: Float[Array, "b y"], labels: Int[Array, "b l"], loss: Loss) -> PerExample:
    """The metrics of each image.

    Args:
        labels: classes; padded with -1.
        loss: the loss that trained the model. "softmax": probabilities are the softmax, and several
            labels share the target equally. "sigmoid": probabilities are the sigmoid of each class,
            and the target of each label is 1.
    """
    shares = label_vectors(labels, logits.shape[-1], normalize=True)
    if loss == "sigmoid":
        probabilities, log_probabilities = jax.nn.sigmoid(logits), jax.nn.log_sigmoid(logits)
        targets = label_vectors(labels, logits.shape[-1], normalize=False)
    else:
        probabilities, log_probabilities = jax.nn.softmax(logits), jax.nn.log_softmax(logits)
        targets = shares
    predictions = logits.argmax(-1)
    top = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1]
    return PerExample(
        labels=labels,
        predictions=predictions,
        correct=is_label(predictions, labels),
        in_top5=is_label(top.T, labels).any(0),
        cross_entropy=cross_entropy(logits, targets, loss),
        brier=jnp.square(probabilities - targets).sum(-1),
        confidence=probabilities.max(-1),
        label_probability=jnp.exp((shares * log_probabilities).sum(-1)),
    )


def calibration_error(confidence: Float[np.ndarray, "b"], correct: Bool[np.ndarray, "b"]) -> float:
    """Expected calibration error: mean gap between confidence and accuracy over 15 equal bins.

    Args:
        confidence: the largest probability of each image, in [0, 1].
        correct: whether the predicted class is a label of the image.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3.

    >>> calibration_error(np.array([0.9, 0.9]), np.array([True, False]))
    0.4
    """
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, weights=correct - confidence.astype(np.float64), minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def true_classes(images: PerExample) -> Int[np.ndarray, "b"]:
    """The true class of each image: of several labels the predicted one, else the first.

    It is -1 for an image without labels.
    """
    return np.where(images.correct, images.predictions, np.asarray(images.labels)[:, 0])


def confusion(images: PerExample, classes: int) -> csr_array:
    """The confusion matrix (y, y + 1): images by true class (rows) and predicted class (columns).

    An image without labels does not count. The matrix is sparse: a dense one for ImageNet-21k takes
    3.8 GB.

    Args:
        classes: number of classes of the data, y; other predicted classes share the last column.
    """
    labels = true_classes(images)
    known = labels >= 0
    cells = labels[known], np.minimum(images.predictions, classes)[known]
    return csr_array((np.ones(known.sum(), int), cells), (classes, classes + 1))
