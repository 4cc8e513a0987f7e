"""godwit replicate and points: making recovery points, and listing them."""

from __future__ import annotations

from datetime import UTC
from typing import Any

import click

from cli.output import Output, output_options
from cli.session import Session, store_options
from cli.sizes import human_size
from replica import catalog, cycle, history
from replica.errors import GodwitError
from replica.model import Point
from replica.stores.store import Store
from replica.tracking import ABOVE
from vhdx.errors import DiskError


@click.command()
@click.argument("name", required=False)
@click.option(
    "--all", "everything", is_flag=True, help="Replicate every protected VM of the store, one after the other."
)
@click.option("--rescan", is_flag=True, help="Compare all that the disks hold, whatever their files tell of changes.")
@click.option("--watch", is_flag=True, help="Go on, at each VM's interval, until told to stop, as 'godwit run' does.")
@store_options
@output_options
def replicate(
    output: Output, name: str | None, everything: bool, rescan: bool, watch: bool, *, session: Session
) -> int | None:
    """Make a recovery point of the VM NAME as its disks are now.

    The first cycle reads all that the disks hold; later ones send only blocks that changed. A cycle that is
    interrupted publishes nothing, and the next one uses what it had uploaded. The VM must be off, or its disks a
    checkpoint, or protected through their running QEMU: a disk file that changes while it is read fails the cycle.
    """
    if bool(name) == everything:
        raise click.UsageError("name one VM, or say --all")
    if watch:
        return _watch(output, session, name, rescan)
    store = session.store()
    if name:
        point = _replicate(output, store, session, name, rescan)
        output.show(point_document(point), lambda: _render_cycle(output, point))
        return None
    catalog.read_store(store)
    results: list[dict[str, Any]] = []
    worst = 0
    for one in catalog.names(store, session.configuration.tenant):
        try:
            point = _replicate(output, store, session, one, rescan)
            results.append(point_document(point))
            if not output.json:
                _render_cycle(output, point)
        except (GodwitError, DiskError) as error:
            worst = 3
            results.append(
                {"vm": one, "error": {"type": type(error).__name__, "message": str(error), "hint": error.hint}}
            )
            output.note(f"{one}: {error}")
    output.show({"cycles": results}, lambda: None)
    return worst


def _watch(output: Output, session: Session, name: str | None, rescan: bool) -> int | None:
    from cli import run  # noqa: PLC0415 - one cycle needs none of it

    if rescan:
        raise click.UsageError("--rescan is for one cycle, --watch for many: say one of the two")
    if name:
        session.vm(session.store(), name)  # says so where there is none
    return run.watch(output, session, name)


def _replicate(output: Output, store: Store, session: Session, name: str, rescan: bool) -> Point:
    found = session.vm(store, name)
    with output.progress(name) as progress:
        point = cycle.replicate(
            store, session.host, found, workers=session.configuration.workers, progress=progress, rescan=rescan
        )
    for disk in point.disks:
        newer = disk.source.get(ABOVE)
        if newer is not None:
            output.note(
                f"{name}, disk {disk.number}: other disks stand on the file that was read, "
                f"which is then an earlier state: {newer.replace(chr(10), ', ')}"
            )
            output.note(f"  if the VM runs on one of them: godwit protect {name} --update --disk PATH, for every disk")
    return point


def _render_cycle(output: Output, point: Point) -> None:
    done = point.cycle
    rate = f", {human_size(int(done.read_bytes / done.seconds))}/s" if done.seconds > 0 else ""
    output.line(
        f"{point.vm_name}: point {point.point}, {done.changed_blocks} blocks changed, "
        f"{human_size(done.stored_bytes)} stored in {done.seconds:.1f} s ({human_size(done.read_bytes)} read{rate})"
    )
    if done.reused_blocks:
        output.line(f"  {done.reused_blocks} blocks were in the store already, from a cycle that was cut off")


def point_document(point: Point) -> dict[str, Any]:
    """Return what --json says of a point."""
    done = point.cycle
    return {
        "vm": point.vm_name,
        "point": point.point,
        "created_at": point.created_at,
        "published_at": point.published_at,
        "consistency": point.consistency.value,
        "size_bytes": point.size,
        "disks": [
            {
                "number": disk.number,
                "name": disk.name,
                "size_bytes": disk.size,
                "data_bytes": disk.data_blocks * 65536,
                "digest": str(disk.digest),
                "found_by": disk.source.get("found_by"),
                "because": disk.source.get("because"),
                "newer_files": disk.source[ABOVE].split("\n") if ABOVE in disk.source else [],
            }
            for disk in point.disks
        ],
        "read_bytes": done.read_bytes,
        "changed_blocks": done.changed_blocks,
        "zero_blocks": done.zero_blocks,
        "reused_blocks": done.reused_blocks,
        "stored_bytes": done.stored_bytes,
        "segments": done.segments,
        "maps": len(point.maps),
        "convertibility": point.convertibility.document() if point.convertibility else None,
        "seconds": done.seconds,
    }


@click.command()
@click.argument("name")
@store_options
@output_options
def points(output: Output, name: str, *, session: Session) -> int | None:
    """List the recovery points of the VM NAME, oldest first."""
    store = session.store()
    found = session.vm(store, name)
    listed = list(history.points(store, found.keys))
    good = [one for one in listed if isinstance(one, Point)]
    damaged = [one for one in listed if not isinstance(one, Point)]
    document = {
        "vm": name,
        "points": [point_document(point) for point in good],
        "damaged": [{"key": error.key, "message": error.message} for error in damaged],
    }

    def render() -> None:
        if not listed:
            output.note(f"{name} has no recovery point yet: godwit replicate {name}")
            return
        output.table(
            ["point", "time (UTC)", "consistency", "disks", "size", "changed", "stored"],
            [
                (
                    point.point,
                    f"{point.created_at.astimezone(UTC):%Y-%m-%d %H:%M:%S}",
                    point.consistency.value,
                    len(point.disks),
                    human_size(point.size),
                    human_size(point.cycle.changed_blocks * 65536),
                    human_size(point.cycle.stored_bytes),
                )
                for point in good
            ],
            right=(0, 3, 4, 5, 6),
        )
        for error in damaged:
            output.note(f"cannot be read: {error}")

    output.show(document, render)
    return 12 if damaged else None
