"""Findings about routing: none for a healthy layer, and each kind where something is wrong."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from tests.routers import grouped
from vmoe import models
from vmoe.analysis import BlockRouting, BlockStatistics, Collected, statistics
from vmoe.config import (
    AnyRouter,
    BiasBalanced,
    CosineGate,
    ExpertChoice,
    ExpertList,
    Hash,
    MlpExpert,
    MlpGate,
    MoEConfig,
    NoisyGate,
    Router,
    RoutingOverrides,
    Sinkhorn,
    Soft,
    Switch,
    TokenChoice,
    TransportExpertChoice,
    ViTConfig,
    ZeroExpert,
    replace,
)
from vmoe.errors import UsageError
from vmoe.health import all_clear, findings, weights_are_gates
from vmoe.nn.moe import MoE
from vmoe.routing.load import ExpertTotals
from vmoe.surgery.experts import prune_experts, random_experts
from vmoe.trees import nested

E, B, N = 8, 40, 25
K1 = TokenChoice(k=1)


def config_of(router: Router = K1, e: int = E) -> ViTConfig:
    per_group = 1 if isinstance(router, Soft) else 8
    layer = MoEConfig(num_experts=e, router=grouped(router, per_group))
    return ViTConfig(sparse_blocks=(5,), moe=layer)


def block(experts: np.ndarray, *, gate: float = 0.5, kept: float = 1.0) -> BlockStatistics:
    """One choice per token, with a gate; a fraction of the choices got a slot."""
    gates = np.full((B, N, E), (1 - gate) / (E - 1), np.float32)
    choices = experts[..., None]
    np.put_along_axis(gates, choices, gate, -1)
    positions = np.where(np.arange(B * N).reshape(B, N, 1) < kept * B * N, 0, -1)
    routing = BlockRouting(gates, choices, positions, gates.max(-1, keepdims=True), np.arange(B))
    shown, labels = np.ones((B, 5, 5), bool), np.arange(B)[:, None] % 3
    return statistics([Collected(np.zeros((B, 3)), labels, {5: routing}, shown, 0)])[5]


EVEN = np.arange(B * N).reshape(B, N) % E


def test_nothing_is_found_where_experts_are_used_evenly() -> None:
    assert findings(config_of(), {5: block(EVEN)}, 0.0) == []


def test_the_line_of_healthy_routing_has_the_checks_that_were_made() -> None:
    """Dead experts need choices, and the others of a batch predictions in several orders."""
    line = all_clear(config_of(), {5: block(EVEN)}, 0.0)
    assert "no dead expert (below 1% of the mean load)" in line
    assert "at least 1% of ln e, at most 1% of the predictions depend on the batch" in line
    few = all_clear(config_of(), {5: totals(0.25, E, 2, tokens=200)})
    assert "dead expert (" not in few and "too few choices to find dead experts" in few
    assert few.endswith("gate entropy at least 1% of ln e")
    without_gate = all_clear(config_of(Hash()), {5: block(EVEN)})
    assert without_gate == "no problem found: at most 25% of the choices dropped"


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
    kinds = {finding.kind: finding for finding in findings(config_of(), {5: block(**arguments)})}
    assert message in str(kinds[kind])
    assert kinds[kind].block == 5 and kinds.keys() <= {kind, "dead"}


def test_predictions_that_depend_on_the_batch_are_a_finding_of_the_model() -> None:
    (finding,) = findings(config_of(), {5: block(EVEN)}, 0.25)
    assert finding.block is None
    assert str(finding).startswith("batch: 25.0% of the predictions depend on the other images")


def test_a_soft_router_is_judged_by_its_gates() -> None:
    own = block(EVEN)
    soft = dataclasses.replace(own, choices=own.choices * 0, kept=own.kept * 0)
    assert findings(config_of(Soft()), {5: soft}) == []
    gates = np.zeros(E)
    gates[2] = own.gates.sum()
    found = findings(config_of(Soft()), {5: dataclasses.replace(soft, gates=gates)})
    assert {finding.kind for finding in found} == {"dead", "collapse"}


def totals(share: float, e: int, k: int, tokens: int = 10_000) -> ExpertTotals:
    """Expert 0 is chosen by a share of the tokens; the others share the other choices evenly."""
    first = round(share * tokens)
    choices = np.array([first, *[(k * tokens - first) / (e - 1)] * (e - 1)]).round().astype(int)
    return ExpertTotals(tokens, choices / k, tokens * np.log(e), choices, choices, 0)


@pytest.mark.parametrize(
    ("e", "k", "largest"),
    [
        *[(8, 2, 0.75), (4, 2, 0.75), (4, 1, 0.75), (2, 1, 0.75)],  # of the tokens
        *[(32, 2, 5 * 2 / 32), (32, 1, 5 / 32), (16, 2, 5 * 2 / 16)],  # five times the mean
        *[(4, 3, 0.875), (4, 4, 1.01), (2, 2, 1.01)],  # halfway from even to all tokens
    ],
)
def test_a_router_collapses_if_most_tokens_or_five_times_the_mean_choose_one_expert(
    e: int, k: int, largest: float
) -> None:
    """A token gives an expert at most one of its k choices."""
    config = config_of(TokenChoice(k=k), e)
    for share in (k / e, largest - 0.01):
        assert findings(config, {5: totals(share, e, k)}) == []
    if k < e:
        (found,) = findings(config, {5: totals(largest + 0.01, e, k)})
        assert found.kind == "collapse" and found.value > found.threshold
        assert f", from {largest + 0.01:.0%} of the tokens: train with a larger" in str(found)


class Fixed(ExpertChoice):
    """A router without a learned gate."""

    learned = False


@pytest.mark.parametrize("router", [TokenChoice(), ExpertChoice(), Fixed()])
def test_a_remedy_is_one_that_the_router_has(router: Router) -> None:
    """A fixed router has gates of 0 and 1 and its own load, which are no faults."""
    config = config_of(router)
    own = dataclasses.replace(totals(1.0, E, 1), entropy=-0.0)
    found = {finding.kind: str(finding) for finding in findings(config, {5: own})}
    assert ("gate entropy" in all_clear(config, {5: own})) == router.learned
    assert ("low_entropy" in found) == router.learned
    assert "entropy is 0.0% of" in found.get("low_entropy", "entropy is 0.0% of")
    has_losses, text = isinstance(router, TokenChoice), " ".join(found.values())
    assert ("losses" in text, "z loss" in text) == (has_losses, has_losses)
    assert ("learning rate" in text) == router.learned
    assert bool(found) == router.learned


MLPS_AND_ZERO = ExpertList(each=(MlpExpert(),) * 3 + (ZeroExpert(),))
LAYERS = [
    *[dict(gate=gate) for gate in (None, NoisyGate(), MlpGate(), CosineGate())],
    *[dict(router=router) for router in (BiasBalanced(), ExpertChoice(), Hash())],
    dict(router=Soft()),
    dict(experts=MLPS_AND_ZERO),
    dict(router=TokenChoice(capacity=3)),
]
BLOCKS = [(LAYERS[i], LAYERS[j]) for i, j in [*((i, i) for i in range(10)), (0, 3), (0, 5), (0, 7)]]


@pytest.mark.parametrize("blocks", BLOCKS)
def test_every_remedy_is_one_that_the_model_accepts(blocks: tuple[dict[str, Any], ...]) -> None:
    """Pruning is one of ``surgery``, the others are overrides of the routing."""
    size = dict(width=8, num_heads=1, mlp_dim=4, patch_size=16, image_size=32, depth=2)
    layers = tuple(MoEConfig(num_experts=4, **fields) for fields in blocks)
    config = ViTConfig(**size, sparse_blocks=(0, 1), moe=layers)
    choices = np.array([5000, 5000, 0, 0])
    own = ExpertTotals(5000, choices / 2, 5000.0, choices, choices // 2, 0)
    found = {f.kind: str(f) for f in findings(config, {0: own}, 0.25)}

    def prune() -> None:
        params = nested(models.abstract_params(config))
        kept = random_experts(config, 2)
        jax.eval_shape(lambda params: prune_experts(config, params, kept)[1], params)

    def override(**fields: Any) -> None:
        changed = RoutingOverrides(**fields).apply(config).moe_blocks.values()
        for name, value in fields.items():
            assert all(getattr(moe.router, name) == value for moe in changed)

    accepted = {}
    for name, remedy in {
        "or prune them": prune,
        "dropless": lambda: override(dropless=True),
        "more capacity": lambda: override(capacity_factor=4.0),
        "one image per group": lambda: override(images_per_group=1),
    }.items():
        try:
            remedy()
            accepted[name] = True
        except (UsageError, AssertionError):
            accepted[name] = False
    dead = found.get("dead", "")
    assert bool(dead) == layers[0].router.learned
    assert ("or prune them" in dead) == (accepted.pop("or prune them") and bool(dead))
    for name, works in accepted.items():
        assert (name in found["batch"]) == works, found["batch"]
    assert ("larger capacity factor" in found["dropped"]) == (layers[0].router.capacity is None)


def test_an_expert_without_parameters_that_tokens_avoid_is_not_dead() -> None:
    config = replace(config_of(TokenChoice(k=2), 4), moe=dict(experts=MLPS_AND_ZERO))
    choices = np.array([0, 3400, 3300, 3300])
    of_zero = ExpertTotals(5000, choices / 2, 5000.0, choices[::-1], choices[::-1], 0)
    assert findings(config, {5: of_zero}) == []
    (found,) = findings(config, {5: dataclasses.replace(of_zero, choices=choices, kept=choices)})
    assert found.kind == "dead" and "1 of 4 experts (0) get less than 1%" in str(found)


@pytest.mark.parametrize(
    ("router", "known"),
    [
        (TokenChoice(k=2), True),
        (Switch(), True),
        (ExpertChoice(), True),
        (TransportExpertChoice(), True),
        (Sinkhorn(k=2), True),
        (Sinkhorn(k=1), False),
        (BiasBalanced(scores="softmax"), True),
        (BiasBalanced(scores="sigmoid"), False),
    ],
    ids=repr,
)
def test_the_weights_of_routers_that_are_known_for_it_are_gates(
    router: AnyRouter, known: bool
) -> None:
    rngs = nnx.Rngs(0)
    experts = [nnx.Linear(8, 8, rngs=rngs) for _ in range(4)]
    layer = MoE(experts, nnx.Linear(8, 4, use_bias=False, rngs=rngs), router)
    tokens = jax.random.normal(jax.random.key(0), (2, 9, 8))
    record = nnx.jit(MoE.forward)(layer, tokens)[1]
    routing = record.routing
    gates = np.take_along_axis(record.gates, np.minimum(routing.experts, 3), axis=-1)
    kept = np.asarray(routing.kept)
    assert kept.any() and weights_are_gates(router) == known
    assert np.allclose(routing.weights[kept], gates[kept], rtol=1e-5) == known
