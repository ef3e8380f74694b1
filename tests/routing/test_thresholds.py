"""Routers with a threshold: training equals a float64 loop, evaluation takes all that reach it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import expit, softmax

from vmoe.axes import Decision, RouterInputs
from vmoe.config import AnyRouter, ExpertChoice, ExpertRace
from vmoe.nn.moe import MoE

G, S, E, K, C = 3, 20, 4, 2, 9
VALID = np.arange(S) < np.array([[S], [13], [0]])
LOGITS = np.random.default_rng(0).normal(size=(G, S, E)).astype(np.float32)
SCORES = {"sigmoid": expit, "softmax": softmax}


@functools.partial(jax.jit, static_argnums=(0, 2))
def decide(router: AnyRouter, threshold: jax.Array, train: bool) -> Decision:
    state = {"threshold": threshold, "steps": jnp.ones(G)}
    draw = jnp.zeros((G, S)) if train else None
    return router(RouterInputs(jnp.asarray(LOGITS), None, jnp.asarray(VALID), draw, state=state), C)


def in_float64(name: str, g: int) -> np.ndarray:
    logits = LOGITS[g].astype(np.float64)
    return expit(logits) if name == "sigmoid" else softmax(logits, axis=-1)


def by_expert(scores: np.ndarray, won: set[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """(token, expert) -> slot, for the winners of each expert, the largest first."""
    kept = {}
    for e in range(E):
        tokens = sorted((t for t, x in won if x == e), key=lambda t: -scores[t, e])
        kept |= {(t, e): i for i, t in enumerate(tokens[:C])}
    return kept


def assert_kept(decision: Decision, scores: np.ndarray, g: int, won: set[tuple[int, int]]) -> None:
    kept = by_expert(scores, won)
    slots, weights, experts = (
        np.asarray(x[g])
        for x in (decision.routing.slots, decision.routing.weights, decision.routing.experts)
    )
    ours = {(t, e): int(slots[t, e]) % C for t, e in np.argwhere(slots < E * C).tolist()}
    assert ours == kept
    assert all(slots[t, e] // C == e for t, e in kept)
    expected = np.zeros((S, E))
    for t, e in kept:
        expected[t, e] = scores[t, e]
    np.testing.assert_allclose(weights, expected, rtol=1e-5)
    assert {(t, e) for t, e in np.argwhere(experts < E).tolist()} >= kept.keys()


@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
def test_in_training_the_k_s_largest_scores_of_a_group_win(name: str) -> None:
    decision = decide(ExpertRace(target_k=K, scores=name), jnp.zeros(G), True)
    for g in range(G):
        scores = in_float64(name, g)
        every = [(t, e) for t, e in np.ndindex(S, E) if VALID[g, t]]
        won = set(sorted(every, key=lambda at: -scores[at])[: K * VALID[g].sum()])
        assert_kept(decision, scores, g, won)
        wanted = np.asarray(decision.routing.experts[g]) < E
        assert {(t, e) for t, e in np.argwhere(wanted).tolist()} == won
        smallest = min((scores[at] for at in won), default=0.0)
        assert float(decision.sums["threshold"][g]) == pytest.approx(smallest, rel=1e-6)
    np.testing.assert_array_equal(decision.sums["groups"], [1, 1, 0])
    assert np.asarray(decision.routing.dropped).any()


def test_in_evaluation_every_score_wins_that_reaches_the_threshold() -> None:
    decision = decide(ExpertRace(target_k=K), jnp.full(G, 0.6), False)
    for g in range(G):
        scores = in_float64("sigmoid", g)
        won = {(t, e) for t, e in np.ndindex(S, E) if VALID[g, t] and scores[t, e] >= 0.6}
        assert_kept(decision, scores, g, won)


def test_an_expert_with_a_threshold_chooses_in_training_and_takes_what_reaches_it_later() -> None:
    router = ExpertChoice(threshold_rate=0.5)
    threshold = jnp.broadcast_to(jnp.array([0.2, 0.3, 0.4, 2.0]), (G, E))
    training, evaluation = (decide(router, threshold, train) for train in (True, False))
    for g in range(G):
        gates = in_float64("softmax", g)
        every = {(t, e) for t, e in np.ndindex(S, E) if VALID[g, t]}
        assert_kept(training, gates, g, every)
        reach = {(t, e) for t, e in every if gates[t, e] >= float(threshold[g, e])}
        assert_kept(evaluation, gates, g, reach)
        smallest = np.sort(gates[VALID[g]], axis=0)[-C:].min(0, initial=np.inf)
        expected = smallest if VALID[g].any() else np.zeros(E)
        np.testing.assert_allclose(training.sums["threshold"][g], expected, rtol=1e-5)


def test_the_threshold_is_the_mean_over_all_steps_and_then_an_exponential_one() -> None:
    router = ExpertRace(threshold_rate=0.4)
    state = router.initial_state(E)
    for total, groups, expected in ((0.6, 2, 0.3), (0.5, 1, 0.4), (0.8, 1, 0.56)):
        sums = {"threshold": jnp.array(total), "groups": jnp.array(groups)}
        state = router.next_state(state, sums)
        assert float(state["threshold"]) == pytest.approx(expected)


@pytest.mark.long_after(1)
@pytest.mark.parametrize(
    "router",
    [ExpertRace(capacity_factor=1.0), ExpertChoice(capacity_factor=1.0, threshold_rate=1.0)],
)
def test_with_room_in_evaluation_a_prediction_does_not_depend_on_the_other_images(
    router: AnyRouter,
) -> None:
    experts = [nnx.Linear(6, 6, rngs=nnx.Rngs(i)) for i in range(E)]
    gate = nnx.Linear(6, E, rngs=nnx.Rngs(9))
    layer = MoE(experts, gate, router)
    images = jax.random.normal(jax.random.key(1), (8, 5, 6))
    _, record = nnx.jit(MoE.forward)(layer, images, key=jax.random.key(0))
    nnx.jit(MoE.update_state)(layer, record)
    state, layer = layer.state, MoE(experts, gate, dataclasses.replace(router, capacity_factor=8.0))
    layer.state = state
    forward = nnx.jit(MoE.__call__)
    together = forward(layer, images)
    assert 0 < float((together == 0).all(-1).mean()) < 1  # some tokens have no expert
    np.testing.assert_allclose(forward(layer, images[3:4])[0], together[3], atol=1e-6)
