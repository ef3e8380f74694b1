"""Where the wall time of training goes, and how fast it is: the timing columns of metrics.csv.

The loop labels its phases: it waits for data, reports (including saving), or pauses. The remaining
time is device work: dispatching steps, and waiting for the status of the step before. Nothing here
waits for the device, so all times are times of the host: while the host waits for data, the device
may still be busy with the step before.
"""

import collections
import contextlib
import time
from collections.abc import Iterator
from typing import Literal

Activity = Literal["data", "reporting", "pause"]

COLUMNS = (
    *("images_per_second", "model_flops_per_second", "mfu"),
    *("seconds/data", "seconds/device", "seconds/reporting"),
)
"""The columns of a row; they differ between otherwise equal runs. The seconds are per step; in sum
they are the batch size divided by the images per second. The model FLOPs utilization (``mfu``) is
relative to the devices' peak for bfloat16 matmuls."""


class StepTimer:
    """Splits the wall time of steps by activity, and counts their images and FLOPs.

    Args:
        batch_size: images per step.
        flops_per_image: FLOPs per image of a training step; None if unknown.
        peak_flops: peak of all devices together, FLOP/s; None if unknown.
    """

    def __init__(
        self,
        batch_size: int,
        flops_per_image: float | None = None,
        peak_flops: float | None = None,
    ) -> None:
        self._batch_size = batch_size
        self._flops_per_image, self._peak_flops = flops_per_image, peak_flops
        self.restart(0)

    def restart(self, step: int) -> None:
        """Starts to measure at the end of a step."""
        self._step, self._start = step, time.perf_counter()
        self._seconds: dict[Activity, float] = collections.defaultdict(float)

    @contextlib.contextmanager
    def measure(self, activity: Activity) -> Iterator[None]:
        """Counts the time inside this context, which is not nested, for an activity.

        A pause, such as an evaluation, belongs to no step.
        """
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[activity] += time.perf_counter() - start

    def row(self, step: int) -> dict[str, float | None]:
        """The timing columns of the steps up to this one; measures anew from here.

        Returns:
            only None if measuring started at the end of this step.
        """
        steps, seconds = step - self._step, self._seconds
        total = time.perf_counter() - self._start - seconds["pause"]
        self.restart(step)
        if steps < 1:
            return dict.fromkeys(COLUMNS)
        images_per_second = steps * self._batch_size / total
        flops = self._flops_per_image and images_per_second * self._flops_per_image
        data, reporting = seconds["data"], seconds["reporting"]
        split = (data, total - data - reporting, reporting)
        values = (
            *(images_per_second, flops, flops and self._peak_flops and flops / self._peak_flops),
            *(part / steps for part in split),
        )
        return dict(zip(COLUMNS, values, strict=True))
