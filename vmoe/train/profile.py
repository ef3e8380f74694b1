"""A trace of some steps of a run, for a profiler."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from vmoe import distributed
from vmoe.errors import Failure, UsageError
from vmoe.train.report import Report


def parse_steps(text: str, steps: int) -> tuple[int, int] | None:
    """The first and the last step to trace.

    Args:
        text: "10:15"; None is returned if it is empty.
        steps: number of steps of the run.

    >>> parse_steps("10:15", 100)
    (10, 15)
    """
    if not text:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first <= last <= steps:
        raise UsageError(
            f"give the first and the last step, from 1 to {steps}, such as 10:15", profile=text
        )
    return first, last


class Profiler:
    """Traces some steps into ``profile/FIRST-LAST`` of a run folder; a context manager.

    Only the primary process traces, and only once in the life of a run: nothing is traced if there
    is a trace already, or if the run resumes after the first of the steps. A run that ends among
    the steps writes a trace of the steps that it has taken.

    Args:
        steps: the first and the last step; None to trace none.
    """

    def __init__(self, workdir: Path, steps: tuple[int, int] | None, report: Report) -> None:
        self._first, self._last = steps or (0, 0)
        self._folder = workdir / "profile" / f"{self._first}-{self._last}"
        self._report = report
        self._due = steps is not None and distributed.is_primary()
        self._tracing = False
        if self._due and any(self._folder.rglob("*.xplane.pb")):
            self._due = False
            report.log(f"profile: {self._folder} has a trace already; nothing is traced")

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if self._tracing:
            with contextlib.suppress(*([Failure] if kind else [])):  # the first error is reported
                self._write()

    def start(self, step: int) -> None:
        """Call this before the batch of a step is read."""
        if self._due and step >= self._first:
            self._due = False
            if step > self._first:
                self._report.log(
                    f"profile={self._first}:{self._last}: the run is at step {step - 1} already; "
                    "nothing is traced"
                )
                return
            with self._errors():
                jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._tracing = True
        if self._tracing:
            self._annotation = jax.profiler.StepTraceAnnotation("train", step_num=step)
            self._annotation.__enter__()

    def stop(self, step: int, outputs: Any) -> None:
        """Call this after a step was dispatched; waits for the outputs of the last traced step."""
        if self._tracing:
            self._annotation.__exit__(None, None, None)
            if step == self._last:
                jax.block_until_ready(outputs)
                self._write()

    def _write(self) -> None:
        self._tracing = False
        with self._report.pause_timer("writing the trace"), self._errors():
            jax.profiler.stop_trace()
        (trace,) = self._folder.rglob("perfetto_trace.json.gz")
        self._report.log(
            f"profile: open {trace} at https://ui.perfetto.dev, or `pip install xprof` and run "
            f"`xprof {self._folder}`"
        )

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turns an error of JAX's profiler into a Failure."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            raise Failure(f"profile: {self._folder}: {error}") from None
