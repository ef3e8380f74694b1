"""The number of slots of an expert in a group. It is static, since it determines array shapes."""

import dataclasses
import math
from typing import Annotated, Any, Literal

from vmoe.fields import Checked, Positive, at_least


@dataclasses.dataclass(frozen=True)
class Capacity(Checked):
    """The settings of a router for whose slots the tokens of a group compete."""

    section = "model.moe.router"

    capacity_factor: Positive = 1.05
    """Capacity of an expert = capacity_factor * k * s / e slots, rounded, with s tokens per group
    and e experts."""
    eval_capacity_factor: Positive | None = None
    """Capacity factor in evaluation; if None, that of training."""
    capacity: Annotated[int, at_least(1)] | None = None
    """Slots per expert and group; overrides the capacity factor and its rounding."""
    capacity_rounding: Literal["ceil", "round"] = "ceil"
    """How the capacity is rounded to an integer; round rounds half to even."""
    capacity_multiple: Annotated[int, at_least(1)] = 4
    """The capacity is rounded up to a multiple of this."""
    images_per_group: Annotated[int, at_least(1)] = 8
    """Maximum number of images whose tokens compete for slots; 1 makes images independent, up to
    rounding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        both = self.capacity is not None and self.eval_capacity_factor is not None
        self.require(not both, "give one of them", "capacity", "eval_capacity_factor")

    def in_evaluation(self) -> Any:
        """The router with its capacity factor of evaluation in place of that of training."""
        factor = self.eval_capacity_factor
        return self if factor is None else dataclasses.replace(self, capacity_factor=factor)

    def rounded(self, ideal: float, e: int) -> int:
        """Rounds a fractional number of slots to an integer, then up to a multiple.

        Args:
            ideal: number of slots; ``capacity``, if given, is returned instead.

        Raises:
            UsageError: the rounding leaves no slot.

        Source: V-MoE, section 2.2; its published code rounds up to a multiple of 4.

        >>> Capacity().rounded(400 * 2 * 1.1 / 4, e=4)
        224
        """
        if self.capacity is not None:
            return self.capacity
        slots = math.ceil(ideal) if self.capacity_rounding == "ceil" else round(ideal)
        if slots < 1:
            in_evaluation = self.capacity_factor == self.eval_capacity_factor
            name = "eval_capacity_factor" if in_evaluation else "capacity_factor"
            remedy = "raise it, use larger groups or capacity_rounding=ceil"
            problem = f"this leaves {ideal:.3g} slots for each of {e} experts: {remedy}"
            self.require(False, problem, name)
        return -(-slots // self.capacity_multiple) * self.capacity_multiple
