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
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import PIL
from PIL import Image
from rich.console import Console
from rich.progress import track

from vmoe.cache import cache_folder
from vmoe.config.data import Check
from vmoe.data.decode import PNG, ImageFile, decode, has_16_bits
from vmoe.errors import UsageError
from vmoe.workdir.layout import replace_text

TAIL = 4096  # bytes read at the end of a file, where its end marker has to be
CHUNK = 256  # files per task of a thread
PNG_END, JPEG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82", b"\xff\xd9"
RULES = 1  # version of the rules below; an index of another version is not used


def unreadable(folder: str | Path, files: Sequence[ImageFile], check: Check) -> dict[str, str]:
    """The files that cannot be read as images, with reasons.

    The result is kept in an index in the user's cache folder, and read again from there as long as
    the names, sizes and times of the files are the same.
    """
    index, key = _index_of(folder), _key(files)
    known = _read_index(index)
    if known.get("key") == key and known.get("check") in (check, "decode"):
        return known["unreadable"]
    Image.init()  # loads all formats; not safe in several threads
    reasons = _check_all(folder, files, check)
    found = {file.path: r.text for file, r in zip(files, reasons, strict=True) if r.text}
    if all(reason.lasting for reason in reasons):
        _write_index(index, {"key": key, "check": check, "unreadable": found})
    return found


class _Reason(NamedTuple):
    """Why a file cannot be read as an image.

    Attributes:
        text: empty if it can.
        lasting: whether the reason is in the file, and not in its permissions or the disk.
    """

    text: str
    lasting: bool = True


def _check_all(folder: str | Path, files: Sequence[ImageFile], check: Check) -> list[_Reason]:
    console = Console(stderr=True)
    chunks = [files[i : i + CHUNK] for i in range(0, len(files), CHUNK)]
    with concurrent.futures.ThreadPoolExecutor() as threads:
        results = threads.map(lambda chunk: [_reason(file, check) for file in chunk], chunks)
        shown = track(
            results,
            f"checking {len(files):,} images of {folder}",
            len(chunks),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        return list(itertools.chain.from_iterable(shown))


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


def _key(files: Sequence[ImageFile]) -> str:
    """Changes with the files, the rules and Pillow."""
    text = repr((RULES, PIL.__version__, files))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def _index_of(folder: str | Path) -> Path:
    name = hashlib.sha256(os.fsencode(os.path.abspath(folder))).hexdigest()[:32]
    return cache_folder() / "images" / f"{name}.json"


def _read_index(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) and isinstance(known.get("unreadable"), dict) else {}


def _write_index(path: Path, index: dict[str, Any]) -> None:
    """Writes the index, or nothing where the cache folder cannot be written."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(index))
