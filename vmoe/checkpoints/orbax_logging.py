"""Hides the messages that Orbax prints after it has raised the error of a failed read or write.

Orbax reads or writes all arrays at once. If one of them fails, the others log errors to an event
loop that is already closed: thousands of lines on stderr. The filters here drop these lines; other
messages are printed as before.
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
