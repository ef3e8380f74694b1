"""Gates and experts other than stacked MLPs on many devices; the oracle is one device."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from tests.devices.test_sharding import (
    CONFIG,
    SPARSE,
    assert_close,
    images,
    on,
    params_of,
    run_on,
    training,
)
from vmoe.config import (
    AttentionExpert,
    BiasBalanced,
    CnnExpert,
    CosineGate,
    ExpertList,
    GatedMlpExpert,
    IdentityExpert,
    MlpExpert,
    NoisyGate,
    TokenChoice,
    ZeroExpert,
    replace,
)
from vmoe.errors import UsageError
from vmoe.nn.moe import MoE
from vmoe.sharding import ONE_DEVICE, Placement

LIST = ExpertList(each=(MlpExpert(), *[CnnExpert()] * 4, IdentityExpert(), *[ZeroExpert()] * 2))


@pytest.mark.parametrize(
    ("fields", "mesh"),
    [
        ({"experts": AttentionExpert(num_heads=2)}, "expert=2"),
        ({"experts": LIST}, "expert=1"),
        ({"experts": CnnExpert(), "gate": NoisyGate(), "shared_experts": 2}, "expert=4"),
        ({"experts": GatedMlpExpert(), "gate": CosineGate(), "shared_experts": 1}, "expert=8"),
    ],
    ids=["attention", "list", "cnn with noisy_gate", "gated_mlp with cosine_gate"],
)
def test_other_experts_and_gates_have_the_logits_losses_and_gradients_of_one_device(
    fields: dict[str, Any], mesh: str
) -> None:
    config = replace(CONFIG, moe=replace(SPARSE, **fields))
    params, batch = params_of(config), (images(16), np.ones(16, bool))
    oracle = run_on(ONE_DEVICE, training(config, ONE_DEVICE), params, *batch)
    placement = on(mesh, config)
    own: Any = jax.tree.leaves(placement.params(params)["blocks"][0]["mlp"]["experts"])
    assert all(sharding.is_fully_replicated == (mesh == "expert=1") for sharding in own)
    assert_close(run_on(placement, training(config, placement), params, *batch), oracle, mesh)


def test_experts_of_different_kinds_are_not_split() -> None:
    config = replace(CONFIG, moe=replace(SPARSE, experts=LIST))
    assert (on("", config).data, on("", config).expert) == (8, 1)
    with pytest.raises(UsageError, match="experts.kind=list .* split over 2 devices; .* expert=1"):
        on("expert=2", config)


def test_experts_may_have_parameters_without_axes() -> None:
    for fsdp in (False, True):
        placement = on("expert=4", fsdp=fsdp)
        tree = {"experts": {"scale": np.ones(()), "kernel": np.ones((8, 64, 64))}}
        own = placement.params(tree)["experts"]
        assert own["scale"].is_fully_replicated and not own["kernel"].is_fully_replicated


def test_the_rows_of_one_sequence_are_shared_by_all_devices() -> None:
    """With room for every choice; 37 rows are 8 groups of 5, and some rows are padding."""
    modules = [nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(8)]
    router = TokenChoice(noise_std=0.0, capacity=37)
    rows = np.random.default_rng(0).normal(size=(37, 4)).astype(np.float32)
    mask = np.arange(37) % 7 > 0

    def run(placement: Placement) -> tuple[Any, tuple[int, ...]]:
        gate = nnx.Linear(4, 8, use_bias=False, rngs=nnx.Rngs(9))
        layer = MoE(modules, gate, router, placement=placement)
        forward = nnx.jit(lambda layer, rows, mask: layer.forward(rows, mask=mask))
        outputs, record = forward(layer, rows, mask)
        return np.asarray(outputs), record.valid.shape

    (ours, groups), (oracle, _) = run(on("expert=8")), run(ONE_DEVICE)
    assert groups == (8, 5) and not ours[~mask].any()
    assert_close(ours, oracle, "expert=8")


def test_a_layer_refuses_a_batch_that_its_devices_cannot_share() -> None:
    rngs = nnx.Rngs(0)
    modules = [nnx.Linear(4, 4, rngs=rngs) for _ in range(8)]
    layer = MoE(modules, nnx.Linear(4, 8, rngs=rngs), placement=on("expert=8"))
    with pytest.raises(UsageError, match=r"each of 8 devices .* use 8 or 16"):
        jax.eval_shape(layer, np.ones((9, 2, 4), np.float32))


def test_a_mesh_of_jax_make_mesh_has_the_outputs_and_gradients_of_one_device() -> None:
    """Its axes are Explicit. The layer's are not, so a model whose are calls it in auto_axes."""
    rngs = nnx.Rngs(0)
    modules = [nnx.Linear(4, 4, rngs=rngs) for _ in range(8)]
    gate = nnx.Linear(4, 8, use_bias=False, rngs=rngs)
    tokens = np.float32(np.random.default_rng(0).normal(size=(8, 3, 4)))
    router = TokenChoice(images_per_group=1)
    mesh = jax.make_mesh((2, 4), ("data", "expert"))
    placement = Placement(mesh)
    layer = MoE(modules, gate, router, placement=placement)
    params = nnx.state(layer)
    nnx.update(layer, jax.device_put(params, placement.params(params)))
    over_all = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    explicit = jax.device_put(tokens, over_all)

    def gradients(layer: MoE, tokens: jax.Array, wrap: Any = lambda f: f) -> Any:
        graph, state = nnx.split(layer)
        function = wrap(lambda state, x: nnx.merge(graph, state)(x))
        return jax.jit(jax.grad(lambda s, x: (function(s, x) ** 2).sum()))(state, tokens)

    oracle = gradients(MoE(modules, gate, router), tokens)
    in_auto_axes = functools.partial(jax.sharding.auto_axes, out_sharding=over_all)
    for ours in (
        gradients(layer, jax.device_put(tokens, placement.batch())),
        gradients(layer, explicit, in_auto_axes),
    ):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, oracle)
    for each in (layer, MoE(modules, gate, router)):
        with pytest.raises(
            UsageError, match=r"Explicit axes .* placement.batch.*, or call .*auto_axes"
        ):
            jax.jit(each)(explicit)


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_state_in_a_shard_map_of_ones_own_follows_the_load_of_all_devices(
    check_vma: bool,
) -> None:
    experts = [nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(4)]
    gate = nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(4))
    tokens = np.float32(np.random.default_rng(0).normal(size=(8, 3, 4)))
    router = BiasBalanced(update_rate=0.1, images_per_group=1)
    graph, state = nnx.split(MoE(experts, gate, router))

    def bias(state: nnx.State, tokens: jax.Array) -> jax.Array:
        layer = nnx.merge(graph, state, copy=True)
        layer.update_state(layer.forward(tokens)[1])
        assert layer.state is not None
        return layer.state["bias"][...]

    mesh = jax.sharding.Mesh(jax.devices(), "x")
    specs = PartitionSpec(), PartitionSpec("x")
    on_devices = jax.shard_map(
        bias, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=check_vma
    )
    ours = jax.jit(on_devices)(state, tokens)
    expected = jax.jit(bias)(state, tokens)
    assert (expected != 0).any()
    for shard in ours.addressable_shards:
        np.testing.assert_array_equal(shard.data, expected)


def test_a_mesh_with_other_axes_is_refused_in_one_line() -> None:
    for shape, names in (((2, 4), ("dp", "ep")), ((4, 2), ("expert", "data")), ((8,), ("data",))):
        with pytest.raises(UsageError, match=r"axes \(.*: name them \('data', 'expert'\)"):
            Placement(jax.make_mesh(shape, names))
