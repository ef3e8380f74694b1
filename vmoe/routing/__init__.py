"""WHO goes WHERE: pure functions on logits and gates, without parameters.

A router is one file with ``capacity(config, s)`` and ``route(...)``, a frozen dataclass in
``vmoe/config.py``, and one line in ``ROUTERS``.
"""

from types import ModuleType

from vmoe.config import ExpertChoice, MoEConfig, Soft, TokenChoice
from vmoe.routing import expert_choice, soft, token_choice

ROUTERS: dict[type, ModuleType] = {
    TokenChoice: token_choice,
    ExpertChoice: expert_choice,
    Soft: soft,
}


def slots_and_factor(config: MoEConfig, s: int) -> tuple[int, float]:
    """Slots of an expert for a group of s tokens, and the capacity factor after rounding."""
    slots = ROUTERS[type(config.router)].capacity(config, s)
    return slots, slots * config.num_experts / (s * getattr(config.router, "k", 1))
