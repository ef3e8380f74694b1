"""ONNX files give the logits and the decisions of the model, in ONNX Runtime.

Tests that convert run where jax2onnx and onnxruntime are installed; ``scripts/check_onnx.py``
installs them in an environment of its own.
"""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.random_models import model_of, random_images, stored_model
from vmoe.axes import SoftRouting
from vmoe.checkpoints import onnx
from vmoe.checkpoints.matmul_form import matmul_form
from vmoe.config import ExpertChoice, Soft, TokenChoice

ROUTERS = {
    "order": TokenChoice(),
    "largest_gate": TokenChoice(priority="largest_gate", normalize_weights=True),
    "random": TokenChoice(k=1, priority="random"),
    "expert_choice": ExpertChoice(),
    "soft": Soft(),
}


def one_image_per_group(router: str | None):
    """A tiny model whose tokens lack slots; a dense one if the router is None."""
    if router is None:
        return stored_model("vit_tiny")
    moe = dict(router=ROUTERS[router], images_per_group=1, capacity_factor=0.5)
    return stored_model("vmoe_tiny_last2_e4", moe=moe)


@pytest.mark.parametrize("router", [None, *ROUTERS])
def test_a_model_without_scatters_has_the_same_decisions_and_logits(router: str | None) -> None:
    stored = one_image_per_group(router)
    images = random_images(stored, 3)
    expected, records = model_of(stored).forward(images)
    logits, own_records = onnx.without_scatters(stored.config, stored.params).forward(images)
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


@pytest.mark.parametrize("router", [None, *ROUTERS])
def test_onnx_runtime_gives_the_logits_for_any_number_of_images(
    router: str | None, tmp_path: Path
) -> None:
    pytest.importorskip("jax2onnx")
    runtime = pytest.importorskip("onnxruntime")
    stored = one_image_per_group(router)
    onnx.write(tmp_path / "model.onnx", stored)
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["class_names"]) == list(stored.class_names)
    assert json.loads(metadata["preprocessing"])["image_size"] == 32
    model = model_of(stored)
    for b in (1, 5):
        images = random_images(stored, b)
        expected = np.asarray(model(images))
        (logits,) = session.run(["logits"], {"images": images})
        scale = np.abs(expected).max()
        np.testing.assert_allclose(logits / scale, expected / scale, atol=1e-5)


@pytest.mark.parametrize("router", [None, "order", "soft"])
def test_matmul_form_multiplies_only_matrices_and_changes_no_logits(router: str | None) -> None:
    stored = one_image_per_group(router)
    model = onnx.without_scatters(stored.config, stored.params)
    images = jnp.asarray(random_images(stored, 2))
    function = matmul_form(jax.vmap(lambda image: model(image[None])[0]))
    program = jax.make_jaxpr(function)(images).jaxpr
    products = [eqn for eqn in program.eqns if eqn.primitive.name == "dot_general"]
    assert products and all(atom.aval.ndim <= 3 for eqn in products for atom in eqn.invars)
    np.testing.assert_allclose(function(images), model(images), rtol=1e-4, atol=1e-4)


def test_without_jax2onnx_the_message_says_how_to_install_it(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from tests.random_models import stored_model
from vmoe.checkpoints import onnx
from vmoe.errors import UsageError
sys.modules["jax2onnx"] = None
try:
    onnx.write(Path({str(tmp_path / "model.onnx")!r}), stored_model("vit_tiny"))
except UsageError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == f"writing ONNX needs jax2onnx: {onnx.INSTALL}\n", result.stderr
    assert not (tmp_path / "model.onnx").exists()
