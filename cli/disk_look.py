"""godwit disk info, check, map and diff: the commands that only look."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path

import click

from cli.disk_options import IMAGE, parent_folder_option
from cli.failure import DEGRADED, FAILED, INTEGRITY, OK
from cli.output import Output, output_options, rfc3339
from cli.sizes import human_size
from vhdx.check import CheckReport, Severity
from vhdx.check_image import check_image
from vhdx.compare import differences
from vhdx.describe import Description, describe
from vhdx.disk import Extents
from vhdx.errors import UnsupportedDiskError
from vhdx.formats import open_disk
from vhdx.raw import RawDisk
from vhdx.vhdx import VhdxDisk
from vhdx.windows import joined


def both_sizes(size_bytes: int | None) -> str | None:
    """Render a size for people and for arithmetic."""
    if size_bytes is None:
        return None
    return f"{human_size(size_bytes)} ({size_bytes} bytes)" if size_bytes >= 1024 else f"{size_bytes} bytes"


@click.command()
@click.argument("path", type=IMAGE)
@parent_folder_option
@output_options
def info(output: Output, path: Path, parent_folder: tuple[Path, ...]) -> None:
    """Show what an image is: sizes, identities, log, parents.

    Works on VHDX, VHD, raw and qcow2, and on a differencing disk whose parent is missing.
    """
    found = describe(path, allowed_folders=parent_folder)
    output.show(found, lambda: _render_info(output, found))


def _render_info(output: Output, found: Description) -> None:
    output.fields(
        [
            ("path", found.path),
            ("format", f"{found.format}, {found.kind}" if found.format in ("vhdx", "vhd") else found.format),
            ("virtual size", both_sizes(found.virtual_size)),
            ("file size", both_sizes(found.file_size)),
            ("on storage", both_sizes(found.storage_size)),
            ("data in file", both_sizes(found.stored_size)),
            ("data with parents", both_sizes(found.allocated_size) if found.parent else None),
            ("block size", both_sizes(found.block_size)),
            ("sector size", _sectors(found)),
            ("identifier", found.identifier),
            ("data write GUID", found.data_write_guid),
            ("file write GUID", found.file_write_guid),
            ("created", rfc3339(found.created) if isinstance(found.created, datetime) else None),
            ("creator", found.creator),
            ("log", _log(found)),
            ("problems", list(found.problems) or None),
        ]
    )
    if found.parent is not None:
        parent = found.parent
        output.line()
        output.fields(
            [
                ("parent", parent.file or "not usable"),
                ("reason", parent.error),
                ("hint", parent.hint),
                ("parent identifier", [str(guid) for guid in parent.identifiers]),
                ("parent paths", [f"{place.path}  ({place.kind.replace('_', ' ')})" for place in parent.paths]),
            ]
        )
    if len(found.chain) > 1:
        output.line()
        rows = [
            (link.path, link.kind, human_size(link.virtual_size), human_size(link.stored_size)) for link in found.chain
        ]
        output.table(["chain", "kind", "virtual size", "data in file"], rows, right=[2, 3])


def _sectors(found: Description) -> str | None:
    if found.sector_size is None:
        return None
    physical = found.physical_sector_size
    return f"{found.sector_size} bytes" + (f" logical, {physical} physical" if physical else "")


def _log(found: Description) -> str | None:
    if found.log is None:
        return None
    if found.log.state == "empty":
        return "empty"
    return f"{found.log.entries} entries to replay (reading does so in memory, opening for writing on disk)"


@click.command()
@click.argument("path", type=IMAGE)
@parent_folder_option
@output_options
def check(output: Output, path: Path, parent_folder: tuple[Path, ...]) -> int:
    """Look for damage; nothing is ever changed.

    Every finding is listed with its severity and its offset in the file. Exit code 12 where there is an error,
    3 where there are only warnings, 0 where the image is sound.
    """
    report = check_image(path, allowed_folders=parent_folder)
    warnings = sum(finding.severity == Severity.WARNING for finding in report.findings)
    document = {
        "path": path,
        "sound": report.sound,
        "errors": len(report.errors),
        "warnings": warnings,
        "findings": report.findings,
    }
    output.show(document, lambda: _render_check(output, report, warnings))
    if not report.sound:
        return INTEGRITY
    return DEGRADED if warnings else OK


def _render_check(output: Output, report: CheckReport, warnings: int) -> None:
    rows = [
        (finding.severity, "" if finding.offset is None else f"{finding.offset:#x}", finding.rule, finding.message)
        for finding in report.findings
    ]
    if rows:
        output.table(["severity", "offset", "rule", "finding"], rows, right=[1])
    if not report.errors and not warnings:
        output.line(f"{report.path}: no damage found")
    else:
        output.line(f"{report.path}: {_count(len(report.errors), 'error')}, {_count(warnings, 'warning')}")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


@click.command("map")
@click.argument("path", type=IMAGE)
@click.option("--own", is_flag=True, help="Only what this very file holds, parents left out.")
@parent_folder_option
@output_options
def show_map(output: Output, path: Path, own: bool, parent_folder: tuple[Path, ...]) -> None:
    """List the extents that hold data.

    What lies outside them reads as zeros. Only tables are read, no data.
    """
    with open_disk(path, allowed_folders=parent_folder) as disk:
        windows = disk.allocated() if not own or isinstance(disk, RawDisk) else disk.stored()
        _show_extents(output, {"path": path, "virtual_size": disk.size}, windows)


@click.command()
@click.argument("path", type=IMAGE)
@click.argument("other", type=IMAGE, required=False)
@click.option("--since", type=IMAGE, help="Compare with this ancestor in the chain instead of the parent.")
@parent_folder_option
@output_options
def diff(
    output: Output, path: Path, other: Path | None, since: Path | None, parent_folder: tuple[Path, ...]
) -> int | None:
    """List where a child differs from its parent, or two disks from each other.

    With one PATH: the extents in which a differencing disk may differ from its parent, from its tables alone.
    With OTHER too: where the contents differ, in sectors of 512 bytes, data read and compared; the exit code is 1
    where they do.
    """
    if other is not None:
        if since is not None:
            raise click.UsageError("--since goes with one PATH.")
        return _diff_content(output, path, other, parent_folder)
    with open_disk(path, allowed_folders=parent_folder) as disk:
        if isinstance(disk, RawDisk) or (since is not None and not isinstance(disk, VhdxDisk)):
            raise UnsupportedDiskError(
                "this image has no change map", path=str(path), hint="name a second disk to compare the contents"
            )
        windows = disk.changed_since(since) if since is not None and isinstance(disk, VhdxDisk) else disk.changed()
        head = {"path": path, "since": since, "virtual_size": disk.size}
        _show_extents(output, head, windows)
    return None


def _diff_content(output: Output, path: Path, other: Path, parent_folder: tuple[Path, ...]) -> int:
    with (
        open_disk(path, allowed_folders=parent_folder) as first,
        open_disk(other, allowed_folders=parent_folder) as second,
        output.progress("diff") as progress,
    ):
        found = list(joined(differences(first, second, progress=progress)))
        sizes = (first.size, second.size)
    head = {
        "path": path,
        "other": other,
        "virtual_size": sizes[0],
        "other_virtual_size": sizes[1],
        "same_content": not found,
        "identical": not found and sizes[0] == sizes[1],
    }
    _show_extents(output, head, found)
    if sizes[0] != sizes[1]:
        output.note(f"the sizes differ: {both_sizes(sizes[0])} and {both_sizes(sizes[1])}")
    return FAILED if found or sizes[0] != sizes[1] else OK


def _show_extents(output: Output, head: Mapping[str, object], windows: Iterable[Extents]) -> None:
    if output.json:
        items = ({"offset": start, "length": end - start} for start, end in _pairs(windows))
        output.document_with_items(head, "extents", items)
        return
    count = total_bytes = 0
    for start, end in _pairs(windows):
        if not count:
            output.line(f"{'OFFSET':>18}{'LENGTH':>18}")
        count, total_bytes = count + 1, total_bytes + end - start
        output.line(f"{start:>18}{end - start:>18}")
    output.note(f"{_count(count, 'extent')}, {both_sizes(total_bytes)}")


def _pairs(windows: Iterable[Extents]) -> Iterator[tuple[int, int]]:
    for window in joined(windows):
        yield from ((start, end) for start, end in window.tolist())
