"""Capacities of each router, compared with hand-computed numbers."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from vmoe.config import (
    ExpertChoice,
    MoEConfig,
    RoutingOverrides,
    Soft,
    TokenChoice,
    ViTConfig,
    replace,
)
from vmoe.config.routing_file import LayerSetting
from vmoe.errors import UsageError
from vmoe.nn.moe import MoE


@pytest.mark.parametrize(
    ("s", "e", "k", "factor", "expected"),
    [
        (400, 4, 2, 1.1, 224),  # 220.00000000000003 rounds up to 221, then to a multiple of 4
        (34, 4, 2, 0.5, 12),
        (130, 8, 2, 1.05, 36),
        (8, 8, 1, 1.0, 4),
        (100, 8, 2, 100.0, 100),  # no expert can hold more than all tokens
    ],
)
def test_capacity_is_rounded_up_and_then_to_a_multiple_of_four(
    s: int, e: int, k: int, factor: float, expected: int
) -> None:
    config = MoEConfig(num_experts=e, router=TokenChoice(k=k, capacity_factor=factor))
    assert config.slots(s) == expected


def test_capacity_rounding_and_its_multiple_can_be_configured() -> None:
    def slots(s: int, **fields: object) -> int:
        return TokenChoice(k=1, capacity_factor=1.0, **fields).slots(s, e=2)

    assert [slots(s, capacity_rounding="round", capacity_multiple=1) for s in (3, 5, 7)] == [
        2,
        2,
        4,
    ]
    assert [slots(s, capacity_rounding="ceil", capacity_multiple=1) for s in (3, 5, 7)] == [2, 3, 4]
    assert slots(100, capacity=7) == 7


def test_a_capacity_below_one_slot_is_refused_with_a_remedy() -> None:
    config = MoEConfig(
        num_experts=8, router=TokenChoice(k=1, capacity_factor=0.1, capacity_rounding="round")
    )
    with pytest.raises(UsageError, match="capacity_factor=0.1: this leaves 0.0125 slots.*raise it"):
        config.slots(1)


def test_a_capacity_of_evaluation_below_one_slot_is_refused_by_its_own_name() -> None:
    router = TokenChoice(k=1, eval_capacity_factor=0.1, capacity_rounding="round")
    with pytest.raises(UsageError, match="router.eval_capacity_factor=0.1: this leaves 0.0125"):
        MoEConfig(num_experts=8, router=router).slots(1)


def test_expert_choice_has_no_k_and_never_more_slots_than_tokens() -> None:
    config = MoEConfig(num_experts=4, router=ExpertChoice(capacity_factor=1.0))
    assert [config.slots(s) for s in (34, 16, 2)] == [12, 4, 2]


def test_soft_slots_are_rounded_to_the_nearest_number_and_at_least_one() -> None:
    config = MoEConfig(num_experts=8, router=Soft(capacity_factor=1.0))
    assert [config.slots(s) for s in (196, 50, 3)] == [24, 6, 1]


def test_the_capacity_of_evaluation_may_be_another_one() -> None:
    """A layer evaluates without a key; an override in evaluation takes the place of both."""
    router = TokenChoice(capacity_factor=1.0, eval_capacity_factor=2.0, capacity_multiple=1)
    moe = MoEConfig(num_experts=4, router=router)
    layer = MoE.from_config(moe, 8, 8, 10, rngs=nnx.Rngs(0))
    for key, slots in ((jax.random.key(0), 10), (None, 20)):
        shapes = jax.eval_shape(lambda key: layer.forward(jnp.ones((2, 10, 8)), key=key)[1], key)
        assert shapes.routing.choices.shape == (1, 4, slots)
    assert moe.slots(20) == 20
    trained = ViTConfig(sparse_blocks=(1,), moe=moe)
    for override, slots in (
        (dict(capacity_factor=0.5), 5),
        (dict(capacity=3), 3),
        (dict(dropless=True), 20),
        (dict(k=1), 10),
    ):
        assert RoutingOverrides(**override).apply(trained).moe.slots(20) == slots
    chosen = LayerSetting(k=1, capacity_factor=0.4, priority="order").apply(moe)
    assert chosen.slots(20) == 2


def test_two_capacities_that_cannot_both_hold_are_refused() -> None:
    router = TokenChoice(eval_capacity_factor=2.0)
    for other in (dict(capacity=3), dict(dropless=True)):
        with pytest.raises(UsageError, match="eval_capacity_factor=2.0: give one of them"):
            replace(router, **other)
