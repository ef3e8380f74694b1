"""Rows of experts travel between devices where no capacity is fixed, or rows are computed.

The oracle is the same model on one device.
"""

from typing import Any

import jax
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
from vmoe.sharding import ONE_DEVICE, Placement

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
        ("expert=2", replace(DROPLESS, moe=dict(router=dict(images_per_group=1)))),
    ],
)
def test_logits_losses_and_gradients_are_those_of_one_device(mesh: str, config: ViTConfig) -> None:
    batch = images(16), np.ones(16, bool)
    ours, oracle = (
        run_on(placement, training(config, placement), params_of(config), *batch)
        for placement in (on(mesh, config), ONE_DEVICE)
    )
    assert_close(ours, oracle, mesh)


@pytest.mark.parametrize("factor", [None, 1.5])
def test_rows_and_their_experts_travel_there_and_rows_back_and_nothing_is_gathered(
    factor: float | None,
) -> None:
    config = replace(DROPLESS, moe=dict(ragged_buffer_factor=factor))
    counts = collectives(compiled_training(config, "expert=4"))
    assert counts["all-to-all"] == 5  # two of them for gradients
    assert set(counts) == {"all-to-all", "all-reduce"}


def test_in_training_the_smallest_weights_that_do_not_fit_a_buffer_are_dropped_and_counted() -> (
    None
):
    """The third image is padding; evaluation drops nothing."""
    router = dict(noise_std=0.0, images_per_group=1)
    config = replace(DROPLESS, moe=dict(ragged_buffer_factor=0.75, router=router))
    placement, params = on("expert=4", config), params_of(config)

    def outputs(placement: Placement, train: bool, decide: Any = None) -> Any:
        def run(params: Any, x: jax.Array, valid: jax.Array) -> Any:
            model = models.with_params(config, params, placement=placement)
            key = jax.random.key(0) if train else None
            return capture(model, x, train=train, key=key, valid=valid, decide=decide)

        return run_on(placement, run, params, images(16), np.arange(16) != 2)

    logits, records = outputs(placement, train=True)
    routing, alone = records[0].routing, outputs(ONE_DEVICE, train=False)[1][0].routing
    k = routing.experts.shape[-1]
    arrays = routing.experts, routing.kept, alone.weights
    experts, kept, weights = (np.asarray(x).reshape(8, -1, k) for x in arrays)
    buffer = round(0.75 * experts[0].size / 4)
    for own, found, weight in zip(experts, kept, weights, strict=True):
        room = dict.fromkeys(range(5), buffer)  # 4: of padding
        for choice in np.argsort(-weight.reshape(-1), kind="stable"):
            fits = weight.flat[choice] > 0 and room[own.flat[choice] // 2] > 0
            assert found.flat[choice] == fits
            room[own.flat[choice] // 2] -= fits
    dropped = (weights > 0) & ~kept
    assert 0 < dropped.sum() < kept.sum()
    assert outputs(placement, train=False)[1][0].routing.kept.sum() == (weights > 0).sum()

    def same(*_: Any) -> Decision:
        return Decision(records[0].gates, routing)

    assert_close(logits, outputs(ONE_DEVICE, train=False, decide={0: same})[0])
