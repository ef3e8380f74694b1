"""Rows of experts travel between devices where no capacity is fixed, or rows are computed.

The oracle is the same model on one device.
"""

import numpy as np
import pytest

from tests.devices.test_sharding import (
    CONFIG,
    SPARSE,
    assert_close,
    collectives,
    compiled_training,
    images,
    on,
    params_of,
    run_on,
    training,
)
from vmoe import models
from vmoe.analysis import capture
from vmoe.axes import Decision
from vmoe.config import CnnExpert, MlpExpert, TokenChoice, ViTConfig, replace
from vmoe.sharding import ONE_DEVICE

DROPLESS = replace(CONFIG, moe=dict(router=TokenChoice(dropless=True, images_per_group=2)))


def by_rows(implementation: str) -> ViTConfig:
    experts = MlpExpert(shared_init=False, implementation=implementation)
    return replace(CONFIG, moe=replace(SPARSE, experts=experts))


@pytest.mark.long_after(2)
@pytest.mark.parametrize(
    ("mesh", "config"),
    [
        ("expert=4", replace(DROPLESS, moe=dict(routed_scale=2.0), pooling="class_token")),
        ("expert=8", by_rows("blocked")),
        ("expert=1", DROPLESS),
        ("expert=4", by_rows("ragged")),
        ("expert=4", replace(DROPLESS, moe=dict(experts=CnnExpert()))),
    ],
)
def test_logits_losses_and_gradients_are_those_of_one_device(mesh: str, config: ViTConfig) -> None:
    batch = images(16), np.ones(16, bool)
    ours, oracle = (
        run_on(placement, training(config, placement), params_of(config), *batch)
        for placement in (on(mesh, config), ONE_DEVICE)
    )
    assert_close(ours, oracle, mesh)


def test_rows_and_their_experts_travel_there_and_rows_back_and_nothing_is_gathered() -> None:
    counts = collectives(compiled_training(DROPLESS, "expert=4"))
    assert counts["all-to-all"] == 5  # two of them for gradients
    assert set(counts) == {"all-to-all", "all-reduce"}
    assert set(collectives(compiled_training(DROPLESS, "expert=1"))) == {"all-reduce"}


def test_what_does_not_fit_a_buffer_is_dropped_and_counted_least_important_choices_first() -> None:
    config = replace(DROPLESS, moe=dict(ragged_buffer_factor=0.75))
    placement, params = on("expert=4", config), params_of(config)

    def outputs(params, x, valid, placement=placement, decide=None):  # noqa: ANN001
        model = models.with_params(config, params, placement=placement)
        return capture(model, x, valid=valid, decide=decide)

    batch = images(16), np.ones(16, bool)
    logits, records = run_on(placement, outputs, params, *batch)
    routing = records[0].routing
    g, s, k = routing.experts.shape
    per_device = g * s * k // 8
    alone = run_on(ONE_DEVICE, lambda *batch: outputs(*batch, ONE_DEVICE), params, *batch)[1][0]
    arrays = routing.experts, routing.kept, alone.routing.weights
    experts, kept, weights = (np.asarray(x).reshape(8, -1, k) for x in arrays)
    for own, found, weight in zip(experts, kept, weights, strict=True):
        room = dict.fromkeys(range(4), round(0.75 * per_device / 4))
        for rank in range(k):
            for token in np.argsort(-weight.max(1), kind="stable"):
                receiver = own[token, rank] // 2
                assert found[token, rank] == (room[receiver] > 0)
                room[receiver] -= 1
    assert 0 < (~kept).sum() < 8 * per_device

    def same(*_):  # noqa: ANN002, ANN202
        return Decision(records[0].gates, records[0].routing)

    expected, _ = run_on(
        ONE_DEVICE, lambda *batch: outputs(*batch, ONE_DEVICE, {0: same}), params, *batch
    )
    assert_close(logits, expected)
