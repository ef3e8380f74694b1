"""The routing settings to try in each sparse block.

A setting of a model is a tuple with a ``LayerSetting`` for each of its sparse blocks, in order.
"""

import itertools

import numpy as np

from vmoe.config import MoEConfig, ViTConfig, replace
from vmoe.config.routing_file import LayerSetting, check_comparable
from vmoe.errors import UsageError, naming
from vmoe.nn.patches import num_tokens
from vmoe.routing import Router
from vmoe.routing.priority import PRIORITIES, Priority

LEVELS = 9  # numbers of slots to try, evenly spaced up to the number as trained

Setting = tuple[LayerSetting, ...]
Option = tuple[int, Priority]
"""k and the priority, which can change without changing the number of slots."""
Levels = tuple[dict[Option, LayerSetting], ...]
"""The settings to try in a layer: a dict for each number of slots, ascending."""


def check_layers(config: ViTConfig) -> None:
    """Raises a UsageError unless the model is sparse and its routers have a k and a priority."""
    if not config.sparse_blocks:
        raise UsageError("no block of this model is sparse")
    for block, moe in config.moe_blocks.items():
        with naming(f"block {block}"):
            check_comparable(moe.router)


def levels_of(config: ViTConfig) -> tuple[Levels, ...]:
    """For each sparse block, the settings to try.

    The number of slots is at most the number as trained (at capacity factor 1 if it is dropless),
    rounded up to a number that a capacity factor gives. k goes from 1 to one more than the largest
    k as trained. Random priority is left out.
    """
    layers = set(config.moe_blocks.values())
    largest_k = min(
        max(moe.router.k for moe in layers) + 1,
        min(moe.num_experts for moe in layers),
    )
    options = [
        (k, priority)
        for k in range(1, largest_k + 1)
        for priority in PRIORITIES
        if priority != "random"
        and (k > 1 or priority != "sum_of_gates")  # the sum of one gate is the largest gate
    ]

    def levels(moe: MoEConfig) -> Levels:
        s = moe.router.images_per_group * num_tokens(config)
        return tuple(
            {
                (k, priority): LayerSetting(k, _factor(moe, s, k, slots), priority)
                for k, priority in options
            }
            for slots in _numbers_of_slots(moe, s)
        )

    of_layer = {moe: levels(moe) for moe in layers}
    return tuple(of_layer[moe] for moe in config.moe_blocks.values())


def _numbers_of_slots(moe: MoEConfig, s: int) -> list[int]:
    """Numbers of slots that a capacity factor gives, evenly spaced."""
    if moe.router.dropless:
        moe = replace(moe, router=dict(dropless=False, capacity_factor=1.0))
    assert isinstance(moe.router, Router)
    most, step = moe.slots(s), moe.router.capacity_multiple
    every = [min(slots, s) for slots in range(step, most + step, step)]
    chosen = np.linspace(0, len(every) - 1, min(LEVELS, len(every))).round().astype(int)
    return [every[i] for i in chosen]


def _factor(moe: MoEConfig, s: int, k: int, slots: int) -> float:
    """The capacity factor with the fewest digits that gives the number of slots."""
    for digits in itertools.count(1):
        largest = slots * moe.num_experts * 10**digits // (s * k)
        for multiple in (largest, largest - 1):  # float error may add a slot to the largest
            factor = multiple / 10**digits
            if factor > 0:
                setting = LayerSetting(k, factor, "order")
                if setting.apply(moe).slots(s) == slots:
                    return factor
    raise AssertionError


def with_setting(config: ViTConfig, setting: Setting) -> ViTConfig:
    """The config of a model with a setting."""
    layers = config.moe_blocks.values()
    return replace(
        config, moe=tuple(own.apply(moe) for own, moe in zip(setting, layers, strict=True))
    )
