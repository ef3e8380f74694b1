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
from tests.random_models import PARTS, model_of, outputs, random_images, stored_model
from tests.routers import grouped
from vmoe.checkpoints.export import jax_program
from vmoe.checkpoints.stored import StoredModel
from vmoe.config import ExpertChoice, Soft, TokenChoice, replace
from vmoe.errors import UsageError

ROUTERS = {
    "dense": None,
    "order": TokenChoice(),
    "largest_gate": TokenChoice(priority="largest_gate"),
    "expert_choice": ExpertChoice(),
    "soft": Soft(),
    "later": TokenChoice(priority="largest_gate"),
}
BATCHES = (1, 5)
RUN_ALL = f"""
import os, sys
sys.modules["vmoe"] = sys.modules["flax"] = None
for router in {[*ROUTERS]}:
    os.chdir(router)
    exec(open("code.py").read())
    images = np.load("../images.npy")
    for b in {BATCHES}:
        np.save(f"../{{router}}{{b}}.npy", program.call(params, images[:b]))
    os.chdir("..")
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, StoredModel]]:
    """A folder with a program of each router, and the models they were written from."""
    folder, stored = tmp_path_factory.mktemp("programs"), {}
    for name, router in ROUTERS.items():
        if router is None:
            stored[name] = stored_model("vit_test", depth=1)
            jax_program.write(folder / name, stored[name])
        else:
            moe = dict(router=grouped(replace(router, capacity_factor=0.5), 1))
            sparse = dict(depth=2, sparse_blocks=(0,), moe=moe) | (PARTS if name == "later" else {})
            stored[name] = stored_model("vmoe_test_last2_e4", **sparse)
            jax_program.write(folder / name, stored[name], shard_bytes=10_000)
    return folder, stored


@pytest.fixture(scope="module")
def printed(written: tuple[Path, dict[str, StoredModel]]) -> list[str]:
    """The output of the code in each README; one process runs all, and saves further logits."""
    folder, _ = written
    np.save(folder / "images.npy", random_images(b=max(BATCHES)))
    for router in ROUTERS:
        readme = (folder / router / "README.md").read_text()
        (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
        (folder / router / "code.py").write_text(code)
    result = subprocess.run(
        [sys.executable, "-I", "-c", RUN_ALL], cwd=folder, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.process
@pytest.mark.parametrize("router", ROUTERS)
def test_the_program_in_the_readme_gives_the_logits_without_vmoe_for_any_number_of_images(
    router: str, written: tuple[Path, dict[str, StoredModel]], printed: list[str]
) -> None:
    """The oracle is the model, called on all images; each is its own group."""
    folder, stored = written
    assert printed == ["(2, 10)"] * len(ROUTERS)
    expected = np.asarray(outputs(model_of(stored[router]), random_images(b=max(BATCHES))))
    scale = np.abs(expected).max()
    for b in BATCHES:
        found = np.load(folder / f"{router}{b}.npy")
        np.testing.assert_allclose(found / scale, expected[:b] / scale, atol=1e-5)


def test_config_json_describes_inputs_outputs_classes_and_files(
    written: tuple[Path, dict[str, StoredModel]],
) -> None:
    folder, stored = written[0] / "dense", written[1]["dense"]
    content = json.loads((folder / "config.json").read_text())
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
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == expected


def test_a_program_is_neither_overwritten_nor_read_as_a_model(
    written: tuple[Path, dict[str, StoredModel]],
) -> None:
    folder, stored = written[0] / "dense", written[1]["dense"]
    with pytest.raises(UsageError, match="it is not empty"):
        jax_program.write(folder, stored)
    with pytest.raises(UsageError, match="a program of jax.export"):
        vmoe.load(folder)
