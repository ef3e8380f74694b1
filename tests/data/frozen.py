"""Small data sets of every kind, the same bytes on every machine, and their opened contents."""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.data.test_tfds import build
from vmoe.data.sources import SPLITS, open_source, relabel, sample
from vmoe.data.sources.source import Source

TIME = 1_600_000_000  # when files were changed, in seconds


def bmp(value: int) -> bytes:
    """A BMP of 4 x 4 pixels of one gray: no library decides about its bytes."""
    header = b"BM" + (54 + 48).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little")
    sizes = b"".join(n.to_bytes(4, "little") for n in (40, 4, 4))
    return (
        header
        + sizes
        + b"\1\0\x18\0"
        + bytes(4)
        + (48).to_bytes(4, "little")
        + bytes(16)
        + (bytes([value]) * 48)
    )


def write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def folder(root: Path, counts: dict[str, int]) -> None:
    value = 0
    for name, count in counts.items():
        for i in range(count):
            value += 1
            write(root / name / f"{i:03}.bmp", bmp(value % 256))


def tar(file: Path, numbers: range) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as archive:
        for i in numbers:
            for suffix, content in (("bmp", bmp(i)), ("cls", b"%d" % (i % 3))):
                member = tarfile.TarInfo(f"{i:04}.{suffix}")
                member.size, member.mtime = len(content), TIME
                archive.addfile(member, io.BytesIO(content))


def arrays(file: Path, counts: dict[str, int]) -> None:
    columns = dict[str, np.ndarray]()
    for split, count in counts.items():
        prefix = f"{split}_" if split else ""
        labels = np.arange(count) % 3
        pixels = np.broadcast_to(np.arange(count)[:, None, None, None], (count, 4, 4, 3))
        columns |= {f"{prefix}images": pixels.astype(np.uint8), f"{prefix}labels": labels}
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, **columns)


def data_sets(root: Path) -> Iterator[str]:
    """The names of data sets that are written below a folder, and of data sets in the package."""
    folder(root / "folder" / "whole", {"cats": 60, "dogs/big": 30, "dogs/small": 12, "owls": 5})
    yield f"folder:{root / 'folder' / 'whole'}"
    splits = {"train/cats": 40, "train/dogs": 30, "val/cats": 5, "val/dogs": 4, "test/dogs": 3}
    folder(root / "folder" / "three", splits)
    yield f"folder:{root / 'folder' / 'three'}"
    folder(root / "folder" / "two", {"Train/cats": 70, "Train/dogs": 30, "Test/dogs": 3})
    yield f"folder:{root / 'folder' / 'two'}"

    for name in ("names", "numbers"):
        folder(root / "manifest" / name, {"images": 90})
    lines = ["path,label", *(f"images/{i:03}.bmp,{['even', 'odd'][i % 2]}" for i in range(90))]
    write(root / "manifest" / "names" / "list.csv", "\n".join(lines).encode())
    yield f"manifest:{root / 'manifest' / 'names' / 'list.csv'}"
    rows = [
        {"path": f"images/{i:03}.bmp", "labels": [0, 2, 1][: i % 4], "split": SPLITS[i % 5 % 3]}
        for i in range(90)
    ]
    write(root / "manifest" / "numbers" / "list.jsonl", "\n".join(map(json.dumps, rows)).encode())
    write(root / "manifest" / "numbers" / "classes.txt", b"red\ngreen\nblue\n")
    yield f"manifest:{root / 'manifest' / 'numbers' / 'list.jsonl'}"

    tar(root / "tar" / "whole-0.tar", range(60))
    tar(root / "tar" / "whole-1.tar", range(60, 100))
    yield f"tar:{root / 'tar' / 'whole-{0..1}.tar'}"
    tar(root / "tar" / "splits" / "train" / "0.tar", range(80))
    tar(root / "tar" / "splits" / "val" / "0.tar", range(80, 100))
    yield f"tar:{root / 'tar' / 'splits'}"

    arrays(root / "arrays" / "whole.npz", {"": 100})
    yield f"arrays:{root / 'arrays' / 'whole.npz'}"
    arrays(root / "arrays" / "two.npz", {"train": 100, "test": 9})
    yield f"arrays:{root / 'arrays' / 'two.npz'}"
    yield from ("digits", "fashion_mnist_sample", "emoji_sample", "synthetic:100:8:3")


def write_tfds(root: Path) -> str:
    """A data set of TFDS: 90 images in three shards of the split train, 10 of the split test."""
    from tensorflow_datasets.core.features import ClassLabel

    shards = {"train": (40, 41, 9), "test": (10,)}
    build(root, ClassLabel(names=["cat", "dog", "owl"]), shards=shards, image=bmp)
    return f"tfds:{root}"


def write_hf(root: Path) -> str:
    """A data set of Hugging Face without splits."""
    import datasets

    datasets.disable_progress_bars()
    names = datasets.ClassLabel(names=["cat", "dog", "owl"])
    columns = {
        "image": [{"bytes": bmp(i), "path": None} for i in range(100)],
        "label": [i % 3 for i in range(100)],
    }
    features = datasets.Features({"image": datasets.Image(), "label": names})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(root)
    return f"hf:{root}"


def opened(source: Source) -> dict[str, Any]:
    """The content of a split. The origins of its examples are relative to the data set."""
    examples = [source[i] for i in range(len(source))]
    assert [example.labels for example in examples] == [
        source.labels_of(i) for i in range(len(source))
    ]
    members = [
        (example.origin.rpartition("/")[2], example.labels, digest(example.image))
        for example in examples
    ]
    return {
        "examples": len(source),
        "class_names": list(source.class_names),
        "max_labels": source.max_labels,
        "members": digest(repr(members).encode()),
        "fingerprint": list(source.fingerprint()),
    }


def digest(content: bytes | np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(content) if len(content) else b"").hexdigest()[:16]


def sources(root: Path) -> dict[str, dict[str, Any]]:
    """The content of each data set and split."""
    names = [
        *data_sets(root),
        write_tfds(root / "tfds" / "photos" / "1.0.0"),
        write_hf(root / "hf"),
    ]
    for path in sorted(root.rglob("*")):
        if path.is_file():
            os.utime(path, (TIME, TIME))
    found = dict[str, dict[str, Any]]()
    for name in names:
        shown = name.replace(f"{root}/", "")
        for split in SPLITS:
            try:
                found[f"{shown}:{split}"] = opened(open_source(name, split))
            except ValueError as error:
                found[f"{shown}:{split}"] = {"error": str(error).replace(f"{root}/", "")}
    whole = open_source(names[0], "train")
    found["sample of 20"] = opened(sample(whole, 20))
    found["relabeled"] = opened(relabel(whole, ("owls", "cats", "dogs")))
    return found
