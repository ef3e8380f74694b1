"""Shards in ArrayRecord form: their states, their numbers of examples, and how many may be open."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from vmoe.data.sources.index import state_of
from vmoe.errors import Failure, UsageError, one_line
from vmoe.retry import retried

NUMBERS = {os.strerror(number): number for number in errno.errorcode}
SPARE_FILES = 256  # that a process may have open beside the shards


def shard_states(shards: Sequence[Any]) -> list[tuple[int, int]]:
    """Sizes and times of the last change of shards."""
    return [state_of(shard.filename) for shard in shards]


def count_records(shard: str) -> int:
    """The number of examples in a shard.

    Raises:
        UsageError: it is missing, truncated or corrupt.
        Failure: it cannot be read for a reason that can pass.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    def count() -> int:
        with system_errors():
            reader = ArrayRecordReader(shard)
            records = reader.num_records()
            reader.close()  # raises what went wrong before
            return records

    try:
        return retried(shard, count)
    except Failure:
        raise
    except FileNotFoundError:
        raise UsageError(
            f"{shard}: no such file; the data set is incomplete, prepare it again"
        ) from None
    except Exception as error:
        raise UsageError(
            f"{shard}: truncated or corrupt ({one_line(str(error))}); prepare the data set again"
        ) from None


@contextlib.contextmanager
def system_errors() -> Iterator[None]:
    """Turns an error of a reader about one of the system into that OSError."""
    try:
        yield
    except RuntimeError as error:
        found = re.search(r"\w\(\) failed: ([^;]+)", str(error))
        if found is None or found[1] not in NUMBERS:
            raise
        raise OSError(NUMBERS[found[1]], found[1]) from None


def allow_open_files(count: int, place: str) -> None:
    """Raises the limit of open files, as every shard stays open in every process.

    Raises:
        UsageError: the hard limit of the system is too low for so many shards.
    """
    import resource  # not on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + SPARE_FILES
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UsageError(
            f"{place}: its {count:,} shards need {needed:,} open files, more than the limit of "
            f"{hard:,}; raise it (ulimit -Hn), or prepare the data set in fewer, larger shards"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
