"""``vmoe check``: what it finds in this installation, and in one that is wrong."""

import json
from pathlib import Path

import pytest

from tests.command import forked

pytestmark = pytest.mark.process


def test_an_installation_that_is_right_passes_and_all_of_it_is_shown(tmp_path: Path) -> None:
    result = forked("check", environment={"XDG_CACHE_HOME": str(tmp_path), "COLUMNS": "80"})
    assert result.returncode == 0, result.stderr + result.stdout
    assert result.stdout.endswith("all right\n") and not result.stderr
    assert all(len(line) <= 80 for line in result.stdout.splitlines())
    for part in ("jaxlib", "cpu: ", "0 wrong", "logits differ by", "WEBP", "hf", "not made yet"):
        assert part in result.stdout, part


def test_what_is_wrong_with_an_installation_is_named_with_its_remedy(tmp_path: Path) -> None:
    """Metadata in front of the installed ones, a file where the cache should be, no GPU."""
    for name, version in (("jaxlib", "0.11.0"), ("flax", "0.1"), ("wandb", "0.99")):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        metadata = f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n"
        (folder / "METADATA").write_text(metadata)
    cache = tmp_path / "file"
    cache.touch()
    environment = {"PYTHONPATH": str(tmp_path), "XDG_CACHE_HOME": str(cache)}
    gpu = {"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": ""}
    result = forked("check", "--json", environment=environment | gpu)
    assert result.returncode == 3
    assert result.stderr == "vmoe: 4 problems: jaxlib, flax, JAX, vmoe's cache\n"
    report = json.loads(result.stdout)
    version, old, device, folder = report["problems"]
    assert "jaxlib 0.11.0 computes wrong numbers on CPUs" in version
    assert "pip install 'jax>=0.10.1,!=0.10.2,!=0.11.0'" in version
    assert report["versions"]["jaxlib"] == {"found": "0.11.0", "problem": version[8:]}
    assert "0.1 is installed, vmoe needs flax>=" in old and "pip install 'flax>=" in old
    assert "JAX_PLATFORMS=cuda: JAX finds no such device" in device
    assert "not computed" in report["numbers"]["squares of 0 to 32,768"]["found"]
    assert f"{cache} is not a folder" in folder and "XDG_CACHE_HOME" in folder
    assert report["extras"]["wandb"]["found"] == "vmoe train --wandb; installed"
    assert "missing: pip install onnx" in report["extras"]["onnx"]["found"]
