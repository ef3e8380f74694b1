"""Decisions instead of a router's; the oracles are models with other configs or parameters."""

from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.random_models import forward, random_images, random_params
from tests.routers import grouped
from vmoe import models
from vmoe.analysis import capture
from vmoe.analysis.effects import can_be_limited
from vmoe.analysis.interventions import ablated, limited, masked, randomized
from vmoe.axes import Decision, Route, RouterInputs
from vmoe.config import (
    AnyRouter,
    BiasBalanced,
    ExpertChoice,
    ExpertRace,
    MoEConfig,
    Router,
    Soft,
    TokenChoice,
    Transport,
    ViTConfig,
    replace,
)
from vmoe.errors import UsageError
from vmoe.routing.priority import Priority
from vmoe.surgery.experts import prune_experts

E = 4
ROUTERS: dict[str, Router] = {
    "token_choice": TokenChoice(normalize_weights=True),
    "expert_choice": ExpertChoice(),
    "soft": Soft(),
}
SLOTS = {"token_choice": dict(capacity=20), "expert_choice": dict(capacity=20), "soft": {}}
each_router = pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS.keys())


def config_of(router: AnyRouter, **moe: Any) -> ViTConfig:
    per_group = 1 if isinstance(router, Soft) else 2
    layer = MoEConfig(num_experts=E, router=grouped(router, per_group))
    dense = models.model_config("vit_test", depth=1, pooling="mean")
    return replace(dense, sparse_blocks=(0,), moe=replace(layer, **moe))


def decided(config: ViTConfig, params: dict[Any, Any], by: Callable[[Any], Route], *of: Any) -> Any:
    """The logits and the records with other decisions, ``by(each)`` for each of ``of``."""

    @jax.jit
    def run(params: dict[Any, Any], each: Any) -> Any:
        model = models.with_params(config, params)
        return capture(model, random_images(b=4), decide={0: by(each)})

    return [run(params, each) for each in of]


@pytest.mark.long_after(1)
@pytest.mark.parametrize(
    ("normalize", "settings"),
    [
        (False, [(6, priority) for priority in get_args(Priority)]),
        (True, [(1, "largest_gate"), (20, "order")]),
    ],
)
def test_limited_slots_equal_a_router_of_that_capacity_for_every_priority(
    normalize: bool, settings: list[tuple[int, Priority]]
) -> None:
    """One program for all of them. Without any slot every choice is dropped."""
    router, s, c = TokenChoice(normalize_weights=normalize), 34, 20
    logits = np.random.default_rng(0).normal(size=(2, s, E)).astype(np.float32)
    inputs = RouterInputs(jnp.asarray(logits), None, jnp.arange(s) < jnp.array([[s], [30]]), None)

    @jax.jit
    def run(slots: jax.Array, priority: jax.Array) -> Decision:
        return limited(slots, priority)(inputs, router, c)

    for slots, priority in settings:
        other = replace(router, priority=priority)
        expected = jax.jit(other, static_argnums=1)(inputs, slots)
        own = run(jnp.int32(slots), jnp.int32(get_args(Priority).index(priority)))
        np.testing.assert_allclose(own.gates, expected.gates, rtol=1e-5)
        np.testing.assert_allclose(own.routing.weights, expected.routing.weights, rtol=1e-5)
        np.testing.assert_array_equal(own.routing.kept, expected.routing.kept)
        np.testing.assert_array_equal(own.routing.experts, expected.routing.experts)
        ours, theirs = own.routing.choices[..., :slots], expected.routing.choices
        np.testing.assert_array_equal(ours, theirs)
    assert not run(jnp.int32(0), jnp.int32(0)).routing.kept.any()


@pytest.mark.long_after(1)
@pytest.mark.parametrize("router", [BiasBalanced(k=3), BiasBalanced(k=3, normalize_weights=True)])
def test_limited_experts_per_token_equal_a_router_of_that_k(router: Router) -> None:
    s, c = 34, 20
    rng = np.random.default_rng(0)
    inputs = RouterInputs(
        logits=jnp.asarray(rng.normal(size=(2, s, E)), jnp.float32),
        noise=None,
        valid=jnp.arange(s) < jnp.array([[s], [30]]),
        draw=None,
        positions=jnp.broadcast_to(jnp.arange(s), (2, s)),
        state={"bias": jnp.asarray(rng.normal(size=(2, E)), jnp.float32)},
    )
    run = jax.jit(lambda slots, k: limited(slots, jnp.int32(0), k)(inputs, router, c))
    for slots, k in ((6, 1), (20, 2), (9, 3)):
        expected = jax.jit(replace(router, k=k), static_argnums=1)(inputs, slots).routing
        own = run(jnp.int32(slots), jnp.int32(k)).routing
        np.testing.assert_array_equal(own.kept[..., :k], expected.kept)
        np.testing.assert_array_equal(own.experts[..., :k], expected.experts)
        np.testing.assert_allclose(own.weights[..., :k], expected.weights, rtol=1e-5)
        assert not own.kept[..., k:].any()


@pytest.mark.long_after(1)
@each_router
def test_an_ablated_expert_equals_one_whose_output_is_zero(router: Router) -> None:
    config = config_of(replace(router, **SLOTS[router.kind]))
    params = random_params(config)
    ((logits, records),) = decided(config, params, ablated, np.arange(E) != 2)
    changed = jax.tree.map(lambda x: x, params)
    down = changed["blocks"][0]["mlp"]["experts"]["down"]
    down |= {name: array.at[2].set(0.0) for name, array in down.items()}
    expected, _ = forward(models.with_params(config, changed), random_images(b=4))
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    before = forward(models.with_params(config, params), random_images(b=4))
    assert np.abs(logits - before[0]).max() > 1e-3
    if not isinstance(router, Soft):  # its tokens still take slots
        np.testing.assert_array_equal(records[0].routing.choices, before[1][0].routing.choices)


@pytest.mark.long_after(1)
@each_router
def test_among_some_experts_a_router_decides_as_if_the_others_were_pruned(router: Router) -> None:
    config = config_of(replace(router, **SLOTS[router.kind]))
    params = random_params(config)
    ((logits, records),) = decided(config, params, masked, np.arange(E) != 1)
    np.testing.assert_array_equal(records[0].gates[..., 1], 0)
    if isinstance(router, Soft):  # surgery does not prune soft routers
        combine = forward(models.with_params(config, params), random_images(b=4))[1][0]
        others = np.delete(combine.routing.combine, 1, axis=2)
        expected = others / others.sum((2, 3), keepdims=True)
        ours = np.delete(records[0].routing.combine, 1, axis=2)
        np.testing.assert_allclose(ours, expected, rtol=1e-4)
        return
    pruned = prune_experts(config, params, {0: (0, 2, 3)})
    expected, _ = forward(models.with_params(*pruned), random_images(b=4))
    np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("scores", ["sigmoid", "softmax"])
def test_no_bias_lifts_a_masked_expert(scores: Any) -> None:
    router = BiasBalanced(k=2, scores=scores, normalize_weights=True)
    logits = jax.random.normal(jax.random.key(0), (1, 8, E))
    state = {"bias": jnp.array([[0.9, 0.0, 0.1, -0.1]])}
    inputs = RouterInputs(logits, None, jnp.ones((1, 8), bool), None, state=state)
    free = router(inputs, 8)
    assert (free.routing.experts[..., 0] == 0).mean() > 0.5  # the bias chooses expert 0
    for choosable in (jnp.arange(E) != 0, jnp.arange(E) == 2):
        routing = masked(choosable)(inputs, router, 8).routing
        weight_of_masked = np.where(choosable[routing.experts], 0, routing.weights)
        np.testing.assert_allclose(weight_of_masked, 0, atol=1e-12)
        np.testing.assert_allclose(routing.weights.sum(-1), 1, rtol=1e-6)
    assert not (masked(jnp.arange(E) != 0)(inputs, router, 8).routing.experts == 0).any()


def test_a_random_router_depends_on_its_key_and_draws_with_the_standard_deviation_of_the_gate() -> (
    None
):
    config = config_of(TokenChoice(dropless=True))
    params = random_params(config)
    keys = map(jax.random.key, (1, 1, 2))
    one, same, other = (records[0] for _, records in decided(config, params, randomized, *keys))
    np.testing.assert_array_equal(one.routing.experts, same.routing.experts)
    assert (one.routing.experts != other.routing.experts).mean() > 0.5
    own = forward(models.with_params(config, params), random_images(b=4))[1][0]
    np.testing.assert_array_equal(one.logits, own.logits)  # of the gate
    assert np.log(np.asarray(one.gates)).std() == pytest.approx(
        np.log(np.asarray(own.gates)).std(), rel=0.3
    )


@pytest.mark.parametrize(
    "router",
    [
        *(ExpertChoice(), ExpertRace(), Transport(), TokenChoice(overflow="next_expert")),
        TokenChoice(shares=(0.5, *[1.0] * (E - 1))),
    ],
)
def test_slots_cannot_be_limited_if_a_choice_depends_on_them(router: AnyRouter) -> None:
    config = config_of(router)
    assert not can_be_limited(config)
    with pytest.raises(
        UsageError, match=f"router.kind={router.kind} .*are compared for token_choice"
    ):
        decided(config, random_params(config), lambda slots: limited(slots, jnp.int32(0)), 1)
