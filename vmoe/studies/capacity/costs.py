"""The costs of settings of the sparse blocks: FLOPs from shapes, or time on this machine."""

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from vmoe import models
from vmoe.config import MoEConfig, TokenChoice, ViTConfig, replace
from vmoe.costs.flops import flops_to_logits, sparse_layer_flops
from vmoe.errors import UsageError
from vmoe.nn.block import Block
from vmoe.nn.patches import num_tokens
from vmoe.nn.vit import ViT
from vmoe.studies.capacity.settings import Levels, Setting, with_setting

ROUNDS = 9  # a time is the least of 9 runs, since other work on the machine only adds to it


class Costs(NamedTuple):
    """The costs of settings, as fractions of the cost of the model as trained.

    Attributes:
        changes: for each sparse block, by (k, capacity factor), the difference from the cost of its
            layer as trained, as a fraction of the cost of the whole model.
    """

    changes: tuple[Mapping[tuple[int, float], float], ...]

    def of(self, setting: Setting) -> float:
        """The cost of a setting of the model."""
        return 1 + sum(
            changes[own.k, own.capacity_factor]
            for own, changes in zip(setting, self.changes, strict=True)
        )

    @property
    def least(self) -> float:
        """The smallest cost of any setting."""
        return 1 + sum(min(changes.values()) for changes in self.changes)

    def check(self, budget: float) -> None:
        """Raises a UsageError if every setting costs more than a budget."""
        if budget < self.least:
            least = math.ceil(self.least * 1000) / 1000
            raise UsageError(
                f"the smallest that can be reached is {least:g}x, since the rest of the model "
                "stays, and every expert keeps a few slots",
                budget=f"{budget:g}",
            )


def flops_costs(config: ViTConfig, levels: Sequence[Levels]) -> Costs:
    """FLOPs that the logits depend on, in full groups of images; exact, from shapes."""
    whole = flops_to_logits(config)
    flops = functools.cache(functools.partial(sparse_layer_flops, config))

    def of(moe: MoEConfig, class_token_only: bool) -> float:
        if not moe.router.dropless:  # the same program for all k: only the slots are multiplied
            images = moe.router.images_per_group
            slots = moe.slots(images * num_tokens(config))
            router = TokenChoice(k=1, capacity=slots, images_per_group=images)
            moe = replace(moe, router=router)
        return flops(moe, class_token_only=class_token_only)

    changes = []
    for (block, moe), tried in zip(config.moe_blocks.items(), levels, strict=True):
        only = config.class_token_last and block == config.depth - 1
        changes.append(
            {
                (own.k, own.capacity_factor): (of(own.apply(moe), only) - of(moe, only)) / whole
                for level in tried
                for own in level.values()
            }
        )
    return Costs(tuple(changes))


def time_costs(
    model: ViT,
    levels: Sequence[Levels],
    images: Float[np.ndarray, "b h w 3"],
    *,
    on_step: Callable[[], None] = lambda: None,
) -> Costs:
    """Seconds per batch on this machine: each sparse block alone, on the tokens that enter it.

    All settings of a block are timed in turn, several times. More slots never count as faster.

    Args:
        images: a batch, over all devices.
        on_step: called after each block.
    """
    config = model.config
    # Else each run uploads.
    images, valid = model.placement.make_global_array((images, np.ones(len(images), bool)))
    tried = dict(zip(config.sparse_blocks, levels, strict=True))
    (whole,) = least_seconds([functools.partial(_forward(model), images)])
    tokens, rotation, changes = model.embed(images), model.rotation(images), []
    for i, block in enumerate(model.blocks):
        if (moe := config.moe_of(i)) is not None:
            only = config.class_token_last and i == config.depth - 1
            layers = {
                (own.k, own.capacity_factor): own.apply(moe)
                for level in tried[i]
                for (_, priority), own in level.items()
                if priority == "largest_gate"  # the order of the tokens takes hardly any time
            }
            runs = []
            for layer in (moe, *layers.values()):
                changed = nnx.clone(block)
                changed.mlp.router = layer.router
                runs.append(functools.partial(_block(changed, only), tokens, valid, rotation))
            trained, *seconds = least_seconds(runs)
            changes.append(_monotone(dict(zip(layers, seconds, strict=True)), trained, whole))
            on_step()
        if i < config.sparse_blocks[-1]:
            tokens = _block(block, False)(tokens, valid, rotation)
    return Costs(tuple(changes))


def _monotone(
    seconds: Mapping[tuple[int, float], float], trained: float, whole: float
) -> dict[tuple[int, float], float]:
    result = {}
    for k in {k for k, _ in seconds}:
        own = sorted(key for key in seconds if key[0] == k)
        least = np.maximum.accumulate([seconds[key] for key in own])
        result |= dict(zip(own, ((least - trained) / whole).tolist(), strict=True))
    return result


def least_seconds(runs: Sequence[Callable[[], Any]]) -> list[float]:
    """The least time of each function; the functions are called in turn, several times."""
    for run in runs:
        jax.block_until_ready(run())  # compiles

    def seconds(run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - start

    return np.min([[seconds(run) for run in runs] for _ in range(ROUNDS)], axis=0).tolist()


@models.compiled
def _forward(model: ViT, images: jax.Array) -> jax.Array:
    return model(images)


@models.compiled
def _block(
    block: Block,
    class_token_only: bool,
    tokens: Float[Array, "b n d"],
    valid: Bool[Array, "b"],
    rotation: Float[Array, "2 n _ z"] | None,
) -> Float[Array, "b x d"]:
    return block(tokens, valid, rotation=rotation, class_token_only=class_token_only)[0]


def time_ratio(model: ViT, setting: Setting, images: Float[np.ndarray, "b h w 3"]) -> float:
    """The time of the whole model with a setting, as a fraction of its time as trained."""
    config, placement = with_setting(model.config, setting), model.placement
    changed = models.with_params(config, models.params_of(model), placement=placement)
    images = placement.make_global_array(images)
    runs = [functools.partial(_forward(each), images) for each in (model, changed)]
    trained, own = least_seconds(runs)
    return own / trained
