"""Checks image files before they are trained on, and remembers the result.

``headers``: a file has to begin and end as its format does, so that a truncated one is found; only
a file that leaves this open is decoded. ``decode``: every file is decoded.
"""

import concurrent.futures
import contextlib
import hashlib
import io
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import PIL

from vmoe.config.data import Check
from vmoe.data.decode import PNG, ImageFile, decode, has_16_bits, open_image
from vmoe.data.progress import progress
from vmoe.errors import Failure, UsageError, parse_json
from vmoe.retry import retried
from vmoe.workdir.layout import replace_text

TAIL = 16  # bytes read at the end of a file, where its end marker is
CHUNK, CHUNKS = 256, 64  # files per task of a thread, and tasks that are waited for together
ENDS = {PNG: b"\x00\x00\x00\x00IEND\xaeB`\x82", b"\xff\xd8\xff": b"\xff\xd9"}
RULES = f"2 {PIL.__version__}"  # version of the rules below; a record of another is not used


def unreadable(
    folder: str | Path, files: Callable[[int], ImageFile], count: int, check: Check, record: Path
) -> dict[int, str]:
    """The files that cannot be read as images, by their index, with reasons.

    Args:
        files: the file at an index in [0, count).
        record: a JSON file that keeps the result, for as long as the files are the same.
    """
    known = _read_record(record)
    if known.get("rules") == RULES and known.get("check") in (check, "decode"):
        return {int(i): reason for i, reason in known["unreadable"].items()}
    found: dict[int, str] = {}
    lasting = True
    with concurrent.futures.ThreadPoolExecutor() as threads:
        for i, reason in _check_all(folder, files, count, check, threads):
            found[i], lasting = reason.text, lasting and reason.lasting
    if lasting:
        _write_record(record, {"rules": RULES, "check": check, "unreadable": found})
    return found


class _Reason(NamedTuple):
    """Why a file cannot be read as an image.

    Attributes:
        text: empty if it can.
        lasting: whether the reason is in the file, and not in its permissions or the disk.
    """

    text: str
    lasting: bool = True


def _check_all(
    folder: str | Path,
    files: Callable[[int], ImageFile],
    count: int,
    check: Check,
    threads: concurrent.futures.Executor,
) -> Iterator[tuple[int, _Reason]]:
    """Those of the files that cannot be read. Few of them are in memory at a time."""

    def reasons(chunk: range) -> list[_Reason]:
        return [_reason(files(i), check) for i in chunk]

    parts = range(0, count, CHUNK * CHUNKS)
    for start in progress(parts, f"checking {count:,} images of {folder}", len(parts)):
        stop = min(start + CHUNK * CHUNKS, count)
        chunks = [range(i, min(i + CHUNK, stop)) for i in range(start, stop, CHUNK)]
        results = itertools.chain.from_iterable(threads.map(reasons, chunks))
        yield from ((i, reason) for i, reason in enumerate(results, start) if reason.text)


def _reason(file: ImageFile, check: Check) -> _Reason:
    try:
        complete = retried(file.path, lambda: _looks_complete(file))
        if complete is False:
            return _Reason("truncated: its end is missing")
        if check == "decode" or complete is None:
            content = retried(file.path, Path(file.path).read_bytes)
            decode(content, "")
            with open_image(io.BytesIO(content)) as image:
                image.verify()  # checksums, which decoding may ignore
    except UsageError as error:
        return _Reason(str(error).removeprefix(": "))
    except OSError as error:
        return _Reason(str(error.strerror or error), lasting=error.errno is None)
    except (MemoryError, Failure):
        raise
    except Exception as error:  # Pillow raises errors of many types
        return _Reason(str(error))
    return _Reason("")


def _looks_complete(file: ImageFile) -> bool | None:
    """Whether a file begins and ends as its format does; None where only decoding shows."""
    with open(file.path, "rb") as opened:
        head = opened.read(32)
        opened.seek(max(file.size - TAIL, 0))
        tail = opened.read()
    if has_16_bits(head):  # its values have to be seen
        return None
    for start, end in ENDS.items():
        if head.startswith(start):
            if tail.endswith(end):
                return True
            # Other bytes may follow the image, such as a film after a photo.
            return None if end in Path(file.path).read_bytes() else False
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return int.from_bytes(head[4:8], "little") + 8 <= file.size
    if head[:6] in (b"GIF87a", b"GIF89a") and tail.endswith(b";"):
        return True
    if head[:2] == b"BM" and 0 < int.from_bytes(head[2:6], "little") <= file.size:
        return True
    return None


def _read_record(path: Path) -> dict[str, Any]:
    """What ``_write_record`` has written; empty if there is nothing, or something else."""
    try:
        known = parse_json(path.read_text())
        return known if known.pop("sha256") == _digest(known) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write_record(path: Path, record: dict[str, Any]) -> None:
    """Writes the record, or nothing where the cache folder cannot be written."""
    with contextlib.suppress(OSError):
        replace_text(path, json.dumps({**record, "sha256": _digest(record)}))


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()
