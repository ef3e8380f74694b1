"""The data of one model on the page: its routing of some images, as loaded and under changes."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, UInt8

from vmoe import models
from vmoe.analysis.capture import capture_features
from vmoe.analysis.collect import BlockRouting, Collected, collect
from vmoe.analysis.effects import (
    Logits,
    Removal,
    at_capacities,
    can_be_limited,
    removals,
    without_experts,
)
from vmoe.analysis.patches import TopPatches
from vmoe.analysis.statistics import BlockStatistics
from vmoe.axes import Images
from vmoe.config import MoEConfig, ViTConfig
from vmoe.data.pipeline import Batch
from vmoe.nn.vit import ViT
from vmoe.passes import as_on_one_device
from vmoe.routing.groups import group_sizes
from vmoe.routing.priority import PRIORITIES, Priority

FRACTIONS = (0, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)
"""The grid of slots, as fractions of the number that drops no choice; dense at few slots, where
predictions change."""

MOST_ATTENTION = 2_000_000
"""Bytes of attention maps on the page."""


class ModelOnImages(NamedTuple):
    """A model on the images of a page.

    Attributes:
        name: the name to show.
        config: the config of the model.
        routing: the routing of the images, which are one batch.
        statistics: the statistics of each sparse block over a larger sample.
        capacities: the logits by number of slots and priority, in every sparse block; empty unless
            they can be changed, see ``vmoe.analysis.effects.can_be_limited``.
        removed: the logits without one expert; empty if not requested.
        top_patches: by sparse block, the top patches of each expert in the sample; blocks can be
            left out.
        attention: by sparse block, how much each token (axis 1) of the first images attends to each
            token: the mean over the heads, as a fraction of the largest to a patch, at most 1.
        sigmoid: whether a probability is the sigmoid of a logit, rather than their softmax.
    """

    name: str
    config: ViTConfig
    routing: Collected
    statistics: Mapping[int, BlockStatistics]
    capacities: dict[tuple[int, Priority], Logits]
    removed: dict[Removal, Logits]
    top_patches: dict[int, TopPatches]
    attention: dict[int, UInt8[np.ndarray, "x n n"]]
    sigmoid: bool = False


def observe(
    name: str,
    model: ViT,
    images: Images,
    labels: Int[np.ndarray, "b l"],
    statistics: Mapping[int, BlockStatistics],
    top_patches: dict[int, TopPatches],
    *,
    sigmoid: bool = False,
    remove: bool = True,
    on_step: Callable[[], None] = lambda: None,
) -> ModelOnImages:
    """Runs a model on the images of a page, as loaded and under changes.

    Args:
        labels: the classes of each image; padded with -1.
        statistics: statistics of a larger sample; see ``vmoe.analysis``.
        top_patches: top patches of a larger sample; see ``vmoe.analysis``.
        sigmoid: see ``ModelOnImages``.
        remove: also predict without each expert, which takes two forward passes per expert.
        on_step: called after each forward pass with a change.
    """
    batch = [as_on_one_device(np.asarray(images), labels, model.placement)]
    (routing,) = collect(model, batch)
    config = model.config
    capacities = {}
    if can_be_limited(config):
        capacities = at_capacities(model, batch, slots_of(config, routing), on_step=on_step)
    which = removals(config) if remove else []
    removed = without_experts(model, batch, which, on_step=on_step) if which else {}
    fields = (name, config, routing, statistics, capacities, removed, top_patches)
    return ModelOnImages(*fields, _attention(model, *batch), sigmoid)


def _attention(model: ViT, batch: Batch) -> dict[int, UInt8[np.ndarray, "x n n"]]:
    """Attention in units of 1/255, for as many images as ``MOST_ATTENTION`` allows (at least 1)."""
    names = {f"blocks.{i}.attention.weights": i for i in model.config.sparse_blocks}

    @models.compiled
    def run(model: ViT, batch: Batch) -> dict[int, jax.Array]:
        images = jnp.asarray(batch.images)
        features = capture_features(model, images, names, valid=batch.valid).features
        means = {names[name]: weights.mean(axis=1) for name, weights in features.items()}
        prefix = model.config.prefix_tokens
        largest = {i: mean[..., prefix:].max(-1, keepdims=True) for i, mean in means.items()}
        return {
            i: jnp.round(255 * jnp.minimum(1, mean / largest[i])).astype(jnp.uint8)
            for i, mean in means.items()
        }

    attention = run(model)(model.placement.make_global_array(batch))
    size = sum(weights[0].size for weights in attention.values())
    most = min(int(batch.valid.sum()), max(1, MOST_ATTENTION // size))
    return {i: np.asarray(weights[:most]) for i, weights in attention.items()}


def count_passes(config: ViTConfig, *, remove: bool = True) -> int:
    """The largest number of calls of ``on_step``."""
    grid = (len(FRACTIONS) + len(config.moe_blocks)) * len(PRIORITIES) * can_be_limited(config)
    return grid + len(removals(config)) * remove


def slots_of(config: ViTConfig, routing: Collected) -> list[int]:
    """The numbers of slots in the grid: multiples of a slider's step, and each block's own."""
    settings = [Slots.of(moe, routing.blocks[i]) for i, moe in config.moe_blocks.items()]
    most, step = max(each.most for each in settings), max(each.step for each in settings)
    grid = {step * math.ceil(most * fraction / step) for fraction in FRACTIONS}
    return sorted(grid | {min(each.slots, most) for each in settings})


class Slots(NamedTuple):
    """The slots of an expert in one sparse block.

    Attributes:
        tokens: number of tokens in a group.
        slots: slots per expert and group in the model as loaded.
        most: number of slots with which no choice of the images is dropped, a multiple of ``step``.
        step: the step of the slider.
    """

    tokens: int
    slots: int
    most: int
    step: int

    @classmethod
    def of(cls, config: MoEConfig, block: BlockRouting) -> "Slots":
        """The slots of a block that routed the images of one batch."""
        b, n, e = block.gates.shape
        tokens = group_sizes(b, config.router.images_per_group)[1] * n
        slots = config.slots(tokens)
        step = 4 if slots % 4 == 0 and slots >= 16 else 1
        queues = np.zeros((block.groups.max(initial=0) + 1, e + 1), int)  # e stands for no expert
        np.add.at(queues, (block.groups[:, None, None], block.experts), 1)
        longest = queues[:, :e].max(initial=0)
        return cls(tokens, slots, step * max(1, math.ceil(longest / step)), step)
