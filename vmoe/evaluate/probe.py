"""The few-shot probe: a ridge regression from features to classes, in closed form.

Features are standardized by their mean and standard deviation over the training images. A constant
feature is added for the bias; it is so large that the L2 penalty hardly shrinks it. Targets are 1
for the class of an image and -1 for other classes. Everything is float64 on the host: in float32,
accuracies at small L2 are off by up to 27 points. The V-MoE authors use this protocol (arXiv
2106.05974).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

L2 = tuple(2.0**i for i in range(-10, 20))
"""The strengths of the L2 penalty that are tried, ascending."""

BIAS = 100.0
MIN_STD = 1e-5  # added to the standard deviation of every feature
ROWS = 8192  # images scored at once, which bounds the memory


def draw(
    labels: Int[np.ndarray, "b"], num_classes: int, count: int, seed: int
) -> Int[np.ndarray, "x"]:
    """Draws images of every class: class by class, in random order within a class.

    Args:
        labels: the class of each image; -1 for an image that must not be drawn.
        count: images per class; all images of a class with fewer.
        seed: seed of one generator, which permutes the images class by class.

    Returns:
        indices of images. With a larger ``count``, each class begins with the same images.
    """
    rng = np.random.default_rng(seed)
    order = np.argsort(labels, kind="stable")
    ends = np.searchsorted(labels[order], np.arange(num_classes), side="right")
    starts = np.searchsorted(labels[order], np.arange(num_classes))
    each = [rng.permutation(order[i:j])[:count] for i, j in zip(starts, ends, strict=True)]
    return np.concatenate(each)


def place_in_class(labels: Int[np.ndarray, "b"]) -> Int[np.ndarray, "b"]:
    """How many images of the same class precede each image, if the labels are ascending.

    >>> place_in_class(np.array([0, 0, 0, 2, 2]))
    array([0, 1, 2, 0, 1])
    """
    return np.arange(len(labels)) - np.searchsorted(labels, labels)


class Probe(NamedTuple):
    """A fitted probe, for any L2.

    Attributes:
        mean: mean of the training features.
        std: standard deviation of the training features.
        singular: singular values of the inputs.
        right: right singular vectors of the inputs.
        targets: the targets in the basis of the left singular vectors.
    """

    mean: Float[np.ndarray, "r"]
    std: Float[np.ndarray, "r"]
    singular: Float[np.ndarray, "x"]
    right: Float[np.ndarray, "x _"]
    targets: Float[np.ndarray, "x y"]

    def scores(self, features: Float[np.ndarray, "b r"], l2: float) -> Float[np.ndarray, "b y"]:
        """The regression's outputs; the largest is the predicted class."""
        return _inputs(features, self.mean, self.std) @ self._weights(l2)

    def accuracy(
        self, features: Float[np.ndarray, "b r"], labels: Int[np.ndarray, "b"], l2: float
    ) -> float:
        """The fraction of images whose class has the largest score."""
        weights, correct = self._weights(l2), 0
        for i in range(0, len(labels), ROWS):
            scores = _inputs(features[i : i + ROWS], self.mean, self.std) @ weights
            correct += int((scores.argmax(axis=-1) == labels[i : i + ROWS]).sum())
        return correct / len(labels)

    def _weights(self, l2: float) -> Float[np.ndarray, "x y"]:
        """The minimizer of the squared error plus ``l2`` times the squared weights."""
        shrunk = self.singular / (self.singular**2 + l2)
        return self.right.T @ (shrunk[:, None] * self.targets)


def fit(
    features: Float[np.ndarray, "b r"], labels: Int[np.ndarray, "b"], num_classes: int
) -> Probe:
    """Fits the probe to training images, for all L2 at once."""
    features = np.asarray(features, np.float64)
    mean, std = features.mean(axis=0), features.std(axis=0) + MIN_STD
    targets = 2 * np.eye(num_classes)[labels] - 1
    left, singular, right = np.linalg.svd(_inputs(features, mean, std), full_matrices=False)
    return Probe(mean, std, singular, right, left.T @ targets)


def _inputs(
    features: Float[np.ndarray, "b r"], mean: Float[np.ndarray, "r"], std: Float[np.ndarray, "r"]
) -> Float[np.ndarray, "b r+1"]:
    return np.pad((features - mean) / std, ((0, 0), (0, 1)), constant_values=BIAS)


def choose_l2(accuracies: Float[np.ndarray, "t x"]) -> int:
    """The index in ``L2`` of the strength with the highest mean rank over data sets.

    Equal accuracies share the mean of their ranks, so a data set with equal accuracies for several
    strengths does not decide between them. Among equal mean ranks, the largest strength is chosen.

    Args:
        accuracies: the accuracy on each data set (row) at each L2 (column).

    >>> choose_l2(np.array([[0.1, 0.3, 0.3, 0.2], [0.5, 0.5, 0.5, 0.5]]))
    2
    """
    from scipy.stats import rankdata  # slow to import, and few runs choose an L2

    ranks = rankdata(accuracies, axis=1).mean(axis=0)
    return int(np.flatnonzero(ranks == ranks.max())[-1])
