"""Counts and reports images that could not be read, or not by the fast decoder."""

from collections.abc import Sequence


class Unreadable:
    """The images that could not be read when batches were made.

    Args:
        instead: how these images were handled, such as "left out".
    """

    def __init__(self, instead: str) -> None:
        self._instead = instead
        self._reasons: dict[str, None] = {}  # without duplicates, in the order of arrival
        self._reported = 0

    def add(self, reason: str) -> None:
        """Adds an image; the reason contains its origin."""
        self._reasons[reason] = None

    def news(self) -> list[str]:
        """A line for each image that no earlier call has returned."""
        start, reasons = self._reported, list(self._reasons)
        self._reported = len(reasons)
        return [
            f"{reason}; {self._instead} ({number} so far)"
            for number, reason in enumerate(reasons[start:], start + 1)
        ]


class Refused:
    """Counts, over all epochs, how often the fast decoder did not support an image."""

    def __init__(self) -> None:
        self._count, self._next, self._example = 0, 1, ""

    def add(self, origins: Sequence[str]) -> None:
        """Adds images by their origins."""
        self._count += len(origins)
        self._example = origins[-1] if origins else self._example

    def news(self) -> list[str]:
        """A line if the number has doubled since the last one."""
        if self._count < self._next:
            return []
        self._next = 2 * self._count
        return [
            f"{self._example}: not supported by the fast decoder; decoded exactly "
            f"({self._count:,} {'time' if self._count == 1 else 'times'} so far)"
        ]
