"""Routing: pure functions from router logits to decisions, without parameters.

A router is one file here with ``capacity(config, s)`` and ``route(inputs, config, capacity)``, a
frozen dataclass in ``vmoe/config/routers.py`` that is a member of ``Router``, and one line in
``ROUTERS``. A stateful router also has ``initial_state(config)`` and ``next_state(state, load,
config)``: both return arrays by name; ``load`` is that of the batch (``load.py``). A router that
ONNX files can have also has ``route_without_scatters``: as ``route`` in evaluation, for groups
without padding, with a ``SoftRouting`` as the result.
"""

import inspect
import typing
from collections.abc import Collection, Mapping
from types import ModuleType

from vmoe.config import (
    BiasBalanced,
    ExpertChoice,
    GShard,
    Hash,
    MoEConfig,
    Random,
    Router,
    Soft,
    Switch,
    TokenChoice,
)
from vmoe.config.fields import check_registered
from vmoe.routing import (
    bias_balanced,
    expert_choice,
    gshard,
    hashed,
    random,
    soft,
    switch,
    token_choice,
)

ROUTERS: dict[type, ModuleType] = {
    TokenChoice: token_choice,
    ExpertChoice: expert_choice,
    Soft: soft,
    Switch: switch,
    GShard: gshard,
    BiasBalanced: bias_balanced,
    Random: random,
    Hash: hashed,
}
"""The module for each type of router config."""

FUNCTIONS = {"capacity": ["config", "s"], "route": ["inputs", "config", "capacity"]}
"""The functions that each of these modules must define, with their parameter names."""

STATE_FUNCTIONS = {"initial_state": ["config"], "next_state": ["state", "load", "config"]}
"""The functions that the module of a stateful router must define too."""


def check_routers(routers: Mapping[type, ModuleType], configs: Collection[type]) -> None:
    """Checks that each router config has a module, and that each module has both functions."""
    check_registered(configs, routers, "routing.ROUTERS")
    for config, module in routers.items():
        functions = FUNCTIONS | (STATE_FUNCTIONS if config.stateful else {})
        for name, parameters in functions.items():
            function = vars(module).get(name)
            if function is None or list(inspect.signature(function).parameters) != parameters:
                raise TypeError(f"{module.__name__} must define {name}({', '.join(parameters)})")


check_routers(ROUTERS, typing.get_args(Router))


def router_of(config: MoEConfig) -> ModuleType:
    """The module of the router in an MoE layer's config."""
    return ROUTERS[type(config.router)]


def slots_and_factor(config: MoEConfig, s: int) -> tuple[int, float]:
    """Slots of an expert for a group of s tokens, and the capacity factor after rounding."""
    slots = router_of(config).capacity(config, s)
    return slots, slots * config.num_experts / (s * config.router.experts_per_token)
