"""Files and data that may only change on purpose: formats, configs, splits and fingerprints.

Older runs resume, and models and data sets of earlier versions open, only if these stay the same.
For an intended change, ``python -m tests.test_frozen`` writes tests/golden/frozen again.
"""

import csv
import hashlib
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests.command import ROOT, vmoe
from tests.data.frozen import bmp, sources
from vmoe import config as configs
from vmoe.checkpoints import read, write
from vmoe.checkpoints.inspection import inspect

GOLDEN = ROOT / "tests" / "golden" / "frozen"
RECIPE = ROOT / "configs" / "tiny.py"  # has a dense block, too


def recipes() -> dict[str, str]:
    """The SHA-256 of the config.json of each config file."""
    texts = {path.stem: configs.to_json(configs.load(path)) for path in ROOT.glob("configs/*.py")}
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in sorted(texts.items())}


def names_in(path: Path) -> Any:
    """The names in a file: columns, keys, arrays with their types and shapes."""
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return next(csv.reader(file))
    if path.suffix == ".json":
        return keys(json.loads(path.read_text()))
    if path.suffix == ".safetensors":
        with safe_open(path, "np") as file:
            arrays = {name: file.get_slice(name) for name in file.keys()}
            shapes = {name: [a.get_dtype(), *a.get_shape()] for name, a in sorted(arrays.items())}
            return {"arrays": shapes, "header": sorted(file.metadata() or {})}
    return None


def keys(value: Any) -> Any:
    """The keys of nested objects; a list stands for its first element, a value for its type."""
    match value:
        case dict():
            return {key: keys(each) for key, each in value.items()}
        case [first, *_]:
            return [keys(first)]
    return type(value).__name__


def names_below(folder: Path) -> dict[str, Any]:
    """The names in each file, by path; files of Orbax and TensorBoard count as one."""
    found = dict[str, Any]()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        inner = re.match(
            r"checkpoints/(\d+/(params|ema|training|checksums)|.*/_CHECK.*)|tensorboard", name
        )
        if path.is_file():
            found[inner.group() if inner else name] = None if inner else names_in(path)
    return found


def formats(run: Path, folder: Path) -> dict[str, Any]:
    """The names in the files of a run of configs/tiny.py, by format."""
    stored = read(run)
    for format in ("vmoe", "jax"):
        write(stored, folder / format, format=format)
    write(stored, folder / "published" / "model", format="published", shards=2)
    published = inspect(folder / "published" / "model")
    predictions, routing = folder / "predictions.csv", folder / "routing.safetensors"
    (image := folder / "image.bmp").write_bytes(bmp(7))
    printed = {
        command: vmoe(command, "--checkpoint", run, "--json", *map(str, options))
        for command, *options in (
            ("evaluate", "--predictions", predictions, "--csv", folder / "results.csv"),
            ("routing", "--images", 8, "--export", routing),
            ("predict", image),
        )
    }
    return {
        "run": names_below(run),
        "vmoe": names_below(folder / "vmoe"),
        "jax": names_below(folder / "jax"),
        "published": {each.name: [each.dtype, *each.shape] for each in published.arrays},
        **{path.name: names_in(path) for path in (predictions, folder / "results.csv", routing)},
        **{f"{name} --json": keys(json.loads(each.stdout)) for name, each in printed.items()},
    }


def text(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def test_the_config_json_of_every_config_has_the_bytes_that_it_had() -> None:
    assert text(recipes()) == (GOLDEN / "recipes.json").read_text()


def test_every_source_has_the_members_labels_and_fingerprints_that_it_had(tmp_path: Path) -> None:
    expected = json.loads((GOLDEN / "sources.json").read_text())
    for name, opened in sources(tmp_path).items():
        assert opened == expected.pop(name), name
    assert not expected


@pytest.mark.process
def test_every_format_has_the_names_and_shapes_that_it_had(tmp_path: Path) -> None:
    run = tmp_path / "run"
    vmoe("train", "--config", RECIPE, "--workdir", run, "--steps", "60")
    expected = json.loads((GOLDEN / "formats.json").read_text())
    for name, written in formats(run, tmp_path).items():
        assert written == expected.pop(name), name
    assert not expected


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["XDG_CACHE_HOME"] = f"{temporary}/cache"
        run = Path(temporary, "run")
        vmoe("train", "--config", RECIPE, "--workdir", run, "--steps", "60")
        (GOLDEN / "recipes.json").write_text(text(recipes()))
        (GOLDEN / "sources.json").write_text(text(sources(Path(temporary, "data"))))
        (GOLDEN / "formats.json").write_text(text(formats(run, Path(temporary, "formats"))))
    print(GOLDEN, file=sys.stderr)
