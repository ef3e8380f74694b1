"""One-hot routing makes the decisions of the routers, whose own tests use float64 loops."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vmoe.axes import RouterInputs, Routing, SoftRouting
from vmoe.checkpoints.export.one_hot import ROUTERS
from vmoe.config import ExpertChoice, TokenChoice
from vmoe.routing.priority import Priority

CASES = [
    *((TokenChoice(k=3, priority=each), 5) for each in get_args(Priority)),
    (TokenChoice(k=1), 5),
    (TokenChoice(k=3), 1),
    (TokenChoice(k=3), 24),
    (TokenChoice(normalize_weights=True), 5),
    (TokenChoice(shares=(1.0, 0.5, 0.25, 1.0)), 5),
    *((ExpertChoice(), capacity) for capacity in (1, 5, 24)),
]


@pytest.mark.parametrize(("router", "capacity"), CASES, ids=str)
def test_the_same_tokens_fill_the_same_slots_with_the_same_weights_even_if_gates_are_equal(
    router: TokenChoice | ExpertChoice, capacity: int
) -> None:
    g, s, e = 3, 24, 4
    logits = np.random.default_rng(0).integers(0, 3, (g, s, e)).astype(np.float32)

    @jax.jit
    def route(logits: jax.Array) -> tuple[Routing, SoftRouting]:
        inputs = RouterInputs(logits, None, jnp.ones((g, s), bool), None)
        own = ROUTERS[type(router)](router, inputs, capacity)
        return router(inputs, capacity).routing, own.routing

    routing, own = route(logits)
    dispatch = np.asarray(routing.tokens)[:, None] == np.arange(s)[:, None, None]
    np.testing.assert_array_equal(own.dispatch, dispatch)
    weights = np.pad(np.asarray(routing.weights).reshape(g, -1), ((0, 0), (0, 1)))
    slot_weights = np.take_along_axis(weights, np.asarray(routing.choices).reshape(g, -1), 1)
    in_slots = np.asarray(own.combine).sum(axis=1).reshape(g, -1)
    np.testing.assert_allclose(in_slots, slot_weights, rtol=1e-6)
