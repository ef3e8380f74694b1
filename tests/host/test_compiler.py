"""What `import vmoe` brings; jax computes right numbers, and versions that do not are named."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from vmoe.host.compiler import RIGHT_FLAG, ROWS, wrong_rows


@pytest.fixture
def jaxlib_0_10_2(tmp_path: Path) -> Path:
    """A folder that makes Python find the metadata of jaxlib 0.10.2."""
    folder = tmp_path / "jaxlib-0.10.2.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.4\nName: jaxlib\nVersion: 0.10.2\n")
    return tmp_path


def test_squares_are_exact_in_float32_and_float64() -> None:
    """Oracle: numpy. jaxlib 0.10.2 gets the last row wrong in either dtype."""
    assert wrong_rows("float32", ROWS) == []
    with jax.enable_x64():
        assert wrong_rows("float64", 16_385) == []


@pytest.mark.process
def test_importing_vmoe_warns_once_of_a_jaxlib_that_errs_unless_a_flag_makes_it_right(
    jaxlib_0_10_2: Path,
) -> None:
    code = "import sys, vmoe, vmoe.config; assert 'jax' not in sys.modules; import vmoe.errors"
    paths = f"{jaxlib_0_10_2}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    for flags, warnings in (("", 1), (RIGHT_FLAG, 0)):
        result = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": paths, "XLA_FLAGS": flags},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        assert result.stderr.count("jaxlib 0.10.2 computes wrong numbers on CPUs") == warnings
        assert result.stderr.count("pip install 'jax>=0.10.1,!=0.10.2,!=0.11.0'") == warnings


@pytest.mark.process
def test_the_rooms_of_vmoe_are_its_attributes_and_are_imported_on_first_use() -> None:
    code = """
import sys, vmoe
assert {"analysis", "classic", "multitask"} <= set(dir(vmoe))
assert not {"jax", "sklearn", "vmoe.classic"} & set(sys.modules)
vmoe.classic.MixtureOfExpertsRegressor
assert "jax" not in sys.modules
vmoe.multitask.MultiTaskClassifier, vmoe.analysis.capture
"""
    subprocess.run([sys.executable, "-c", code], check=True)
