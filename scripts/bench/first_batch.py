"""Measure the first batch of a data set of any length; ``scripts.bench data`` runs this.

    python -m scripts.bench.first_batch ITEMS WORKERS

The data set is synthetic. Prints JSON: the milliseconds from opening it to its first batch, which
include the start of the workers, and the peak memory in MB of this process and of each worker.
"""

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

from vmoe.config import TrainConfig, ViTConfig
from vmoe.data.pipeline import training_batches
from vmoe.data.reading import read_ahead
from vmoe.data.sources import open_source
from vmoe.data.workers import Workers

SIZE = 8  # pixels on each side of an image
CONFIG = TrainConfig(model=ViTConfig(image_size=SIZE, patch_size=SIZE, num_classes=1000))
BATCHES = 4  # read before the memory is measured


def main() -> None:
    items, count = map(int, sys.argv[1:])
    start = time.perf_counter()
    batches = training_batches(open_source(f"synthetic:{items}:{SIZE}", "train"), CONFIG)
    with Workers(count) as workers, read_ahead(batches, 0, BATCHES, workers) as reader:
        next(reader)
        milliseconds = 1e3 * (time.perf_counter() - start)
        for _ in reader:
            pass
        pids = [os.getpid(), *(process.pid for process in multiprocessing.active_children())]
        print(json.dumps({"ms": milliseconds, "mb": [_peak_mb(pid) for pid in pids]}))


def _peak_mb(pid: int | None) -> float:
    """The peak memory of a process on Linux; getrusage includes the parent's at the fork."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1e3


if __name__ == "__main__":
    main()
