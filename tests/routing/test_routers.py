"""Each router's decisions equal a float64 loop over the rule of its paper, in one group."""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import expit, softmax

from vmoe.axes import Decision, RouterInputs
from vmoe.config import BiasBalanced, GShard, Hash, MoEConfig, Random, Router, Switch
from vmoe.errors import UsageError
from vmoe.nn.moe import MoE

S, E, C = 23, 4, 5
Choice = tuple[int, float]
"""An expert and its combine weight."""
Rule = Callable[[np.ndarray, float, int], list[Choice]]
"""(logits of a token, its draw, its position) -> its choices, in float64."""
BIAS = np.array([0.2, -0.3, 0.0, 0.1])


def switch(logits: np.ndarray, draw: float, position: int) -> list[Choice]:
    gates = softmax(logits)
    return [(int(gates.argmax()), gates.max())]


def gshard(logits: np.ndarray, draw: float, position: int) -> list[Choice]:
    gates = softmax(logits)
    first, second = np.argsort(-gates)[:2]
    g1, g2 = gates[[first, second]] / gates[[first, second]].sum()
    return [(int(first), g1), (int(second), g2)] if 2 * g2 > draw else [(int(first), g1)]


def bias_balanced(
    logits: np.ndarray, draw: float, position: int, *, scores: str, normalize: bool
) -> list[Choice]:
    values = {"sigmoid": expit, "softmax": softmax}[scores](logits)
    chosen = np.argsort(-(values + BIAS))[:2]
    total = values[chosen].sum() if normalize else 1.0
    return [(int(e), values[e] / total) for e in chosen]


def hashes(logits: np.ndarray, draw: float, position: int) -> list[Choice]:
    return [(int(e), 1 / 3) for e in np.asarray(table(Hash(k=3, seed=5), E, S))[position]]


table = jax.jit(Hash.table, static_argnums=(0, 1, 2))


CASES: dict[str, tuple[Router, Rule]] = {
    "switch": (Switch(), switch),
    "gshard": (GShard(), gshard),
    "bias_balanced": (
        BiasBalanced(),
        functools.partial(bias_balanced, scores="sigmoid", normalize=False),
    ),
    "bias_balanced_softmax_normalized": (
        BiasBalanced(scores="softmax", normalize_weights=True),
        functools.partial(bias_balanced, scores="softmax", normalize=True),
    ),
    "hash": (Hash(k=3, seed=5), hashes),
}


def inputs_of(seed: int, *, draw: bool = True) -> RouterInputs:
    rng = np.random.default_rng(seed)
    return RouterInputs(
        logits=jnp.asarray(rng.normal(size=(1, S, E)), jnp.float32),
        noise=None,
        valid=jnp.asarray(rng.random((1, S)) < 0.9),
        draw=jnp.asarray(rng.random((1, S)), jnp.float32) if draw else None,
        positions=jnp.asarray(rng.permutation(S))[None],
        state={"bias": jnp.asarray(BIAS, jnp.float32)[None]},
    )


@functools.partial(jax.jit, static_argnums=1)
def decide(inputs: RouterInputs, router: Router) -> Decision:
    return router(inputs, C)


@pytest.mark.parametrize(("router", "rule"), CASES.values(), ids=CASES.keys())
def test_decisions_equal_a_float64_loop_over_the_papers_rule(router: Router, rule: Rule) -> None:
    for seed in range(3):
        inputs = inputs_of(seed)
        decision = decide(inputs, router)
        (logits,), (valid,), (draw,), (positions,) = map(
            np.asarray, (inputs.logits, inputs.valid, inputs.draw, inputs.positions)
        )
        chosen = [
            rule(logits[s].astype(np.float64), float(draw[s]), int(positions[s])) * bool(valid[s])
            for s in range(S)
        ]
        free, expected = [C] * E, {}
        for rank in range(router.k):  # all first choices before any second one
            for s in range(S):
                if rank < len(chosen[s]):
                    expert, weight = chosen[s][rank]
                    if free[expert]:
                        expected[s, rank] = (expert, C - free[expert], weight)
                        free[expert] -= 1
        slots, weights = (
            np.asarray(x[0]) for x in (decision.routing.slots, decision.routing.weights)
        )
        kept = {(s, rank) for s, rank in np.argwhere(np.asarray(decision.routing.kept[0])).tolist()}
        assert kept == expected.keys()
        for (s, rank), (expert, position, weight) in expected.items():
            assert divmod(int(slots[s, rank]), C) == (expert, position)
            assert weights[s, rank] == pytest.approx(weight, rel=1e-6)
        np.testing.assert_allclose(decision.gates.sum(-1), 1, rtol=1e-6)


def test_gshard_makes_every_second_choice_in_evaluation() -> None:
    inputs = inputs_of(0, draw=False)._replace(valid=jnp.ones((1, S), bool))
    in_training = decide(inputs_of(0)._replace(valid=inputs.valid), GShard()).routing.experts
    assert (decide(inputs, GShard()).routing.experts < E).all()
    assert (in_training[..., 0] < E).all() and (in_training[..., 1] == E).any()


def test_the_bias_rises_for_experts_below_the_mean_load_and_falls_above_it() -> None:
    router = BiasBalanced(update_rate=0.5)
    first = router.initial_state(4)
    np.testing.assert_array_equal(first["bias"], np.zeros(4))
    state = router.next_state(first, {"choices": jnp.array([10, 2, 5, 3])})  # the mean is 5
    np.testing.assert_array_equal(state["bias"], [-0.5, 0.5, 0, 0.5])
    state = router.next_state(state, {"choices": jnp.array([9, 1, 5, 5])})
    np.testing.assert_array_equal(state["bias"], [-1, 1, 0, 0.5])


@pytest.mark.parametrize("scores", ["sigmoid", "softmax"])
def test_scores_that_round_to_0_are_normalized_to_equal_weights(
    scores: Literal["sigmoid", "softmax"],
) -> None:
    inputs = inputs_of(0)._replace(
        logits=jnp.broadcast_to(jnp.array([0.0, 0.0, -200.0, -300.0]), (1, S, E)),
        state={"bias": jnp.array([[0.0, 0.0, 5.0, 5.0]])},
    )
    routing = decide(inputs, BiasBalanced(scores=scores, normalize_weights=True)).routing
    assert set(np.unique(routing.experts[routing.kept])) == {2, 3}
    np.testing.assert_array_equal(routing.weights[routing.kept], 0.5)


def test_random_experts_follow_the_draw_in_training_and_the_position_in_evaluation() -> None:
    router, one, other = Random(k=2), inputs_of(0, draw=False), inputs_of(1, draw=False)
    experts = {}
    for inputs in (one, other):
        valid = inputs._replace(valid=jnp.ones((1, S), bool))
        chosen = np.asarray(decide(valid, router).routing.experts[0])
        assert all(len(set(row)) == 2 for row in chosen.tolist())
        for position, row in zip(np.asarray(inputs.positions[0]).tolist(), chosen, strict=True):
            assert tuple(row) == experts.setdefault(position, tuple(row))
    assert len(set(experts.values())) > E
    one = one._replace(valid=jnp.ones((1, S), bool))
    draws = [
        jnp.asarray(np.random.default_rng(seed).random((1, S)), jnp.float32) for seed in (0, 1)
    ]
    drawn = [decide(one._replace(draw=draw), router).routing.experts for draw in draws]
    assert (drawn[0] != drawn[1]).any()
    weights = decide(one, router).routing.weights
    assert set(np.unique(weights).tolist()) == {0.0, 0.5}


def test_random_experts_are_uniform() -> None:
    draw = jax.random.uniform(jax.random.key(0), (1, 4000))
    inputs = RouterInputs(jnp.zeros((1, 4000, E)), None, jnp.ones((1, 4000), bool), draw)
    inputs = inputs._replace(positions=jnp.zeros((1, 4000), int))
    experts = np.asarray(decide(inputs, Random(k=2)).routing.experts[0])
    pairs = np.bincount(experts[:, 0] * E + experts[:, 1], minlength=E * E).reshape(E, E)
    assert (np.diag(pairs) == 0).all()
    np.testing.assert_allclose(pairs[~np.eye(E, dtype=bool)] / 4000, 1 / 12, atol=0.02)


@pytest.mark.parametrize("n", [E, 3 * E, 3 * E + 1])
def test_the_table_of_hash_is_balanced_distinct_and_independent_of_the_image_size(n: int) -> None:
    config = Hash(k=3)
    experts = np.asarray(table(config, E, n))
    for rank in range(3):
        counts = np.bincount(experts[:, rank], minlength=E)
        assert counts.max() - counts.min() <= 1
    assert all(len(set(row)) == 3 for row in experts.tolist())
    np.testing.assert_array_equal(experts, table(config, E, 40)[:n])
    others = Hash(k=3, seed=1)
    assert (np.asarray(table(others, E, 3 * E)) != table(config, E, 3 * E)).any()


def test_switch_jitters_what_the_gate_sees_in_training_only() -> None:
    class Seen(nnx.Module):
        """A gate whose logits are the first values of a token."""

        def __call__(self, tokens: jax.Array) -> jax.Array:
            return tokens[..., :2]

    experts = [nnx.Linear(3, 3, rngs=nnx.Rngs(i)) for i in range(2)]
    moe, tokens = MoE(experts, Seen(), Switch(jitter=0.25)), jnp.ones((2, 300, 3))
    _, record = jax.jit(lambda x: moe.forward(x, key=jax.random.key(0)))(tokens)
    seen = np.asarray(record.logits)
    assert 0.75 <= seen.min() < 0.76 and 1.24 < seen.max() <= 1.25
    _, record = nnx.jit(MoE.forward)(moe, tokens)
    np.testing.assert_array_equal(record.logits, np.ones((1, 600, 2)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(num_experts=1, router=GShard()), "needs at least 2 experts"),
        (dict(num_experts=1, router=Hash()), "lower k or add experts"),
    ],
)
def test_a_router_with_too_few_experts_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        MoEConfig(**settings)
