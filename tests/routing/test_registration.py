"""Registering a router or gate takes one line; a missing line or function fails at import."""

import runpy
import types
from typing import Any, get_args

import pytest

from vmoe import routing
from vmoe.config import BiasBalanced, ExpertChoice, MoEConfig, Soft, TokenChoice
from vmoe.config.experts import ListedExpert
from vmoe.config.fields import check_registered
from vmoe.config.gates import Gate
from vmoe.nn.experts.make import MODULES
from vmoe.nn.gates import GATES
from vmoe.routing import ROUTERS, check_routers, expert_choice, soft, token_choice


def module(**functions: object) -> types.ModuleType:
    broken = types.ModuleType("broken")
    vars(broken).update(functions)
    return broken


def test_a_router_config_without_a_module_is_refused() -> None:
    with pytest.raises(TypeError, match="Soft has no entry: add a line to routing.ROUTERS"):
        check_routers({TokenChoice: token_choice}, (TokenChoice, Soft))


def test_a_registered_router_that_is_missing_from_the_config_union_is_refused() -> None:
    routers = {TokenChoice: token_choice, ExpertChoice: expert_choice}
    with pytest.raises(TypeError, match="ExpertChoice is in routing.ROUTERS: add it to the union"):
        check_routers(routers, (TokenChoice,))


def test_a_stateful_router_without_its_functions_is_refused() -> None:
    broken = module(capacity=soft.capacity, route=soft.route)
    with pytest.raises(TypeError, match=r"broken must define initial_state\(config\)"):
        check_routers({BiasBalanced: broken}, (BiasBalanced,))


@pytest.mark.parametrize("name", ["capacity", "route"])
def test_a_router_module_without_a_required_function_is_refused(name: str) -> None:
    functions = {"capacity": soft.capacity, "route": soft.route}
    del functions[name]
    with pytest.raises(TypeError, match=rf"broken must define {name}\("):
        check_routers({Soft: module(**functions)}, (Soft,))


def test_a_route_function_with_other_parameters_is_refused() -> None:
    broken = module(capacity=soft.capacity, route=lambda logits, valid: None)
    with pytest.raises(TypeError, match=r"must define route\(inputs, config, capacity\)"):
        check_routers({Soft: broken}, (Soft,))


def test_the_check_runs_at_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(soft, "route")
    with pytest.raises(TypeError, match="vmoe.routing.soft must define route"):
        runpy.run_path(routing.__file__)


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_has_a_gate_that_makes_its_logits(router: type) -> None:
    gate = MoEConfig(router=router(), images_per_group=1).gate_config
    logits = None if gate is None else gate.logits_per
    assert logits == router().logits_per and (gate is None or type(gate) in GATES)


@pytest.mark.parametrize(
    ("kinds", "registry", "name"),
    [(Gate, GATES, "nn.gates.GATES"), (ListedExpert, MODULES, "nn.experts.make.MODULES")],
)
def test_a_kind_of_gate_or_expert_without_a_module_is_refused(
    kinds: Any, registry: dict[type, Any], name: str
) -> None:
    known = list(registry)
    assert set(known) <= set(get_args(kinds))
    with pytest.raises(TypeError, match=f"{known[0].__name__} has no entry: add a line to {name}"):
        check_registered(known, {kind: registry[kind] for kind in known[1:]}, name)
    with pytest.raises(TypeError, match=f"{known[0].__name__} is in {name}: add it to the union"):
        check_registered(known[1:], registry, name)
