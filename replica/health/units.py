"""Quantities as a person reads them in a report, and the round steps that an axis of them is divided by."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final, Literal, TypeAlias

Quantity: TypeAlias = Literal["seconds", "bytes"]

_BINARY: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_STEPS_SECONDS: Final = (
    *(0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30),
    *(60, 120, 300, 600, 900, 1800),
    *(3600, 7200, 14400, 21600, 43200),
    *(86400, 2 * 86400, 5 * 86400, 10 * 86400, 30 * 86400, 100 * 86400, 365 * 86400, 3650 * 86400),
)


def bytes_text(count: float) -> str:
    """Return a size: ``512 B``, ``1.5 MiB``."""
    unit = 0
    while abs(count) >= 1024 and unit < len(_BINARY) - 1:
        count, unit = count / 1024, unit + 1
    return f"{count:.0f} {_BINARY[unit]}" if count >= 100 or count == int(count) else f"{count:.1f} {_BINARY[unit]}"


def duration_text(seconds: float) -> str:
    """Return a span of time in at most two units."""
    if seconds < 10 and seconds != int(seconds):
        return f"{seconds:.1f} s"
    whole = int(seconds)
    for size, unit, smaller_size, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller_size
            return f"{whole // size} {unit} {rest} {smaller}" if rest else f"{whole // size} {unit}"
    return f"{whole} s"


def quantity_text(value: float, quantity: Quantity) -> str:
    """Return a value with its unit."""
    return duration_text(value) if quantity == "seconds" else bytes_text(value)


def time_text(moment: datetime) -> str:
    """Return a moment to the minute, in UTC."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M}"


def step_for(largest: float, quantity: Quantity, most: int = 4) -> float:
    """Return a round step by which an axis from 0 to ``largest`` has at most ``most`` divisions."""
    if quantity == "seconds":
        return next((step for step in _STEPS_SECONDS if step * most >= largest), largest / most)
    step = 1.0
    while step * most < largest:
        step *= 2
    return step
