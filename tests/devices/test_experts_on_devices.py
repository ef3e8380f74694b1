"""Gates and experts other than stacked MLPs on many devices; the oracle is one device."""

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

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
    CnnExpert,
    CosineGate,
    ExpertList,
    GatedMlpExpert,
    IdentityExpert,
    MlpExpert,
    NoisyGate,
    ZeroExpert,
    replace,
)
from vmoe.errors import UsageError
from vmoe.nn.moe import MoE
from vmoe.sharding import ONE_DEVICE

LIST = ExpertList(each=(MlpExpert(), *[CnnExpert()] * 4, IdentityExpert(), *[ZeroExpert()] * 2))


@pytest.mark.parametrize(
    ("fields", "mesh"),
    [
        ({"experts": CnnExpert()}, "expert=4"),
        ({"experts": AttentionExpert(num_heads=2)}, "expert=2"),
        ({"experts": GatedMlpExpert()}, "expert=8"),
        ({"experts": LIST}, "expert=1"),
        ({"gate": NoisyGate(), "shared_experts": 2}, "expert=4"),
        ({"gate": CosineGate(), "shared_experts": 1}, "expert=8"),
    ],
    ids=["cnn", "attention", "gated_mlp", "list", "noisy_gate", "cosine_gate"],
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


def test_a_layer_refuses_a_batch_that_its_devices_cannot_share() -> None:
    rngs = nnx.Rngs(0)
    modules = [nnx.Linear(4, 4, rngs=rngs) for _ in range(8)]
    layer = MoE(modules, nnx.Linear(4, 8, rngs=rngs), placement=on("expert=8"))
    with pytest.raises(UsageError, match=r"each of 8 devices .* use 8 or 16"):
        jax.eval_shape(layer, np.ones((9, 2, 4), np.float32))
