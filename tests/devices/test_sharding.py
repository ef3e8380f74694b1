"""Many devices compute the same numbers as one device, with no more collectives than necessary.

The oracle is the same program on one device: on the whole batch if its groups are the same, else on
the images of each device separately.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.own_router import Own
from tests.routers import grouped
from vmoe import models
from vmoe.analysis import capture, collect, concatenate
from vmoe.config import (
    AuxLossWeights,
    BiasBalanced,
    DataConfig,
    ExpertChoice,
    ExpertRace,
    GShard,
    Hash,
    MlpExpert,
    MoEConfig,
    OptimConfig,
    Random,
    ReLU,
    Router,
    Sinkhorn,
    Soft,
    Switch,
    TokenChoice,
    TopP,
    TrainConfig,
    Transport,
    TransportExpertChoice,
    ViTConfig,
    replace,
)
from vmoe.costs.hlo import Program, replica_group
from vmoe.data.pipeline import Batch
from vmoe.errors import UsageError
from vmoe.mesh import place
from vmoe.passes import in_batches
from vmoe.routing.load import expert_use
from vmoe.sharding import ONE_DEVICE, Placement
from vmoe.train.optim import optimizer
from vmoe.train.state import abstract_state, init_state, state_shardings
from vmoe.train.status import make_reduction
from vmoe.train.step import make_train_step

SPARSE = MoEConfig(
    num_experts=8,
    router=TokenChoice(capacity_factor=0.8, images_per_group=2),
    experts=MlpExpert(shared_init=False),
)
CONFIG = ViTConfig(
    patch_size=4,
    width=32,
    depth=1,
    mlp_dim=64,
    num_heads=2,
    image_size=16,
    num_classes=10,
    head_std=0.2,
    pooling="mean",
    sparse_blocks=(0,),
    moe=SPARSE,
)
OTHERS = (
    *(Switch(), GShard(), Random(), Hash(), Sinkhorn(), Transport(), TransportExpertChoice()),
)
ROUTERS: dict[str, Router] = {
    "order": SPARSE.router,
    "largest_gate, shares": TokenChoice(priority="largest_gate", shares=(0.5,) * 6 + (1.0,) * 2),
    "sum_of_gates, next_expert": TokenChoice(priority="sum_of_gates", overflow="next_expert"),
    "random, all_losses": TokenChoice(
        k=1,
        priority="random",
        aux_loss=AuxLossWeights(load=0.1, importance=0.1, gshard=0.1, z=0.1),
    ),
    "losses_over_batch": TokenChoice(k=1, aux_loss=AuxLossWeights(0.1, 0.1, 0.1, over="batch")),
    "expert_choice": ExpertChoice(),
    "choice_by_threshold": ExpertChoice(threshold_rate=0.1),
    "soft": Soft(),
    **{router.kind: router for router in OTHERS},
}
"""Those with a state, and top-p, are in ``UPDATED_ROUTERS``."""
OVER_DEVICE = TokenChoice(k=1, aux_loss=AuxLossWeights(0.1, 0.1, 0.1, over="device"))
OPERATIONS = ("all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute")


def on(mesh: str, config: ViTConfig = CONFIG, **options: Any) -> Placement:
    return place(config, jax.devices(), mesh=mesh, **options)


@functools.cache
def params_of(config: ViTConfig) -> dict[str, Any]:
    return models.params_of(models.build(config))


def images(b: int, seed: int = 1) -> np.ndarray:
    return np.asarray(jax.random.normal(jax.random.key(seed), (b, 16, 16, 3)))


def collectives(program: jax.stages.Compiled) -> dict[str, int]:
    """The number of collectives of each kind in the compiled program."""
    pattern = rf" ({'|'.join(OPERATIONS)})(?:-start)?\(%?\w"
    return collections.Counter(re.findall(pattern, program.as_text()))


def forward(config: ViTConfig, placement: Placement, key: jax.Array | None = None) -> Any:
    def run(params: dict[str, Any], x: jax.Array, valid: jax.Array) -> Any:
        model = models.with_params(config, params, placement=placement)
        logits, records = capture(model, x, train=key is not None, key=key, valid=valid)
        aux_loss = sum((record.aux_loss for record in records.values()), jnp.zeros(()))
        return logits, aux_loss

    return run


def training(config: ViTConfig, placement: Placement) -> Any:
    """The gradient of a training loss, the logits and the auxiliary loss, which sum up to it."""
    run = forward(config, placement, jax.random.key(3))

    def loss(params: dict[str, Any], x: jax.Array, valid: jax.Array) -> Any:
        logits, aux_loss = run(params, x, valid)
        total = (jnp.where(valid[:, None], logits, 0) ** 2).sum() / 10 + aux_loss
        return total, (logits, aux_loss)

    return jax.grad(loss, has_aux=True)


def run_on(placement: Placement, function: Any, params: Any, *batch: np.ndarray) -> Any:
    if placement.mesh is not None:
        params = jax.device_put(params, placement.params(params))
    return jax.jit(function)(params, *placement.make_global_array(batch))


def assert_close(ours: Any, oracle: Any, mesh: str = "") -> None:
    """Compares to 1e-5 of the largest value of each array; a key bias has the gradient 0."""
    for (path, array), expected in zip(
        jax.tree.leaves_with_path(ours), jax.tree.leaves(oracle), strict=True
    ):
        if "['key']['bias']" not in jax.tree_util.keystr(path):
            largest = max(float(np.abs(expected).max()), 1e-3)
            np.testing.assert_allclose(
                *map(np.asarray, (array, expected)), atol=1e-5 * largest, rtol=0, err_msg=mesh
            )


@functools.cache
def compiled_training(config: ViTConfig, mesh: str) -> jax.stages.Compiled:
    placement, params = on(mesh), params_of(config)
    shardings = placement.params(params)
    batch = placement.make_global_array((images(16), np.ones(16, bool)))
    program = jax.jit(training(config, placement), out_shardings=(shardings, None))
    return program.lower(jax.device_put(params, shardings), *batch).compile()


@pytest.mark.parametrize(
    ("mesh", "pooling"),
    [
        ("expert=8", "mean"),
        ("expert=4", "mean"),
        ("expert=1", "mean"),
        pytest.param("expert=2", "class_token", marks=pytest.mark.slow),
    ],
)
def test_an_moe_layer_has_two_all_to_all_four_with_backward_and_no_all_gather(
    mesh: str, pooling: str
) -> None:
    config = replace(CONFIG, pooling=pooling)
    placement, params, valid = on(mesh), params_of(config), np.ones(16, bool)
    sharded = jax.device_put(params, placement.params(params))
    batch = placement.make_global_array((images(16), valid))
    sends = 0 if mesh == "expert=1" else 1
    program = jax.jit(forward(config, placement)).lower(sharded, *batch).compile()
    counts = collectives(program)
    assert counts["all-to-all"] == 2 * sends
    assert set(counts) <= {"all-to-all", "all-reduce"}  # all-reduce sums the losses
    counts = collectives(compiled_training(config, mesh))
    assert counts["all-to-all"] == 4 * sends
    assert set(counts) <= {"all-to-all", "all-reduce"}


@pytest.mark.parametrize("mesh", ["expert=8", "expert=4", "expert=1"])
def test_gradients_of_experts_are_summed_over_data_and_all_others_over_all_devices(
    mesh: str,
) -> None:
    placement, params = on(mesh), params_of(CONFIG)
    text = compiled_training(CONFIG, mesh).as_text()
    summed = {}  # the number of devices, by the sizes of a device's part of an array
    for instruction in Program(text).instructions.values():
        if instruction.name.startswith("all-reduce"):
            group = replica_group(instruction.attributes)
            for shape in re.findall(r"f32\[([\d,]+)\]", instruction.shape):
                summed[sizes(map(int, shape.split(",")))] = len(group)
    leaves, shardings = jax.tree.leaves_with_path(params), placement.params(params)
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
        part = sizes(sharding.shard_shape(leaf.shape))
        expert = "['experts']" in jax.tree_util.keystr(path)
        if len(part) > 1:  # experts and others have vectors of the same length
            assert summed.get(part, 1) == (placement.data if expert else 8), path


def sizes(shape: Iterable[int]) -> tuple[int, ...]:
    """The sizes of an array, whichever way XLA has transposed it; it may drop axes of size 1."""
    return tuple(sorted(n for n in shape if n > 1))


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS.keys())
def test_logits_losses_and_gradients_equal_those_of_one_device(router: Router) -> None:
    per_group = 1 if isinstance(router, Soft) else 2
    moe = replace(SPARSE, router=grouped(router, per_group))
    config = replace(CONFIG, moe=moe)
    params, batch = params_of(config), (images(16), np.ones(16, bool))
    oracle = run_on(ONE_DEVICE, training(config, ONE_DEVICE), params, *batch)
    one_of_its_kind = router in (ROUTERS["order"], ROUTERS["expert_choice"], ROUTERS["soft"])
    for mesh in ("expert=4", "expert=8") if one_of_its_kind else ("expert=4",):
        placement = on(mesh)
        sharded = jax.device_put(params, placement.params(params))
        ours = compiled_training(config, mesh)(sharded, *placement.make_global_array(batch))
        assert_close(ours, oracle, mesh)


@pytest.mark.parametrize(
    ("router", "mesh"),
    [
        (TokenChoice(priority="largest_gate"), "expert=4"),
        (ROUTERS["expert_choice"], "expert=2"),
        (OVER_DEVICE, "expert=4"),
    ],
    ids=["largest_gate", "expert_choice", "losses_over_device"],
)
def test_with_uneven_groups_and_padding_devices_equal_separate_runs_of_their_images(
    router: Router, mesh: str
) -> None:
    """Each device has five images in groups of three; the last device has padding."""
    config = replace(CONFIG, moe=replace(SPARSE, router=grouped(router, 3)))
    params, x, valid = params_of(config), images(40), np.arange(40) < 37
    groups = [2] * 7 + [1]  # with at least one image: the last device has two images
    one = loss_and_gradient(config, ONE_DEVICE)
    alone = [
        run_on(ONE_DEVICE, one, params, x[i : i + 5], valid[i : i + 5], np.full(5, count / 15))
        for i, count in zip(range(0, 40, 5), groups, strict=True)
    ]
    oracle = jax.tree.map(lambda *parts: sum(parts), *alone)
    placement = on(mesh)
    function = loss_and_gradient(config, placement)
    assert_close(run_on(placement, function, params, x, valid, np.ones(40)), oracle, mesh)


def loss_and_gradient(config: ViTConfig, placement: Placement) -> Any:
    """Loss and gradient without noise; ``weights[0]`` is the weight of the auxiliary loss."""
    run = forward(config, placement)

    def loss(params: dict[str, Any], x: jax.Array, valid: jax.Array, weights: jax.Array) -> Any:
        logits, aux_loss = run(params, x, valid)
        return (jnp.where(valid[:, None], logits, 0) ** 2).sum() / 10 + weights[0] * aux_loss

    return jax.value_and_grad(loss)


# The update of SGD is the gradient, so it shows a sum over the wrong number of devices.
UPDATED = TrainConfig(
    model=CONFIG,
    data=DataConfig("digits"),
    optim=OptimConfig(kind="sgd", lr=0.1, warmup_steps=0, grad_clip_norm=0.5, schedule="constant"),
    batch_size=16,
    ema_decay=0.5,
)


def batch_of_16() -> Batch:
    labels = np.arange(16, dtype=np.int32)[:, None] % 10
    pixels = np.random.default_rng(0).integers(256, size=images(16).shape, dtype=np.uint8)
    return Batch(pixels, labels, np.ones(16, bool))


@functools.cache
def update_of_one_device() -> tuple[Any, Any, Any]:
    """The state before and after a step, on the host, and the metrics."""
    before = init_state(UPDATED)
    on_host = jax.device_get(before)  # a step donates its state
    return on_host, *jax.device_get(make_train_step(UPDATED)(before, batch_of_16()))


@functools.cache
def compiled_update(placement: Placement) -> jax.stages.Compiled:
    batch = placement.make_global_array(batch_of_16())
    step = make_train_step(UPDATED, placement)
    return step.lower(abstract_state(UPDATED, placement), batch).compile()


@pytest.mark.parametrize(
    ("mesh", "fsdp"),
    [
        ("expert=8", False),
        ("expert=4", True),
        pytest.param("expert=1", False, marks=pytest.mark.slow),
        ("expert=1", True),
    ],
)
def test_the_state_and_metrics_after_an_update_equal_those_of_one_device(
    mesh: str, fsdp: bool
) -> None:
    ours = on(mesh, fsdp=fsdp)
    start = init_state(UPDATED, ours)
    before, expected, measured = update_of_one_device()
    assert_close(start, before)
    state, metrics = compiled_update(ours)(start, ours.make_global_array(batch_of_16()))
    assert_close(state, expected)
    assert_close(metrics, measured)
    expected = abstract_state(UPDATED, ours)
    for leaf, target in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert leaf.sharding == target.sharding


UPDATED_ROUTERS = (
    *(TokenChoice(noise_std=0.0), BiasBalanced(), ExpertRace(), Own(), ReLU(coefficient=0.1)),
    TopP(),
)


@pytest.mark.parametrize("router", UPDATED_ROUTERS, ids=lambda router: router.kind)
def test_parts_of_each_devices_images_give_the_update_of_the_whole_batch_on_one_device(
    router: Router,
) -> None:
    """Each device has two groups of two images, one in each part.

    The update of SGD is the gradient. A router's state follows the load of the whole batch.
    """
    config = replace(UPDATED, model=dict(moe=dict(router=grouped(router, 2))))
    ours = place(CONFIG, jax.devices()[:4], mesh="expert=2")
    before = jax.device_get(init_state(config))
    expected = make_train_step(config)(before, batch_of_16())
    step = make_train_step(replace(config, accumulate=2), ours)
    start = jax.device_put(before, state_shardings(before, ours))
    batch = ours.make_global_array(batch_of_16())
    compiled = step.lower(start, batch).compile()
    assert set(collectives(compiled)) <= {"all-to-all", "all-reduce"}
    assert_close(compiled(start, batch), expected)
    for name, initial in router.initial_state(SPARSE.num_experts).items():
        assert np.any(expected[0].params["blocks"][0]["mlp"]["state"][name] != initial)


@pytest.mark.parametrize(("mesh", "fsdp"), [("expert=4", True), ("expert=8", False)])
def test_adafactors_steps_on_a_mesh_equal_those_of_one_device(mesh: str, fsdp: bool) -> None:
    """Biases of experts are factored too, so that one of their statistics has no expert axis."""
    optim = OptimConfig(kind="adafactor", warmup_steps=0, min_dim_size_to_factor=8)
    config, placement, params = (
        replace(UPDATED, optim=optim),
        on(mesh, fsdp=fsdp),
        params_of(CONFIG),
    )
    transform, rng = optimizer(config), np.random.default_rng(0)
    gradients = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
    start = transform.init(params)
    expected = jax.jit(transform.update)(gradients, start, params)
    shardings = placement.params(params), placement.opt_state(start)
    arguments = (gradients, start, params), (shardings[0], shardings[1], shardings[0])
    update = jax.jit(transform.update, out_shardings=shardings)
    assert_close(update(*jax.device_put(*arguments)), expected)
    factors = start[1][0]
    for name, bias, kernel in (
        ("v_row", (8,), (8, 32)),
        ("v_col", (64,), (8, 64)),
        ("v", (1,), (1,)),
    ):
        up = getattr(factors, name)["blocks"][0]["mlp"]["experts"]["up"]
        assert up["bias"].shape == bias and up["kernel"].shape == kernel


def test_fsdp_splits_large_dense_arrays_and_the_optimizer_state_of_experts() -> None:
    config = TrainConfig(model=CONFIG, data=DataConfig("digits"))
    placement = on("expert=2", fsdp=True)
    state = abstract_state(config, placement)
    for tree, splits in ((state.params, (1, 4, 2)), (state.opt_state[1].mu, (1, 4, 8))):
        small, dense, experts = splits
        block = tree["blocks"][0]
        for leaf, shards in (
            (block["norm1"]["scale"], small),
            (block["attention"]["out"]["kernel"], dense),
            (block["mlp"]["experts"]["up"]["kernel"], experts),
        ):
            assert np.prod(leaf.shape) == shards * np.prod(leaf.sharding.shard_shape(leaf.shape))


def test_a_stop_requested_on_one_device_reaches_all() -> None:
    placement = on("expert=4")
    reduce = make_reduction(placement)
    for flags in (np.zeros(8, bool), np.arange(8) == 5):
        finite, stop = reduce(jnp.zeros(()), placement.make_global_array(flags))
        assert finite and bool(stop) == flags.any()
    finite, _ = reduce(jnp.asarray(jnp.nan), placement.per_device_flag(False))
    assert not finite


@pytest.mark.parametrize(
    ("dropless", "sent"),
    [(False, ["sharding_constraint", "8x8x32", 4]), (True, ["all_to_all", "4x64x32", 2])],
)
def test_rows_are_rounded_to_the_data_type_of_the_exchange_before_they_are_sent(
    dropless: bool, sent: list[Any]
) -> None:
    """The CPU compiler still sends four bytes per number; other compilers may send two."""
    layer = replace(SPARSE, exchange=dict(dtype="bfloat16"), router=dict(dropless=dropless))
    config = replace(CONFIG, moe=layer)
    placement, params, batch = on("expert=4"), params_of(CONFIG), (images(16), np.ones(16, bool))
    lowered = jax.jit(forward(config, placement)).lower(params, *placement.make_global_array(batch))
    operation, rows, number = sent
    wire = [line for line in lowered.as_text().splitlines() if operation in line]
    assert sum(f"{rows}xbf16>" in line for line in wire) == number, wire
    ours = run_on(placement, forward(config, placement), params, *batch)
    alone = run_on(ONE_DEVICE, forward(config, ONE_DEVICE), params, *batch)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-3), ours, alone)


def test_experts_are_split_over_neighboring_devices_as_far_as_they_divide() -> None:
    assert (on("").data, on("").expert) == (1, 8)
    few = replace(CONFIG, moe=replace(SPARSE, num_experts=6))
    assert (on("", few).data, on("", few).expert) == (4, 2)
    dense = replace(CONFIG, sparse_blocks=())
    assert (on("", dense).data, on("", dense).expert) == (8, 1)
    assert (on("data=2").data, on("data=2").expert) == (2, 4)
    ids = [[device.id for device in row] for row in on("data=2").mesh.devices]
    assert ids == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert place(CONFIG, jax.devices()[:1]) == ONE_DEVICE


@pytest.mark.parametrize(
    ("mesh", "changes", "message"),
    [
        ("data=3,expert=4", {}, "12 devices, there are 8; expert can be 1, 2, 4 or 8"),
        (
            "expert=4",
            {"num_experts": 6},
            "num_experts=6 with mesh=.*expert=4: 4 does not divide the experts; on 8 devices ",
        ),
        ("expert=4", {"exchange": {"ragged": True}}, "exchange.ragged=True: .* GPUs and TPUs only"),
        ("experts=4", {}, "no axis 'experts': did you mean 'expert'"),
        ("expert=x", {}, "each axis once, with a size of 1 or more"),
        ("data=2,data=4", {}, "each axis once"),
        ("expert=0x8", {}, "with a size of 1 or more"),
        ("data=2x4", {}, "give one number, or expert as hosts x devices, as expert=2x8"),
        ("expert=2x2x2", {}, "give one number, or expert as hosts x devices"),
        ("expert=2x4", {"exchange": {"ragged": True}}, "use mesh expert=8"),
    ],
)
def test_a_model_that_a_mesh_cannot_split_is_refused(
    mesh: str, changes: dict, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        on(mesh, replace(CONFIG, moe=replace(SPARSE, **changes)))


def test_a_layer_that_is_made_in_python_is_refused_on_a_mesh_with_levels_it_cannot_send_in() -> (
    None
):
    config = replace(CONFIG, moe=dict(exchange=dict(ragged=True), router=dict(dropless=True)))
    with pytest.raises(UsageError, match="use mesh expert=8"):
        models.build(config, placement=on("expert=2x4"))
    with pytest.raises(UsageError, match="hosts=3: it must divide the 8 devices of expert"):
        dataclasses.replace(on("expert=8"), hosts=3)


def test_fsdp_over_a_data_axis_of_one_device_is_refused() -> None:
    for devices in (jax.devices(), jax.devices()[:1]):
        with pytest.raises(UsageError, match="fsdp=True: it splits over data, which is 1 on these"):
            place(CONFIG, devices, fsdp=True)
    assert place(CONFIG, jax.devices()[:1], mesh="data=1") == ONE_DEVICE


def test_an_indivisible_batch_size_is_refused_with_the_nearest_divisible_ones() -> None:
    with pytest.raises(UsageError, match="batch_size=12: each of 8 devices .* use 8 or 16"):
        on("expert=4").check_batch(12)
    with pytest.raises(UsageError, match="batch_size=12: each of 8 devices"):
        models.build(CONFIG, placement=on("expert=4"))(images(12))


@pytest.mark.parametrize("mesh", ["expert=4", "expert=1"])
def test_fsdp_gathers_only_the_parameters_that_it_splits(mesh: str) -> None:
    placement = on(mesh, fsdp=True)
    target = abstract_state(UPDATED, placement)
    text = compiled_update(placement).as_text()
    gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather", text)
    shards = on(mesh).params(target.params)  # without FSDP: split over experts alone
    without_fsdp = {
        where.shard_shape(leaf.shape)
        for leaf, where in zip(*map(jax.tree.leaves, (target.params, shards)), strict=True)
    }
    assert gathered and {tuple(map(int, shape.split(","))) for shape in gathered} <= without_fsdp
    assert not re.findall(r"all-gather-start|collective-permute", text)


def test_expert_use_is_assigned_to_the_right_image_in_padded_groups() -> None:
    """Each device has five images in groups of three, so its last group is padded."""
    config = replace(CONFIG, moe=dict(router=dict(capacity_factor=8.0, images_per_group=3)))
    two = place(config, jax.devices()[:2], mesh="expert=2")

    def use_on(placement: Placement, config: ViTConfig) -> jax.Array:
        def use(params: dict[str, Any], x: jax.Array) -> jax.Array:
            _, records = capture(models.with_params(config, params, placement=placement), x)
            return expert_use(records[0], 10, devices=placement.devices)

        return run_on(placement, use, params_of(config), images(10))

    alone = use_on(ONE_DEVICE, replace(config, moe=dict(router=dict(images_per_group=1))))
    np.testing.assert_allclose(use_on(two, config), alone, atol=1e-6)


def test_routing_collected_on_two_devices_is_assigned_to_the_right_image_in_padded_groups() -> None:
    config = replace(CONFIG, moe=dict(router=dict(capacity_factor=8.0, images_per_group=3)))
    two = place(config, jax.devices()[:2], mesh="expert=2")
    params, own = params_of(config), two.params(params_of(config))
    sharded = models.with_params(config, jax.device_put(params, own), placement=two)
    single = replace(config, moe=dict(router=dict(images_per_group=1)))
    ours, alone = (
        concatenate(collect(model, in_batches(images(10), batch_size=10)))
        for model in (sharded, models.with_params(single, params))
    )
    np.testing.assert_allclose(ours.logits, alone.logits, atol=1e-5)
    np.testing.assert_allclose(ours.blocks[0].gates, alone.blocks[0].gates, atol=1e-6)
    np.testing.assert_array_equal(ours.blocks[0].experts, alone.blocks[0].experts)
    assert ours.blocks[0].groups.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
