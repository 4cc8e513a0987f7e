"""Hydration of a running machine: QEMU copies what is missing into its disks behind the guest (block-stream)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from replica.monitor import Monitor, MonitorError, MonitorGoneError
from replica.platforms.platform import DiskSpec
from replica.platforms.qemu.command import node_name

PREFIX: Final = "hydrate-"


def begin(monitor: Monitor, disks: Iterable[DiskSpec], *, bytes_per_second: int = 0) -> None:
    """Begin to copy for each disk that is not whole, or go on where that stopped. Raises MonitorError."""
    jobs = _jobs(monitor)
    backed = backed_nodes(monitor)
    for disk in disks:
        job = f"{PREFIX}{disk.number}"
        if job in jobs:
            if jobs[job].get("io-status") not in (None, "ok"):
                monitor.execute("block-job-resume", device=job)
        elif node_name(disk.number) in backed:
            try:
                monitor.execute(
                    "block-stream",
                    job_id=job,
                    device=node_name(disk.number),
                    on_error="stop",  # waits for a store that is away; ended jobs would have to be begun again
                    speed=bytes_per_second,
                )
            except MonitorGoneError:
                raise
            except MonitorError:
                if job not in _jobs(monitor):  # another command was quicker
                    raise


def flush(monitor: Monitor, number: int) -> None:
    """Have QEMU write down which clusters a disk has. Raises MonitorError."""
    said = monitor.execute("human-monitor-command", command_line=f'qemu-io {node_name(number)} "flush"')
    if isinstance(said, str) and said.strip():
        raise MonitorError(f"QEMU does not flush disk {number}: {said.strip()[:200]}", path=monitor.path)


def backed_nodes(monitor: Monitor) -> frozenset[str]:
    """Return the names of block nodes that build on another. Raises MonitorError."""
    rows = monitor.rows("query-named-block-nodes", flat=True)
    return frozenset(str(row.get("node-name")) for row in rows if row.get("backing_file"))


def remaining(monitor: Monitor, disks: Iterable[DiskSpec]) -> dict[int, int]:
    """Return how many bytes at most are to be copied, by the number of each disk that is not whole yet."""
    backed, jobs = backed_nodes(monitor), _jobs(monitor)
    left = {}
    for disk in disks:
        if node_name(disk.number) not in backed:
            continue
        job = jobs.get(f"{PREFIX}{disk.number}", {})
        length, done = job.get("len", 0), job.get("offset", 0)
        is_known = isinstance(length, int) and isinstance(done, int) and length > 0
        left[disk.number] = max(0, length - done) if is_known else disk.size
    return left


def _jobs(monitor: Monitor) -> dict[str, dict[str, Any]]:
    return {str(row.get("device")): row for row in monitor.rows("query-block-jobs")}
