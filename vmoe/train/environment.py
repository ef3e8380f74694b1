"""The environment and the data of a run, and how they have changed since its start."""

import importlib.metadata
import platform
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

import vmoe
from vmoe.config.changes import Change
from vmoe.data.sources import Source
from vmoe.data.sources.views import Subset
from vmoe.host.cores import cores
from vmoe.sharding import Placement
from vmoe.train.check import Data

COMPUTING = ("jax", "jaxlib", "numpy", "grain")
DECODING = ("pillow", "opencv-python-headless", "simplejpeg")
OTHERS = ("vmoe", "flax", "optax", "scipy", "tensorflow-datasets", "array-record")
COMPARED = ("devices", "mesh", "processes", "cores", *COMPUTING, *DECODING)


def environment(data: Data, placement: Placement) -> dict[str, Any]:
    """Everything, apart from the config, that can change the result of a run."""
    measured = {each.name: own for each, own in data.evaluations}
    for each in data.fewshot:  # whole splits: which images are drawn follows from them
        splits = (own.source if isinstance(own, Subset) else own for own in each.sources)
        names = (f"few-shot {each.name}, {split}" for split in ("train", "test"))
        measured |= zip(names, splits, strict=True)
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": cores(),
        "devices": [device.device_kind for device in jax.devices()],
        **{name: _version(name) for name in (*OTHERS, *COMPUTING, *DECODING)},
        "mesh": str(placement),
        "processes": jax.process_count(),
        **_data(data.source),
        "evaluations": {name: _data(each) for name, each in measured.items()},
    }


def _data(source: Source) -> dict[str, Any]:
    return {"images": len(source), "data": source.fingerprint()._asdict()}


def shared(now: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a process's environment that all processes of a run must have in common.

    Cores and the times of files may differ between hosts.
    """
    data = {"training": now, **now["evaluations"]}
    return {
        **{f"{name} images": each["images"] for name, each in data.items()},
        **{
            f"{name} {part}": each["data"][part][:16]
            for name, each in data.items()
            for part in ("data", "content")
        },
        **{name: now[name] for name in ("mesh", "commit", *COMPUTING, *DECODING, *OTHERS)},
    }


def differences(stored: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Messages about changes of the environment and the data since the start of the run."""
    differ = "continuing, but results will differ from an uninterrupted run"
    lines = list(_data_differences("the training data", stored, current, differ))
    before = stored.get("evaluations")
    for name, now in current["evaluations"].items():
        if isinstance(before, dict) and name in before:
            differ = "its results cannot be compared with those from before"
            lines += _data_differences(f"evaluation set {name!r}", before[name], now, differ)
    for name in COMPARED:
        if stored.get(name) != current[name]:
            lines.append(
                f"the run started with {name} {stored.get(name)}, now {current[name]}: the same "
                "steps may round differently"
            )
    return lines


def same_images(change: Change, stored: dict[str, Any], current: dict[str, Any]) -> bool:
    """Whether a data set that has another name has the same images as at the start of the run."""
    if change.key == "data.name":
        return _same(stored, current)
    name = list(current["evaluations"])[int(change.field.split(".")[1])]
    return _same((stored.get("evaluations") or {}).get(name), current["evaluations"][name])


def with_new_sets(stored: dict[str, Any], current: dict[str, Any]) -> dict[str, Any]:
    """The environment of a run, with the data of all its evaluation sets.

    Those of sets that are left out are kept, to compare them if the sets return.
    """
    known = stored.get("evaluations") or {}
    return stored | {"evaluations": current["evaluations"] | known}


def _data_differences(what: str, stored: Any, current: dict[str, Any], so: str) -> Iterator[str]:
    """A line if the data has changed, with the consequences."""
    if not _same(stored, current):
        images = stored.get("images") if isinstance(stored, dict) else None
        yield (
            f"{what} has changed since this run began ({images} images then, "
            f"{current['images']} now); {so}"
        )
    elif stored["data"].get("times") != current["data"]["times"]:
        yield (
            f"the files of {what} have other modification times than when this run began; their "
            "names, sizes and the content of a sample are the same"
        )


def _same(stored: Any, current: dict[str, Any]) -> bool:
    """Whether names, sizes, labels and the content of a sample are the same."""
    before = stored.get("data") if isinstance(stored, dict) else None
    return isinstance(before, dict) and all(
        before.get(k) == current["data"][k] for k in ("data", "content")
    )


def _version(package: str) -> str | None:
    """The version of a package; None if it is not installed under this name.

    >>> print(_version("no-such-package"))
    None
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # another build of OpenCV, say
        return None


def commit() -> str | None:
    """The git commit of this code, "+ changes" if it has any; None outside a checkout."""
    root = Path(vmoe.__file__).parents[1]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        completed = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
        return completed.stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (" + changes" if changes else "") or None
    except OSError:  # git is not installed
        return None
