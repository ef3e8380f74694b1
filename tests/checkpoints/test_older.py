"""A run of an older version: gates were called routers, and settings stood beside their owners."""

import json
import shutil
from pathlib import Path

import pytest

from tests.command import TINY, vmoe
from tests.run_folder import arrays
from vmoe.checkpoints.older import CURRENT, OLDER, renamed
from vmoe.checkpoints.run import Checkpoints
from vmoe.config import load
from vmoe.train.state import abstract_state, checkpoint_items

STEPS = ("--steps=4", "--checkpoint-every=2", "--optim.warmup-steps=0")
TRAIN = ("train", "--config", TINY, *STEPS, "--workdir")


def make_older(run: Path, step: int) -> None:
    """Writes the checkpoint and the config of a run as an older version did."""
    target = checkpoint_items(abstract_state(load(run / "config.json")))
    sizes = dict(every=1, keep_latest=9)
    with Checkpoints(run, **sizes) as checkpoints:
        restored = checkpoints.restore_newest(**target)
    shutil.rmtree(run / "checkpoints" / str(step))
    with Checkpoints(run, **sizes) as checkpoints:
        checkpoints.save(step, restored.files, **renamed(restored.items, CURRENT, OLDER))
    fields = json.loads((run / "config.json").read_text())
    layer = fields["model"]["moe"]
    layer["expert_dropout"] = layer["experts"].pop("dropout")
    for name in ("capacity_factor", "dropless", "images_per_group"):
        layer[name] = layer["router"].pop(name)
    for name in ("implementation", "shared_init"):
        layer[name] = layer["experts"].pop(name)
    (run / "config.json").write_text(json.dumps(fields))


@pytest.mark.process
def test_a_run_of_an_older_version_resumes_bit_for_bit(tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert vmoe(*TRAIN, whole).returncode == 0
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "4")
    now = arrays(run, 2)
    make_older(run, 2)
    written = (run / "checkpoints" / "2" / "checksums" / "metadata").read_text()
    assert "params/blocks/0/mlp/router/kernel" in written and arrays(run, 2) == now
    resumed = vmoe(*TRAIN, run)
    assert resumed.returncode == 0 and "resumed from step 2" in resumed.stderr, resumed.stderr
    assert arrays(run, 4) == arrays(whole, 4)
