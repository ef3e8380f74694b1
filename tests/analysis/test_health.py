"""Findings about routing: none for a healthy layer, and each kind where something is wrong."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from vmoe.analysis import BlockRouting, BlockStatistics, Collected, statistics
from vmoe.analysis.effects import BatchDependence
from vmoe.analysis.health import findings

E, B, N = 8, 40, 25


def block(experts: np.ndarray, *, gate: float = 0.5, kept: float = 1.0) -> BlockStatistics:
    """One choice per token, with a gate; a fraction of the choices got a slot."""
    gates = np.full((B, N, E), (1 - gate) / (E - 1), np.float32)
    choices = experts[..., None]
    np.put_along_axis(gates, choices, gate, -1)
    positions = np.where(np.arange(B * N).reshape(B, N, 1) < kept * B * N, 0, -1)
    routing = BlockRouting(gates, choices, positions, gates.max(-1, keepdims=True), np.arange(B))
    shown = np.ones((B, 5, 5), bool)
    return statistics(
        [Collected(np.zeros((B, 3)), np.arange(B)[:, None] % 3, {5: routing}, shown)]
    )[5]


EVEN = np.arange(B * N).reshape(B, N) % E


def test_nothing_is_found_where_experts_are_used_evenly() -> None:
    assert findings({5: block(EVEN)}, BatchDependence(0.0, 0.1)) == []


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (
            dict(experts=EVEN % 6),
            "dead",
            "2 of 8 experts (6, 7) get less than 1% of the",
        ),
        (dict(experts=np.where(EVEN > 1, 0, EVEN)), "collapse", "expert 0 gets 7.0 times the"),
        (dict(experts=EVEN, kept=0.5), "dropped", "block 5: 50% of the choices get no slot"),
        (dict(experts=EVEN, gate=1 - 1e-5), "low_entropy", "of ln e (at least 1%), so the router"),
        (dict(experts=EVEN, gate=np.nan), "not_finite", "gates are NaN or infinite: load an"),
    ],
)
def test_each_problem_is_found_with_its_block_and_a_remedy(
    arguments: dict[str, Any], kind: str, message: str
) -> None:
    kinds = {finding.kind: finding for finding in findings({5: block(**arguments)})}
    assert message in str(kinds[kind])
    assert kinds[kind].block == 5 and kinds.keys() <= {kind, "dead"}


def test_predictions_that_depend_on_the_batch_are_a_finding_of_the_model() -> None:
    (finding,) = findings({5: block(EVEN)}, BatchDependence(0.25, 3.0))
    assert finding.block is None
    assert str(finding).startswith("batch: 25.0% of the predictions depend on the other images")


def test_a_soft_router_is_judged_by_its_gates() -> None:
    own = block(EVEN)
    soft = dataclasses.replace(own, choices=own.choices * 0, kept=own.kept * 0)
    assert findings({5: soft}) == []
    gates = np.zeros(E)
    gates[2] = own.gates.sum()
    kinds = {finding.kind for finding in findings({5: dataclasses.replace(soft, gates=gates)})}
    assert kinds == {"dead", "collapse"}
