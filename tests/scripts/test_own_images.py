"""Fine-tuning on own images: rows that are made once, and the tables of docs/your_images.md."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scripts.experiments import own_images
from tests.script import commands_in_this_process, experiment
from vmoe.config import to_json

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "your_images.md"
NAMES = "ABCDEFGHI"


def test_the_tables_of_the_page_are_made_from_the_committed_rows_without_training(
    tmp_path: Path,
) -> None:
    page = tmp_path / "page.md"
    page.write_text(re.sub(r"^\|.*\n", "", PAGE.read_text(), flags=re.MULTILINE))
    experiment("own_images", "--workdir", tmp_path / "runs", "--write", page)
    assert not list((tmp_path / "runs").iterdir())

    def section(text: str) -> str:
        return text.partition("<!-- own_images: begin -->")[2].partition("<!-- own_images: end")[0]

    assert section(page.read_text()) == section(PAGE.read_text())
    assert "drawings" in section(PAGE.read_text())


def test_missing_data_is_one_line_that_names_the_script_which_makes_it(
    tmp_path: Path,
) -> None:
    folders = [f"--{name}={tmp_path / name}" for name in ("workdir", "rows", "data")]
    with pytest.raises(SystemExit) as caught:
        experiment("own_images", *folders)
    assert f"{tmp_path / 'data' / 'twitter.csv'}: no such file" in str(caught.value)
    assert "python -m scripts.prepare.emoji" in str(caught.value) and "\n" not in str(caught.value)


def test_the_config_of_the_page_is_the_one_that_was_measured() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (block,) = [each for each in blocks if "TrainConfig" in each]
    names: dict[str, Any] = {}
    exec(block, names)
    assert to_json(names["config"]) == to_json(own_images.recipe("vmoe_emoji", "folder:pets", 2))


@pytest.mark.process
@pytest.mark.slow
def test_a_cell_is_trained_on_a_share_of_each_category_and_has_a_digit_for_each_test_image(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    lines, rng = ["path,label,split"], np.random.default_rng(0)
    for i in range(63):
        split = ("train", "train", "train", "train", "train", "validation", "test")[i // 9]
        (data / split).mkdir(parents=True, exist_ok=True)
        name = f"{split}/{i}.png"
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(data / name)
        lines.append(f"{name},{NAMES[i % 9]},{split}")
    (data / "twitter.csv").write_text("\n".join(lines) + "\n")
    options = [f"--{name}={tmp_path / name}" for name in ("workdir", "rows", "data")]
    options += [f"--words={tiny_run}", "--jobs=1"]  # so that nothing is pre-trained
    commands_in_this_process(monkeypatch)
    monkeypatch.setattr(own_images, "DRAWINGS", (36, 45))
    cell = own_images.Cell("words", 36, "head", 1e-2, 20)
    handler = signal.getsignal(signal.SIGTERM)
    own_images.OwnImages(own_images.options_of(options)).make([(cell, 3)])
    signal.signal(signal.SIGTERM, handler)
    chosen = (tmp_path / "workdir" / "lists" / "36.csv").read_text().splitlines()[1:]
    assert sorted(x.split(",")[1] for x in chosen if x.endswith("train")) == sorted(NAMES * 4)
    row = json.loads((tmp_path / "rows").read_text())
    assert (row["model"], row["seed"]) == ("words-36-head-1e-02-20", 3)
    assert len(row["test"]) == 9 and set(row["test"]) <= set("01") and row["steps"] == 23
    assert (row["drawings"], row["trained"], row["rate"]) == (36, "head", 0.01)
