"""A list of images and labels in a CSV or JSON Lines file.

    path,label,split            CSV with a header; `label` has one class, `labels` several, with `|`
    cats/1.jpg,cat,train        between them; an empty field is an image without a label
    dogs/7.jpg,dog,test

    {"path": "cats/1.jpg", "labels": ["cat", "pet"], "split": "train"}         JSON Lines

Paths are relative to the folder of the list. Labels are names or numbers of classes; a file
``classes.txt`` in the same folder gives the names of the classes (``vocabulary.py``). If there are
no splits, a hash of each path decides: on average 80% train, 10% validation and 10% test. If only
validation is missing, it is 10% of train, also on average.

An image whose file is missing counts as unreadable. The list is read once, and kept in an index
(``index.py``) until it, ``classes.txt`` or an unreadable image changes. Other changes of images are
detected in a sample only; touch the list to read all of them again.
"""

import csv
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vmoe.config.data import CHECKS, ImageChecks
from vmoe.data.check import recorded
from vmoe.data.sources.index import Index, IndexWriter, cached, state_of
from vmoe.data.sources.source import sampled
from vmoe.data.sources.splits import SPLITS, resolve_split
from vmoe.data.sources.table import RECORD, FileSource, finish_table, open_files
from vmoe.data.sources.vocabulary import CLASSES, Vocabulary, labels_of_json, read_class_names
from vmoe.errors import UsageError, parse_json, repeated, unknown
from vmoe.host.progress import progress
from vmoe.host.retry import failure

SUFFIXES = (".csv", ".jsonl")
LINES = 8192  # read at once
MISSING = (-1, 0)  # size and time of an image whose file is missing
FIELDS = ("path", "label", "labels", "split")


def open_manifest(
    path: str, splits: Sequence[str], checks: ImageChecks = CHECKS
) -> list[FileSource]:
    """Opens splits of a ``.csv`` or ``.jsonl`` file, after checking that the images can be read."""
    file, place = Path(path), f"manifest:{path}"
    if file.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{place}: give a file that ends with {' or '.join(SUFFIXES)}")
    if not file.is_file():
        raise UsageError(f"{place}: no such file")
    if not os.access(file, os.R_OK):
        raise UsageError(f"{place}: permission denied; make it readable")
    folder = file.parent
    given = read_class_names(folder)

    def valid(index: Index) -> bool:
        bad = recorded(index.folder / RECORD)  # they may be repaired
        return all(
            (_stat(folder / index.text("paths", row)) or MISSING)
            == (index["sizes"][row], index["times"][row])
            for row in itertools.chain(sampled(len(index["sizes"])), index.info["missing"], bad)
        )

    index = cached(
        f"manifest:{file.absolute()}",
        [_stat(file), _stat(folder / CLASSES)],
        lambda target: _build(file, place, given, target),
        valid,
    )
    return [open_files(place, str(folder), index, split, checks) for split in splits]


def _stat(path: Path) -> tuple[int, int] | None:
    """Size and time of the last change; None if there is no such file, or it is no regular one."""
    try:
        return state_of(path)
    except UsageError:
        return None


class _Line(NamedTuple):
    """An image of the list; ``split`` is -1 if the line has none, else an index into SPLITS."""

    path: str
    labels: list[str]
    split: int
    where: str


def _build(file: Path, place: str, given: tuple[str, ...] | None, target: Path) -> None:
    vocabulary, splits, missing, count = Vocabulary(), set[int](), list[int](), 0
    read = _read_csv if file.suffix.lower() == ".csv" else _read_jsonl
    with (
        IndexWriter(target) as table,
        file.open(encoding="utf-8-sig", newline="") as text,
        progress(f"reading {file}", None, first=""),
    ):
        lines = read(_lines(text, place), place)
        while piece := list(itertools.islice(lines, LINES)):
            splits |= {line.split for line in piece}
            stats = [_stat(file.parent / line.path) or MISSING for line in piece]
            missing += [count + i for i, status in enumerate(stats) if status == MISSING]
            count += len(piece)
            sizes, times = np.array(stats, np.int64).T
            table.append_texts("paths", [line.path for line in piece])
            table.append_lists("labels", [vocabulary.numbers(line.labels) for line in piece])
            table.append("sizes", sizes)
            table.append("times", times)
            table.append("split", np.array([line.split for line in piece], np.int8))
        if len(splits) > 1 and -1 in splits:
            raise UsageError(f"{place}: some lines name a split and some do not; name all or none")
        stored = [name for i, name in enumerate(SPLITS) if i in splits]
        whole = bool(stored) and "train" not in stored  # nothing to split off
        _, fractions = ("", {}) if whole else resolve_split("train", stored, place)
        class_names, classes = vocabulary.resolve(given, place)
        table.translate("labels", classes)
        finish_table(
            table,
            class_names,
            place=place,
            splits=SPLITS if stored else (),
            fractions=fractions,
            identity=_identity(file.parent),
            missing=missing,
        )


def _identity(folder: Path) -> Callable[[str], str]:
    """The function that finds the real path of an image, however its folder is spelled."""
    real = functools.lru_cache(LINES)(lambda name: os.path.realpath(folder / name))

    def identity(path: str) -> str:
        head, tail = os.path.split(path)
        return os.path.join(real(head), tail)

    return identity


def _lines(text: Iterable[str], place: str) -> Iterator[str]:
    try:
        yield from text
    except UnicodeDecodeError as error:
        raise UsageError(f"{place}: is not UTF-8 ({error.reason}); save it as UTF-8") from None
    except OSError as error:
        raise failure(place, error) from None


def _read_csv(text: Iterable[str], place: str) -> Iterator[_Line]:
    rows = csv.reader(text, strict=True)
    try:
        header = [name.strip() for name in next(rows, [])]
        if header and (name := repeated(header)):
            raise UsageError(f"{place}, line 1: the field {name!r} occurs twice")
        _check_fields(header, f"{place}, line 1")
        column = {name: i for i, name in enumerate(header)}
        for row in rows:
            where = f"{place}, line {rows.line_num}"
            if not row:  # an empty line, as editors leave at the end
                continue
            if len(row) != len(header):
                raise UsageError(f"{where}: {len(row)} fields; line 1 has {len(header)}")
            labels = [row[column["label"]]] if "label" in column else []
            if "labels" in column:
                labels += row[column["labels"]].split("|")
            split = row[column["split"]] if "split" in column else None
            found = list(dict.fromkeys(label.strip() for label in labels if label.strip()))
            yield _line(row[column["path"]], found, split, where)
    except csv.Error as error:
        raise UsageError(f"{place}, line {rows.line_num}: {error}") from None


def _read_jsonl(text: Iterable[str], place: str) -> Iterator[_Line]:
    for number, content in enumerate(text, 1):
        if not content.strip():  # an empty line, as editors leave at the end
            continue
        where = f"{place}, line {number}"
        try:
            fields = parse_json(content)
        except ValueError as error:
            raise UsageError(f"{where}: is not JSON ({error})") from None
        if not isinstance(fields, dict):
            raise UsageError(f'{where}: give an object such as {{"path": "a.jpg", "label": 3}}')
        _check_fields(list(fields), where)
        value = fields.get("labels", fields.get("label"))
        labels = [] if value is None else labels_of_json(value, where)
        yield _line(fields["path"], labels, fields.get("split"), where)


def _check_fields(fields: Sequence[str], where: str) -> None:
    for field in fields:
        if field not in FIELDS:
            raise UsageError(unknown(f"{where}: no field", field, list(FIELDS)))
    if "path" not in fields or not {"label", "labels"} & set(fields):
        raise UsageError(
            f"{where}: the fields are {', '.join(fields)}; give path, and label or labels"
        )
    if {"label", "labels"} <= set(fields):
        raise UsageError(f"{where}: both label and labels; give one of them")


def _line(path: Any, labels: list[str], split: Any, where: str) -> _Line:
    try:
        valid = path != "" and b"\0" not in os.fsencode(path)
    except (TypeError, UnicodeEncodeError):  # JSON strings are not all names of files
        valid = False
    if not valid:
        raise UsageError(f"{where}: path is {path!r}; give the path of an image")
    if split and split not in SPLITS:
        raise UsageError(unknown(f"{where}: no split", split, list(SPLITS)))
    return _Line(str(Path(path)), labels, SPLITS.index(split) if split else -1, where)
