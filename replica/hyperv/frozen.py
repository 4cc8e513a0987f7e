"""The newest state of a VM that stands still by itself: beneath its newest checkpoint, or all of it when off."""

from __future__ import annotations

from dataclasses import dataclass

from replica.errors import SourceError
from replica.hyperv.machine import Drive, drives_of
from replica.hyperv.scripts import NEWEST
from replica.hyperv.session import Session, ask
from replica.model import Consistency


@dataclass(frozen=True, slots=True)
class Newest:
    """The disks of a checkpoint, in the files that it froze; ``checkpoint`` is empty for a VM that is off."""

    checkpoint: str
    off: bool
    drives: tuple[Drive, ...]

    @property
    def consistency(self) -> Consistency:
        """What is known of it: how somebody else's checkpoint was made is not."""
        return Consistency.OFFLINE if self.off else Consistency.CRASH


def newest_checkpoint(session: Session, vm: str) -> Newest:
    """Return what stands still. Raises SourceError where nothing does."""
    answer = ask(session, NEWEST, VmId=vm)
    newest = Newest(answer.text("checkpoint"), answer.flag("off"), drives_of(answer))
    if not newest.off and not newest.checkpoint:
        raise SourceError(
            "the VM runs and has no checkpoint, so nothing of it stands still",
            path=vm,
            hint="make one with Checkpoint-VM, or protect the VM without --checkpoints",
        )
    return newest
