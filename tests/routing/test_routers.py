"""Each router's decisions equal a float64 loop over the rule of its paper, in one group."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import expit, softmax

from tests.oracles import transport_by_loop
from vmoe.axes import Decision, RouterInputs
from vmoe.config import (
    BiasBalanced,
    GShard,
    Hash,
    MoEConfig,
    Random,
    ReLU,
    Router,
    Sinkhorn,
    Switch,
    TokenChoice,
    TopP,
    Transport,
)
from vmoe.errors import UsageError
from vmoe.nn.moe import MoE

S, E, C = 23, 4, 5
Choice = tuple[int, float]
"""An expert and its combine weight."""
TokenRule = Callable[[np.ndarray, float, int], list[Choice]]
"""(logits of a token, its draw, its position) -> its choices, in float64."""
Rule = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], list[list[Choice]]]
"""The same for a group: (logits, valid, draws, positions) -> the choices of each token."""
THRESHOLD, COEFFICIENT = 0.7, 0.3
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


def sinkhorn(
    logits: np.ndarray, valid: np.ndarray, draws: np.ndarray, positions: np.ndarray, *, k: int
) -> list[list[Choice]]:
    kernel = np.exp(logits[valid])
    v = np.ones(E)
    for _ in range(500):
        u = 1 / (kernel @ v)
        v = len(kernel) / E / (u @ kernel)
    scores = softmax(logits, axis=-1) if k > 1 else expit(logits)
    chosen = np.argsort(-np.exp(logits) * v, axis=-1)[:, :k]
    return [
        [(int(e), row[e]) for e in of_token] for of_token, row in zip(chosen, scores, strict=True)
    ]


def transport(
    logits: np.ndarray, valid: np.ndarray, draws: np.ndarray, positions: np.ndarray
) -> list[list[Choice]]:
    gates, plan = softmax(logits, axis=-1), np.zeros((S, E))
    plan[valid] = transport_by_loop(gates[valid], k=2, line=1.0, other=valid.sum() / E)
    largest = np.argsort(-plan, axis=-1)[:, :2]
    return [[(int(e), gates[s, e]) for e in largest[s] if plan[s, e] > 0] for s in range(S)]


def relu(logits: np.ndarray, draw: float, position: int) -> list[Choice]:
    return [(int(e), logits[e]) for e in np.argsort(-logits) if logits[e] > 0]


def top_p(logits: np.ndarray, draw: float, position: int) -> list[Choice]:
    gates, choices = softmax(logits), []
    for e in np.argsort(-gates):
        if sum(weight for _, weight in choices) < THRESHOLD:
            choices.append((int(e), gates[e]))
    return choices


def each_token(rule: TokenRule) -> Rule:
    def of_group(
        logits: np.ndarray, valid: np.ndarray, draws: np.ndarray, positions: np.ndarray
    ) -> list[list[Choice]]:
        tokens = zip(logits, draws.tolist(), positions.tolist(), strict=True)
        return [rule(*token) for token in tokens]

    return of_group


table = jax.jit(Hash.table, static_argnums=(0, 1, 2))


CASES: dict[str, tuple[Router, Rule]] = {
    "switch": (Switch(), each_token(switch)),
    "gshard": (GShard(), each_token(gshard)),
    "bias_balanced": (
        BiasBalanced(),
        each_token(functools.partial(bias_balanced, scores="sigmoid", normalize=False)),
    ),
    "bias_balanced_softmax_normalized": (
        BiasBalanced(scores="softmax", normalize_weights=True),
        each_token(functools.partial(bias_balanced, scores="softmax", normalize=True)),
    ),
    "hash": (Hash(k=3, seed=5), each_token(hashes)),
    "sinkhorn": (Sinkhorn(), functools.partial(sinkhorn, k=2)),
    "transport": (Transport(), transport),
    "relu": (ReLU(), each_token(relu)),
    "top_p": (TopP(), each_token(top_p)),
    "sinkhorn_k1": (Sinkhorn(k=1), functools.partial(sinkhorn, k=1)),
}


def inputs_of(seed: int, *, draw: bool = True) -> RouterInputs:
    rng = np.random.default_rng(seed)
    return RouterInputs(
        logits=jnp.asarray(rng.normal(size=(1, S, E)), jnp.float32),
        noise=None,
        valid=jnp.asarray(rng.random((1, S)) < 0.9),
        draw=jnp.asarray(rng.random((1, S)), jnp.float32) if draw else None,
        positions=jnp.asarray(rng.permutation(S))[None],
        state={
            "bias": jnp.asarray(BIAS, jnp.float32)[None],
            "threshold": jnp.array([THRESHOLD]),
            "coefficient": jnp.array([COEFFICIENT]),
        },
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
        chosen = rule(logits.astype(np.float64), valid, draw, positions)
        chosen = [choices if real else [] for choices, real in zip(chosen, valid, strict=True)]
        free, expected = [C] * E, {}
        for rank in range(max(map(len, chosen))):  # all first choices before any second one
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


def test_sinkhorns_evaluation_is_token_choice_and_no_gradient_passes_through_its_plan() -> None:
    inputs, trained = inputs_of(0, draw=False), inputs_of(0)
    ours, theirs = decide(inputs, Sinkhorn()), decide(inputs, TokenChoice())
    jax.tree.map(np.testing.assert_array_equal, ours.routing, theirs.routing)
    assert (decide(trained, Sinkhorn()).routing.experts != ours.routing.experts).any()

    def total(logits: jax.Array, inputs: RouterInputs) -> jax.Array:
        return decide(inputs._replace(logits=logits), Sinkhorn()).routing.weights.sum()

    def of_the_gates(logits: jax.Array, inputs: RouterInputs) -> jax.Array:
        routing = decide(inputs, Sinkhorn()).routing
        gates = jax.nn.softmax(logits, axis=-1)
        weights = jnp.take_along_axis(gates, routing.experts, axis=-1, mode="clip")
        return (weights * routing.kept).sum()

    gradients = (jax.jit(jax.grad(f))(trained.logits, trained) for f in (total, of_the_gates))
    np.testing.assert_allclose(*gradients, atol=1e-6)


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


def test_the_l1_loss_of_relu_routing_is_weighted_by_the_share_of_each_expert() -> None:
    inputs, expected = inputs_of(0), 0.0
    real = np.maximum(np.float64(inputs.logits[0]), 0)[np.asarray(inputs.valid[0])]
    for e in range(E):
        share = E / 2 * np.mean(real[:, e] > 0)
        expected += COEFFICIENT * share * real[:, e].mean()
    np.testing.assert_allclose(decide(inputs, ReLU()).losses["l1"], [expected], rtol=1e-6)


def test_the_coefficient_of_the_l1_loss_rises_with_too_many_experts_and_falls_else() -> None:
    router = ReLU(target_k=2, coefficient=0.5, factor=4.0)
    state = router.initial_state(3)
    for choices, expected in (([9, 9, 9], 2.0), ([9, 9, 2], 2.0), ([1, 0, 0], 0.5)):
        state = router.next_state(state, {"choices": jnp.array(choices), "tokens": jnp.array(10)})
        np.testing.assert_allclose(state["coefficient"], expected, rtol=1e-6)


def test_the_threshold_of_top_p_is_proportional_to_the_error_and_to_its_sum() -> None:
    router = TopP(target_k=2, threshold=0.5, proportional_gain=0.3, integral_gain=0.1)
    state, total = router.initial_state(4), 0.5
    for choices in ([10, 10, 5, 3], [3, 3, 3, 3], [5, 5, 5, 5], [10, 10, 10, 10]):
        error = (2 - sum(choices) / 10) / 4
        total += 0.1 * error
        state = router.next_state(state, {"choices": jnp.array(choices), "tokens": jnp.array(10)})
        np.testing.assert_allclose(state["threshold"], total + 0.3 * error, rtol=1e-6)
    for _ in range(30):  # too few, whatever the threshold: it stays at 1, and comes back at once
        state = router.next_state(state, {"choices": jnp.ones(4), "tokens": jnp.array(10)})
    assert state["threshold"] == state["integral"] == 1
    state = router.next_state(state, {"choices": jnp.full(4, 10), "tokens": jnp.array(10)})
    np.testing.assert_allclose(state["threshold"], 1 - 0.5 * (0.1 + 0.3), rtol=1e-6)


@pytest.mark.parametrize("router", [ReLU(target_k=3, coefficient=1e-3), TopP(target_k=3)])
def test_training_brings_the_mean_number_of_experts_to_the_target(router: Router) -> None:
    """The task is to keep the logits."""
    e, start = 8, jax.random.normal(jax.random.key(0), (1, 200, 8))

    @jax.jit
    def step(logits: jax.Array, state: dict[str, jax.Array]) -> tuple[Any, Any, Any]:
        def loss(logits: jax.Array) -> tuple[jax.Array, Decision]:
            own = {name: x[None] for name, x in state.items()}
            valid = jnp.ones((1, 200), bool)
            decision = router(RouterInputs(logits, None, valid, None, state=own), 200)
            task = ((logits - start) ** 2).sum() / 2
            return task + decision.losses.get("l1", jnp.zeros(1)).sum(), decision

        gradient, decision = jax.grad(loss, has_aux=True)(logits)
        choices = jnp.bincount(decision.routing.experts.ravel(), length=e)
        sums = {"choices": choices, "tokens": jnp.array(200)}
        return logits - gradient, router.next_state(state, sums), choices.sum() / 200

    logits, state, means = start, router.initial_state(e), []
    for _ in range(150):
        logits, state, mean = step(logits, state)
        means.append(float(mean))
    assert abs(means[0] - 3) > 0.5 and np.mean(means[-20:]) == pytest.approx(3, abs=0.1)


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
