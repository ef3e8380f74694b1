"""ONNX files give the logits and the decisions of the model, in ONNX Runtime.

Tests that convert run where jax2onnx and onnxruntime are installed (``onnx_file.INSTALL``).
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.extend.core import jaxpr_as_fun

from tests.random_models import PARTS, forward, model_of, outputs, random_images, stored_model
from tests.routers import grouped
from vmoe.axes import SoftRouting
from vmoe.checkpoints.export import onnx_file
from vmoe.checkpoints.export.matmul_form import matmul_form
from vmoe.config import (
    AttentionExpert,
    BiasBalanced,
    CnnExpert,
    ExpertChoice,
    ExpertList,
    GShard,
    Hash,
    MlpExpert,
    Random,
    Router,
    Sinkhorn,
    Soft,
    Switch,
    TokenChoice,
    ZeroExpert,
    replace,
)
from vmoe.errors import UsageError

ROUTERS = {
    "order": TokenChoice(),
    "largest_gate": TokenChoice(priority="largest_gate", normalize_weights=True),
    "random": TokenChoice(k=1, priority="random"),
    "expert_choice": ExpertChoice(),
    "soft": Soft(),
    "later": TokenChoice(),
}


def one_image_per_group(router: str | None):
    """A tiny model whose tokens lack slots; a dense one if the router is None."""
    if router is None:
        return stored_model("vit_test", depth=2)
    own = replace(ROUTERS[router], capacity_factor=0.5)
    moe = dict(router=grouped(own, 1), shared_experts=1)
    moe |= dict(shared_gate=True, routed_scale=2.5)
    blocks = dict(sparse_blocks=(1,), **PARTS) if router == "later" else dict(sparse_blocks=(0, 1))
    return stored_model("vmoe_test_last2_e4", depth=2, **blocks, moe=moe)


@pytest.mark.long_after(2)
@pytest.mark.parametrize("router", [None, *ROUTERS])
def test_a_model_without_scatters_has_the_same_decisions_and_logits(router: str | None) -> None:
    stored = one_image_per_group(router)
    images = random_images(b=3)
    expected, records = forward(model_of(stored), images)
    logits, own_records = forward(onnx_file.without_scatters(stored.config, stored.params), images)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits / scale, expected / scale, atol=1e-5)
    for block, record in records.items():
        if not isinstance(record.routing, SoftRouting):
            g, s, e = record.gates.shape
            slots = np.zeros((g, s + 1, e, record.routing.choices.shape[2]))
            np.put_along_axis(slots, np.asarray(record.routing.tokens)[:, None], 1, axis=1)
            np.testing.assert_array_equal(own_records[block].routing.dispatch, slots[:, :s])
            if router != "expert_choice":
                assert record.routing.dropped.any()


@pytest.mark.parametrize(
    "router", [Switch(), GShard(), BiasBalanced(), Random(), Hash(), Sinkhorn()]
)
def test_a_router_that_needs_scatters_is_refused_by_its_kind(router: Router) -> None:
    stored = stored_model(
        "vmoe_test_last2_e4", depth=2, sparse_blocks=(1,), moe=dict(router=router)
    )
    with pytest.raises(UsageError, match=f"router.kind={router.kind} with block=1: an ONNX file"):
        onnx_file.without_scatters(stored.config, stored.params)


@pytest.mark.parametrize("router", [None, *ROUTERS])
def test_onnx_runtime_gives_the_logits_for_any_number_of_images(
    router: str | None, tmp_path: Path
) -> None:
    pytest.importorskip("jax2onnx")
    runtime = pytest.importorskip("onnxruntime")
    stored = one_image_per_group(router)
    onnx_file.write(tmp_path / "model.onnx", stored)
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["class_names"]) == list(stored.class_names)
    assert json.loads(metadata["preprocessing"])["image_size"] == 32
    model = model_of(stored)
    for b in (1, 5):
        images = random_images(b=b)
        expected = np.asarray(outputs(model, images))
        (logits,) = session.run(["logits"], {"images": images})
        scale = np.abs(expected).max()
        np.testing.assert_allclose(logits / scale, expected / scale, atol=1e-5)


@pytest.mark.long_after(1)
@pytest.mark.parametrize("router", [None, "order", "soft"])
def test_matmul_form_multiplies_only_matrices_and_changes_no_logits(router: str | None) -> None:
    stored = one_image_per_group(router)
    model = onnx_file.without_scatters(stored.config, stored.params)
    images = random_images()
    function = jax.make_jaxpr(matmul_form(jax.vmap(lambda image: model(image[None])[0])))(images)
    products = [eqn for eqn in function.eqns if eqn.primitive.name == "dot_general"]
    assert products and all(atom.aval.ndim <= 3 for eqn in products for atom in eqn.invars)
    pads = [eqn.params["padding_config"] for eqn in function.eqns if eqn.primitive.name == "pad"]
    assert all(any(map(any, each)) for each in pads)  # jax2onnx pads no free number of images
    (logits,) = jax.jit(jaxpr_as_fun(function))(images)
    np.testing.assert_allclose(logits, outputs(model, images), rtol=1e-4, atol=1e-4)


def test_experts_that_mix_tokens_are_refused_by_their_kind() -> None:
    each = (MlpExpert(), CnnExpert(), AttentionExpert(), ZeroExpert())
    for experts in (CnnExpert(), ExpertList(each=each)):
        stored = stored_model(
            "vmoe_test_last2_e4", depth=1, sparse_blocks=(0,), moe={"experts": experts}
        )
        with pytest.raises(UsageError, match=f"kind={experts.kind} with block=0: ONNX has no exp"):
            onnx_file.without_scatters(stored.config, stored.params)


def test_without_jax2onnx_the_message_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jax2onnx", None)  # so Python says that it is not installed
    with pytest.raises(UsageError) as caught:
        onnx_file.write(tmp_path / "model.onnx", stored_model("vit_test", depth=2))
    assert str(caught.value) == f"writing ONNX needs jax2onnx: {onnx_file.INSTALL}"
    assert not (tmp_path / "model.onnx").exists()
