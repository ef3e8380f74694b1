"""Memory that is freed and needed again at once: for images, and for training steps on a CPU."""

import ctypes
import functools
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # settings of mallopt in glibc
KEPT = 1 << 30  # bytes
MOST = 1 << 25  # bytes; the largest M_MMAP_THRESHOLD that older versions accept


@functools.cache
def keep_freed_memory() -> None:
    """Lets this process keep memory that it has freed: up to 1 GiB at the end of its heap.

    It also keeps all that it has freed between arrays that are still in use, of whatever size.
    glibc returns large arrays to the kernel when they are freed. The page faults of the next ones
    then take a tenth of the time of reading images, and up to a third of a training step of a small
    model on a CPU. Other systems than Linux are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(M_TRIM_THRESHOLD, KEPT)
        if not mallopt(M_MMAP_THRESHOLD, KEPT):
            mallopt(M_MMAP_THRESHOLD, MOST)
