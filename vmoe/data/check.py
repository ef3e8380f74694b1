"""Checks image files before they are trained on, and remembers the result.

``headers`` checks that a file begins and ends as its format requires, which finds truncated files;
a file that this cannot judge is decoded. ``decode`` decodes every file.
"""

import concurrent.futures
import contextlib
import hashlib
import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL
from PIL import UnidentifiedImageError

from vmoe.config.data import CHECKS, ImageChecks
from vmoe.data.decode import PNG, decode, has_16_bits, open_image
from vmoe.data.files import ImageFile
from vmoe.errors import Failure, UsageError, parse_json
from vmoe.host.progress import tracked
from vmoe.host.retry import open_regular, read_regular, retried
from vmoe.workdir.layout import replace_text

TAIL = 16  # bytes read at the end of a file, where its end marker is
CHUNK, CHUNKS = 256, 64  # files per task, and tasks that are awaited together
ENDS = {PNG: b"\x00\x00\x00\x00IEND\xaeB`\x82", b"\xff\xd8\xff": b"\xff\xd9"}
RULES = f"4 {PIL.__version__}"  # version of the rules below; records of other versions are ignored


def unreadable(
    folder: str | Path,
    files: Callable[[int], ImageFile],
    count: int,
    record: Path,
    checks: ImageChecks = CHECKS,
    earlier: Callable[[], Callable[[ImageFile], bool]] = lambda: lambda file: False,
) -> dict[int, str]:
    """Finds the files that cannot be read as images; returns the reason for each, by its index.

    Args:
        files: the file at an index in [0, count).
        record: a JSON file that stores the result until the files change.
        earlier: called once if there is no record; returns a function that tells whether a file is
            known to be readable, and is not read again.
    """
    if (known := known_by(record, checks)) is not None:
        return known
    unchanged = earlier()
    found, lasting = dict[int, str](), True

    def reasons(chunk: range) -> list[tuple[str, bool]]:
        read = map(files, chunk)
        return [("", True) if unchanged(file) else _reason(file, checks) for file in read]

    parts = range(0, count, CHUNK * CHUNKS)  # bounds the files in memory at a time
    with concurrent.futures.ThreadPoolExecutor() as threads:
        for start in tracked(parts, f"checking {count:,} images of {folder}", len(parts)):
            stop = min(start + CHUNK * CHUNKS, count)
            chunks = [range(i, min(i + CHUNK, stop)) for i in range(start, stop, CHUNK)]
            results = itertools.chain.from_iterable(threads.map(reasons, chunks))
            for i, (reason, lasts) in enumerate(results, start):
                if reason:
                    found[i], lasting = reason, lasting and lasts
    if lasting:
        new = {"rules": _rules(checks), "check": checks.check, "unreadable": found}
        with contextlib.suppress(OSError):  # the cache folder may not be writable
            replace_text(record, json.dumps({**new, "sha256": _digest(new)}))
    return found


def _reason(file: ImageFile, checks: ImageChecks) -> tuple[str, bool]:
    """Why a file cannot be read as an image; empty if it can.

    Returns:
        the reason; and whether the file's content is the cause, not its permissions or the disk.
    """
    try:
        if file.size < 0:
            return f"{'not a regular' if Path(file.path).exists() else 'no such'} file", True
        complete = retried(file.path, lambda: _looks_complete(file, checks.max_pixels))
        if complete is False:
            return "truncated: its end is missing", True
        if checks.check == "decode" or complete is None:
            content = retried(file.path, lambda: read_regular(file.path))
            decode(content, "", max_pixels=checks.max_pixels)
            with open_image(io.BytesIO(content), "", checks.max_pixels) as image:
                image.verify()  # checksums, which decoding may ignore
    except UsageError as error:
        return str(error).removeprefix(": "), True
    except OSError as error:
        return str(error.strerror or error), error.errno is None
    except (MemoryError, Failure):
        raise
    except Exception as error:  # Pillow raises errors of many types
        return str(error), True
    return "", True


def _looks_complete(file: ImageFile, max_pixels: int) -> bool | None:
    """Whether a file begins and ends as its format requires; None if only decoding can tell."""
    with open_regular(file.path) as opened:
        head = opened.read(32)
        opened.seek(max(file.size - TAIL, 0))
        tail = opened.read()
        try:
            opened.seek(0)
            open_image(opened, "", max_pixels)
        except UnidentifiedImageError:
            return None
    if has_16_bits(head):  # only decoding shows its values
        return None
    for start, end in ENDS.items():
        if head.startswith(start):
            if tail.endswith(end):
                return True
            # Other bytes may follow the image, such as a video after a photo.
            return None if end in read_regular(file.path) else False
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return int.from_bytes(head[4:8], "little") + 8 <= file.size
    if head[:6] in (b"GIF87a", b"GIF89a") and tail.endswith(b";"):
        return True
    if head[:2] == b"BM" and 0 < int.from_bytes(head[2:6], "little") <= file.size:
        return True
    return None


def known_by(record: Path, checks: ImageChecks) -> dict[int, str] | None:
    """What ``unreadable`` found, by its record; None if that is missing or of other checks."""
    known = _read_record(record)
    if known.get("rules") != _rules(checks) or known.get("check") not in (checks.check, "decode"):
        return None
    return {int(i): reason for i, reason in known["unreadable"].items()}


def _rules(checks: ImageChecks) -> str:
    return f"{RULES} {checks.max_pixels}"


def recorded(record: Path) -> list[int]:
    """The files that ``unreadable`` found, by their indices, as far as they are in its record."""
    return list(map(int, _read_record(record).get("unreadable", {})))


def _read_record(path: Path) -> dict[str, Any]:
    """The record that ``unreadable`` wrote; empty if it is missing or damaged."""
    try:
        known = parse_json(path.read_text())
        return known if known.pop("sha256") == _digest(known) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()
