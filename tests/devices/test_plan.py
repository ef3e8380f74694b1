"""What a plan says of devices that are not there is what these eight hold, send and compute.

The oracles: the arrays of a state that was really made, the compiled step of the whole model, its
whole program, and sums by hand.
"""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from vmoe import models
from vmoe.analysis import capture
from vmoe.config import MoEConfig, OptimConfig, TrainConfig, ViTConfig, replace
from vmoe.costs.chips import CHIPS
from vmoe.costs.collectives import KEEP_APART, Collective, collectives
from vmoe.costs.flops import count_flops
from vmoe.costs.residuals import Residual, residuals
from vmoe.data.pipeline import Batch
from vmoe.mesh import place
from vmoe.nn.losses import cross_entropy
from vmoe.plan.candidates import exchanges
from vmoe.plan.memory import memory
from vmoe.plan.segments import pieces
from vmoe.sharding import Placement
from vmoe.train.step import compile_program

MODEL = ViTConfig(
    patch_size=4,
    width=64,
    depth=4,
    mlp_dim=128,
    num_heads=4,
    image_size=8,
    num_classes=10,
    sparse_blocks=(1, 2),
    moe=MoEConfig(num_experts=8, images_per_group=2),
)
CONFIG = TrainConfig(model=MODEL, batch_size=32, optim=OptimConfig(warmup_steps=10), ema_decay=0.9)
placed = pytest.mark.parametrize(
    "placement",
    [
        pytest.param((mesh, fsdp), id=f"{mesh}{' fsdp' * fsdp}")
        for mesh, fsdp in [("expert=4", False), ("expert=2", True), ("expert=1", True)]
    ],
    indirect=True,
)


@pytest.fixture
def placement(request: pytest.FixtureRequest) -> Placement:
    mesh, fsdp = request.param
    return place(MODEL, jax.devices(), mesh=mesh, fsdp=fsdp)


def step_arguments(placement: Placement) -> tuple[Batch, jax.ShapeDtypeStruct]:
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=placement.batch())
    b, side = CONFIG.batch_size, MODEL.image_size
    images, labels = shape((b, side, side, 3), "f4"), shape((b, MODEL.num_classes), "f4")
    return Batch(images, labels, shape((b,), bool)), shape((placement.devices,), bool)


@placed
def test_the_bytes_of_the_state_are_those_of_a_state_that_was_made(placement: Placement) -> None:
    program = compile_program(CONFIG, placement)
    made = program.init()
    found = memory(CONFIG, placement, compile_program(CONFIG).like)
    for of, planned in [
        (made.params, found.parameters),
        (made.moments, found.optimizer),
        (made.ema, found.average),
    ]:
        for device in jax.devices():
            held = sum(
                part.data.nbytes
                for array in jax.tree.leaves(of)
                for part in array.addressable_shards
                if part.device == device
            )
            assert held == planned


@placed
def test_the_messages_are_those_of_the_compiled_step_of_the_whole_model(
    placement: Placement,
) -> None:
    program = compile_program(CONFIG, placement)
    compiled = program.step.lower(program.like, *step_arguments(placement)).compile()
    whole, planned = collections.Counter(), collections.Counter()
    for collective in collectives(compiled.as_text()):
        whole[collective.kind, len(collective.group)] += collective.sent
    for exchange in exchanges(CONFIG, [placement], CHIPS["h100"])[0]:
        planned[exchange.kind, exchange.group] += exchange.sent * exchange.times
    assert planned["all-to-all", placement.expert] > 0 or placement.expert == 1
    for kind in whole | planned:
        # What is left are norms and metrics: some hundred numbers.
        assert 0 <= whole[kind] - planned[kind] <= 2000 < sum(whole.values()) / 100, kind


@pytest.mark.parametrize("remat", [False, True])
def test_the_flops_are_those_of_the_program_of_the_whole_step(remat: bool) -> None:
    config = replace(CONFIG, model=dict(remat=remat))
    placement = place(MODEL, jax.devices(), mesh="expert=4")
    step = compile_program(config, placement).step
    like = compile_program(config).like
    whole = count_flops(jax.make_jaxpr(step)(like, *step_arguments(placement)).jaxpr)
    assert sum(piece.flops() * piece.times for piece in pieces(config, placement)) == whole


def test_what_the_pieces_keep_is_what_the_whole_model_keeps() -> None:
    placement = place(MODEL, jax.devices(), mesh="expert=4")
    params = compile_program(CONFIG).like.params
    batch, _ = step_arguments(placement)

    def loss(params, images):
        model = models.with_params(MODEL, params, placement=placement)
        logits, records = capture(model, images, train=True, key=jax.random.key(0))
        balance = sum(record.aux_loss for record in records.values())
        return cross_entropy(logits, jnp.zeros(logits.shape), "softmax").mean() + balance

    whole = sum(
        residual.size * residual.itemsize
        for residual in residuals(loss, params, batch.images)
        if not residual.of_params
    )
    planned = memory(CONFIG, placement, compile_program(CONFIG).like).kept
    assert planned == pytest.approx(whole / placement.devices, rel=0.02)


def test_residuals_are_told_apart() -> None:
    kernel, x = jax.ShapeDtypeStruct((4, 4), "f4"), jax.ShapeDtypeStruct((8, 4), jnp.bfloat16)

    def rounded(kernel, x):
        return jnp.tanh(x.astype(jnp.float32) @ kernel.astype(jnp.bfloat16).astype(jnp.float32))

    found = residuals(rounded, kernel, x)
    assert set(found) == {
        Residual(size=16, itemsize=2, of_params=True, is_param=False),
        Residual(
            size=32, itemsize=2, of_params=False, is_param=False
        ),  # widened again for the product
        Residual(size=32, itemsize=4, of_params=False, is_param=False),  # the tanh
    }
    assert Residual(16, 4, True, True) in residuals(lambda kernel, x: x @ kernel, kernel, x)


def both(x: jax.Array) -> tuple[jax.Array, ...]:
    sums = jax.lax.psum(x, "data"), jax.lax.psum_scatter(x, "expert", tiled=True)
    moved = jax.lax.all_to_all(x * 2, "expert", 0, 0, tiled=True)
    return *sums, moved, jax.lax.all_gather(x * 3, ("data", "expert"), tiled=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_are_those_of_a_ring_in_the_type_of_the_program(dtype: str) -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "expert"))
    spec = PartitionSpec(("data", "expert"))
    program = jax.jit(
        jax.shard_map(both, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    )
    compiled = program.lower(jax.ShapeDtypeStruct((8 * 8, 16), dtype)).compile(KEEP_APART)
    put_in = 8 * 16 * jnp.dtype(dtype).itemsize
    assert sorted(collectives(compiled.as_text())) == [
        Collective("all-gather", put_in * 7, tuple(range(8))),
        Collective("all-reduce", put_in * 2 / 2, (0, 4)),
        Collective("all-to-all", put_in * 3 / 4, (0, 1, 2, 3)),
        Collective("reduce-scatter", put_in * 3 / 4, (0, 1, 2, 3)),
    ]


def test_what_leaves_an_island_takes_the_network() -> None:
    chip = CHIPS["h100"]  # islands of 8, 450 GB/s inside, 50 GB/s a device between
    inside, across = tuple(range(8)), tuple(range(32))
    assert chip.seconds(Collective("all-to-all", 450e9, inside)) == 1
    assert chip.seconds(Collective("all-to-all", 31e9, across)) == 24e9 / 50e9
    assert chip.seconds(Collective("all-reduce", 400e9, across)) == 1  # by 8 networks
    assert chip.seconds(Collective("all-reduce", 50e9, (0, 8, 16, 24))) == 1
