"""godwit restore: getting disks back."""

from __future__ import annotations

import os
from pathlib import Path

import click

from cli.output import Output, output_options
from cli.session import Session, store_options
from cli.sizes import human_size
from replica import catalog, history
from replica.catalog import ProtectedVm
from replica.hydrate import FORMATS, choose_disks, restore_files, target_paths
from replica.model import Point
from replica.stores.store import Store


@click.command()
@click.argument("name")
@click.option(
    "--to", "to", required=True, metavar="PATH", help="The file to make; a folder where it ends in / or is one."
)
@click.option(
    "--point", "number", type=click.IntRange(1), metavar="P", help="The recovery point.  [default: the newest]"
)
@click.option("--disk", "disks", multiple=True, metavar="D", help="A disk by number or name.  [default: all]")
@click.option(
    "--format", "format_", type=click.Choice(FORMATS), default=None, help="[default: by the file's name, else vhdx]"
)
@click.option("--overwrite", is_flag=True, help="Replace files that exist.")
@store_options
@output_options
def restore(
    output: Output,
    name: str,
    to: str,
    number: int | None,
    disks: tuple[str, ...],
    format_: str | None,
    overwrite: bool,
    *,
    session: Session,
) -> None:
    """Restore disks of the VM NAME into new files.

    Every block is compared with the hash that was taken when it was replicated, and all of them with the digest of
    the whole disk. A file has its name only once it is whole.
    """
    store = session.store()
    found = session.vm(store, name)
    point = _point(store, found, number)
    chosen = choose_disks(point, disks)
    made_format = format_ or _format_of(to)
    is_folder = to.endswith(("/", os.sep))
    paths = target_paths(chosen, Path(to), made_format, is_folder=is_folder)
    with output.progress(name) as progress:
        done = restore_files(
            store,
            session.host,
            found,
            point,
            disks=chosen,
            paths=paths,
            format_=made_format,  # type: ignore[arg-type]
            overwrite=overwrite,
            workers=session.configuration.workers,
            progress=progress,
        )

    def render() -> None:
        output.line(f"{name}: restored point {point.point}, every block checked")
        for disk in done:
            output.line(
                f"  disk {disk.disk}: {disk.path} ({disk.format}, {human_size(disk.size_bytes)}, "
                f"{human_size(disk.data_bytes)} of it data)"
            )

    output.show({"vm": name, "point": point.point, "disks": done}, render)


def _point(store: Store, found: ProtectedVm, number: int | None) -> Point:
    if number is None:
        return catalog.newest_point(store, found)
    return history.point(store, found.keys, number)


def _format_of(to: str) -> str:
    by_suffix = {".vhd": "vhd", ".img": "raw", ".raw": "raw", ".qcow2": "qcow2"}
    return by_suffix.get(Path(to).suffix.lower(), "vhdx")
