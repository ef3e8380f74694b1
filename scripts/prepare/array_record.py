"""Writes a data set in the ArrayRecord form of TFDS, shard by shard.

The images of a split are in the order of a hash of their names, so that every slice of it, such as
``train[:99%]``, is a random sample. A shard is written under a temporary name and then renamed. A
shard that exists is not written again, so the same command resumes. The metadata is written last,
and then the plan is removed: a data set with a plan is not complete.

A shard has about 256 MB. A split of more than 512 GB has 2,000 larger shards, since every process
that reads it keeps all of them open: 300 million images of 100 kB are 2,000 shards of 15 GB. About
256 MB of images are in memory at once.
"""

import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vmoe.host.cache import TEMPORARY
from vmoe.host.progress import tracked
from vmoe.workdir.layout import replace_text

SHARD_BYTES = 256 << 20  # about the size of a shard, and of the images in memory at once
MOST_SHARDS = 2000  # maximum for a split
PLAN = "plan.json"  # the images of an unfinished data set
OPTIONS = "group_size:1,uncompressed"  # one record is read at a time; images are compressed already


@dataclasses.dataclass(frozen=True)
class Split:
    """The images of a split.

    Attributes:
        names: distinct names of the images.
        sizes: sizes of the images in bytes.
        places: keys by which reads are sorted, such as offsets in an archive.
        read: returns the bytes of an image by its index.
        fields: returns the other features of an example by its index, such as its label.
    """

    names: Sequence[str]
    sizes: np.ndarray
    places: np.ndarray
    read: Callable[[int], bytes]
    fields: Callable[[int], dict[str, Any]]


def write(folder: Path, name: str, features: dict[str, Any], splits: Mapping[str, Split]) -> None:
    """Writes a data set, or its missing shards.

    Args:
        folder: the folder of the version; created if it is missing.
        name: the name of the data set.
        features: the features for TFDS, without the image.

    Raises:
        SystemExit: the folder holds another data set, or cannot be written.
    """
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict({"image": tfds.features.Image(), **features})
    infos = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_plan(folder, splits)
        for split, images in splits.items():
            shards = _shards(images)
            template = tfds.core.ShardedFileTemplate(
                data_dir=folder, dataset_name=name, split=split, filetype_suffix="array_record"
            )
            info = tfds.core.SplitInfo(
                name=split,
                shard_lengths=[len(shard) for shard in shards],
                num_bytes=int(images.sizes.sum()),
                filename_template=template,
            )
            missing = [i for i, path in enumerate(info.filepaths) if not os.path.exists(path)]
            if there := len(shards) - len(missing):
                print(f"{name} {split}: {there} shards are there already", file=sys.stderr)
            for i in tracked(missing, f"writing {name} {split}", len(missing)):
                _write_shard(Path(info.filepaths[i]), shards[i], images, features)
            infos.append(info)
        tfds.folder_dataset.write_metadata(
            data_dir=folder, features=features, split_infos=infos, check_data=False
        )
        (folder / PLAN).unlink()
    except OSError as error:
        raise SystemExit(f"{error.filename or folder}: {error.strerror or error}") from None
    counts = ", ".join(f"{len(images.names):,} {split}" for split, images in splits.items())
    print(f"{folder}: {counts} images; use tfds:{folder.absolute()}")


def check_name(name: str) -> None:
    """Checks that TFDS accepts the name of a data set.

    Raises:
        SystemExit: it does not.
    """
    if not re.fullmatch(r"[a-zA-Z]\w*", name):
        raise SystemExit(
            f"{name!r} is no name of a data set; use letters, digits and _, and a letter first"
        )


def is_complete(folder: Path) -> bool:
    """Whether a data set is complete already; if so, prints a line."""
    complete = (folder / "dataset_info.json").exists() and not (folder / PLAN).exists()
    if complete:
        print(f"{folder}: is complete already")
    return complete


def number_of_shards(size: int, images: int) -> int:
    """The number of shards of a split.

    Args:
        size: size of all images, in bytes.
        images: number of images.

    >>> number_of_shards(150 * 10**9, 1_281_167), number_of_shards(30 * 10**12, 300_000_000)
    (559, 2000)
    """
    return min(max(1, round(size / SHARD_BYTES)), MOST_SHARDS, images)


def _check_plan(folder: Path, splits: Mapping[str, Split]) -> None:
    """Writes the plan of the data set, or checks it against the plan of a stopped command."""
    digest = hashlib.sha256()
    for split, images in splits.items():
        digest.update(repr((split, SHARD_BYTES, MOST_SHARDS, OPTIONS)).encode())
        digest.update("\n".join(images.names).encode(errors="surrogateescape"))
        digest.update(np.asarray(images.sizes, np.int64).tobytes())
    plan, path = json.dumps({"images": digest.hexdigest()}), folder / PLAN
    if not path.exists():
        for left in folder.glob(f"{TEMPORARY}*"):  # from a command that was killed at this point
            shutil.rmtree(left)
        if any(folder.iterdir()):
            raise SystemExit(f"{folder}: holds other files; give a new folder")
        replace_text(path, plan)
    elif path.read_text(encoding="utf-8", errors="replace") != plan:
        raise SystemExit(f"{folder}: holds other images; remove it, or give another")


def _shards(images: Split) -> list[np.ndarray]:
    """The indices of the images of each shard."""
    digests = [hashlib.sha256(name.encode(errors="surrogateescape")) for name in images.names]
    order = np.argsort(np.array([digest.digest()[:8] for digest in digests]))
    return np.array_split(order, number_of_shards(int(images.sizes.sum()), len(order)))


def _write_shard(path: Path, indices: np.ndarray, images: Split, features: Any) -> None:
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    unfinished = path.with_name(f".{path.name}")
    writer = ArrayRecordWriter(str(unfinished), OPTIONS)
    for part in _parts(indices, images.sizes[indices]):
        content = {int(i): images.read(int(i)) for i in part[np.argsort(images.places[part])]}
        for i in part.tolist():
            fields = {"image": io.BytesIO(content[i]), **images.fields(i)}
            writer.write(features.serialize_example(features.encode_example(fields)))
    writer.close()
    reader = ArrayRecordReader(str(unfinished))
    written = reader.num_records()
    reader.close()
    if written != len(indices):
        raise SystemExit(f"{unfinished}: has {written} of {len(indices)} images; is the disk full?")
    unfinished.rename(path)


def _parts(indices: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    """The images of a shard, in parts that fit into memory."""
    ends = np.cumsum(sizes, dtype=np.int64)
    return np.split(indices, np.flatnonzero(np.diff((ends - 1) // SHARD_BYTES)) + 1)
