"""Rows of experts travel between devices where no capacity is fixed, or rows are computed.

The oracle is the same model on one device.
"""

import collections
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.interpreters import mlir

from tests.devices.test_sharding import (
    CONFIG,
    SPARSE,
    UPDATED,
    assert_close,
    batch_of_16,
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
from vmoe.axes import Decision, RouterInputs
from vmoe.config import CnnExpert, MlpExpert, TokenChoice, ViTConfig, replace
from vmoe.costs.collectives import parse_collectives
from vmoe.errors import UsageError
from vmoe.mesh import place
from vmoe.nn.moe import MoE
from vmoe.sharding import ONE_DEVICE, Placement
from vmoe.train.state import init_state, state_shardings
from vmoe.train.step import make_train_step

DROPLESS = replace(CONFIG, moe=dict(router=TokenChoice(dropless=True, images_per_group=2)))

RAGGED = replace(DROPLESS, moe=dict(exchange=dict(ragged=True)))

# The head reads the class token alone, so the experts get a row for each image.
FEW = replace(DROPLESS, pooling="class_token", moe=dict(router=dict(images_per_group=1)))


def ragged_all_to_all(
    rows: jax.Array,
    into: jax.Array,
    starts: jax.Array,
    sizes: jax.Array,
    places: jax.Array,
    theirs: jax.Array,
    *,
    axis_name: tuple[str, ...],
    axis_index_groups: None,
) -> jax.Array:
    """What JAX's documentation says of it, for CPUs, whose XLA cannot do it."""
    own, received = jax.lax.axis_index(axis_name), jnp.arange(len(into))
    sent = jax.lax.all_gather((rows, starts, sizes, places), axis_name)
    for sender, (rows, starts, sizes, places) in enumerate(zip(*sent, strict=True)):
        i = received - places[own]
        here = (i >= 0) & (i < sizes[own])
        into = jnp.where(here.reshape(-1, *[1] * (into.ndim - 1)), rows[starts[own] + i], into)
        into = jnp.where(sizes[own] == theirs[sender], into, jnp.zeros_like(into) - 1)
    return into


mlir.register_lowering(
    jax.lax.ragged_all_to_all_p,
    mlir.lower_fun(ragged_all_to_all, multiple_results=False),
    platform="cpu",
)


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
        ("expert=4", replace(DROPLESS, moe=dict(exchange=dict(hot_experts=3), routed_scale=2.0))),
        ("expert=8", replace(by_rows("blocked"), moe=dict(exchange=dict(hot_experts=8, chunks=2)))),
        ("expert=4", replace(DROPLESS, moe=dict(exchange=dict(chunks=3, hot_experts=1)))),
        ("expert=2", replace(CONFIG, moe=dict(exchange=dict(chunks=2)))),
        ("expert=4", replace(FEW, moe=dict(exchange=dict(chunks=2, hot_experts=1)))),
        ("expert=4", RAGGED),
        ("expert=8", replace(RAGGED, moe=dict(exchange=dict(hot_experts=1, buffer_factor=8.0)))),
        ("expert=2x4", replace(CONFIG, moe=dict(exchange=dict(chunks=2)))),
        ("expert=2x2", replace(DROPLESS, moe=dict(exchange=dict(hot_experts=1)))),
        ("expert=2x2", replace(CONFIG, moe=dict(experts=CnnExpert()))),
    ],
)
def test_logits_losses_and_gradients_are_those_of_one_device(mesh: str, config: ViTConfig) -> None:
    batch = images(16), np.ones(16, bool)
    ours, oracle = (
        run_on(placement, training(config, placement), params_of(config), *batch)
        for placement in (on(mesh), ONE_DEVICE)
    )
    assert_close(ours, oracle, mesh)


@pytest.mark.parametrize(
    ("config", "chunked", "sends"),
    [
        (DROPLESS, DROPLESS, 5),  # rows, their experts, and back; two for gradients
        (DROPLESS, replace(DROPLESS, moe=dict(exchange=dict(chunks=2, hot_experts=2))), 2 * 5),
        (CONFIG, replace(CONFIG, moe=dict(exchange=dict(chunks=2))), 2 * 4),
    ],
)
def test_each_chunk_travels_there_and_back_and_nothing_is_gathered_or_sent_twice(
    config: ViTConfig, chunked: ViTConfig, sends: int
) -> None:
    counts = collectives(compiled_training(chunked, "expert=4"))
    assert counts["all-to-all"] == sends
    assert set(counts) == {"all-to-all", "all-reduce"}
    whole, parts = (bytes_sent(each, "all-to-all") for each in (config, chunked))
    assert parts == pytest.approx(whole)


@pytest.mark.parametrize(("config", "sends"), [(CONFIG, 4), (DROPLESS, 5)])
def test_two_levels_send_inside_each_host_and_one_message_to_each_other_host(
    config: ViTConfig, sends: int
) -> None:
    """Devices 0 to 3 are a host. Between hosts a device sends half of all, as in one level."""
    program = compiled_training(config, "expert=2x4").as_text()
    sent = collections.defaultdict[tuple[int, ...], list[float]](list)
    for each in parse_collectives(program):
        if each.kind == "all-to-all":
            sent[each.replica_group].append(each.bytes_sent)
        else:
            assert each.kind == "all-reduce"
    inside, between = sent.pop((0, 1, 2, 3)), sent.pop((0, 4))
    assert not sent and len(inside) == len(between) == sends
    whole = bytes_sent(config, "all-to-all", mesh="expert=8") * 8 / 7
    assert sum(inside) == pytest.approx(whole * 3 / 4)
    assert sum(between) == pytest.approx(whole / 2)


def bytes_sent(config: ViTConfig, kind: str, mesh: str = "expert=4") -> float:
    """By all collectives of a kind of a device, forward and backward."""
    program = compiled_training(config, mesh).as_text()
    return sum(x.bytes_sent for x in parse_collectives(program) if x.kind == kind)


def test_the_parameters_of_hot_experts_are_sent_and_their_gradients_summed() -> None:
    def summed(hot: int) -> float:
        return bytes_sent(replace(DROPLESS, moe=dict(exchange=dict(hot_experts=hot))), "all-reduce")

    d, f, e = CONFIG.width, CONFIG.mlp_dim, SPARSE.num_experts
    copies, loads = 2 * 4 * (2 * d * f + f + d), 4 * e
    rings = 2 * 2 * 3 / 4 * copies + 2 * 7 / 8 * loads  # there and back; of four and eight devices
    assert summed(2) - summed(0) == pytest.approx(rings)


def test_a_hot_expert_leaves_the_buffers_to_the_others() -> None:
    """All tokens choose expert 0, which its device alone would have to compute."""
    placement, batch = on("expert=4"), (images(16), np.ones(16, bool))

    def popular(inputs: RouterInputs, router: TokenChoice, c: int) -> Decision:
        return router(inputs._replace(logits=inputs.logits.at[..., 0].add(9)), c)

    def run(hot: int, placement: Placement) -> Any:
        router = TokenChoice(dropless=True, noise_std=0.0)
        moe = dict(exchange=dict(buffer_factor=1.5, hot_experts=hot), router=router)
        config = replace(CONFIG, moe=moe)

        def outputs(params: Any, x: jax.Array, valid: jax.Array) -> Any:
            model = models.with_params(config, params, placement=placement)
            decide, key = {0: popular}, jax.random.key(0)
            return capture(model, x, train=True, key=key, valid=valid, decide=decide)

        return run_on(placement, outputs, params_of(CONFIG), *batch)

    oracle = run(0, ONE_DEVICE)[0]
    assert run(0, placement)[1][0].routing.dropped.sum() > 0
    logits, records = run(1, placement)
    assert records[0].routing.dropped.sum() == 0
    assert_close(logits, oracle)


@pytest.mark.parametrize(
    "exchange", [dict(hot_experts=1, chunks=2), dict(hot_experts=1, ragged=True)]
)
def test_a_step_in_parts_with_fsdp_and_rematerialization_is_that_of_one_device(
    exchange: dict[str, Any],
) -> None:
    router = TokenChoice(dropless=True, noise_std=0.0, images_per_group=2)
    config = replace(UPDATED, model=replace(CONFIG, moe=dict(router=router)))
    changed = replace(config, accumulate=2, model=dict(remat=True, moe=dict(exchange=exchange)))
    ours = place(CONFIG, jax.devices()[:4], mesh="expert=2", fsdp=True)
    before = jax.device_get(init_state(config))
    expected = make_train_step(config)(before, batch_of_16())
    start = jax.device_put(before, state_shardings(before, ours))
    found = make_train_step(changed, ours)(start, ours.make_global_array(batch_of_16()))
    assert_close(found, expected)


@pytest.mark.parametrize("config", [DROPLESS, RAGGED], ids=["buffers", "ragged"])
def test_more_choices_on_a_device_than_can_be_sorted_are_refused(config: ViTConfig) -> None:
    b, n, d = 2**20, 2**10, CONFIG.width  # 2**27 tokens on each device
    layer = MoE.from_config(config.moe, d, 1, n, placement=on("expert=8"), rngs=nnx.Rngs(0))
    with pytest.raises(UsageError, match="too many to sort: .* or the batch"):
        jax.eval_shape(layer, jax.ShapeDtypeStruct((b, n, d), jnp.float32))


@pytest.mark.parametrize("ragged", [False, True])
def test_in_training_the_smallest_weights_that_do_not_fit_a_buffer_are_dropped_and_counted(
    ragged: bool,
) -> None:
    """The third image is padding; evaluation drops nothing."""
    router = dict(noise_std=0.0, images_per_group=1)
    moe = dict(exchange=dict(buffer_factor=0.75, ragged=ragged), router=router)
    config = replace(DROPLESS, moe=moe)
    placement, params = on("expert=4"), params_of(config)

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
    if ragged:  # the four senders to a device share its room
        sent, most = (
            np.stack([np.bincount(own[own < 8] // 2, minlength=4) for own in choices])
            for choices in (experts, np.where(kept, experts, 8))
        )
        totals = sent.reshape(2, 4, 4).sum(1)
        room = np.minimum(totals, 4 * buffer)
        assert (room < totals).any() and (room == totals).any()
        np.testing.assert_array_equal(most.reshape(2, 4, 4).sum(1), room)
        assert (abs(most - sent * (room / totals).repeat(4, axis=0)) <= 1).all()
    else:
        most = np.full((8, 4), buffer)
    for own, found, weight, room in zip(experts, kept, weights, most, strict=True):
        for choice in np.argsort(-weight.reshape(-1), kind="stable"):
            fits = weight.flat[choice] > 0 and room[own.flat[choice] // 2] > 0
            assert found.flat[choice] == fits
            if fits:
                room[own.flat[choice] // 2] -= 1
    dropped = (weights > 0) & ~kept
    assert 0 < dropped.sum() < kept.sum()
    assert outputs(placement, train=False)[1][0].routing.kept.sum() == (weights > 0).sum()

    def same(*_: Any) -> Decision:
        return Decision(records[0].gates, routing)

    assert_close(logits, outputs(ONE_DEVICE, train=False, decide={0: same})[0])
