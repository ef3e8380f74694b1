"""One tar shard in WebDataset's layout: where its images lie, and their labels.

    0001.jpg  0001.cls       the files of one example have the same name up to the first dot of the
    0002.png  0002.json      base name, and follow each other: one image, and `.cls` with the number
                             or the name of a class, or `.json` with an object whose `label` or
                             `labels` has one or several; others are ignored

An index of each shard (``index.py``) is built once and kept in the user's cache folder until the
size or the time of the shard changes, so that shards that are added are the only ones to be read.
"""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vmoe.data.decode import SUFFIXES
from vmoe.data.sources.index import Index, IndexWriter, cached, state_of
from vmoe.data.sources.vocabulary import Vocabulary, labels_of_json
from vmoe.errors import UsageError, listed, parse_json
from vmoe.retry import retried

BLOCK = 512  # bytes of a header, and unit of everything in a tar file
READ = 1 << 20  # bytes read at once
MOST_LABEL_BYTES = 1 << 20  # of a .cls or .json file


def index_of(shard: Path) -> Index:
    """The index of a shard: names, offsets, sizes and labels of its images.

    The labels are numbers of words, which ``Index.info`` lists.

    Raises:
        UsageError: the shard is truncated, compressed or no tar file, or an example is wrong.
    """
    folder = cached(
        f"shard:{shard.absolute()}", state_of(shard), lambda target: _build(shard, target)
    )
    return Index(folder)


def _build(shard: Path, target: Path) -> None:
    vocabulary, keys = Vocabulary(), set[str]()
    try:
        examples = retried(shard, lambda: list(_examples(shard)))
    except OSError as error:
        raise UsageError(f"{shard}: {error.strerror or error}") from None
    with IndexWriter(target) as index:
        for example in examples:
            if example.key in keys:
                raise UsageError(
                    f"{shard}: {example.key} is there twice; the files of an example have to "
                    "follow each other"
                )
            keys.add(example.key)
        if not examples:
            raise UsageError(f"{shard}: no images in it ({', '.join(SUFFIXES)})")
        labels = [vocabulary.numbers(example.labels) for example in examples]
        index.append_texts("paths", [example.image.name for example in examples])
        index.append("offsets", np.array([each.image.offset_data for each in examples], np.int64))
        index.append("sizes", np.array([each.image.size for each in examples], np.int64))
        index.append_ragged(
            "labels",
            np.array([number for each in labels for number in each], np.int32),
            np.array([len(each) for each in labels], np.int64),
        )
        index.finish(words=vocabulary.words)


class _Example(NamedTuple):
    key: str
    image: tarfile.TarInfo
    labels: list[str]


def _examples(shard: Path) -> Iterator[_Example]:
    """The examples of a shard, in their order."""
    try:
        with tarfile.open(shard, "r:", encoding="utf-8") as archive:
            key, files = "", dict[str, tarfile.TarInfo]()
            for member in archive:
                folder, name = os.path.split(os.path.normpath(member.name))
                if not member.isfile() or name.startswith("."):
                    continue
                stem, _, suffix = name.partition(".")
                if os.path.join(folder, stem) != key and files:
                    yield _example(archive, shard, key, files)
                    files = {}
                key = os.path.join(folder, stem)
                if suffix.lower() in files:
                    raise UsageError(f"{shard}: {member.name} is there twice")
                files[suffix.lower()] = member
            _check_end(shard, archive.offset)
            if files:
                yield _example(archive, shard, key, files)
    except tarfile.ReadError as error:
        raise UsageError(
            f"{shard}: truncated, compressed or no tar file ({error}); write it again, uncompressed"
        ) from None


def _check_end(shard: Path, offset: int) -> None:
    """Checks that nothing but zeros, at least one block, is where the reading of a shard ended.

    Zeros also take the place of what a download has left out, and end the first of two archives
    that are joined by ``cat``: nothing that follows them would be read.
    """
    with open(shard, "rb") as file:
        file.seek(offset)
        first = file.read(BLOCK)
        if len(first) < BLOCK:
            raise UsageError(f"{shard}: truncated: its end is missing; write it again")
        if first.strip(b"\0"):
            raise UsageError(
                f"{shard}: damaged: no file begins at byte {offset:,}; get or write it again"
            )
        while piece := file.read(READ):
            if piece.strip(b"\0"):
                raise UsageError(
                    f"{shard}: more follows the zeros at byte {offset:,}, which end an archive: "
                    "get it again if it is incomplete; join archives with tar --concatenate"
                )


def _example(
    archive: tarfile.TarFile, shard: Path, key: str, files: dict[str, tarfile.TarInfo]
) -> _Example:
    images = [member for suffix, member in files.items() if f".{suffix}" in SUFFIXES]
    where = f"{shard}: {key}"
    if len(images) != 1:
        held = listed([f".{suffix}" for suffix in files], 5)
        raise UsageError(f"{where}: {len(images)} images among {held}; give it one")
    if images[0].issparse():
        raise UsageError(f"{where}: is a sparse file; write the shard again as plain files")
    if label := files.get("cls") or files.get("json"):
        if label.size > MOST_LABEL_BYTES:
            raise UsageError(f"{shard}: {label.name}: {label.size:,} bytes are no label")
        opened = archive.extractfile(label)
        assert opened is not None, "it is a file"
        read = _cls if "cls" in files else _json
        return _Example(key, images[0], read(opened.read(), f"{shard}: {label.name}"))
    raise UsageError(f"{where}: no label: neither .cls nor .json")


def _cls(content: bytes, where: str) -> list[str]:
    label = content.decode(errors="replace").strip()
    if not label or "\n" in label:
        raise UsageError(f"{where}: {label[:40]!r} is no label; give the number or name of a class")
    return [label]


def _json(content: bytes, where: str) -> list[str]:
    try:
        fields: Any = parse_json(content)
    except ValueError as error:
        raise UsageError(f"{where}: is no JSON ({error})") from None
    if isinstance(fields, dict):
        for name in ("label", "labels"):
            if name in fields:
                return labels_of_json(fields[name], where)
    raise UsageError(f"{where}: no field label or labels in it")
