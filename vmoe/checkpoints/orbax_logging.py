"""Hides what a failed read or write of Orbax prints after its error has been raised.

Orbax reads or writes all arrays at once; when one fails, those that are still open report their own
errors to an event loop that is closed: thousands of lines on stderr. Reports of other code are
printed as before.
"""

import functools
import logging
import sys
import warnings


@functools.cache
def hide_late_reports() -> None:
    """Installs the filters for the rest of the process."""
    logging.getLogger("asyncio").addFilter(lambda record: not _is_late(record.getMessage()))
    late = "coroutine '(Store|_?(async_)?(read|open|write|serialize)).*' was never awaited"
    warnings.filterwarnings("ignore", late)
    print_unraisable = sys.unraisablehook

    def hook(report: "sys.UnraisableHookArgs") -> None:
        if not _is_late(f"{report.exc_value} {report.object!r}"):
            print_unraisable(report)

    sys.unraisablehook = hook


def _is_late(report: str) -> bool:
    texts = ("Event loop is closed", "_read_array_index_and_device_put", "async_deserialize")
    return any(text in report for text in (*texts, "Error opening"))
