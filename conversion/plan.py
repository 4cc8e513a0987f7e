"""A planned conversion: what would be written where and why, in the order of writing, and how it is taken back.

A plan holds its writes in an overlay; the disk below is not touched until somebody writes them. Groups are written one
after the other, each durable before the next. In both directions the first sector of the disk, alone in its group, is
the switch: before it the disk starts as it did, after it as the other generation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

from conversion.errors import RefusedError
from conversion.finding import Finding, Severity
from conversion.inspection import Inspection
from conversion.layout import Layout
from conversion.manifest import Component, Manifest, Written
from conversion.overlay import Change, Overlay
from conversion.windows.hiveorder import in_phases

GUEST: Final = "guest"  # files of the guest's system: the registry hive, /etc/fstab
ESP: Final = "esp"  # files on the EFI system partition
PLACES: Final = "places"  # the boot core and boot records of logical partitions; on the way back what stood there
TABLE: Final = "table"  # both copies of the GUID partition table, on the way back
SWITCH: Final = "switch"  # the first sector

TO_BIOS_ORDER: Final = (PLACES, ESP, GUEST, SWITCH)
TO_UEFI_ORDER: Final = (TABLE, SWITCH, PLACES, ESP, GUEST)


@dataclass(frozen=True, slots=True)
class Plan:
    """``generation`` is the one that the disk is to start as. Refused where ``overlay`` is None: see ``findings``."""

    generation: Literal[1, 2]
    inspection: Inspection
    overlay: Overlay | None
    order: tuple[str, ...]
    findings: tuple[Finding, ...]
    sentences: tuple[str, ...] = ()
    layout: Layout | None = None
    manifest: Manifest | None = None  # of a conversion to Generation 1

    @property
    def refusals(self) -> tuple[Finding, ...]:
        """What stands against it."""
        return tuple(one for one in self.findings if one.severity is Severity.REFUSAL)

    @property
    def changes(self) -> tuple[Change, ...]:
        """What would change, and why."""
        return () if self.overlay is None else self.overlay.changes()

    @property
    def written_bytes(self) -> int:
        """How much would be written."""
        return sum(length for change in self.changes for _, length in change.extents)

    def require(self) -> Overlay:
        """Return the overlay with all writes. Raises RefusedError naming every reason where there is none."""
        if self.overlay is not None:
            return self.overlay
        raise RefusedError(
            " ".join(f"{one.subject}: {one.message} ({one.evidence})" for one in self.refusals),
            hint="; ".join(one.remedy for one in self.refusals if one.remedy) or None,
        )

    def require_manifest(self) -> Manifest:
        """Return the manifest of a conversion to Generation 1. Raises ValueError for the way back, which has none."""
        if self.manifest is None:
            raise ValueError("only a conversion to Generation 1 has a manifest of its own")
        return self.manifest

    def groups(self) -> Iterator[list[tuple[int, bytes]]]:
        """Yield the writes in their order: each group is to be durable before the next begins."""
        overlay = self.require()
        for name in self.order:
            yield from in_phases(overlay.written(name))

    def document(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "to": f"gen{self.generation}",
            "disk": self.inspection.document(),
            "refused": self.overlay is None,
            "findings": [one.document() for one in self.findings],
            "notes": list(self.sentences),
            "layout": None if self.layout is None else self.layout.document(),
            "changes": [one.document() for one in self.changes],
            "written_bytes": self.written_bytes,
        }


def components(overlay: Overlay, order: tuple[str, ...], documents: dict[str, dict[str, Any]]) -> tuple[Component, ...]:
    """Return what the overlay holds as the components of a manifest."""
    return tuple(
        Component(
            name,
            documents.get(name, {}),
            tuple(Written(offset, overlay.before(offset, len(data)), data) for offset, data in overlay.written(name)),
        )
        for name in order
    )
