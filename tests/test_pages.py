"""The Python of the pages runs as written."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vmoe import models

ROOT = Path(__file__).parents[1]


def python_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.mark.slow
def test_the_code_of_the_readme_predicts_and_creates_a_model() -> None:
    names: dict[str, Any] = {}
    exec(python_of("README.md")[0], names)  # the page is ours
    assert names["loaded"].class_names[names["logits"][0].argmax()] == "Ankle boot"
    assert names["model"].config.num_classes == 10


def test_the_config_of_the_readme_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    exec(python_of("README.md")[1], names)
    assert models.build_abstract(names["config"].model).config.moe_blocks


def test_the_code_beside_timms_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = python_of("notebooks/from_timm.md")
    words = ("vmoe", "loaded", "# new", "sparse")
    ours = [block for block in blocks if any(word in block for word in words)]
    assert len(ours) == 6
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"DIR": ROOT / "tests" / "golden" / "weights" / "timm_vit"}
    exec("\n".join(ours), names)
    assert names["grid"].shape == (1, 4, 4, 24) and len(names["records"]) == 1
    assert names["model"](names["images"]).shape == (1, 5)
    assert np.isfinite(names["value"])
    (record,) = names["sparse"].forward(names["images"])[1].values()
    assert record.aux_loss > 0  # of the losses that the loop adds
