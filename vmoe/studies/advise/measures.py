"""What images and a dense model show before any expert is trained.

As in the experiment, inputs of the MLP of the last block are clustered, one cluster for each of
four experts: of patches on a grid, every second row and column of 16 x 16.
"""

import sys
from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np
import scipy.special
from einops import rearrange
from jaxtyping import Float, Int

from vmoe.analysis.statistics import class_information
from vmoe.config import ViTConfig
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
"""How many images are read; as many make the clusters in the experiment."""
SIDE = 8
"""Rows and columns of patches that are read of an image, at most."""


class Measures(NamedTuple):
    """What is compared with the data sets of the experiment.

    Attributes:
        groups: what the cluster of a patch tells of the class of its image: their normalized mutual
            information, in [0, 1], minus that of shuffled classes.
        spread: clusters that the patches of an image are of: the exponential of the entropy of
            their shares, 1 to 4, a mean over the images.
        routed: the part of a forward pass's FLOPs that the MLP takes for the patches, in [0, 1].
    """

    groups: float
    spread: float
    routed: float


def measure(model: ViT, batches: Iterable[Batch]) -> Measures:
    """Measures some images; the memory for 256 of them is that of 16,384 patches at most.

    Args:
        model: a dense model.
        batches: images in [-1, 1], with their classes; see ``vmoe.passes``.

    Raises:
        UsageError: the images have fewer patches than there are clusters.
    """
    config, rows, labels = model.config, [], []
    side, last = config.image_size // config.patch_size, config.depth - 1
    step = -(-side // SIDE)
    for batch in batches:
        tokens = mlp_inputs(model, [batch], (last,), most=sys.maxsize)[last]
        tokens = tokens.reshape(-1, num_tokens(config), config.width)
        grid = rearrange(tokens[:, config.prefix_tokens :], "b (i j) d -> b i j d", i=side)
        patches = grid[:, ::step, ::step].astype(np.float32)
        rows.append(rearrange(patches, "b i j d -> b (i j) d"))
        labels.append(batch.labels[batch.valid])
    return measure_patches(config, np.concatenate(rows), np.concatenate(labels))


def measure_patches(
    config: ViTConfig, patches: Float[np.ndarray, "b n d"], labels: Int[np.ndarray, "b l"]
) -> Measures:
    """``measure`` for the inputs of the MLP."""
    flat = rearrange(patches, "b n d -> (b n) d")
    enough = f"{len(flat)} patches cannot make {EXPERTS} clusters: give more images"
    require(len(flat) >= EXPERTS, enough)
    clusters = (unit(flat) @ spherical_k_means(flat, EXPERTS, 0).T).argmax(-1)
    uses = (clusters.reshape(*patches.shape[:2], 1) == np.arange(EXPERTS)).sum(1)
    own, chance = class_information(uses, labels, int(labels.max(initial=0)) + 1)
    entropy = scipy.special.entr(uses / patches.shape[1]).sum(-1)
    return Measures(own - chance, float(np.exp(entropy).mean()), routed_share(config))


def routed_share(config: ViTConfig) -> float:
    """``Measures.routed``."""
    mlp = nested(abstract_params(config))["blocks"][config.depth - 1]["mlp"]
    kernels = sum(x.size for x in jax.tree.leaves(mlp) if len(x.shape) == 2)
    patches = (config.image_size // config.patch_size) ** 2
    return 2 * kernels * patches / cost(config).flops_per_image
