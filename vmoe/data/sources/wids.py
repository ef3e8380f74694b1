"""JSON indexes of tar shards, as the library ``wids`` of WebDataset writes them."""

import os
import re
from pathlib import Path
from typing import Any

from vmoe.data.sources.index import state_of
from vmoe.errors import UsageError, parse_json
from vmoe.retry import retried

MAGIC = "wids-shard-index-v1"
REMOTE = re.compile(r"[a-z][a-z0-9+.-]*://|pipe:")  # URLs and commands that write a shard


def read_wids(file: Path, place: str) -> dict[str, int]:
    """The shards of an index, with their numbers of examples; their sizes are checked.

    Args:
        place: the data set, for error messages.

    Raises:
        UsageError: the file is not such an index, or a shard is remote, missing or of another size.
    """
    try:
        index = parse_json(retried(place, file.read_text))
        kind = index.get("__kind__", MAGIC if index.get("wids_version") == 1 else None)
        if kind != MAGIC:
            raise UsageError(f"{place}: is no {MAGIC}")
        entries = [_entry(each) for each in index["shardlist"]]
    except FileNotFoundError:
        raise UsageError(f"{place}: no such file") from None
    except UsageError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{place}: is no {MAGIC} ({error!r})") from None
    for shard, _, size in entries:
        if REMOTE.match(shard):
            raise UsageError(
                f"{place}: the shard {shard!r} is not a local file; download it and put its path "
                "into the index"
            )
        found, _ = state_of(file.parent / shard)
        if size is not None and size != found:
            raise UsageError(
                f"{file.parent / shard}: has {found:,} bytes, {file} says {size:,}; get it again"
            )
    return {os.path.normpath(shard): count for shard, count, _ in entries}


def _entry(entry: dict[str, Any]) -> tuple[str, int, int | None]:
    """The path, the number of examples and the size of a shard.

    Raises:
        ValueError: the path cannot be one.
        KeyError, TypeError: something is missing, or of a wrong type.
    """
    path, count, size = entry["url"], entry["nsamples"], entry.get("filesize")
    if not isinstance(path, str) or "\0" in path:
        raise ValueError(f"url {path!r}")
    return path, int(count), None if size is None else int(size)
