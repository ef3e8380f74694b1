"""What images and a dense model show before any expert is trained.

The inputs of the last block's MLP are divided into as many clusters as there would be experts. Two
patches agree if they are of one cluster; none is paired with itself. With few images the clusters
follow single images, so the spread is too small unless the clusters are clear.
"""

import sys
from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np
from einops import rearrange
from jaxtyping import Float, Int

from vmoe.config import ViTConfig, replace
from vmoe.costs.flops import cost
from vmoe.data.pipeline import Batch
from vmoe.errors import require
from vmoe.models import abstract_params
from vmoe.nn.patches import num_tokens
from vmoe.nn.vit import ViT
from vmoe.surgery.clusters import spherical_k_means, unit
from vmoe.surgery.upcycle import mlp_inputs
from vmoe.trees import nested

EXPERTS = 4
IMAGES = 256
"""How many images are read."""
SIDE = 8
"""Rows and columns of patches that are read of an image, at most."""
SPLITS = 4
"""How often the images are divided into halves, for the errors."""


class Estimate(NamedTuple):
    """A measured value.

    Attributes:
        value: NaN if it is not measured.
        error: its standard error, over images and clusterings; infinite if it is not known.
    """

    value: float
    error: float

    @property
    def known(self) -> bool:
        """Whether both are."""
        return bool(np.isfinite(self).all())


class Measures(NamedTuple):
    """What is compared with the data sets of the experiment.

    Attributes:
        class_agreement: how much more often patches of two images agree if the images share a
            class: 0 if not, 1 if patches of a class always agree and not all do; less than 0 by
            chance only. All classes of two images count alike. Not measured if fewer than two
            classes have two images.
        spread: number of clusters that the patches of an image are of: 1 over the probability that
            two of its patches agree; from 1 to about 4.
        routed: the part of a forward pass's FLOPs that the last MLP takes for the patches, in
            [0, 1].
    """

    class_agreement: Estimate
    spread: Estimate
    routed: float


def measure(model: ViT, batches: Iterable[Batch]) -> Measures:
    """Measures some images; the memory for 256 of them is that of 16,384 patches at most.

    Args:
        model: a dense model.
        batches: images in [-1, 1], all of one size, with their classes; see ``vmoe.passes``.

    Raises:
        UsageError: the images have too few patches for clusters of each half of them.
    """
    config, rows, labels, last = model.config, [], [], model.config.depth - 1
    for batch in batches:
        config = replace(config, image_size=batch.images.shape[1])  # may differ from the model's
        side = config.image_size // config.patch_size
        step = -(-side // SIDE)
        tokens = mlp_inputs(model, [batch], (last,), most=sys.maxsize)[last]
        tokens = tokens.reshape(-1, num_tokens(config), config.width)
        grid = rearrange(tokens[:, config.prefix_tokens :], "b (i j) d -> b i j d", i=side)
        patches = grid[:, ::step, ::step].astype(np.float32)
        rows.append(rearrange(patches, "b i j d -> b (i j) d"))
        labels.append(batch.labels[batch.valid])
    agreement, spread = estimates(np.concatenate(rows), np.concatenate(labels))
    return Measures(agreement, spread, routed_share(config))


def estimates(
    patches: Float[np.ndarray, "b n d"], labels: Int[np.ndarray, "b l"]
) -> list[Estimate]:
    """``Measures.class_agreement`` and ``spread``.

    Halves of the images are clustered apart. The difference of two halves has twice the standard
    error of all images; its mean square is over ``SPLITS`` random divisions.

    Args:
        patches: the inputs of the MLP.
        labels: the classes of each image; padded with -1.
    """
    b, n, _ = patches.shape
    few = f"{b} images of {n} patches cannot make {EXPERTS} clusters of each half: give more"
    require(n > 1 and b // 2 * n >= EXPERTS, few)
    random, changes = np.random.default_rng(0), []
    for _ in range(SPLITS):
        halves = np.array_split(random.permutation(b), 2)
        first, second = (_agreement_and_spread(patches[own], labels[own]) for own in halves)
        changes.append(np.subtract(first, second))
    found = []
    values = _agreement_and_spread(patches, labels)
    for value, own in zip(values, np.transpose(changes), strict=True):
        own = own[np.isfinite(own)]
        error = float(np.sqrt(np.mean(own**2)) / 2) if len(own) else np.inf
        found.append(Estimate(value, error))
    return found


def routed_share(config: ViTConfig) -> float:
    """``Measures.routed``."""
    mlp = nested(abstract_params(config))["blocks"][config.depth - 1]["mlp"]
    kernels = sum(x.size for x in jax.tree.leaves(mlp) if len(x.shape) == 2)
    patches = num_tokens(config) - config.prefix_tokens
    return 2 * kernels * patches / cost(config).flops_per_image


def with_patch_mean(config: ViTConfig) -> ViTConfig:
    """The model to train: if its head reads the class token, a new one is to read the patches.

    Experts of the last block would work for that one token only.
    """
    return replace(config, pooling="patch_mean") if config.pooling == "class_token" else config


def _agreement_and_spread(
    patches: Float[np.ndarray, "b n d"], labels: Int[np.ndarray, "b l"]
) -> tuple[float, float]:
    b, n, _ = patches.shape
    flat = rearrange(patches, "b n d -> (b n) d")
    clusters = (unit(flat) @ spherical_k_means(flat, EXPERTS, 0).T).argmax(-1)
    counts = (clusters.reshape(b, n, 1) == np.arange(EXPERTS)).sum(1)
    agree = (counts * (counts - 1)).sum() / (b * n * (n - 1))
    return class_agreement(counts / n, labels), float(1 / agree) if agree else np.inf


def class_agreement(shares: Float[np.ndarray, "b e"], labels: Int[np.ndarray, "b l"]) -> float:
    """``Measures.class_agreement`` for the shares of the clusters in the patches of each image."""
    known = np.unique(labels[labels >= 0])
    is_of = (labels[..., None] == known).any(1).astype(float)  # b y
    is_of = is_of[:, is_of.sum(0) > 1]
    classes = is_of.shape[1]
    if classes < 2:
        return np.nan
    sums, number = is_of.T @ shares, is_of.sum(0)
    # An image is not paired with itself.
    agree = sums @ sums.T - is_of.T @ (is_of * (shares**2).sum(1, keepdims=True))
    each = agree / (np.outer(number, number) - is_of.T @ is_of)
    same = np.eye(classes, dtype=bool)
    own, other = each[same].mean(), each[~same].mean()
    return float((own - other) / (1 - other)) if other < 1 else 0.0
