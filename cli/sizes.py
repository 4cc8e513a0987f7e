"""Byte sizes as people write and read them: 20G, 1.5 TiB, 512."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, TypeAlias

import click

if TYPE_CHECKING:
    IntegerParameter: TypeAlias = click.ParamType[int]
else:  # generic for type checkers alone: older releases of click have no parameter there
    IntegerParameter = click.ParamType

_UNITS = ("K", "M", "G", "T", "P")
_WRITTEN = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:([KMGTP])(?:iB|B)?|B)?\s*", re.IGNORECASE)
_LARGEST_BYTES = 2**63 - 1


def parse_size(text: str) -> int:
    """Return the bytes that ``text`` stands for: a number with an optional K, M, G, T or P (powers of 1024).

    Raises ValueError for anything else, for a fraction of a byte, and for more than 2^63-1.
    """
    written = _WRITTEN.fullmatch(text)
    if written is None:
        raise ValueError("a size is a number with an optional K, M, G or T, such as 512, 64M or 1.5T")
    number: str = written[1]
    unit: str | None = written[2]
    factor: int = 1024 ** (_UNITS.index(unit.upper()) + 1) if unit else 1
    whole, _, fraction = number.partition(".")
    scale: int = 10 ** len(fraction)
    scaled = int(whole + fraction) * factor
    if scaled % scale:
        raise ValueError("not a whole number of bytes")
    if scaled // scale > _LARGEST_BYTES:
        raise ValueError("larger than any disk can be")
    return scaled // scale


def human_size(size_bytes: int) -> str:
    """Render a size for a person: ``512 B``, ``1.5 MiB``, ``8 GiB``."""
    value, unit = float(size_bytes), ""
    for candidate in _UNITS:
        if abs(value) < 1024:
            break
        value, unit = value / 1024, candidate
    if not unit:
        return f"{size_bytes} B"
    text = f"{value:.1f}".removesuffix(".0")
    return f"{text} {unit}iB"


class SizeParameter(IntegerParameter):
    """A size on the command line, as ``parse_size`` understands it."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Turn what was typed into bytes, or say what a size looks like."""
        if isinstance(value, int):
            return value
        try:
            return parse_size(str(value))
        except ValueError as error:
            self.fail(f"{value!r}: {error}.", param, ctx)


SIZE = SizeParameter()
