"""What a run checks and says before its first step."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.command import TINY
from vmoe import config as configs
from vmoe.config import TrainConfig
from vmoe.errors import UsageError
from vmoe.sharding import Placement
from vmoe.train.check import open_data, plan_program
from vmoe.train.setup import setup


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run on a list of images with two labels each."""
    folder = tmp_path_factory.mktemp("several")
    for i in range(60):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(folder / f"{i}.png")
    lines = [f"{i}.png,{'a|b' if i % 2 else 'b|c'}" for i in range(60)]
    (folder / "list.csv").write_text("\n".join(["path,labels", *lines]))
    data = dict(name=f"manifest:{folder / 'list.csv'}", check="decode")
    return configs.replace(configs.load(TINY), batch_size=8, data=data)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_several_labels_per_image_with_the_softmax_loss_are_reported(
    several: TrainConfig, loss: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with setup(configs.replace(several, loss=loss), tmp_path / "run"):
        reported = capsys.readouterr().err
    line = "several labels, which share the target equally with loss=softmax; loss=sigmoid learns"
    assert (line in reported) == (loss == "softmax")


def test_a_check_of_files_is_refused_if_no_data_set_has_files(several: TrainConfig) -> None:
    assert open_data(several).source.max_labels == 2
    config = configs.replace(several, data=dict(name="digits"))
    with pytest.raises(
        UsageError, match=r"data.check=decode with data.name=digits: only the files"
    ):
        open_data(config)


def test_planning_puts_no_batch_on_a_device(
    several: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = open_data(several)
    monkeypatch.setattr(Placement, "make_global_array", None)  # so making one would fail
    plan_program(several, data, mesh="", fsdp=False)
