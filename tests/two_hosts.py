"""One of the two processes of ``test_distributed.py`` that differ: it runs all cases in turn.

``python -m tests.two_hosts`` prints a line for each case: the exit status and the message of the
error that ``train`` raises. Then it trains on photos of which half are damaged. Last it prints the
checkpoints of a folder that the second process sees in an earlier state, and its share of its cores
where both may run on the same cores, on others, and where the second may run on some of the first.
"""

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from tests.command import TINY
from vmoe import distributed
from vmoe.checkpoints.restore import sha256_of
from vmoe.checkpoints.run import Checkpoints
from vmoe.config import EvalConfig, load, replace
from vmoe.errors import VmoeError
from vmoe.train import train
from vmoe.workdir import lock
from vmoe.workdir.layout import read_config
from vmoe.workdir.lock import LOCK

DAMAGED = "folder:../damaged"  # relative to the folder of a host


class Case(NamedTuple):
    """A difference between the processes, or a run folder that all must refuse alike.

    Attributes:
        message: the first words of the error in both processes.
        config: changes of the config of the run in the folder, or else of a tiny one; one for both
            processes, or one for each.
        options: further arguments of ``train``.
        workdirs: the run folders, relative to the folder of the host.
    """

    message: str
    config: tuple[dict[str, Any], ...] = ({},)
    options: tuple[dict[str, Any], ...] = ({},)
    workdirs: tuple[str, ...] = ("../run",)
    status: int = 2


CASES = {
    "learning rate": Case(
        "process 1 has optim.lr=0.01, process 0 has optim.lr=0.001: give all processes the same",
        (dict(optim=dict(lr=0.001)), dict(optim=dict(lr=0.01))),
    ),
    "how slots are sent": Case(
        "process 1 has model.moe.exchange.chunks=2, process 0 has model.moe.exchange.chunks=1",
        ({}, dict(model=dict(moe=dict(exchange=dict(chunks=2))))),
    ),
    "number of evaluation sets": Case(
        "process 1 has evaluations.1.name=test, process 0 has evaluations.1.name=None",
        ({}, dict(evaluations=(EvalConfig(), EvalConfig("test", "test")))),
    ),
    "what follows a NaN": Case(
        "process 1 has on_nan=stop, process 0 has on_nan=rewind",
        options=(dict(on_nan="rewind"), dict(on_nan="stop")),
    ),
    "Weights & Biases": Case(  # process 1 refuses it if it is not installed
        "process 1",
        options=({}, dict(wandb="project")),
    ),
    "trained model to start from": Case("process 1: init=", options=({}, dict(init="../trained"))),
    "number of images": Case(
        "process 1 has training images=15, process 0 has training images=16",
        (dict(steps=None, epochs=8.0, data=dict(name="folder:fewer")),),
    ),
    "labels": Case("process 1 has training data=", (dict(data=dict(name="folder:renamed")),)),
    "pixels": Case(
        "process 1 has validation content=",
        (dict(evaluations=(EvalConfig(data="folder:repainted:validation"),)),),
    ),
    "a missing folder": Case(
        "process 1: folder:missing: no such folder", (dict(data=dict(name="folder:missing")),)
    ),
    "a model that does not fit": Case(
        "process 1: model.num_classes=1: folder:photos:train has 2 classes: raise it",
        ({}, dict(model=dict(num_classes=1))),
    ),
    "run folder": Case(
        "workdir here: process 1 does not see what the primary process sees there; use a workdir",
        workdirs=("here",),
    ),
    "run folder that is seen late": Case(
        "process 0: workdir new: it has metrics.csv but no config.json", workdirs=("new",)
    ),
    "list of checkpoints that catches up": Case(
        "process 0: workdir late: it has checkpoints but no config.json", workdirs=("late",)
    ),
    "list of checkpoints": Case(
        "workdir behind: process 1 does not see what the primary process sees there",
        workdirs=("behind",),
    ),
    "another config than the run's": Case(
        "process 0: workdir ../version holds a run of another config (seed is 0 there and 1 here)",
        (dict(seed=1),),
        workdirs=("../version",),
    ),
    "a checkpoint of another version, which is not corrupt": Case(
        "../version/checkpoints/20: checkpoint format 9", workdirs=("../version",), status=1
    ),
    "a checkpoint with a file that links to itself, which is not corrupt": Case(
        "../link/checkpoints/20: cannot be read (Too many levels of symbolic",
        workdirs=("../link",),
        status=1,
    ),
}


def make_hosts(folder: Path, trained: Path) -> list[Path]:
    """Makes the folders ``host0`` and ``host1``, with photos that differ as the cases require.

    Args:
        trained: a run with another model.
    """
    (folder / "trained").symlink_to(trained)
    index = Path("checkpoints", "20", "checksums", "metadata")
    version = shutil.copytree(trained, folder / "version") / index
    content = json.loads(version.read_text()) | {"format": 9}
    del content["sha256"]
    version.write_text(json.dumps(content | {"sha256": sha256_of(content)}))
    link = shutil.copytree(trained, folder / "link") / index
    link.unlink()
    link.symlink_to(link)
    make_damaged(folder / "damaged")
    hosts = [folder / "host0", folder / "host1"]
    for host in hosts:
        for name in ("photos", "fewer", "renamed", "repainted", "missing"):
            for split, count in (("train", 8), ("validation", 1), ("test", 1)):
                for i in range(2 * count):
                    path = host / name / split / ("cat", "dog")[i % 2] / f"{i}.bmp"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.new("RGB", (8, 8), (i, 0, 0)).save(path)
    (hosts[1] / "fewer" / "train" / "cat" / "2.bmp").unlink()
    cat = hosts[1] / "renamed" / "train" / "cat" / "2.bmp"
    cat.rename(cat.parents[1] / "dog" / "2.bmp")
    Image.new("RGB", (8, 8), (2, 0, 0)).save(hosts[1] / "repainted" / "validation/dog/1.bmp")
    shutil.rmtree(hosts[1] / "missing")
    (hosts[1] / "behind" / "checkpoints" / "10").mkdir(parents=True)
    (hosts[0] / "late" / "checkpoints" / "10").mkdir(parents=True)
    (hosts[1] / "late").mkdir()
    (hosts[0] / "new").mkdir()
    (hosts[0] / "new" / "metrics.csv").touch()
    for name in ("behind", "late"):
        (hosts[1] / name / LOCK).symlink_to(hosts[0] / name / LOCK)
    for host, steps in zip(hosts, ((1,), (1, 2)), strict=True):
        for step in steps:
            (host / "cached" / "checkpoints" / str(step)).mkdir(parents=True)
    metrics = json.dumps({1: {"accuracy": 0.5}})
    (hosts[0] / "cached" / "checkpoints" / "metrics.json").write_text(metrics)
    return hosts


def make_damaged(folder: Path) -> None:
    """Makes 60 photos; those with even numbers cannot be decoded."""
    for i in range(60):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        if i % 2 == 0:  # its header and its end are as they should be
            content = bytearray(path.read_bytes())
            content[1000:1100] = bytes(100)
            path.write_bytes(content)


def catch_up(workdir: str) -> None:
    """Shows what a network file system shows after a while."""
    if workdir == "late":
        Path("late/checkpoints/10").mkdir(exist_ok=True, parents=True)
    if workdir == "new" and not Path("new").exists():
        Path("new").symlink_to("../host0/new")


def shares() -> list[tuple[int, int]]:
    first = distributed.is_primary()
    distributed.quota = lambda: math.inf
    found = []
    for cores in (range(8), range(4) if first else range(4, 8), range(8) if first else range(2)):
        distributed.core_numbers = lambda cores=cores: list(cores)
        distributed.cores = lambda cores=cores: len(cores)
        found.append(distributed.share_of_host())
    return found


def main() -> None:
    distributed.initialize()
    tiny = replace(
        load(TINY),
        batch_size=4,
        data=dict(name="folder:photos"),
        model=dict(depth=1, sparse_blocks=(), num_classes=2),
    )
    for case in CASES.values():
        config, options, workdir = (
            each[0 if distributed.is_primary() else -1]
            for each in (case.config, case.options, case.workdirs)
        )
        lock.time = SimpleNamespace(sleep=lambda _, workdir=workdir: catch_up(workdir))
        try:
            there = Path(workdir, "config.json").exists()
            base = read_config(Path(workdir)) if there else tiny
            train(replace(base, **config), workdir, **options)
        except VmoeError as error:
            message = re.sub(r"^/.*/host\d/", "", str(error))  # a path from either host's folder
            print(json.dumps([error.status, message]))
    data = dict(name=DAMAGED, on_error="replace")
    train(
        replace(tiny, batch_size=16, steps=20, optim=dict(warmup_steps=5), data=data), "../replaced"
    )
    with Checkpoints(Path("cached"), every=1, keep_latest=1) as checkpoints:
        print(json.dumps([checkpoints.steps, checkpoints.is_best(1), *shares()]))


if __name__ == "__main__":
    main()
