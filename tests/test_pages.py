"""The Python of pages for people who come from other libraries runs as written."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


def test_the_code_beside_timms_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "notebooks" / "from_timm.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    ours = [block for block in blocks if "vmoe" in block or "loaded" in block or "# new" in block]
    assert len(ours) == 5
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg")
    monkeypatch.chdir(tmp_path)
    names = {"DIR": ROOT / "tests" / "golden" / "weights" / "timm_vit"}
    exec("\n".join(ours), names)  # the page is ours
    assert names["grid"].shape == (1, 4, 4, 24) and len(names["records"]) == 1
    assert names["model"](names["images"]).shape == (1, 5)
