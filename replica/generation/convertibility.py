"""Whether a machine of Generation 2 can be started as Generation 1, as a recovery point's manifest keeps it.

The value and its JSON form alone (docs/format.md, section 6): manifests are read where nothing is ever inspected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from itertools import pairwise
from typing import Any, Final, TypeAlias

from conversion.finding import Finding, Severity
from replica.block import LARGEST_DISK_BYTES, LARGEST_DISK_NUMBER, block_count
from replica.errors import IntegrityError
from replica.record import Fields, time_text

MOST_FINDINGS: Final = 12
LONGEST_TEXT: Final = 200
MOST_RANGES: Final = 256  # of all disks together
MOST_DISKS: Final = 16

Ranges: TypeAlias = tuple[tuple[int, int], ...]  # half-open, block numbers, ascending, not touching


class Verdict(StrEnum):
    """What is known."""

    CONVERTIBLE = "convertible"
    NOT_NEEDED = "not needed"  # it starts from a BIOS as it is
    REFUSED = "refused"
    UNKNOWN = "unknown"  # the inspection failed, or took too long


@dataclass(frozen=True, slots=True)
class Inspected:
    """Which blocks of a disk an inspection read: while they stay as they are, so does what was found."""

    disk: int
    size: int  # bytes
    blocks: Ranges


@dataclass(frozen=True, slots=True)
class Convertibility:
    """The verdict, with what it rests upon.

    ``findings`` are the refusals first, then the warnings, texts cut short; notes are not kept. ``inspected`` are the
    disks that were looked at, in their order, the one with the system last; ``disk`` is its number, None where there
    is none. ``pending``: what was read has changed since, and is looked at again as soon as that may be.
    """

    verdict: Verdict
    judged_at: datetime
    system: str = ""
    disk: int | None = None
    because: str = ""  # of ``unknown``: why
    findings: tuple[Finding, ...] = ()
    rules: int = 0  # the version of the rules that judged
    generation: int = 2  # the machine's, when it was judged
    seconds: float = 0.0  # that the inspection took
    pending: bool = False
    inspected: tuple[Inspected, ...] = ()

    @property
    def refusals(self) -> tuple[Finding, ...]:
        """The findings that keep it from being converted."""
        return tuple(one for one in self.findings if one.severity is Severity.REFUSAL)

    def document(self) -> dict[str, Any]:
        """Return the JSON form for people and programs: without what later cycles need."""
        return {
            "verdict": self.verdict.value,
            "convertible": self.verdict is Verdict.CONVERTIBLE,
            "system": self.system,
            "disk": self.disk,
            "because": self.because or None,
            "pending": self.pending,
            "judged_at": self.judged_at,
            "findings": [one.document() for one in self.findings],
        }


def short(text: str) -> str:
    """Return the text, cut where it is longer than is kept."""
    return text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 1]}…"


def encode(kept: Convertibility) -> dict[str, Any]:
    """Return the JSON form of a manifest; at most some 20 KiB, some hundred bytes as a rule."""
    body: dict[str, Any] = {
        "verdict": kept.verdict.value,
        "judged_at": time_text(kept.judged_at),
        "rules": kept.rules,
        "generation": kept.generation,
        "seconds": round(kept.seconds, 3),
    }
    if kept.system:
        body["system"] = kept.system
    if kept.disk is not None:
        body["disk"] = kept.disk
    if kept.because:
        body["because"] = kept.because
    if kept.pending:
        body["pending"] = True
    if kept.findings:
        body["findings"] = [one.document() for one in kept.findings]
    if kept.inspected:
        body["inspected"] = [
            {"disk": one.disk, "size_bytes": one.size, "blocks": [edge for pair in one.blocks for edge in pair]}
            for one in kept.inspected
        ]
    return body


def decode(body: Fields) -> Convertibility | None:
    """Read what ``encode`` wrote; None for what is not understood: a point restores whatever is said here."""
    try:
        return _decode(body)
    except (IntegrityError, ValueError):
        return None


def _decode(body: Fields) -> Convertibility:
    values = body.values
    inspected = tuple(map(_decode_inspected, _some(body, "inspected", MOST_DISKS)))
    if sum(len(one.blocks) for one in inspected) > MOST_RANGES:
        raise ValueError("more ranges than are ever kept")
    return Convertibility(
        verdict=Verdict(body.text("verdict")),
        judged_at=body.time("judged_at"),
        system=short(body.optional_text("system") or ""),
        disk=body.integer("disk", most=LARGEST_DISK_NUMBER) if "disk" in values else None,
        because=short(body.optional_text("because") or ""),
        findings=tuple(map(_decode_finding, _some(body, "findings", MOST_FINDINGS))),
        rules=body.integer("rules"),
        generation=body.integer("generation", least=1, most=2),
        seconds=body.number("seconds"),
        pending="pending" in values and body.truth("pending"),
        inspected=inspected,
    )


def _some(body: Fields, name: str, most: int) -> Sequence[Fields]:
    found = body.list_of_fields(name) if name in body.values else []
    if len(found) > most:
        raise ValueError(f"more {name} than are ever kept")
    return found


def _decode_finding(body: Fields) -> Finding:
    severity = Severity(body.text("severity"))
    rule, subject, message, evidence, remedy = (
        short(body.text(name)) for name in ("rule", "subject", "message", "evidence", "remedy")
    )
    return Finding(rule, severity, subject, message, evidence, remedy)


def _decode_inspected(body: Fields) -> Inspected:
    edges = body.integers("blocks")
    size = body.integer("size_bytes", least=1, most=LARGEST_DISK_BYTES)
    ordered = all(one < later for one, later in pairwise(edges))
    if len(edges) % 2 or not ordered or (edges and not 0 <= edges[0] < edges[-1] <= block_count(size)):
        raise ValueError("ranges of blocks that are none")
    pairs = tuple(zip(edges[::2], edges[1::2], strict=True))
    return Inspected(body.integer("disk", most=LARGEST_DISK_NUMBER), size, pairs)
