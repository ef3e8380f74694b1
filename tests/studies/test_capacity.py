"""Search of routing settings; the oracles are exhaustive search, and models with other configs."""

import itertools
from typing import Any

import jax
import numpy as np
import pytest

from tests.random_models import outputs, random_images, random_params
from vmoe import models
from vmoe.config import (
    ExpertChoice,
    GShard,
    Hash,
    MoEConfig,
    Random,
    Switch,
    TokenChoice,
    ViTConfig,
    replace,
)
from vmoe.config.routing_file import LayerSetting
from vmoe.costs.flops import flops_to_logits
from vmoe.data.pipeline import Batch
from vmoe.errors import Failure, UsageError
from vmoe.nn.vit import ViT
from vmoe.studies.capacity.costs import Costs, flops_costs, time_costs
from vmoe.studies.capacity.scores import SHARPNESS, Scores
from vmoe.studies.capacity.search import Search
from vmoe.studies.capacity.settings import check_layers, levels_of, with_setting

B = 8
LABELS = np.stack([np.arange(B) % 10, np.full(B, -1)], axis=1)


def config_of(*second: dict[str, Any], **moe: Any) -> ViTConfig:
    """Both sparse blocks are the same, unless fields of the second one are given."""
    layer = replace(MoEConfig(num_experts=3, router=TokenChoice(k=1, images_per_group=2)), **moe)
    dense = models.model_config("vit_test", depth=2)
    other = [replace(layer, **fields) for fields in second]
    return replace(dense, sparse_blocks=(0, 1), moe=(layer, *other) if other else layer)


def model_of(config: ViTConfig) -> ViT:
    return models.with_params(config, random_params(config))


def batches() -> list[Batch]:
    """The last image of the second batch is padding."""
    parts = [slice(0, 4), slice(4, 8)]
    valid = np.arange(B) < B - 1
    return [Batch(random_images(b=B)[part], LABELS[part], valid[part]) for part in parts]


@pytest.mark.slow
@pytest.mark.parametrize(
    "layers",
    [
        config_of(),
        config_of(router=dict(capacity=10)),
        config_of(dict(num_experts=4, router=dict(capacity=8))),
    ],
    ids=["capacity factor", "capacity", "blocks that differ"],
)
def test_the_search_finds_what_an_exhaustive_one_finds(layers: ViTConfig) -> None:
    config = replace(layers, pooling="mean")
    levels, model = levels_of(config), model_of(config)
    measured: list[int] = []
    scores = Scores(model, batches(), levels, on_step=lambda: measured.append(1))
    costs = flops_costs(config, levels)
    search = Search(scores, costs, levels)
    budgets = [costs.least + share * (1 - costs.least) for share in (1.0, 0.75, 0.5, 0.25)]
    found = {budget: search.best(budget) for budget in budgets}
    uniform = {budget: search.uniform(budget) for budget in budgets}
    every = [[own for level in of_block for own in level.values()] for of_block in levels]
    pairs = list(itertools.product(*every))
    assert len(measured) < len(pairs) / 2
    for budget in budgets:
        within = [pair for pair in pairs if costs.of(pair) <= budget + 1e-9]
        best = min(scores.of(pair).divergence for pair in within)
        assert scores.of(found[budget]).divergence == best
        same = [pair for pair in within if pair[0] == pair[1]]
        expected = min(same, key=lambda pair: scores.of(pair).divergence, default=None)
        assert uniform[budget] == expected
    assert len(set(found.values())) == len(budgets)
    assert search.uniform(0.5) is None


def test_budgets_out_of_reach_are_refused_with_the_smallest_one() -> None:
    costs = Costs(({(1, 0.1): -0.2, (1, 0.5): -0.1}, {(1, 0.1): -0.1509, (1, 0.5): 0.0}))
    costs.check(0.65)
    with pytest.raises(UsageError, match=r"budget=0.6: the smallest that can be reached is 0.65x"):
        costs.check(0.6)


@pytest.mark.long_after(1)
@pytest.mark.parametrize(
    "fields", [{}, dict(pooling="mean"), dict(moe=dict(router=dict(dropless=True)))], ids=str
)
def test_the_cost_of_a_setting_is_the_flops_of_the_model_with_it(fields: dict[str, Any]) -> None:
    """With a class token, little is computed after a sparse last block routed."""
    config = replace(config_of(), **fields)
    levels = levels_of(config)
    costs = flops_costs(config, levels)
    assert levels[0] == levels[1]
    as_trained = flops_to_logits(config)
    cheap, dear = levels[0][0][1, "order"], levels[0][-1][2, "sum_of_gates"]
    for setting in ((cheap, dear), (dear, cheap)):
        whole = flops_to_logits(with_setting(config, setting)) / as_trained
        assert costs.of(setting) == pytest.approx(whole, abs=1e-12)
    assert costs.of((cheap, cheap)) == pytest.approx(costs.least) and costs.least < 1


def test_a_model_with_nan_logits_has_no_scores() -> None:
    config = config_of()
    broken = model_of(config)
    broken.head.classes.bias[...] = np.full(10, np.nan, np.float32)
    with pytest.raises(Failure, match="images have logits that are NaN or infinite"):
        Scores(broken, batches(), levels_of(config))


@pytest.mark.slow
def test_scores_equal_models_with_these_settings() -> None:
    """Numbers of slots, k and priority are traced in one program, but fixed in these models."""
    config = config_of(router=dict(k=2, capacity_multiple=1))
    model, levels = model_of(config), levels_of(config)
    scores = Scores(model, batches(), levels)
    labels = LABELS[:-1, 0]

    def logits(model: ViT) -> np.ndarray:
        run = jax.jit(lambda images, valid: model.forward(images, valid=valid)[0])
        return np.concatenate([np.asarray(run(x, valid)) for x, _, valid in batches()])[:-1]

    before = np.asarray(jax.nn.log_softmax(SHARPNESS * logits(model)))
    assert scores.trained == (before.argmax(-1) == labels).mean()
    a, b, c = (
        levels[0][i][option]
        for i, option in ((0, (1, "largest_gate")), (4, (2, "sum_of_gates")), (-1, (3, "order")))
    )
    for setting in ((a, b), (c, a)):
        params = models.params_of(model)
        own = logits(models.with_params(with_setting(config, setting), params))
        after = np.asarray(jax.nn.log_softmax(SHARPNESS * own))
        score = scores.of(setting)
        assert score.accuracy == pytest.approx((own.argmax(-1) == labels).mean())
        expected = (np.exp(before) * (before - after)).sum(-1).mean()
        assert score.divergence == pytest.approx(expected, rel=1e-3)


ODD = dict(router=dict(k=2, capacity_multiple=1))  # 34 tokens, 24 slots
ROUND = dict(router=dict(capacity_rounding="round"))


@pytest.mark.parametrize(
    ("fields", "slots"),
    [
        (ODD, [1, 4, 7, 10, 13, 15, 18, 21, 24]),
        (dict(router=ODD["router"] | ROUND["router"]), [1, 4, 7, 10, 13, 15, 18, 21, 24]),
        ({}, [4, 8, 12]),
        (dict(router=dict(capacity=12)), [4, 8, 12]),
        (dict(router=dict(capacity=10)), [4, 8, 12]),
        (dict(router=dict(capacity=3)), [4]),
        (dict(router=dict(k=3, capacity=36)), [4, 8, 12, 16, 20, 24, 28, 32, 34]),
        (
            dict(num_experts=11, router=dict(k=3, capacity=11, capacity_multiple=1)),
            [1, 2, 3, 5, 6, 7, 9, 10, 11],
        ),
        (dict(router=dict(dropless=True)), [4, 8, 12]),
    ],
    ids=str,
)
def test_levels_are_evenly_spaced_numbers_of_slots_up_to_those_as_trained(
    fields: dict[str, Any], slots: list[int]
) -> None:
    """Every setting of a level has its number of slots, so no two levels share a setting."""
    config = config_of(dict(router=dict(capacity=5, dropless=False)), **fields)
    found = []
    for layer, levels in zip(config.moe_blocks.values(), levels_of(config), strict=True):
        every = [[own.apply(layer).slots(34) for own in x.values()] for x in levels]
        assert all(len(set(of_level)) == 1 for of_level in every)
        found.append([of_level[0] for of_level in every])
    multiple = config.moe_blocks[0].router.capacity_multiple
    assert found == [slots, [1, 2, 3, 4, 5] if multiple == 1 else [4, 8]]


def test_all_k_and_priorities_that_make_a_difference_are_tried() -> None:
    levels, other = levels_of(config_of(dict(router=dict(k=1)), router=dict(k=2)))
    assert (
        levels[-1].keys()
        == other[0].keys()
        == {
            *((1, priority) for priority in ("order", "largest_gate")),
            *((k, p) for k in (2, 3) for p in ("order", "largest_gate", "sum_of_gates")),
        }
    )


@pytest.mark.slow
def test_times_are_measured_for_every_setting_and_grow_with_the_slots() -> None:
    config = config_of()
    levels, blocks = levels_of(config), []
    model = model_of(config)
    images = random_images(b=4)
    with jax.transfer_guard_host_to_device("disallow"):  # no time may include an upload
        costs = time_costs(model, levels, images, on_step=lambda: blocks.append(1))
    assert len(blocks) == len(costs.changes) == 2
    for changes in costs.changes:
        for k in (1, 2):
            own = [changes[k, level[k, "order"].capacity_factor] for level in levels[0]]
            assert own == sorted(own)


def test_other_routers_and_dense_models_are_refused() -> None:
    with pytest.raises(UsageError, match="no block of this model is sparse"):
        check_layers(models.model_config("vit_test"))
    for router in (ExpertChoice(), Switch(), GShard(), Random(), Hash()):
        message = f"router.kind={router.kind} .*are compared for token_choice and bias_balanced"
        with pytest.raises(UsageError, match=f"block 0: {message}"):
            check_layers(config_of(router=router))
        with pytest.raises(UsageError, match=message):
            LayerSetting(1, 1.0, "order").apply(MoEConfig(router=router))


def test_any_label_counts_in_a_score_and_images_without_one_only_in_the_divergence() -> None:
    """Four images have the prediction as their second label, the others have none."""
    config = replace(config_of(), pooling="mean")
    model, levels = model_of(config), levels_of(config)
    first, second = batches()
    images, _, valid = first
    right = np.asarray(outputs(model, images)).argmax(-1)
    given = [Batch(images, np.stack([(right + 1) % 10, right], 1), valid)]
    given += [second._replace(labels=np.full((4, 2), -1))]
    scores = Scores(model, given, levels)
    every = [batch._replace(labels=right[:, None].repeat(2, 1)) for batch in given]
    plain = Scores(model, every, levels)
    assert (scores.trained, scores.images) == (1.0, 7)
    tight = (levels[0][0][1, "order"],) * 2
    assert scores.of(tight).divergence == pytest.approx(plain.of(tight).divergence)
    with pytest.raises(UsageError, match="no image has a label"):
        Scores(model, given[1:], levels)
