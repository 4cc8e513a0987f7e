"""Hydration of a running domain: libvirt has QEMU copy what is missing into its disks behind the guest (blockpull)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from replica.libvirt.virsh import Virsh, VirshError, VirshRefusedError
from replica.platforms.overlay import stands_alone

JOB: Final = "Block Pull"


def begin(virsh: Virsh, uuid: str, disks: Iterable[tuple[str, Path]], *, mib_per_second: int = 0) -> None:
    """Begin to copy for each disk that is not whole and not under way; they are targets with their files.

    Raises VirshError, PlatformError.
    """
    for target, path in disks:
        if stands_alone(path) or _job(virsh, uuid, target) is not None:
            continue
        speed = ("--bandwidth", str(mib_per_second)) if mib_per_second else ()
        try:
            virsh.ask("blockpull", "--domain", uuid, "--path", target, *speed)
        except VirshRefusedError:
            if not stands_alone(path) and _job(virsh, uuid, target) is None:  # else another command was quicker
                raise


def flush(virsh: Virsh, uuid: str, path: Path) -> None:
    """Have QEMU write down which clusters a disk has. Raises VirshError.

    No command of libvirt's own does just that.
    """
    rows = json.loads(virsh.ask("qemu-monitor-command", "--domain", uuid, '{"execute": "query-named-block-nodes"}'))
    for row in rows.get("return", ()):
        if row.get("drv") == "qcow2" and row.get("file") == str(path):
            said = virsh.ask("qemu-monitor-command", "--domain", uuid, "--hmp", f'qemu-io {row["node-name"]} "flush"')
            if not said.strip():
                return
            raise VirshError(f"QEMU does not flush the disk: {said.strip()[:200]}", path=str(path))
    raise VirshError("QEMU has no node of the disk", path=str(path))


def remaining_bytes(virsh: Virsh, uuid: str, target: str) -> int | None:
    """Return how many bytes at most are to be copied by the job that runs; None where none does. Raises VirshError."""
    job = _job(virsh, uuid, target)
    if job is None:
        return None
    end, done = job.get("end", ""), job.get("cur", "")
    if not (end.isascii() and end.isdigit() and done.isascii() and done.isdigit() and int(end)):
        return None
    return max(0, int(end) - int(done))


def _job(virsh: Virsh, uuid: str, target: str) -> dict[str, str] | None:
    text = virsh.ask("blockjob", "--domain", uuid, "--path", target, "--raw")
    fields = dict(line.strip().partition("=")[::2] for line in text.splitlines())
    return fields if JOB in fields.get("type", "") else None
