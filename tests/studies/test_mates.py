"""Batch-mates; the oracles are models with that capacity and priority, called group by group."""

from typing import Any

import jax
import numpy as np
import pytest

from tests.random_models import forward, random_images, random_params
from vmoe import models
from vmoe.config import (
    ExpertChoice,
    GShard,
    Hash,
    MoEConfig,
    Random,
    RoutingOverrides,
    Soft,
    Switch,
    TokenChoice,
    ViTConfig,
    replace,
)
from vmoe.errors import UsageError
from vmoe.nn.vit import ViT
from vmoe.studies.attack.config import AttackConfig, MatesConfig
from vmoe.studies.attack.mates import attack_mates, check_mates, draw_groups, measures
from vmoe.studies.attack.mates_program import Outcome, with_room

SIZE = 4
CONFIG = MatesConfig(victims=3, draws=4)
SMALL, LARGE = (AttackConfig(epsilon=epsilon, steps=1) for epsilon in (32.0, 64.0))
LABELS = (np.arange(12) % 10)[:, None]
TIGHT, ROOMY = (RoutingOverrides(capacity_factor=x, priority="order") for x in (0.25, 1.0))
IMMUNE = (RoutingOverrides(dropless=True), replace(TIGHT, images_per_group=1))


def model_of(depth: int = 1, **moe: Any) -> ViT:
    """A model all of whose blocks are sparse."""
    layer = MoEConfig(
        num_experts=3, router=TokenChoice(k=1, capacity_multiple=1, images_per_group=SIZE)
    )
    dense: ViTConfig = models.model_config("vit_test", depth=depth, pooling="mean", head_std=0.3)
    config = replace(dense, sparse_blocks=tuple(range(depth)), moe=replace(layer, **moe))
    return models.with_params(config, random_params(config))


def images() -> np.ndarray:
    return random_images(b=12)


@pytest.mark.slow
def test_the_worst_draw_equals_a_loop_that_calls_the_model_on_every_group() -> None:
    model, setting = model_of(2), RoutingOverrides(capacity_factor=0.5, priority="largest_gate")
    steps: list[None] = []
    result = attack_mates(
        model, images(), LABELS, setting, CONFIG, batch_size=20, on_step=lambda: steps.append(None)
    )
    own = model_of(2, router=dict(capacity_factor=0.5, priority="largest_gate"))
    groups = draw_groups(12, SIZE, CONFIG)
    right, drops = np.ones(3, bool), np.zeros(3)
    for victim, draw in np.ndindex(3, 4):
        assert groups[victim, draw, -1] == victim and len(set(groups[victim, draw])) == SIZE
        logits, records = forward(own, images()[groups[victim, draw]])
        assert result.drawn.predictions[victim, draw] == logits[-1].argmax()
        right[victim] &= logits[-1].argmax() == LABELS[victim, 0]
        dropped = [
            np.asarray(each.routing.dropped).reshape(SIZE, -1)[-1].mean()
            for each in records.values()
        ]
        drops[victim] = max(drops[victim], np.mean(dropped))
        loss = -jax.nn.log_softmax(logits[-1])[LABELS[victim, 0]]
        assert result.drawn.losses[victim, draw] == pytest.approx(float(loss), abs=1e-4)
    worst = measures(result.drawn, result.without, LABELS[:3], worst=True)
    assert worst["accuracy"] == right.mean() and worst["dropped"] == pytest.approx(drops.mean())
    assert worst["dropped"] > 0 and result.drawn.losses.std(1).min() > 1e-3
    assert len(steps) == 1 + 3  # 20 images are 5 groups: of 3, and of 12


@pytest.mark.long_after(1)
@pytest.mark.parametrize("immune", IMMUNE, ids=["dropless", "alone"])
def test_without_a_capacity_and_in_groups_of_one_no_mate_changes_anything(
    immune: RoutingOverrides,
) -> None:
    result = attack_mates(model_of(), images(), LABELS, immune, CONFIG, [LARGE], batch_size=20)
    for outcome in (result.drawn, *result.changed[0][:2]):
        same = [x.reshape(3, 1) for x in result.without]
        groups = [x.reshape(3, -1) for x in outcome]
        np.testing.assert_allclose(groups[0], same[0] + 0 * groups[0], atol=1e-5)
        assert (groups[1] == same[1]).all() and (groups[2] == same[2]).all()
    assert measures(result.drawn, result.without, LABELS[:3], worst=True)["changed"] == 0


def test_one_program_serves_all_settings_with_groups_of_one_size() -> None:
    model, by_gate = model_of(), replace(ROOMY, priority="largest_gate")
    first, *others = (with_room(model, each, 17, 0) for each in (TIGHT, ROOMY, by_gate, IMMUNE[0]))
    for roomy, routing in others:
        assert roomy.config == first[0].config and routing.slots != first[1].slots


@pytest.mark.slow
def test_optimized_mates_take_more_slots_than_mates_changed_at_random() -> None:
    model = model_of()
    model.blocks[0].mlp.gate.kernel[...] *= 0.3  # flat gates, so that the surrogate is smooth
    change = replace(SMALL, steps=20)
    result = attack_mates(model, images(), LABELS, ROOMY, CONFIG, [change], batch_size=20)
    (changed,) = result.changed
    assert (changed.surrogate[:, 1] > changed.surrogate[:, 0]).all()
    assert changed.optimized.dropped.mean() > changed.control.dropped.mean()
    assert changed.optimized.dropped.mean() > result.drawn.dropped[:, 0].mean()


@pytest.mark.slow
def test_the_size_of_a_batch_changes_no_result_at_any_epsilon() -> None:
    small, large = (
        attack_mates(model_of(), images(), LABELS, ROOMY, CONFIG, [SMALL, LARGE], batch_size=size)
        for size in (4, 20)
    )
    for one, other in zip(jax.tree.leaves(small), jax.tree.leaves(large), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_victim_is_right_with_any_of_its_labels_and_needs_one() -> None:
    labels = np.array([[3, 7], [2, -1]])
    outcome = Outcome(*(np.zeros((2, 2)), np.array([[7, 3], [2, 7]]), np.zeros((2, 2))))
    without = Outcome(*(x[:, 0] for x in outcome))
    found = measures(outcome, without, labels)
    assert (found["accuracy"], found["standard_error"]) == (0.75, 0.25)  # 1 and 0.5
    with pytest.raises(UsageError, match="labels: a victim has none"):
        attack_mates(model_of(), images(), LABELS - 1, TIGHT, CONFIG)


def test_the_first_image_of_a_group_loses_no_first_choice_by_order() -> None:
    first = MatesConfig(victims=3, draws=4, index=0)
    result = attack_mates(model_of(), images(), LABELS, TIGHT, first, batch_size=20)
    np.testing.assert_array_equal(
        result.drawn.dropped, np.repeat(result.without.dropped[:, None], 4, 1)
    )


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        (dict(router=ExpertChoice()), "router expert_choice drops no choice"),
        (dict(router=Soft()), "router soft routes each image alone"),
        (dict(router=Switch()), "router.kind=switch .*are compared for token_choice"),
        (dict(router=GShard()), "router.kind=gshard .*are compared for token_choice"),
        (dict(router=Random()), "router random reads no pixels: no mate can attack"),
        (dict(router=Hash()), "router hash reads no pixels: no mate can attack"),
        (dict(router=dict(images_per_group=1)), "images_per_group=1: an image has no mates"),
    ],
)
def test_models_without_mates_are_refused(moe: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_mates(model_of(**moe))


def test_bad_input_is_refused() -> None:
    for fields, message in (
        (dict(victims=0), "mates.victims=0: use at least 1"),
        (dict(priority=()), "mates.priority=.*: give at least one"),
        (dict(capacity_factor=(0.0,)), "mates.capacity_factor=.*: use more than 0"),
    ):
        with pytest.raises(UsageError, match=message):
            MatesConfig(**fields)  # ty: ignore
    with pytest.raises(UsageError, match="mates.index=4: use 0 to 3"):
        draw_groups(12, SIZE, MatesConfig(victims=3, index=4))
    with pytest.raises(UsageError, match="images=5: 6 victims in groups of 4 need at least 6"):
        draw_groups(5, SIZE, MatesConfig(victims=6))
