"""Assignment by one sort equals a loop and a one-hot cumulative sum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from tests.oracles import one_hot_slots, queue_by_loop
from vmoe.axes import RouterInputs, Routing
from vmoe.config import TokenChoice
from vmoe.errors import UsageError
from vmoe.routing import token_choice
from vmoe.routing.overflow import Overflow
from vmoe.routing.priority import descending

PRIORITIES = ("order", "largest_gate", "sum_of_gates")


@functools.partial(jax.jit, static_argnames=("k", "c", "priority", "normalize", "overflow"))
def assign(gates: jax.Array, valid: jax.Array, **settings: object) -> Routing:
    return token_choice.assign(gates, valid, **settings)


def random_gates(seed: int, g: int, s: int, e: int, ties: bool) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if ties:  # few distinct values, so that nearly every comparison is a tie
        return rng.integers(1, 4, size=(g, s, e)).astype(np.float32) / 4
    return softmax(rng.normal(size=(g, s, e)).astype(np.float32) * 2, axis=-1)


def order_of(gates: np.ndarray, k: int, priority: str) -> np.ndarray:
    top = -np.sort(-gates, axis=1)[:, :k]
    score = {
        "order": np.zeros(len(gates), np.float32),
        "largest_gate": top[:, 0],
        "sum_of_gates": top.sum(1, dtype=np.float32),
    }[priority]
    return np.argsort(-score, kind="stable")


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize(
    ("s", "e", "k", "c", "priority"),
    [
        *((40, 16, 3, 4, priority) for priority in PRIORITIES),
        (1, 1, 1, 1, "order"),
        (13, 4, 2, 5, "sum_of_gates"),
        (40, 64, 2, 2, "largest_gate"),
        (9, 2, 2, 9, "largest_gate"),
    ],
)
def test_assignments_equal_a_loop_and_a_one_hot_cumulative_sum(
    s: int, e: int, k: int, c: int, priority: str, ties: bool
) -> None:
    for seed in range(3):
        gates = random_gates(seed, 2, s, e, ties)
        routing = assign(jnp.asarray(gates), jnp.ones((2, s), bool), k=k, c=c, priority=priority)
        for g in range(2):
            order = order_of(gates[g], k, priority)
            kept = queue_by_loop(gates[g], np.ones(s, bool), k=k, c=c, order=order)
            slots_of_choices = np.asarray(routing.slots[g])
            ours = {(t, r): divmod(int(slots_of_choices[t, r]), c) for t, r in np.ndindex(s, k)}
            ours = {choice: at for choice, at in ours.items() if at[0] < e}
            assert ours == kept
            slots = np.full((s, e), -1)
            for (token, _), (expert, position) in kept.items():
                slots[token, expert] = position
            np.testing.assert_array_equal(slots, one_hot_slots(gates[g], k=k, c=c, order=order))


@pytest.mark.parametrize("priority", PRIORITIES)
def test_padding_anywhere_in_a_group_takes_no_slot(priority: str) -> None:
    gates = random_gates(7, 2, 40, 16, ties=False)
    valid = np.random.default_rng(1).random((2, 40)) < 0.6
    routing = assign(jnp.asarray(gates), jnp.asarray(valid), k=3, c=4, priority=priority)
    kept = np.asarray(routing.kept)
    for g in range(2):
        order = order_of(gates[g], 3, priority)
        expected = queue_by_loop(gates[g], valid[g], k=3, c=4, order=order)
        assert {(t, r) for t, r in np.argwhere(kept[g]).tolist()} == set(expected)


@pytest.mark.parametrize("priority", ["order", "largest_gate"])
@pytest.mark.parametrize(("e", "k", "c"), [(16, 3, 4), (4, 2, 22), (5, 1, 3), (3, 3, 5)])
def test_overflow_to_the_next_expert_equals_a_loop_over_all_ranks_and_tokens(
    e: int, k: int, c: int, priority: str
) -> None:
    """In order of priority, a token with fewer than k slots takes one at its expert of the rank."""
    for seed in range(3):
        gates, valid = random_gates(seed, 2, 40, e, ties=False), np.arange(40) % 7 > 0
        gates[:, 3, 1:], gates[:, 3, 0] = 0.0, 1.0  # all other experts are masked for this token
        routing = assign(
            jnp.asarray(gates),
            jnp.stack([valid, valid]),
            k=k,
            c=c,
            priority=priority,
            normalize=True,
            overflow="next_expert",
        )
        for g in range(2):
            ranked, free = np.argsort(-gates[g], axis=1, kind="stable"), [c] * e
            expected: dict[int, dict[int, int]] = {token: {} for token in range(40)}
            for rank in range(e):
                for token in order_of(gates[g], k, priority):
                    expert, own = ranked[token, rank], expected[token]
                    masked = rank >= k and gates[g, token, expert] == 0
                    if valid[token] and len(own) < k and free[expert] and not masked:
                        own[int(expert)] = c - free[expert]
                        free[expert] -= 1
            slots, weights = (np.asarray(x[g]) for x in (routing.slots, routing.weights))
            for token, own in expected.items():
                kept = slots[token] < e * c
                assert dict(divmod(slot, c) for slot in slots[token][kept].tolist()) == own
                experts = np.asarray(routing.experts[g, token])
                all_gates = gates[g, token, np.minimum(experts, e - 1)]
                np.testing.assert_allclose(
                    weights[token], kept * all_gates / all_gates.sum(), rtol=1e-6
                )
            in_slots = np.asarray(routing.choices[g]).reshape(-1)
            filled = np.flatnonzero(in_slots < 40 * k)
            np.testing.assert_array_equal(slots.reshape(-1)[in_slots[filled]], filled)
            assert len(filled) == sum(len(own) for own in expected.values())


@pytest.mark.parametrize("overflow", ["drop", "next_expert"])
def test_experts_have_slots_by_their_shares(overflow: Overflow) -> None:
    """MoE++ (equation 8): tau k s / (tau + tau + 1) slots, and k s / (tau + tau + 1) for a zero."""
    tau, s, k = 0.75, 40, 1
    router = TokenChoice(k=k, shares=(tau, tau, 1.0), overflow=overflow, capacity_factor=1.0)
    c = router.slots(s, 3)
    assert c == k * s / (2 * tau + 1)
    limits = [12, 12, 16]
    gates = random_gates(0, 1, s, 3, ties=False)
    inputs = RouterInputs(jnp.log(gates), None, jnp.ones((1, s), bool), None)
    routing = jax.jit(lambda inputs: router(inputs, c).routing)(inputs)
    ranked, free, expected = np.argsort(-gates[0], axis=1), list(limits), set()
    for rank in range(3 if overflow == "next_expert" else k):
        for token in range(s):
            expert = int(ranked[token, rank])
            if free[expert] and sum(t == token for t, *_ in expected) < k:
                expected.add((token, expert, limits[expert] - free[expert]))
                free[expert] -= 1
    slots = np.asarray(routing.slots[0])
    ours = {(t, *divmod(int(slots[t, r]), c)) for t, r in np.ndindex(s, k) if slots[t, r] < 3 * c}
    assert ours == expected and 0 in free
    filled = np.asarray(routing.choices[0]) < s * k
    assert filled.sum(1).tolist() == [
        limit - left for limit, left in zip(limits, free, strict=True)
    ]


def test_batch_priority_equals_a_hand_computed_example() -> None:
    gates = jnp.array([[[0.6, 0.4], [0.9, 0.1], [0.7, 0.3], [0.2, 0.8]]])
    valid = jnp.ones((1, 4), bool)
    first = assign(gates, valid, k=1, c=2, priority="order")
    np.testing.assert_array_equal(first.slots[0, :, 0], [0, 1, 4, 2])  # token 2 comes too late
    best = assign(gates, valid, k=1, c=2, priority="largest_gate")
    np.testing.assert_array_equal(best.slots[0, :, 0], [4, 0, 1, 2])  # token 0 matters least
    np.testing.assert_array_equal(best.tokens[0], [[1, 2], [3, 4]])
    np.testing.assert_allclose(best.weights[0, :, 0], [0, 0.9, 0.7, 0.8])


def test_combine_weights_are_the_gates_optionally_normalized_before_drops() -> None:
    gates = jnp.array([[[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]]])
    valid = jnp.ones((1, 2), bool)
    plain = assign(gates, valid, k=2, c=1)
    np.testing.assert_allclose(plain.weights[0], [[0.5, 0.3], [0, 0]])
    normalized = assign(gates, valid, k=2, c=1, normalize=True)
    np.testing.assert_allclose(normalized.weights[0], [[0.625, 0.375], [0, 0]])


def test_random_priority_depends_only_on_its_draw() -> None:
    gates = jnp.asarray(random_gates(0, 1, 64, 4, ties=False))
    valid = jnp.ones((1, 64), bool)
    by_draw = functools.partial(assign, gates, valid, k=1, c=4, priority="random")
    one, same, other = (
        by_draw(draw=jax.random.uniform(jax.random.key(seed), (1, 64))) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one.slots, same.slots)
    assert (one.slots != other.slots).any()
    np.testing.assert_array_equal(by_draw(draw=None).slots, by_draw(draw=None).slots)


def test_an_unknown_priority_is_refused_by_name() -> None:
    gates, valid = jnp.ones((1, 4, 2)), jnp.ones((1, 4), bool)
    with pytest.raises(UsageError, match="'largest_gates': did you mean 'largest_gate'"):
        assign(gates, valid, k=1, c=2, priority="largest_gates")


def test_a_group_too_large_for_the_sort_key_is_refused() -> None:
    gates = jax.ShapeDtypeStruct((1, 2**21, 1024), jnp.float32)
    valid = jax.ShapeDtypeStruct((1, 2**21), bool)
    with pytest.raises(UsageError, match="lower images_per_group"):
        jax.eval_shape(lambda g, v: token_choice.assign(g, v, k=2, c=4), gates, valid)


@pytest.mark.parametrize("s", [1, 2, 700, 70_000])
def test_the_priority_order_equals_a_stable_sort(s: int) -> None:
    rng = np.random.default_rng(s)
    scores = rng.random(s).astype(np.float32)
    scores[rng.random(s) < 0.3] = 0.25  # ties
    scores[rng.random(s) < 0.1] = 0.0
    close = rng.random(s) < 0.2  # equal in the upper half of their bits
    scores[close] = np.nextafter(np.float32(0.5), np.float32(1), dtype=np.float32)
    expected = np.argsort(-scores, kind="stable")
    np.testing.assert_array_equal(jax.jit(descending)(scores), expected)
