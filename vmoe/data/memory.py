"""Memory that images have left, kept for the next ones."""

import ctypes
import functools
import sys

# Settings of glibc's mallopt, and values in bytes.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT = 1 << 28
LARGEST = 1 << 25  # the largest threshold that glibc accepts


@functools.cache
def keep_freed_memory() -> None:
    """Lets this process keep up to 256 MiB of freed memory.

    glibc would return the memory of each batch to the kernel, and page faults for the next one take
    a tenth of the time of reading. Other systems than Linux are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(M_TRIM_THRESHOLD, KEPT)
        mallopt(M_MMAP_THRESHOLD, LARGEST)
