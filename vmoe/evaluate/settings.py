"""Settings of token choice for each sparse block: which of them are tried.

A setting of a model is a tuple with a ``LayerSetting`` for each of its sparse blocks, in order.
"""

import itertools
import math

import numpy as np

from vmoe.config import MoEConfig, TokenChoice, ViTConfig, replace
from vmoe.config.inference import LayerSetting
from vmoe.config.routers import Priority
from vmoe.errors import UsageError
from vmoe.nn.patches import num_tokens
from vmoe.routing import slots_and_factor

LEVELS = 9  # numbers of slots that are tried, evenly spaced up to those as trained
PRIORITIES: tuple[Priority, ...] = ("order", "largest_gate", "sum_of_gates")

Setting = tuple[LayerSetting, ...]
Option = tuple[int, Priority]
"""k and the priority: what can change without changing the number of slots."""
Level = dict[Option, LayerSetting]
"""The settings of a layer with the same number of slots."""


def check_layers(config: ViTConfig) -> None:
    """Raises a UsageError unless the model is sparse, and each of its routers is token choice."""
    if not config.sparse_blocks:
        raise UsageError("no block of this model is sparse")
    for block, moe in config.moe_blocks.items():
        if not isinstance(moe.router, TokenChoice):
            raise UsageError(
                f"block {block} has the router {moe.router.kind}: only token_choice has k, slots "
                "and a priority to choose"
            )


def levels_of(config: ViTConfig) -> tuple[Level, ...]:
    """The settings of a layer that are tried, by number of slots, ascending.

    Slots up to those as trained (those of capacity factor 1 if it is dropless); k from 1 to one
    more than as trained; no random priority. Layers that differ share them: their numbers of slots
    are in the same proportion to tokens and experts.

    Raises:
        UsageError: the capacity leaves no slot.
    """
    layers = set(config.moe_blocks.values())
    ratios = {ratio: moe for moe in layers for ratio in _slot_ratios(moe, num_tokens(config))}
    largest_k = min(
        max(moe.router.experts_per_token for moe in layers) + 1,
        min(moe.num_experts for moe in layers),
    )
    return tuple(
        {
            (k, priority): LayerSetting(k, _factor(moe, num_tokens(config), k, ratio), priority)
            for k in range(1, largest_k + 1)
            for priority in PRIORITIES[: 3 if k > 1 else 2]  # with one gate both scores are equal
        }
        for ratio, moe in sorted(ratios.items(), key=lambda item: item[0])
    )


def _slot_ratios(moe: MoEConfig, n: int) -> set[float]:
    """Slots of all experts per token, e * c / s, for some c."""
    s, e = moe.images_per_group * n, moe.num_experts
    if moe.dropless:
        moe = replace(moe, dropless=False, capacity_factor=1.0)
    most = slots_and_factor(moe, s)[0]
    step = 1 if moe.capacity else moe.capacity_multiple
    every = sorted({*range(step, most, step), most})
    chosen = np.linspace(0, len(every) - 1, min(LEVELS, len(every))).round().astype(int)
    return {every[i] * e / s for i in chosen}


def _factor(moe: MoEConfig, n: int, k: int, ratio: float) -> float:
    """The capacity factor with the fewest digits that gives the number of slots."""
    s = moe.images_per_group * n
    slots = round(ratio * s / moe.num_experts)
    for digits in itertools.count(1):
        factor = math.floor(ratio / k * 10**digits) / 10**digits
        setting = LayerSetting(k, factor, "order") if factor else None
        if setting and slots_and_factor(setting.apply(moe), s)[0] >= slots:
            return factor
    raise AssertionError


def with_setting(config: ViTConfig, setting: Setting) -> ViTConfig:
    """The config of a model with a setting."""
    layers = config.moe_blocks.values()
    return replace(
        config, moe=tuple(own.apply(moe) for own, moe in zip(setting, layers, strict=True))
    )
