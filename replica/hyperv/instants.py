"""The recovery checkpoints and reference points that Godwit makes of a VM, and how it cleans up after itself.

An instant has a label, random in part, which the manifest names. While the disks are read it is a recovery checkpoint;
once the point is published the checkpoint is turned into a reference point, from which on Hyper-V knows what was
written. Both are found again by the ledger on the host (``replica.hyperv.ledger``), wherever a cycle ended:

- a checkpoint whose label the newest manifest names belongs to a published point, and is turned into its reference
  point late; any other of ours is removed, and the reference point of the newest manifest serves again;
- reference points of ours whose label the newest manifest does not name are removed;
- what is in no ledger of ours is never touched.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from replica.errors import SourceError
from replica.hyperv import scripts
from replica.hyperv.address import Take
from replica.hyperv.ledger import COMPACT_LINES, Ledger
from replica.hyperv.machine import Drive, drives_of, is_tracked, place_of
from replica.hyperv.session import (
    Answer,
    HypervError,
    HypervMissingError,
    Session,
    ask,
)
from replica.model import Consistency

RCT: Final = 2  # Msvm_VirtualSystemReferencePoint.ReferencePointType
TAKE_SECONDS: Final = 900  # the guest's applications may take their time
JOB_SECONDS: Final = 600
_LEVELS: Final = {Consistency.APPLICATION: 1, Consistency.CRASH: 2}


@dataclass(frozen=True, slots=True)
class Reference:
    """A reference point, and by place of a disk the identifier of its change tracking."""

    id: str
    changes: dict[str, str]

    def limit(self, drive: Drive) -> str | None:
        """Return the disk's identifier; None where it cannot be told for certain which is the disk's."""
        return self.changes.get(drive.key) if drive.key else None


@dataclass(frozen=True, slots=True)
class Survey:
    """What there is of a VM before a cycle does anything."""

    version: str
    snapshots: tuple[str, ...]  # recovery checkpoints, of anybody
    references: dict[str, Reference]  # by identifier, of anybody
    ledger: Ledger

    @property
    def foreign(self) -> tuple[str, ...]:
        """Return recovery checkpoints that are none of ours."""
        return tuple(one for one in self.snapshots if one not in self.ledger.snapshots)


@dataclass(frozen=True, slots=True)
class Taken:
    """A recovery checkpoint: its disks stand still. ``why_not``: why applications are not quiesced as was wanted."""

    snapshot: str
    label: str
    drives: tuple[Drive, ...]
    consistency: Consistency
    why_not: str = ""


class VmInstants:
    """A VM on its host, as far as instants go. ``ledger`` is the protected VM's id, not Hyper-V's."""

    def __init__(self, session: Session, vm: str, ledger: str) -> None:
        """Nothing is asked yet."""
        self._session = session
        self._vm = vm
        self._ledger = ledger

    def survey(self) -> Survey:
        """Return what there is. Raises HypervError."""
        answer = ask(self._session, scripts.SURVEY, VmId=self._vm, Ledger=self._ledger)
        found = (_reference(one) for one in answer.objects("references"))
        references = {one.id: one for one in found if one is not None}
        ledger = Ledger.parse(answer.text("ledger"))
        return Survey(answer.text("version"), answer.texts("snapshots"), references, ledger)

    def settled(self, survey: Survey, newest: str | None) -> Reference | None:
        """Clean up what earlier cycles left, and return the reference point labelled ``newest``, if there is one.

        Raises HypervError where a checkpoint of ours can be neither converted nor removed: another above it would make
        the chain of the VM's disks longer in each cycle.
        """
        kept = {one: label for one, label in survey.ledger.references.items() if one in survey.references}
        converted = False
        for one, label in survey.ledger.snapshots.items():
            if one not in survey.snapshots:
                continue
            if label == newest and newest not in kept.values():
                converted = self._converted_late(one, label) or converted
            else:
                self.discard(one)
        if converted:
            survey = self.survey()
            kept = {one: label for one, label in survey.ledger.references.items() if one in survey.references}
        for one, label in kept.items():
            if label != newest:
                with suppress(HypervError):
                    self.forget(one)
        mine = [survey.references[one] for one, label in kept.items() if label == newest]
        return mine[0] if len(mine) == 1 else None

    def _converted_late(self, snapshot: str, label: str) -> bool:
        try:
            self.convert(snapshot, label)
        except HypervMissingError:
            return False
        except HypervError as error:
            if error.kind != "Refused":
                raise
            self.discard(snapshot)  # the next point then compares everything, and goes on from there
            return False
        return True

    def take(self, label: str, take: Take, version: str) -> Taken:
        """Make a recovery checkpoint. Raises HypervError."""
        if not is_tracked(version):
            raise SourceError(
                f"the VM's configuration is of version {version or 'unknown'}, and Hyper-V tracks changes from 6.2 on",
                path=self._vm,
                hint="Update-VMVersion raises it while the VM is off; --checkpoints does without tracking",
            )
        if take is Take.CRASH:
            return self._take(label, Consistency.CRASH)
        try:
            return self._take(label, Consistency.APPLICATION)
        except HypervError as error:
            if take is Take.APPLICATION or error.kind != "Refused":
                raise
            self._cleared(label)
            taken = self._take(label, Consistency.CRASH)
            return Taken(taken.snapshot, label, taken.drives, taken.consistency, why_not=error.message)

    def _take(self, label: str, consistency: Consistency) -> Taken:
        answer = ask(
            self._session,
            scripts.TAKE,
            timeout_seconds=TAKE_SECONDS,
            VmId=self._vm,
            Ledger=self._ledger,
            Label=label,
            Consistency=_LEVELS[consistency],
        )
        snapshot = answer.text("snapshot")
        if not snapshot:
            raise HypervError("the host tells of no checkpoint that it made", kind="Answer")
        if answer.flag("off"):
            consistency = Consistency.OFFLINE
        return Taken(snapshot, label, drives_of(answer), consistency)

    def _cleared(self, label: str) -> None:
        """Remove what a failed attempt under this label may have left."""
        survey = self.survey()
        for one, owner in survey.ledger.snapshots.items():
            if owner == label and one in survey.snapshots:
                self.discard(one)

    def stands(self, taken: Taken) -> bool:
        """Tell whether the checkpoint is still there. Raises HypervError."""
        return taken.snapshot in self.survey().snapshots

    def convert(self, snapshot: str, label: str) -> str:
        """Turn a checkpoint into a reference point, and return its identifier. Raises HypervError."""
        answer = ask(
            self._session,
            scripts.CONVERT,
            timeout_seconds=JOB_SECONDS,
            VmId=self._vm,
            Ledger=self._ledger,
            Label=label,
            Snapshot=snapshot,
        )
        return answer.text("reference")

    def discard(self, snapshot: str) -> None:
        """Remove a checkpoint; what was written since stays in the disk. Raises HypervError."""
        ask(
            self._session,
            scripts.DISCARD,
            timeout_seconds=JOB_SECONDS,
            VmId=self._vm,
            Ledger=self._ledger,
            Snapshot=snapshot,
        )

    def forget(self, reference: str) -> None:
        """Remove a reference point. Raises HypervError."""
        ask(
            self._session,
            scripts.FORGET,
            timeout_seconds=JOB_SECONDS,
            VmId=self._vm,
            Ledger=self._ledger,
            Reference=reference,
        )

    def published(self, taken: Taken) -> None:
        """Turn the checkpoint of a published point into its reference point; remove older ones. Raises HypervError."""
        kept = self.convert(taken.snapshot, taken.label)
        survey = self.survey()
        for one in survey.ledger.references:
            if one != kept and one in survey.references:
                self.forget(one)
        if survey.ledger.lines > COMPACT_LINES:
            ledger = self.survey().ledger
            ask(self._session, scripts.COMPACT, Ledger=self._ledger, Text=ledger.text())


def _reference(one: Answer) -> Reference | None:
    """Return a reference point if it is one of change tracking, and told in a way that leaves no doubt."""
    if one.integer("type") != RCT or not one.text("id"):
        return None
    places = [place_of(text) for text in one.texts("disks")]
    changes = one.texts("changes")
    if len(places) != len(changes) or len(set(places)) != len(places) or not all(places) or not all(changes):
        return Reference(one.text("id"), {})
    return Reference(one.text("id"), dict(zip(places, changes, strict=True)))
