"""Images that could not be read, or not as asked for: counted, and reported in lines of text."""

from collections.abc import Sequence


class Unreadable:
    """The images that could not be read while batches were made.

    Args:
        instead: what is done in place of reading one, such as "left out".
    """

    def __init__(self, instead: str) -> None:
        self._instead = instead
        self._reasons: dict[str, None] = {}  # each once, in the order of their arrival
        self._reported = 0

    def add(self, reason: str) -> None:
        """Notes an image, which the reason names."""
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
    """The images that the fast decoder refused, each counted once."""

    def __init__(self) -> None:
        self._origins: set[str] = set()
        self._next, self._example = 1, ""

    def add(self, origins: Sequence[str]) -> None:
        """Notes images by where they come from; those of earlier epochs are known already."""
        for origin in origins:
            if origin not in self._origins:
                self._origins.add(origin)
                self._example = origin

    def news(self) -> list[str]:
        """A line whenever their number has doubled."""
        count = len(self._origins)
        if count < self._next:
            return []
        self._next = 2 * count
        return [
            f"{self._example}: refused by the fast decoder, and decoded exactly "
            f"({count:,} image{'s' * (count > 1)} so far)"
        ]
