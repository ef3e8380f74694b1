"""The number of slots of an expert in a group. It is static, since it determines array shapes."""

import math
from typing import Protocol, runtime_checkable

from vmoe.errors import UsageError


@runtime_checkable
class Limits(Protocol):
    """The fields of an ``MoEConfig`` that determine a capacity."""

    @property
    def num_experts(self) -> int: ...
    @property
    def capacity_factor(self) -> float: ...
    @property
    def capacity(self) -> int | None: ...
    @property
    def capacity_rounding(self) -> str: ...
    @property
    def capacity_multiple(self) -> int: ...
    @property
    def dropless(self) -> bool: ...


def rounded_capacity(ideal: float, limits: Limits) -> int:
    """Rounds a fractional number of slots to an integer, then up to a multiple.

    Args:
        limits: the rounding rules; ``capacity``, if given, is returned instead.

    Raises:
        UsageError: the rounding leaves no slot.

    Source: V-MoE, section 2.2; its published code rounds up to a multiple of 4.

    >>> from vmoe.config import MoEConfig
    >>> rounded_capacity(400 * 2 * 1.1 / 4, MoEConfig())
    224
    """
    if limits.capacity is not None:
        return limits.capacity
    slots = math.ceil(ideal) if limits.capacity_rounding == "ceil" else round(ideal)
    if slots < 1:
        raise UsageError(
            f"this leaves {ideal:.3g} slots for each of {limits.num_experts} experts: raise it, "
            "use larger groups or capacity_rounding=ceil",
            **{"model.moe.capacity_factor": limits.capacity_factor},
        )
    return -(-slots // limits.capacity_multiple) * limits.capacity_multiple
