"""How a data set uses the experts of each sparse block, summed up batch by batch."""

import collections
import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from scipy.sparse import csr_array

from vmoe.analysis.collect import BlockRouting, Collected
from vmoe.errors import UsageError
from vmoe.nn.inputs import has_label
from vmoe.routing.load import ExpertTotals

BINS = 20
"""Bins of histograms over [0, 1]."""
KINDS = ("class_token", "register", "background", "foreground")
"""Kinds of tokens; those of patches are the last two, see ``foreground``."""
MIN_PLAIN = 0.01
"""Smallest fraction of the patches' choices that each kind of patch must have. Below it, the images
are taken to have no plain background, and there are no results by kind of patch."""
SHUFFLES = 10
"""Shuffles of the labels; their mean is the chance baseline of a specialization."""


@dataclasses.dataclass
class BlockStatistics(ExpertTotals):
    """Further sums over the tokens of one sparse block; counts of choices are 0 for soft routing.

    Attributes:
        coactivation: number of tokens that chose both experts of a pair.
        by_position: number of choices by expert and position of the patch, without the tokens
            before the patches.
        by_shuffled_position: the same with the positions of each image's patches shuffled.
        by_weight: number of tokens by rank of the choice and bin of its gate.
        gates_by_rank: sum of the gates of the choices by rank.
        by_priority: number of tokens by bin of the gate of their first choice.
        kept_by_priority: number of choices with a slot, by the same bins of their tokens.
        choices_by_priority: number of all choices, by the same bins.
        kept_by_kind: number of choices with a slot, by kind of token; see ``KINDS``.
        choices_by_kind: number of all choices, by kind of token.
        uses: number of choices by image and expert.
        labels: the classes of each image; padded with -1.
    """

    coactivation: Int[np.ndarray, "e e"]
    by_position: Int[np.ndarray, "e i j"]
    by_shuffled_position: Int[np.ndarray, "e i j"]
    by_weight: Int[np.ndarray, "k x"]
    gates_by_rank: Float[np.ndarray, "k"]
    by_priority: Int[np.ndarray, "x"]
    kept_by_priority: Int[np.ndarray, "x"]
    choices_by_priority: Int[np.ndarray, "x"]
    kept_by_kind: Int[np.ndarray, "4"]
    choices_by_kind: Int[np.ndarray, "4"]
    uses: Int[np.ndarray, "b e"]
    labels: Int[np.ndarray, "b l"]

    @property
    def kept_share(self) -> dict[str, float | None]:
        """Fraction of the choices that got a slot, by kind of token.

        None if there are no such tokens, and for patches if the images have no plain background.
        """
        patches = self.choices_by_kind[2:]
        plain = patches.min() >= MIN_PLAIN * max(1, patches.sum())
        known = (True, True, plain, plain)
        counts = zip(KINDS, self.kept_by_kind, self.choices_by_kind, known, strict=True)
        return {name: float(x / of) if of and known else None for name, x, of, known in counts}

    @property
    def idle(self) -> Float[np.ndarray, "e"]:
        """Fraction of the images in which no token chose the expert; 0 if tokens do not choose."""
        return (self.uses == 0).mean(axis=0) if self.choices.any() else np.zeros(len(self.gates))

    def class_table(self, num_classes: int) -> Int[np.ndarray, "e y"]:
        """Number of choices by expert and class of the image, where the class is known.

        An image of several classes counts for each.
        """
        return _by_class(self.uses, self.labels, num_classes)

    def class_information(self, num_classes: int, seed: int = 0) -> tuple[float, float]:
        """``class_information`` of the experts."""
        return class_information(self.uses, self.labels, num_classes, seed)

    @property
    def position_information(self) -> tuple[float, float]:
        """Normalized mutual information of expert and position, and its chance baseline.

        Returns:
            the information of the patches' choices; and the same with shuffled positions in each
            image, the value to expect of a router that ignores the position.
        """
        own, chance = (
            mutual_information(table.reshape(len(table), -1))
            for table in (self.by_position, self.by_shuffled_position)
        )
        return own, chance


def statistics(parts: Iterable[Collected]) -> dict[int, BlockStatistics]:
    """The statistics of each sparse block over all batches.

    Memory is bounded, except for ``labels`` and ``uses`` (one small integer per image and expert).

    Raises:
        UsageError: there is no image, or no sparse block.
    """
    sums: dict[int, dict[str, Any]] = {}
    rngs = collections.defaultdict(lambda: np.random.default_rng(0))
    uses, labels = collections.defaultdict(list), []
    for part in parts:
        labels.append(part.labels)
        for i, block in part.blocks.items():
            own, of_images = _of_batch(block, part, rngs[i])
            sums[i] = {name: sums[i][name] + x for name, x in own.items()} if i in sums else own
            uses[i].append(of_images)
    if not any(own["tokens"] for own in sums.values()):
        raise UsageError("no image, or no sparse block: there is no routing to measure")
    every = np.concatenate(labels)
    return {
        i: BlockStatistics(**own, uses=np.concatenate(uses[i]), labels=every)
        for i, own in sums.items()
    }


def _of_batch(
    block: BlockRouting, part: Collected, rng: np.random.Generator
) -> tuple[dict[str, Any], Int[np.ndarray, "b e"]]:
    """The sums over a batch, and the ``uses`` of its images."""
    gates, experts = block.gates.astype(np.float64), block.experts
    (b, n, e), k = gates.shape, experts.shape[-1]
    _, i, j = part.foreground.shape
    of_expert = experts[..., None] == np.arange(e)  # b n k e
    kept, chosen, priority = block.kept, experts < e, _bin(block.priority)
    own = np.take_along_axis(gates, np.minimum(experts, e - 1), axis=-1)
    by_weight = np.bincount((np.arange(k) * BINS + _bin(own))[chosen], minlength=k * BINS)
    any_of = of_expert.any(axis=2).reshape(-1, e).astype(int)
    by_token = of_expert.sum(axis=2)  # b n e
    by_patch = by_token[:, n - i * j :]
    positions = rng.permuted(np.broadcast_to(np.arange(i * j), (b, i * j)), axis=1)
    shuffled = np.take_along_axis(by_patch, positions[..., None], axis=1)
    # indices of KINDS
    kinds = np.pad(2 + part.foreground.reshape(b, i * j), ((0, 0), (n - i * j, 0)))
    kinds[:, n - i * j - part.registers : n - i * j] = 1
    sums = _totals(block) | dict(
        coactivation=any_of.T @ any_of,
        by_position=by_patch.sum(axis=0).T.reshape(e, i, j),
        by_shuffled_position=shuffled.sum(axis=0).T.reshape(e, i, j),
        by_weight=by_weight.reshape(k, BINS),
        gates_by_rank=np.where(chosen, own, 0.0).sum(axis=(0, 1)),
        by_priority=_histogram(priority),
        kept_by_priority=_histogram(priority, kept.sum(-1)),
        choices_by_priority=_histogram(priority, chosen.sum(-1)),
        kept_by_kind=_histogram(kinds, kept.sum(-1), len(KINDS)),
        choices_by_kind=_histogram(kinds, chosen.sum(-1), len(KINDS)),
    )
    return sums, by_token.sum(axis=1).astype(np.int32)


def _totals(block: BlockRouting) -> dict[str, Any]:
    """The fields of ``ExpertTotals`` from collected routing; gates are summed in 64 bits."""
    gates, experts = block.gates.astype(np.float64), block.experts
    b, n, e = gates.shape
    return {
        "tokens": b * n,
        "gates": gates.sum(axis=(0, 1)),
        "entropy": float(-np.sum(gates * np.log(np.maximum(gates, 1e-30)))),
        "choices": np.bincount(experts.reshape(-1), minlength=e + 1)[:e],
        "kept": np.bincount(experts[block.kept], minlength=e),
        "unprocessed": int((~block.kept.any(axis=-1)).sum()) if experts.shape[-1] else 0,
    }


def _histogram(
    bins: Int[np.ndarray, "b n"], counts: Int[np.ndarray, "b n"] | None = None, size: int = BINS
) -> Int[np.ndarray, "x"]:
    weights = None if counts is None else counts.reshape(-1)
    return np.bincount(bins.reshape(-1), weights, minlength=size).astype(int)


def _bin(gates: Float[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
    """The bin of each gate; a NaN is in the first one."""
    return np.minimum((np.nan_to_num(gates) * BINS).astype(int), BINS - 1)


def class_information(
    uses: Int[np.ndarray, "b e"], labels: Int[np.ndarray, "b l"], num_classes: int, seed: int = 0
) -> tuple[float, float]:
    """Normalized mutual information of expert and class, and its chance baseline.

    Args:
        uses: number of choices by image and expert; or of tokens by image and cluster.
        labels: the classes of each image; padded with -1.

    Returns:
        the information of the choices; and its mean under shuffled labels, the value to expect of a
        router that ignores the class. It is above 0, as choices of an image are dependent.
    """
    rng, known = np.random.default_rng(seed), has_label(labels)
    uses, labels = uses[known], labels[known]
    chance = [
        mutual_information(_by_class(uses, rng.permutation(labels), num_classes))
        for _ in range(SHUFFLES)
    ]
    return mutual_information(_by_class(uses, labels, num_classes)), float(np.mean(chance))


def _by_class(
    uses: Int[np.ndarray, "b e"], labels: Int[np.ndarray, "b l"], num_classes: int
) -> Int[np.ndarray, "e y"]:
    """Uses a sparse matrix: a dense one for images and thousands of classes takes gigabytes."""
    images, column = np.nonzero((labels >= 0) & (labels < num_classes))
    places = images, labels[images, column]
    is_of_class = csr_array((np.ones(len(images), bool), places), (len(labels), num_classes))
    return uses.T @ is_of_class


def mutual_information(table: Int[np.ndarray, "e x"]) -> float:
    """Normalized mutual information of the rows and columns of a table of counts, in [0, 1].

    Normalized by the mean of the two entropies, as in scikit-learn; 0 if both are 0.

    >>> mutual_information(np.eye(3, dtype=int)), mutual_information(np.ones((3, 3), int))
    (1.0, 0.0)
    """
    joint = table / max(1, table.sum())
    rows, columns = joint.sum(1, keepdims=True), joint.sum(0, keepdims=True)
    expected = rows * columns
    some = joint > 0
    information = float(np.sum(joint[some] * np.log(joint[some] / expected[some])))
    mean = (_entropy(rows) + _entropy(columns)) / 2
    return round(max(0.0, information / mean), 12) if mean else 0.0


def _entropy(p: Float[np.ndarray, "..."]) -> float:
    return float(-np.sum(p[p > 0] * np.log(p[p > 0])))


def standard_error(
    values: Bool[np.ndarray, "x"] | Float[np.ndarray, "x"],
    groups: Shaped[np.ndarray, "x"] | None = None,
) -> float:
    """The standard error of the mean of values over images; NaN for one observation.

    Args:
        values: for each image, whether it is predicted correctly, the share of several predictions
            that are correct, or a difference of two of these.
        groups: images of the same group are one observation; by default each image is one.
    """
    rest = values - np.mean(values, dtype=np.float64)
    if groups is not None:
        rest = np.bincount(np.unique(groups, return_inverse=True)[1], rest)
    n = len(rest)
    return float(np.sqrt(np.sum(rest**2) * n / (n - 1)) / len(values)) if n > 1 else np.nan
