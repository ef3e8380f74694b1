"""A program of jax.export gives the model's logits, without vmoe, for any number of images."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import vmoe
from tests.random_models import model_of, random_images, stored_model
from vmoe.checkpoints import export
from vmoe.config import ExpertChoice, Soft, TokenChoice
from vmoe.errors import UsageError

ROUTERS = {
    "order": TokenChoice(),
    "largest_gate": TokenChoice(priority="largest_gate"),
    "expert_choice": ExpertChoice(),
    "soft": Soft(),
}
WITHOUT_VMOE = "import sys; sys.modules['vmoe'] = sys.modules['flax'] = None"
RUN = "for b in (1, 2, 5): np.save(f'{b}.npy', program.call(params, np.load(f'images{b}.npy')))"


@pytest.mark.parametrize("router", [None, *ROUTERS])
def test_the_program_in_the_readme_gives_the_logits_without_vmoe_for_any_number_of_images(
    router: str | None, tmp_path: Path
) -> None:
    """The oracle is the model, called on the same images."""
    moe = dict(router=ROUTERS.get(router), images_per_group=1, capacity_factor=0.5)
    name, overrides = ("vit_tiny", {}) if router is None else ("vmoe_tiny_last2_e4", dict(moe=moe))
    stored = stored_model(name, **overrides)
    folder = tmp_path / "program"
    export.write(folder, stored, shard_bytes=10_000)
    batches = {b: random_images(stored, b) for b in (1, 2, 5)}
    for b, images in batches.items():
        np.save(folder / f"images{b}.npy", images)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    result = subprocess.run(
        [sys.executable, "-I", "-c", f"{WITHOUT_VMOE}\n{code}\n{RUN}"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and result.stdout == "(2, 10)\n", result.stderr
    model = model_of(stored)
    for b, images in batches.items():
        expected = np.asarray(model(images))
        scale = np.abs(expected).max()
        np.testing.assert_allclose(
            np.load(folder / f"{b}.npy") / scale, expected / scale, atol=1e-5
        )


def test_config_json_describes_inputs_outputs_classes_and_files(tmp_path: Path) -> None:
    stored = stored_model("vit_tiny")
    export.write(tmp_path, stored)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["inputs"]["images"] == {
        "shape": ["b", 32, 32, 3],
        "dtype": "float32",
        "range": [-1, 1],
    }
    assert content["outputs"]["logits"]["shape"] == ["b", 10]
    assert content["class_names"] == list(stored.class_names)
    assert content["preprocessing"]["image_size"] == 32
    assert set(content["sha256"]) == {"model.jaxexport", "model.safetensors"}
    for name, expected in content["sha256"].items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == expected


def test_a_program_is_neither_overwritten_nor_read_as_a_model(tmp_path: Path) -> None:
    stored = stored_model("vit_tiny")
    export.write(tmp_path, stored)
    with pytest.raises(UsageError, match="it is not empty"):
        export.write(tmp_path, stored)
    with pytest.raises(UsageError, match="a program of jax.export"):
        vmoe.load(tmp_path)
