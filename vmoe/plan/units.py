"""Formats bytes, seconds and FLOPs with three digits, and parses amounts of memory."""

import re

from vmoe.errors import UsageError

_MEMORY = {"GB": 1e9, "GiB": 2.0**30, "MB": 1e6, "MiB": 2.0**20, "kB": 1e3}


def parse_bytes(device_memory: str) -> float:
    """Parses an amount of memory, such as "80GB" or "74.5 GiB", to bytes.

    Raises:
        UsageError: the text is not a number and a unit.

    >>> parse_bytes("1.5kB")
    1500.0
    """
    amount = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)", device_memory)
    if not amount or amount[2] not in _MEMORY:
        problem = f"use a number and one of {', '.join(_MEMORY)}"
        raise UsageError(problem, device_memory=device_memory)
    return float(amount[1]) * _MEMORY[amount[2]]


def format_bytes(amount: float) -> str:
    """Bytes in a decimal unit.

    >>> format_bytes(5.16e9), format_bytes(320.0)
    ('5.16 GB', '320 B')
    """
    return _format(amount, {1e9: "GB", 1e6: "MB", 1e3: "kB", 1.0: "B"})


def format_seconds(amount: float) -> str:
    """Seconds, as s, ms or µs.

    >>> format_seconds(0.0123)
    '12.3 ms'
    """
    return _format(amount, {1.0: "s", 1e-3: "ms", 1e-6: "µs"})


def format_flops(amount: float) -> str:
    """FLOPs in a decimal unit.

    >>> format_flops(1.41e16)
    '14.1 PFLOPs'
    """
    return _format(amount, {1e15: "PFLOPs", 1e12: "TFLOPs", 1e9: "GFLOPs", 1e6: "MFLOPs"})


def _format(amount: float, units: dict[float, str]) -> str:
    """Formats in the largest unit that gives at least 1, else in the smallest; units descend."""
    size = next((size for size in units if amount >= size), min(units))
    digits = max(0, 3 - len(f"{amount / size:.0f}"))
    return f"{amount / size:,.{digits}f} {units[size]}"
