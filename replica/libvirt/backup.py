"""A libvirt backup job in pull mode: begun over all disks at once, served by QEMU over NBD, and always ended."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final
from xml.sax.saxutils import quoteattr

from replica.errors import SourceError
from replica.libvirt import checkpoints
from replica.libvirt.domain import DomainDisk, parse_xml
from replica.libvirt.virsh import Virsh, VirshError, VirshRefusedError
from replica.nbd.wire import UnixAddress

LOOKING: Final = "looking"  # in place of a VM's id, where a disk is looked at
BITMAP_EXPORT: Final = "godwit"  # what the bitmap of a disk is called over NBD
POLL_SECONDS: Final = 0.02
LONGEST_SOCKET_PATH: Final = 107  # bytes, as the system has it


@dataclass(frozen=True, slots=True)
class JobDisk:
    """A disk of a backup job. ``since``: the checkpoint from which on its writes are to be told, None for none."""

    disk: DomainDisk
    number: int
    since: str | None = None

    @property
    def export(self) -> str:
        """What the disk is called over NBD."""
        return f"disk-{self.number}"


@dataclass(frozen=True, slots=True)
class Begun:
    """How a job was begun: what was wanted may have been more. ``refusals`` are libvirt's words about the rest."""

    disks: tuple[JobDisk, ...]
    checkpoint: str | None
    refusals: tuple[str, ...]


class BackupJob:
    """The backup job of one domain. Its socket and scratch files carry the VM's id, by which it is known later on."""

    def __init__(self, virsh: Virsh, uuid: str, vm_id: str, folder: Path, *, timeout_seconds: float = 60) -> None:
        """Socket and scratch files are made by libvirt and QEMU in ``folder``, which they must be able to write to."""
        self._virsh = virsh
        self._uuid = uuid
        self._folder = folder.absolute()
        self._prefixes = tuple(f"{checkpoints.PREFIX}{one}-" for one in (vm_id, LOOKING))
        # Whoever may write to the folder could lay a socket of their own under a name that they can foretell.
        self._stem = f"{self._prefixes[0]}{secrets.token_hex(6)}"
        self._timeout = timeout_seconds

    @property
    def address(self) -> UnixAddress:
        """Where the disks are served."""
        return UnixAddress(str(self._folder / f"{self._stem}.sock"))

    def begin(self, disks: Sequence[JobDisk], others: Sequence[str], checkpoint: str | None) -> Begun:
        """Begin, and make ``checkpoint`` at the same instant. ``others``: targets of disks that are left alone.

        Where libvirt refuses the bitmaps since a checkpoint, or to make a new one, the job is begun without.
        Raises VirshRefusedError where it cannot be begun at all, VirshError.
        """
        if len(self.address.path.encode()) > LONGEST_SOCKET_PATH:
            raise SourceError(
                "the path is too long for a socket", path=self.address.path, hint="name a shorter one with TMPDIR"
            )
        plain = tuple(replace(one, since=None) for one in disks)
        recorded = checkpoint if any(one.disk.keeps_bitmaps for one in disks) else None
        attempts = [(tuple(disks), recorded)] if any(one.since for one in disks) else []
        attempts += [(plain, recorded)] if recorded else []
        attempts += [(plain, None)]
        refusals: list[str] = []
        for number, (wanted, made) in enumerate(attempts, 1):
            try:
                self._begin(wanted, others, made)
            except VirshRefusedError as error:
                if number == len(attempts):
                    raise VirshRefusedError(error.message, path=error.path, hint=_hint(error.message)) from error
                refusals.append(error.message)
            else:
                return Begun(wanted, made, tuple(refusals))
        raise AssertionError("unreachable")

    def _begin(self, disks: Sequence[JobDisk], others: Sequence[str], checkpoint: str | None) -> None:
        files = {"--backupxml": self._xml(disks, others)}
        if checkpoint is not None:
            recorded = [(one.disk.target, one.disk.keeps_bitmaps) for one in disks]
            files["--checkpointxml"] = checkpoints.xml_of(checkpoint, recorded + [(one, False) for one in others])
        self._virsh.ask("backup-begin", "--domain", self._uuid, files=files)

    def _xml(self, disks: Sequence[JobDisk], others: Sequence[str]) -> str:
        lines = []
        for one in disks:
            scratch = str(self._folder / f"{self._stem}.{one.number}")
            mode = "backupmode='full'"
            if one.since is not None:
                since = quoteattr(one.since)
                mode = f"backupmode='incremental' incremental={since} exportbitmap='{BITMAP_EXPORT}'"
            lines.append(
                f"<disk name={quoteattr(one.disk.target)} backup='yes' type='file' {mode} exportname='{one.export}'>"
                f"<driver type='qcow2'/><scratch file={quoteattr(scratch)}/></disk>"
            )
        lines += [f"<disk name={quoteattr(target)} backup='no'/>" for target in others]
        server = f"<server transport='unix' socket={quoteattr(self.address.path)}/>"
        return f"<domainbackup mode='pull'>{server}<disks>{''.join(lines)}</disks></domainbackup>"

    def end_backups(self) -> None:
        """End the domain's backup job if it is ours. Raises SourceError where it does not end."""
        if self._owner() is not True:
            return
        with suppress(VirshError):  # it may have ended by itself just now
            self._virsh.ask("domjobabort", "--domain", self._uuid)
        deadline = time.monotonic() + self._timeout
        while self._owner() is True:
            if time.monotonic() > deadline:
                raise SourceError("libvirt does not finish to end the backup job", path=self._uuid)
            time.sleep(POLL_SECONDS)

    def clear(self) -> None:
        """End a job that a cycle which was killed left, and remove its files. Raises SourceError where it is another's.

        Only a job whose socket carries our name is ours.
        """
        owner = self._owner()
        if owner:
            self.end_backups()
            owner = self._owner()
        if owner is False:
            raise SourceError(
                "another backup of the domain is running",
                path=self._uuid,
                hint="libvirt runs one at a time: wait until it is done; 'virsh backup-dumpxml' shows it",
            )
        self.remove_files()

    def remove_files(self) -> None:
        """Remove sockets and scratch files that were left: libvirt removes them where a job ends in order."""
        prefix = self._prefixes[0]
        for old in self._folder.glob(f"{prefix}*"):
            with suppress(OSError):
                old.unlink()

    def _owner(self) -> bool | None:
        """Tell whether the job that is running is ours; None where none is."""
        try:
            xml = self._virsh.ask("backup-dumpxml", "--domain", self._uuid)
        except VirshRefusedError as error:
            if "no domain backup job present" in error.message:
                return None
            raise
        server = parse_xml(xml, "domainbackup", self._uuid).find("server")
        name = "" if server is None else Path(server.get("socket") or "").name
        return name.startswith(self._prefixes)


@contextmanager
def ended(job: BackupJob) -> Iterator[None]:
    """Clear away what an earlier cycle left, and on leaving end what was begun meanwhile."""
    job.clear()
    try:
        yield
    except BaseException:
        with suppress(SourceError):  # what went wrong first is told; the next cycle ends the job
            job.end_backups()
            job.remove_files()
        raise
    job.end_backups()
    job.remove_files()


def _hint(message: str) -> str | None:
    if "Permission denied" in message:
        return (
            f"QEMU must be able to make files named {checkpoints.PREFIX}* in the folder for scratch files "
            "(TMPDIR): see its owner, and the rules of AppArmor or SELinux"
        )
    return None
