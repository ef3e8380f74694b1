"""Predictions of a model under changed routing; the oracles have other configs or parameters.

Models are run on batches of four images, the last one padded; the oracles on all six at once, in
the same groups of two. Most tests change one model, so that they share its compiled program, in the
implementation that compiles fastest.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.random_models import forward, random_images, random_params
from vmoe import models
from vmoe.analysis.collect import BlockRouting, Collected, collect, concatenate
from vmoe.analysis.compare import agreement, saturation
from vmoe.analysis.effects import (
    Removal,
    at_capacities,
    at_k,
    batch_dependence,
    removals,
    with_random_routers,
    without_experts,
)
from vmoe.analysis.interventions import ablated, masked, randomized
from vmoe.config import (
    BiasBalanced,
    ExpertChoice,
    Hash,
    MlpExpert,
    MoEConfig,
    Random,
    Router,
    TokenChoice,
    ViTConfig,
    replace,
)
from vmoe.data.pipeline import Batch
from vmoe.errors import UsageError
from vmoe.nn.vit import ViT
from vmoe.passes import in_batches
from vmoe.routing.priority import PRIORITIES

B, E = 6, 3


def config_of(*, depth: int = 2, **moe: Any) -> ViTConfig:
    """A model whose experts have too few slots; every block is sparse."""
    router = TokenChoice(k=1, capacity_factor=0.5, images_per_group=2)
    experts = MlpExpert(implementation="batched")
    layer = MoEConfig(num_experts=E, router=router, experts=experts)
    dense = models.model_config("vit_test", depth=depth)
    return replace(dense, sparse_blocks=tuple(range(depth)), moe=replace(layer, **moe))


def model_of(**fields: Any) -> ViT:
    config = config_of(**fields)
    return models.with_params(config, random_params(config))


def batches() -> Any:
    return in_batches(random_images(b=B), np.arange(B)[:, None] % 3, batch_size=4)


def logits_of(model: ViT) -> np.ndarray:
    return np.asarray(forward(model, random_images(b=B))[0])


def silenced(model: ViT, block: int, experts: list[int]) -> ViT:
    """The model with some experts whose parameters make every output zero."""
    params = jax.tree.map(np.array, models.params_of(model))
    for array in params["blocks"][block]["mlp"]["experts"]["down"].values():
        array[experts] = 0
    return models.with_params(model.config, jax.device_put(params))


@pytest.mark.slow
def test_every_expert_is_removed_in_both_ways() -> None:
    model, steps = model_of(), []
    which = removals(model.config)
    assert len(which) == len(set(which)) == 2 * E * 2
    result = without_experts(model, batches(), which, on_step=lambda: steps.append(1))
    assert len(steps) == 2 * len(which) and result.keys() == set(which)
    for block in (0, 1):
        expected = logits_of(silenced(model, block, [1]))
        np.testing.assert_allclose(result[Removal(block, 1, "ablated")], expected, atol=1e-5)
    decide = {1: masked(jnp.arange(E) != 1)}
    expected = jax.jit(lambda x: model.forward(x, decide=decide)[0])(random_images(b=B))
    np.testing.assert_allclose(result[Removal(1, 1, "masked")], expected, atol=1e-5)
    first = result[Removal(0, 0, "ablated")]
    assert np.abs(first - logits_of(model)).max() > 1e-3
    assert np.abs(first - result[Removal(0, 0, "masked")]).max() > 1e-3


@pytest.mark.slow
def test_logits_at_other_capacities_equal_a_model_with_that_capacity() -> None:
    model = model_of(router=dict(capacity=11), experts=MlpExpert())
    result = at_capacities(model, batches(), [0, 8], ["order", "largest_gate"])
    factors = dict(capacity_factor=1.0, eval_capacity_factor=2.0)  # of the same parameters
    other = models.with_params(
        config_of(router=factors, experts=MlpExpert()), models.params_of(model)
    )
    again = at_capacities(other, batches(), [0, 8], ["order", "largest_gate"])
    jax.tree.map(np.testing.assert_array_equal, again, result)
    assert list(result) == [(c, p) for c in (0, 8) for p in ("order", "largest_gate")]
    assert np.abs(result[8, "order"] - result[8, "largest_gate"]).max() > 1e-3
    for priority in ("order", "largest_gate"):
        config = config_of(router=dict(priority=priority))
        assert config.moe.slots(2 * 17) == 8
        other = models.with_params(config, models.params_of(model))
        np.testing.assert_allclose(result[8, priority], logits_of(other), atol=1e-5)
    nothing = silenced(silenced(model_of(), 0, [*range(E)]), 1, [*range(E)])
    np.testing.assert_allclose(result[0, "order"], logits_of(nothing), atol=1e-5)
    assert PRIORITIES[0] == "order"
    with pytest.raises(UsageError, match=r"slots=\[-1\]: use numbers from 0 on"):
        at_capacities(model, batches(), [-1])


def test_logits_at_another_k_equal_a_model_with_that_k() -> None:
    steps: list[int] = []
    result = at_k(model_of(), batches(), [1, 3], on_step=lambda: steps.append(1))
    assert list(result) == [1, 3] and len(steps) == 4
    np.testing.assert_allclose(result[1], logits_of(model_of()), atol=1e-5)
    np.testing.assert_allclose(result[3], logits_of(model_of(router=dict(k=3))), atol=1e-5)
    assert np.abs(result[1] - result[3]).max() > 1e-3
    with pytest.raises(UsageError, match="k=4"):
        at_k(model_of(), batches(), [4])
    with pytest.raises(UsageError, match="routing.k=1: router expert_choice has no k"):
        at_k(model_of(router=ExpertChoice()), batches(), [1])


def test_a_random_router_in_one_block_leaves_the_others_as_they_are() -> None:
    """The content of padding does not change the random logits."""
    model, images = model_of(), random_images(b=B)
    valid, other = np.arange(4) < 2, random_images(b=2)
    (whole,) = in_batches(images[:4], batch_size=4)
    padded = [
        Batch(np.concatenate([images[4:], x]), whole.labels, valid) for x in (0 * other, other)
    ]
    result = with_random_routers(model, iter([whole, *padded]), seed=1)
    own = logits_of(model)
    assert result.keys() == {0, 1}
    assert all(np.abs(logits[:B] - own).max() > 1e-3 for logits in result.values())
    np.testing.assert_allclose(result[0][4:B], result[0][B:], atol=1e-5)
    key = jax.random.split(jax.random.key(1), 2)[0]
    expected = jax.jit(lambda x: model.forward(x, decide={0: randomized(key)})[0])(images[:4])
    np.testing.assert_allclose(result[0][:4], expected, atol=1e-5)


def test_random_logits_are_given_only_to_routers_that_read_logits() -> None:
    assert with_random_routers(model_of(router=Hash()), batches()) == {}


def test_predictions_depend_on_the_batch_only_where_images_compete_for_slots() -> None:
    images = random_images(b=16)
    tight = dict(priority="order", capacity_factor=0.3)
    dependent = batch_dependence(model_of(depth=1, router=tight), images)
    assert dependent.changed > 0 and dependent.largest > 1e-2
    for independent in (
        tight | dict(images_per_group=1),
        dict(dropless=True),
    ):
        result = batch_dependence(model_of(depth=1, router=independent), images)
        assert result.changed == 0 and result.largest < 1e-4


def collected(model: ViT) -> Collected:
    return concatenate(collect(model, batches()))


def choosing_two() -> ViTConfig:
    return replace(config_of(router=dict(k=2, dropless=True)), pooling="mean")


def test_no_choice_of_a_model_with_fewer_experts_is_no_choice_of_the_other_s_expert() -> None:
    def chosen(e: int, expert: int) -> Collected:
        """One image of one token, which chose one expert; e is no choice."""
        experts, one = np.full((1, 1, 1), expert), np.ones((1, 1, 1), np.float32)
        block = BlockRouting(np.full((1, 1, e), 1 / e), experts, 0 * experts, one, np.zeros(1, int))
        return Collected(np.zeros((1, 2)), np.zeros((1, 1), int), {0: block}, one > 0, 0)

    assert saturation(chosen(8, 4), chosen(4, 4)) == {0: 0.0}
    assert saturation(chosen(8, 3), chosen(4, 3)) == {0: 1.0}


def test_a_model_agrees_with_itself_and_with_a_copy_whose_experts_are_renumbered() -> None:
    config = choosing_two()
    params = random_params(config)
    order = np.array([2, 0, 1])
    renumbered = jax.tree.map(lambda x: x, params)
    for block in renumbered["blocks"].values():
        layer = block["mlp"]
        layer["experts"] = jax.tree.map(lambda x: x[order], layer["experts"])
        layer["gate"] = {"kernel": layer["gate"]["kernel"][:, order]}
    one, same = (collected(models.with_params(config, each)) for each in (params, renumbered))
    np.testing.assert_allclose(one.logits, same.logits, atol=1e-5)
    assert saturation(one, one) == {0: 1.0, 1: 1.0}
    for result in agreement(one, same).values():
        np.testing.assert_array_equal(order[result.matches], np.arange(E))
        assert result.share == 1.0 > 0.8 > result.by_chance
    other = collected(models.with_params(config, random_params(config, seed=1)))
    for i, share in saturation(one, other).items():
        chosen = [
            [set(token) for image in each.blocks[i].experts for token in image.tolist()]
            for each in (one, other)
        ]
        expected = np.mean([len(a & b) / 2 for a, b in zip(*chosen, strict=True)])
        assert share == pytest.approx(expected)


@pytest.mark.long_after(1)
@pytest.mark.parametrize("router", [TokenChoice(k=2), BiasBalanced(), Random(), Hash()])
def test_first_choices_are_compared_by_rank_and_not_by_gate(router: Router) -> None:
    """A token's first choice in the only block does not depend on its number of choices."""
    two = config_of(depth=1, router=replace(router, dropless=True))
    one, params = replace(two, moe=dict(router=dict(k=1))), random_params(two)
    if isinstance(router, BiasBalanced):  # every token chooses the last expert first
        params["blocks"][0]["mlp"]["state"]["bias"] = jnp.array([0.0, 0.0, 10.0])
    first, second = (collected(models.with_params(config, params)) for config in (one, two))
    result = agreement(first, second)[0]
    np.testing.assert_array_equal(result.matches, np.arange(E))
    assert result.share == 1.0
    assert (result.by_chance == 1.0) == isinstance(router, BiasBalanced)
    chosen = second.blocks[0].experts[..., :1]
    expected = np.take_along_axis(second.blocks[0].gates, chosen, axis=-1)[..., 0]
    np.testing.assert_array_equal(second.blocks[0].priority, expected)


def test_experts_that_choose_are_compared_by_the_tokens_they_take() -> None:
    model = model_of(depth=1, router=ExpertChoice(capacity_factor=1.0))
    one = collected(model)
    other = collected(models.with_params(model.config, random_params(model.config, seed=1)))
    for i, share in saturation(one, other).items():
        taken = [each.blocks[i].experts < E for each in (one, other)]
        expected = sum(a & b for a, b in zip(*map(np.ravel, taken), strict=True)) / taken[0].sum()
        assert 0 < share < 1 and share == pytest.approx(expected)


def test_two_crops_are_compared_where_they_show_the_same() -> None:
    """The router sees a patch alone: without attention, and without positions."""
    config = choosing_two()
    params = random_params(config)
    params["positions"]["embedding"] *= 0
    for block in params["blocks"].values():
        block["attention"]["out"]["kernel"] *= 0
    model, p = models.with_params(config, params), config.patch_size
    side = config.image_size // p
    images = random_images((side + 1) * p, b=B)
    left, right = (
        concatenate(collect(model, in_batches(images[:, p:, x : x + side * p], batch_size=4)))
        for x in (0, p)
    )
    places = np.arange(side * side).reshape(side, side)
    common = places[:, 1:].ravel(), places[:, :-1].ravel()
    assert set(saturation(left, right, tokens=common).values()) == {1.0}
    assert max(saturation(left, right).values()) < 0.9
    for i, result in agreement(left, right, tokens=common).items():
        assert result.share == 1.0 > agreement(left, right)[i].share


def test_what_a_model_does_not_have_is_refused() -> None:
    config = choosing_two()
    model = models.with_params(config, random_params(config))
    with pytest.raises(UsageError, match="which=Removal.block=2, expert=0"):
        without_experts(model, batches(), [Removal(2, 0, "ablated")])
    with pytest.raises(
        UsageError, match=r"decide for blocks \[5\], which are not sparse: use any of"
    ):
        jax.eval_shape(
            lambda images: model.forward(images, decide={5: ablated(jnp.ones(E, bool))}),
            random_images(),
        )
    one = collected(model)
    with pytest.raises(UsageError, match="compare the same images in models with the same sparse"):
        agreement(one, one._replace(blocks={0: one.blocks[0]}))
