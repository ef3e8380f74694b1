"""Routers by optimal transport against stored runs of the authors' own.

``tests/golden/transport`` has logits, plans and combine weights of the routers in
``vmoe/projects/sparsity_constrained_ot`` of google-research/vmoe at commit 942a78b, by the authors
of arXiv 2209.15466, with jaxopt 0.8.5, for seeded tokens.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from tests.oracles import one_hot_dispatch, transport_by_loop
from vmoe.axes import Decision, RouterInputs, Routing
from vmoe.config import Router, Sinkhorn, Transport, TransportExpertChoice
from vmoe.routing import sinkhorn, transport

FOLDER = Path(__file__).parents[1] / "golden" / "transport"
G, S, E = 2, 16, 4


def stored(name: str) -> tuple[jax.Array, np.ndarray, np.ndarray]:
    """Logits (g, s, e), plan (g, s, e) and combine weights (g, s, e, c)."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return jnp.asarray(file["logits"]), file["plan"], file["combine"]


def decide(router: Router, logits: jax.Array, c: int) -> Decision:
    valid, draw = jnp.ones((G, S), bool), jnp.zeros((G, S))
    return jax.jit(lambda x: router(RouterInputs(x, None, valid, draw), c))(logits)


def combine(routing: Routing) -> np.ndarray:
    """The combine weight of each token in each slot, (g, s, e, c)."""
    by_expert = np.zeros((G, S, E + 1))
    np.put_along_axis(by_expert, np.asarray(routing.experts), np.asarray(routing.weights), axis=-1)
    return one_hot_dispatch(routing) * by_expert[..., :E, None]


def test_sinkhorns_plan_is_the_authors_entropic_one() -> None:
    """Theirs is 20 steps of L-BFGS on the semi-dual: its rows sum to 1 up to 2e-4."""
    logits, plan, expected = stored("kl_lbfgs_item_k2")
    ours = sinkhorn.plan(logits, jnp.ones((G, S), bool), iterations=20)
    np.testing.assert_allclose(ours, plan, atol=2e-4)
    np.testing.assert_allclose(ours.sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(ours.sum(1), S / E, atol=2e-4)
    routing = decide(Sinkhorn(k=2), logits, expected.shape[-1]).routing
    np.testing.assert_allclose(combine(routing), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "router"),
    [
        ("ksparse_item_k2", Transport(k=2)),
        ("ksparse_item_k1_plan", Transport(k=1, weights="plan", priority="largest_gate")),
        ("ksparse_expert", TransportExpertChoice()),
    ],
)
def test_combine_weights_are_those_of_the_authors_sparse_routers(name: str, router: Router) -> None:
    logits, _, expected = stored(name)
    routing = decide(router, logits, expected.shape[-1]).routing
    np.testing.assert_allclose(combine(routing), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "by_experts", "k", "steps", "atol"),
    [
        ("ksparse_item_k2", False, 2, 20, 1e-5),
        ("ksparse_item_k1_plan", False, 1, 20, 1e-5),
        ("ksparse_expert", True, 4, 20, 1e-5),
        # Theirs is not sparse, and 20 steps of L-BFGS: its rows sum to 0.985 to 1.004.
        ("l2_expert", True, S, 2000, 0.02),
    ],
)
def test_plans_are_those_of_the_authors_routers(
    name: str, by_experts: bool, k: int, steps: int, atol: float
) -> None:
    logits, expected, combined = stored(name)
    gates, lines, others = jax.nn.softmax(logits), 1.0, S / E
    if by_experts:
        gates, expected, lines, others = gates.mT, expected.transpose(0, 2, 1), S / E, 1.0
    ours = jax.jit(functools.partial(transport.plan, k=k, steps=steps, rate=0.01))(
        gates, jnp.ones(gates.shape, bool), jnp.full((G, 1), lines), jnp.full((G, 1), others)
    )
    np.testing.assert_allclose(ours, expected, atol=atol)
    np.testing.assert_allclose(ours.sum(-1), lines, rtol=1e-6)
    assert (ours > 0).sum(-1).max() <= k
    if name == "l2_expert":
        np.testing.assert_allclose(ours.sum(1), 1, atol=5e-3)
        chosen = (combined > 0).any(-1).transpose(0, 2, 1)
        np.testing.assert_array_equal(np.asarray(ours) >= np.sort(ours)[..., -4:-3], chosen)


def test_by_experts_by_a_float64_loop_over_the_plan_without_padding() -> None:
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(G, S, E)), jnp.float32)
    valid = rng.random((G, S)) < 0.8
    inputs = RouterInputs(logits, None, jnp.asarray(valid), None)
    routing = jax.jit(lambda x: TransportExpertChoice()(x, 3))(inputs).routing
    gates = softmax(np.float64(logits), axis=-1)
    for g in range(G):
        real = gates[g, valid[g]]
        plan = transport_by_loop(real.T, k=3, line=len(real) / E, other=1.0)  # e s
        expected = np.zeros((S, E))
        expected[valid[g]] = np.where(plan.T > 0, real, 0)
        np.testing.assert_allclose(routing.weights[g], expected, rtol=1e-6)
