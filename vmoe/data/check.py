"""Checks image files before they are trained on, and remembers the result.

``headers``: a file has to begin and end as its format does, so that a truncated one is found; only
a file that leaves this open is decoded. ``decode``: every file is decoded.
"""

import concurrent.futures
import contextlib
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import PIL
from PIL import Image

from vmoe.config.data import Check
from vmoe.data.decode import PNG, ImageFile, decode, has_16_bits
from vmoe.data.progress import progress
from vmoe.errors import UsageError, parse_json
from vmoe.workdir.layout import replace_text

TAIL = 4096  # bytes read at the end of a file, where its end marker has to be
CHUNK, CHUNKS = 256, 64  # files per task of a thread, and tasks that are waited for together
PNG_END, JPEG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82", b"\xff\xd9"
RULES = f"1 {PIL.__version__}"  # version of the rules below; a record of another is not used


def unreadable(
    folder: str | Path, files: Sequence[ImageFile], check: Check, record: Path
) -> dict[int, str]:
    """The files that cannot be read as images, by their index, with reasons.

    Args:
        record: a JSON file that keeps the result, for as long as the files are the same.
    """
    known = _read_record(record)
    if known.get("rules") == RULES and known.get("check") in (check, "decode"):
        return {int(i): reason for i, reason in known["unreadable"].items()}
    found: dict[int, str] = {}
    lasting = True
    with concurrent.futures.ThreadPoolExecutor() as threads:
        for i, reason in _check_all(folder, files, check, threads):
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
    files: Sequence[ImageFile],
    check: Check,
    threads: concurrent.futures.Executor,
) -> Iterator[tuple[int, _Reason]]:
    """Those of the files that cannot be read. Few of them are in memory at a time."""

    def reasons(chunk: range) -> list[_Reason]:
        return [_reason(files[i], check) for i in chunk]

    parts = range(0, len(files), CHUNK * CHUNKS)
    for start in progress(parts, f"checking {len(files):,} images of {folder}", len(parts)):
        stop = min(start + CHUNK * CHUNKS, len(files))
        chunks = [range(i, min(i + CHUNK, stop)) for i in range(start, stop, CHUNK)]
        results = itertools.chain.from_iterable(threads.map(reasons, chunks))
        yield from ((i, reason) for i, reason in enumerate(results, start) if reason.text)


def _reason(file: ImageFile, check: Check) -> _Reason:
    try:
        complete = _looks_complete(file)
        if complete is False:
            return _Reason("truncated: its end is missing")
        if check == "decode" or complete is None:
            content = Path(file.path).read_bytes()
            decode(content, "")
            with Image.open(io.BytesIO(content)) as image:
                image.verify()  # checksums, which decoding may ignore
    except UsageError as error:
        return _Reason(str(error).removeprefix(": "))
    except OSError as error:
        return _Reason(str(error.strerror or error), lasting=error.errno is None)
    except MemoryError:
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
    if head.startswith(PNG):
        return _ends(tail, PNG_END)
    if head.startswith(b"\xff\xd8\xff"):
        whole = Path(file.path).read_bytes  # a film may follow the photo
        return _ends(tail, JPEG_END) or (None if JPEG_END in whole() else False)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return int.from_bytes(head[4:8], "little") + 8 <= file.size
    if head[:6] in (b"GIF87a", b"GIF89a") and tail.endswith(b";"):
        return True
    if head[:2] == b"BM" and 0 < int.from_bytes(head[2:6], "little") <= file.size:
        return True
    return None


def _ends(tail: bytes, marker: bytes) -> bool | None:
    """Whether a marker is at the end of a file; None if other bytes follow it."""
    if tail.endswith(marker):
        return True
    return None if marker in tail else False


def _read_record(path: Path) -> dict[str, Any]:
    try:
        known = parse_json(path.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) and isinstance(known.get("unreadable"), dict) else {}


def _write_record(path: Path, record: dict[str, Any]) -> None:
    """Writes the record, or nothing where the cache folder cannot be written."""
    with contextlib.suppress(OSError):
        replace_text(path, json.dumps(record))
