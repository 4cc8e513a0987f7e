"""What of a VM's checkpoints and reference points is ours: the ledger on the host, read.

A line is a verb and its fields, divided by tabs: ``taking LABEL``, ``snapshot LABEL ID``, ``converting LABEL ID``,
``reference LABEL ID``, ``gone ID``. A label is what a cycle calls its instant, and what a manifest names. What a host
that ended in the middle of making something left is in no line, and so is nobody's: it is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

MOST_LINES: Final = 100_000  # more are not read: what they named is left alone
COMPACT_LINES: Final = 100
_FIELDS: Final = {"taking": 2, "snapshot": 3, "converting": 3, "reference": 3, "gone": 2}


@dataclass(frozen=True, slots=True)
class Ledger:
    """Checkpoints and reference points by identifier, with the labels of their instants. ``lines`` is its length."""

    snapshots: dict[str, str] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)
    lines: int = 0

    @classmethod
    def parse(cls, text: str) -> Ledger:
        """Read a ledger. Lines that are none of ours, as one that was cut off, count for nothing."""
        found = cls({}, {}, text.count("\n"))
        for line in text.split("\n", MOST_LINES)[:MOST_LINES]:
            fields = line.rstrip("\r").split("\t")
            if _FIELDS.get(fields[0]) != len(fields) or not all(fields):
                continue
            if fields[0] == "snapshot":
                found.snapshots[fields[2]] = fields[1]
            elif fields[0] == "reference":
                found.references[fields[2]] = fields[1]
            elif fields[0] == "gone":
                found.snapshots.pop(fields[1], None)
                found.references.pop(fields[1], None)
        return found

    def text(self) -> str:
        """Return the shortest ledger that says the same."""
        lines = [f"snapshot\t{label}\t{one}\n" for one, label in self.snapshots.items()]
        lines += [f"reference\t{label}\t{one}\n" for one, label in self.references.items()]
        return "".join(lines)
