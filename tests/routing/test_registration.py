"""Every router has a gate, and a gate or expert without a module fails at import."""

from typing import Any, get_args

import pytest

from tests.routers import ROUTERS
from vmoe.config import MoEConfig
from vmoe.config.experts import ListedExpert
from vmoe.config.gates import Gate
from vmoe.fields import check_registered
from vmoe.nn.experts.make import MODULES
from vmoe.nn.gates import GATES


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_has_a_gate_that_makes_its_logits(router: type) -> None:
    gate = MoEConfig(router=router()).gate_config
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
