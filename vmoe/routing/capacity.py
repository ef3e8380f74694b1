"""The number of slots of an expert in a group. It is static, since it determines array shapes."""

import math

from vmoe.config import MoEConfig
from vmoe.errors import UsageError


def rounded_capacity(ideal: float, config: MoEConfig) -> int:
    """Rounds a fractional number of slots to an integer, then up to a multiple.

    Args:
        config: the rounding rules; ``config.capacity``, if given, is returned instead.

    Raises:
        UsageError: the rounding leaves no slot.

    Source: V-MoE, section 2.2; its published code rounds up to a multiple of 4.

    >>> rounded_capacity(400 * 2 * 1.1 / 4, MoEConfig())
    224
    """
    if config.capacity is not None:
        return config.capacity
    slots = math.ceil(ideal) if config.capacity_rounding == "ceil" else round(ideal)
    if slots < 1:
        raise UsageError(
            f"this leaves {ideal:.3g} slots for each of {config.num_experts} experts: raise it, "
            "use larger groups or capacity_rounding=ceil",
            **{"model.moe.capacity_factor": config.capacity_factor},
        )
    return -(-slots // config.capacity_multiple) * config.capacity_multiple
