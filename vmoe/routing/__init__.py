"""WHO goes WHERE: pure functions on logits and gates, without parameters.

A router is one file with ``capacity(config, s)`` and ``route(...)``, a frozen dataclass in
``vmoe/config.py``, and one line in ``ROUTERS``.
"""

from types import ModuleType

from vmoe.config import ExpertsChoose, MoEConfig, Soft, TokensChoose
from vmoe.routing import experts_choose, soft, tokens_choose

ROUTERS: dict[type, ModuleType] = {
    TokensChoose: tokens_choose,
    ExpertsChoose: experts_choose,
    Soft: soft,
}


def slots_and_factor(config: MoEConfig, s: int) -> tuple[int, float]:
    """Slots of an expert for a group of s tokens, and the capacity factor after rounding."""
    slots = ROUTERS[type(config.router)].capacity(config, s)
    return slots, slots * config.experts / (s * getattr(config.router, "k", 1))
