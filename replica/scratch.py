"""Scratch overlays, where a running QEMU keeps what its guest overwrites while a point is read, and room for them."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Protocol, Self

from replica.errors import SourceError
from replica.monitor import Monitor
from replica.qemu import Machine

LEAST_ROOM_BYTES: Final = 256 << 20
WATCH_SECONDS: Final = 0.1


def default_scratch_folder() -> Path:
    """Return TMPDIR, or /var/tmp where there is one: overlays can grow, and /tmp is often memory."""
    large = Path("/var/tmp")
    return Path(tempfile.gettempdir()) if "TMPDIR" in os.environ or not large.is_dir() else large


@dataclass(frozen=True, slots=True)
class Overlay:
    """A scratch overlay over a disk: what the guest overwrites goes there first, and the rest shows through."""

    node: str  # the overlay
    over: str  # the node beneath
    number: int

    @classmethod
    def make(cls, vm: Machine, number: int, node: str, size: int, folder: Path) -> Self:
        """Make the overlay in a file without a name, which ends with the last process that has it open."""
        name = f"{vm.prefix}{number}"
        file = vm.stack.enter_context(_scratch_file(folder))
        vm.scratch.append(file)
        given = vm.monitor.execute("add-fd", descriptor=file.fileno(), opaque=name)
        path = f"/dev/fdset/{given['fdset-id']}"
        vm.monitor.execute("blockdev-add", driver="file", node_name=f"{name}-file", filename=path)
        options = {"driver": "qcow2", "file": f"{name}-file", "size": size}
        vm.monitor.execute("blockdev-create", job_id=f"{name}-create", options=options)
        vm.monitor.wait_until(lambda: _is_created(vm.monitor, f"{name}-create"), "make an overlay")
        vm.monitor.execute(
            "blockdev-add",
            driver="qcow2",
            node_name=f"{name}-over",
            file=f"{name}-file",
            backing=node,
        )
        return cls(f"{name}-over", node, number)

    def action(self, vm: Machine) -> dict[str, Any]:
        """Return what begins, within the transaction, to keep the instant."""
        data = {
            "job-id": f"{vm.prefix}{self.number}-backup",
            "device": self.over,
            "target": self.node,
            "sync": "none",
        }
        return {"type": "blockdev-backup", "data": data}


def _is_created(monitor: Monitor, job_id: str) -> bool:
    for job in monitor.rows("query-jobs"):
        if job.get("id") == job_id:
            if job.get("status") != "concluded":
                return False
            if "error" in job:
                raise SourceError(f"QEMU cannot make a scratch overlay: {job['error']}", path=monitor.path)
            monitor.execute("job-dismiss", id=job_id)
    return True


@contextmanager
def _scratch_file(folder: Path) -> Iterator[IO[bytes]]:
    """A file without a name."""
    try:
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed below
    except OSError as error:
        raise SourceError(f"no scratch file can be made: {error.strerror}", path=str(folder)) from error
    with file:
        yield file


def require_room(folder: Path) -> None:
    """Raise SourceError where there is too little room to begin with."""
    if _is_short(folder):
        raise _short(folder)


class Backups(Protocol):
    """Backups of a running machine that are at work."""

    def end_backups(self) -> None:
        """Let the guest write on without keeping what it overwrites. Raises SourceError."""


@contextmanager
def room_watched(vm: Backups, folder: Path) -> Iterator[None]:
    """End the backups, and fail, where the room for scratch files becomes short while the context lasts.

    QEMU fails the guest's write where the overlay cannot take what is overwritten; a point is not worth that. Nobody
    else may use the machine's monitor meanwhile. Raises SourceError.
    """
    stopped, short = threading.Event(), threading.Event()

    def watch() -> None:
        while not stopped.wait(WATCH_SECONDS):
            if _is_short(folder):
                short.set()
                with suppress(SourceError):  # the end of the cycle tries again
                    vm.end_backups()
                return

    thread = threading.Thread(target=watch, name="room")
    thread.start()
    try:
        yield
    except Exception as error:
        if short.is_set():
            raise _short(folder) from error
        raise
    finally:
        stopped.set()
        thread.join()
    if short.is_set():
        raise _short(folder)


def _is_short(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < LEAST_ROOM_BYTES
    except OSError:
        return True


def _short(folder: Path) -> SourceError:
    return SourceError(
        f"less than {LEAST_ROOM_BYTES >> 20} MiB are left for what the guest overwrites while it is read",
        path=str(folder),
        hint="make room, or name another folder for scratch files with TMPDIR",
    )
