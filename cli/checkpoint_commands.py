"""godwit checkpoints list and merge: chains of AVHDX files, and making them short again."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click

from cli.disk_options import IMAGE, dry_run_option, parent_folder_option, yes_option
from cli.failure import DEGRADED
from cli.output import Output, output_options
from cli.session import Duration, Session, duration_text, store_options
from cli.sizes import human_size
from replica import catalog
from replica.checkpoints import chains, merging
from replica.checkpoints.chains import DiskChain
from replica.checkpoints.merging import Merging, Rule
from vhdx.survey import Chain

_SUFFIXES = (".vhdx", ".avhdx")


def _is_path(word: str) -> bool:
    """Tell a path from the name of a VM: by a slash, by its ending, or because there is such a file or folder."""
    return "/" in word or "\\" in word or word.lower().endswith(_SUFFIXES) or Path(word).exists()


@click.command("list")
@click.argument("names", nargs=-1, metavar="[NAME | PATH]...")
@parent_folder_option
@store_options
@output_options
def list_(output: Output, names: tuple[str, ...], parent_folder: tuple[Path, ...], *, session: Session) -> int | None:
    """Show the chain of each disk of the VM NAME, or of the VHDX, AVHDX or folder PATH; of all VMs without either.

    The newest file comes first. Shown are what stands on which file, who uses it, which one the newest recovery point
    was read from, and what is broken. Exit code 3 where a chain is broken or cannot be read.
    """
    listed: list[tuple[str | None, DiskChain]] = []
    for one in names or _every_vm(session):
        if names and _is_path(one):
            listed += [(None, chain) for chain in chains.chains_at(Path(one), allowed_folders=parent_folder)]
        else:
            store = session.store()
            listed += [(one, chain) for chain in chains.chains_of_vm(store, session.vm(store, one))]
    now = session.host.clock.now()

    def render() -> None:
        for position, (vm, disk) in enumerate(listed):
            if position:
                output.line()
            _render(output, vm, disk, now)
        if not listed:
            output.note("no disk was found whose chain could be told")

    output.show({"chains": [_document(vm, disk, now) for vm, disk in listed]}, render)
    return None if all(disk.is_sound for _, disk in listed) else DEGRADED


def _every_vm(session: Session) -> list[str]:
    store = session.store()
    catalog.read_store(store)
    return list(catalog.names(store, session.configuration.tenant))


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME | PATH...")
@click.option(
    "--keep",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="How many AVHDX files stay: the newest, which is never merged, and those beneath it.",
)
@click.option("--older-than", type=Duration(), help="Merge only files last written to longer ago, such as 7d.")
@click.option(
    "--configurations",
    type=IMAGE,
    multiple=True,
    metavar="FOLDER",
    help="A folder with Hyper-V's configurations, beside the usual places: a file that one names is not merged.",
)
@parent_folder_option
@dry_run_option
@yes_option
@store_options
@output_options
def merge(
    output: Output,
    names: tuple[str, ...],
    keep: int,
    older_than: int | None,
    configurations: tuple[Path, ...],
    parent_folder: tuple[Path, ...],
    dry_run: bool,
    yes: bool,
    *,
    session: Session,
) -> None:
    """Merge the older checkpoint files of the VM NAME, or of the disks PATH, into the disk that they are of.

    The VM must be off. All disks named are merged to the same depth, or none where one cannot be. The newest file
    stays, with its name and what it reads as; a template beneath the disk is left alone. Safe to be cut off: run it
    again. Checkpoints that Hyper-V lists are to be deleted there, which merges their files: what one of its
    configurations names is refused.
    """
    paths: list[Path] = []
    for one in names:
        if _is_path(one):
            if Path(one).is_dir():
                raise click.UsageError(f"{one} is a folder: name the newest files of the chains, or the VM")
            paths.append(Path(one))
        else:
            store = session.store()
            found = session.vm(store, one)
            merging.require_protected(store, found)
            paths += chains.files_of_vm(store, found)
    before = None if older_than is None else datetime.now(UTC) - timedelta(seconds=older_than)
    planned = merging.plan(paths, Rule(keep, before), allowed_folders=parent_folder, record_folders=configurations)
    for warning in planned.warnings:
        output.note(f"warning: {warning}")
    if planned.is_needed and not dry_run:
        output.confirm(f"Merge {_summary(planned)}? No machine may be using them", yes=yes)
        merging.run(planned, progress=output.progress)
    output.show(_merge_document(planned, dry_run), lambda: _render_merge(output, planned, dry_run))


def _summary(planned: Merging) -> str:
    count = sum(len(disk.steps) for disk in planned.disks)
    size = human_size(sum(disk.data_bytes for disk in planned.disks))
    disks = sum(bool(disk.steps) for disk in planned.disks)
    return f"{count} file{'s' if count > 1 else ''} of {disks} disk{'s' if disks > 1 else ''}, {size} of data"


def _render_merge(output: Output, planned: Merging, dry_run: bool) -> None:
    for disk in planned.disks:
        if not disk.steps:
            output.line(f"{disk.path}: nothing to merge")
            continue
        output.line(f"{disk.path}: {'would merge' if dry_run else 'merged'} into {disk.target.name}")
        for one in disk.finished:
            output.line(f"  {one.name}, whose merge was cut off")
        for one in disk.merged:
            output.line(f"  {one.name}")
        output.line(f"  {human_size(disk.data_bytes)} of data; {human_size(disk.freed_bytes)} of files removed")
    if planned.is_needed and not dry_run:
        output.note("the next recovery point compares these disks by hash; every older point stays as it is")


def _merge_document(planned: Merging, dry_run: bool) -> dict[str, Any]:
    return {
        "disks": [
            {
                "path": disk.path,
                "into": disk.target,
                "merged": disk.merged,
                "finished": disk.finished,
                "kept": disk.kept,
                "data_bytes": disk.data_bytes,
                "growth_bytes": disk.growth_bytes,
                "freed_bytes": disk.freed_bytes,
            }
            for disk in planned.disks
        ],
        "configurations": planned.records.configurations,
        "warnings": planned.warnings,
        "dry_run": dry_run,
    }


# --- one chain


def _render(output: Output, vm: str | None, disk: DiskChain, now: datetime) -> None:
    of = "" if vm is None else f"{vm}, disk {disk.number}: "
    output.line(f"{of}{disk.path}")
    chain = disk.chain
    if chain is None:
        output.line(f"  {disk.error}")
        if disk.hint:
            output.line(f"  hint: {disk.hint}")
        return
    output.line(f"  {_shape(chain)}")
    output.table(
        ["file", "depth", "file size", "data", "written"],
        [
            (
                link.path.name,
                link.depth,
                human_size(link.file_size),
                human_size(link.stored_size),
                f"{duration_text((now - link.modified_at).total_seconds())} ago",
            )
            for link in chain.links
        ],
        right=(1, 2, 3, 4),
    )
    for remark in _remarks(vm, disk, chain):
        output.line(f"  {remark}")


def _shape(chain: Chain) -> str:
    count = len(chain.links)
    if count == 1 and chain.broken is None:
        return "1 file, no checkpoints"
    above = human_size(sum(link.file_size for link in chain.links if link.depth or chain.broken))
    return f"{count} file{'s' if count > 1 else ''}, {chain.checkpoints} deep; {above} in differencing files"


def _remarks(vm: str | None, disk: DiskChain, chain: Chain) -> list[str]:
    remarks = []
    if chain.broken is not None:
        remarks.append(f"broken at {chain.broken.path.name}: {chain.broken.error}")
        if chain.broken.hint:
            remarks.append(f"hint: {chain.broken.hint}")
    if chain.above:
        names = ", ".join(str(one) for one in chain.above)
        remarks.append(f"not the newest: {names} stand{'s' if len(chain.above) == 1 else ''} above it")
        if vm is not None:
            remarks.append(f"hint: godwit protect {vm} --update --disk {chain.above[0]}, and every other disk")
    remarks += [f"{link.path.name} is in use by {link.used_by}" for link in chain.links if link.used_by]
    for link in chain.links:
        others = [one for one in link.branches if one not in chain.left_over]
        if others:
            remarks.append(
                f"{link.path.name} is the parent of other disks too: {', '.join(one.name for one in others)}"
            )
    cut_off = [*(link.path for link in chain.links if link.merge_begun), *chain.left_over]
    remarks += [f"the merge of {one.name} was cut off: 'godwit checkpoints merge' finishes it" for one in cut_off]
    if disk.replicated is not None:
        remarks.append(_replicated(disk))
    return remarks


def _replicated(disk: DiskChain) -> str:
    told = disk.replicated
    assert told is not None
    if told.file is None:
        return (
            f"point {told.point} was read from a file that is not in the chain any more: the next is compared by hash"
        )
    if told.unchanged:
        return f"point {told.point} was read from {told.file.name}, which is as it was"
    return f"point {told.point} was read from {told.file.name}, and the chain was written to or merged since"


def _document(vm: str | None, disk: DiskChain, now: datetime) -> dict[str, Any]:
    chain = disk.chain
    return {
        "vm": vm,
        "number": disk.number,
        "name": disk.name,
        "path": disk.path,
        "error": disk.error,
        "hint": disk.hint,
        "files": None if chain is None else len(chain.links),
        "checkpoints": None if chain is None else chain.checkpoints,
        "links": None
        if chain is None
        else [
            {
                "path": link.path,
                "depth": link.depth,
                "virtual_size": link.virtual_size,
                "file_size": link.file_size,
                "storage_size": link.storage_size,
                "stored_size": link.stored_size,
                "modified_at": link.modified_at,
                "created_at": link.created_at,
                "age_seconds": int((now - link.modified_at).total_seconds()),
                "used_by": link.used_by,
                "branches": link.branches,
                "merge_begun": link.merge_begun,
            }
            for link in chain.links
        ],
        "above": None if chain is None else chain.above,
        "left_over": None if chain is None else chain.left_over,
        "broken": None if chain is None else chain.broken,
        "replicated": disk.replicated,
    }
