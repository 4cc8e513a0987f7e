"""godwit disk create, convert, merge, resize and compact: the commands that write."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import click

from cli.disk_look import both_sizes
from cli.disk_options import IMAGE, dry_run_option, parent_folder_option, yes_option
from cli.output import Output, output_options
from cli.sizes import SIZE, human_size
from vhdx.change import Compacted, compact_image, merge_image, plan_merge, plan_resize, resize_image
from vhdx.convert import CONVERT_FORMATS, ConvertFormat
from vhdx.convert import convert as convert_image
from vhdx.make import create_image, format_for

_FORMAT = click.Choice(CONVERT_FORMATS)
_FORMAT_HELP = "Format; without it the name's ending decides. vhd is fixed, as Azure takes it; raw is sparse."


@click.command()
@click.argument("path", type=IMAGE)
@click.argument("size", type=SIZE, required=False)
@click.option("--format", "-f", "format_name", type=_FORMAT, help=_FORMAT_HELP)
@click.option("--parent", type=IMAGE, help="Make a differencing VHDX on this parent; SIZE defaults to the parent's.")
@click.option("--block-size", type=SIZE, help="Block size of a VHDX or dynamic VHD.")
@click.option("--sector-size", type=click.Choice(["512", "4096"]), help="Logical sector size of a VHDX.")
@click.option("--overwrite", is_flag=True, help="Replace PATH if it exists.")
@output_options
def create(
    output: Output,
    path: Path,
    size: int | None,
    format_name: str | None,
    parent: Path | None,
    block_size: int | None,
    sector_size: str | None,
    overwrite: bool,
) -> None:
    """Create an empty image.

    SIZE is bytes, or a number with K, M, G or T.
    """
    if size is None and parent is None:
        raise click.UsageError("SIZE is needed, but for a differencing disk.")
    made = create_image(
        path,
        size,
        format=cast("ConvertFormat", format_name) if format_name else format_for(path),
        parent=parent,
        block_size=block_size,
        sector_size=int(sector_size) if sector_size else None,
        overwrite=overwrite,
    )
    output.show(made, lambda: output.line(f"created {made.path}: {made.format}, {both_sizes(made.virtual_size)}"))


@click.command()
@click.argument("source", type=IMAGE)
@click.argument("target", type=IMAGE)
@click.option("--format", "-f", "format_name", type=_FORMAT, help=_FORMAT_HELP)
@click.option("--source-format", type=click.Choice(["vhdx", "vhd", "raw", "qcow2"]), help="Format of SOURCE; detected.")
@click.option("--block-size", type=SIZE, help="Block size of a VHDX or dynamic VHD.")
@click.option("--verify", is_flag=True, help="Read the new image again and compare it with SOURCE.")
@click.option("--overwrite", is_flag=True, help="Replace TARGET if it exists.")
@parent_folder_option
@output_options
def convert(
    output: Output,
    source: Path,
    target: Path,
    format_name: str | None,
    source_format: str | None,
    block_size: int | None,
    verify: bool,
    overwrite: bool,
    parent_folder: tuple[Path, ...],
) -> None:
    """Convert an image, parents included, to a new one.

    Only what holds data is read, and zeros are not written. TARGET appears once it is whole and on stable storage.
    """
    with output.progress("convert") as progress:
        done = convert_image(
            source,
            target,
            format=cast("ConvertFormat", format_name) if format_name else format_for(target),
            source_format=source_format,
            allowed_folders=parent_folder,
            block_size=block_size,
            verify=verify,
            overwrite=overwrite,
            progress=progress,
        )
    output.show(
        done,
        lambda: output.line(
            f"converted {done.source} to {done.target}: {done.format}, {human_size(done.target_size)}, "
            f"{human_size(done.written_bytes)} of data{', verified' if done.verified else ''}"
        ),
    )
    if done.target_size != done.source_size:
        grown = done.target_size - done.source_size
        output.note(f"the new disk is {grown} bytes larger: the format takes whole MiB")


@click.command()
@click.argument("child", type=IMAGE)
@click.option("--keep-child", is_flag=True, help="Keep the child; it then says nothing that its parent does not.")
@parent_folder_option
@dry_run_option
@yes_option
@output_options
def merge(
    output: Output, child: Path, keep_child: bool, parent_folder: tuple[Path, ...], dry_run: bool, yes: bool
) -> None:
    """Merge a differencing VHDX into its parent.

    The parent then reads as the child did, and the child is removed. Safe to be cut off: run it again.
    """
    plan = plan_merge(child, allowed_folders=parent_folder)
    text = f"{human_size(plan.data_bytes)} of {plan.child} into {plan.parent}"
    if not dry_run:
        output.confirm(f"Merge {text}{'' if keep_child else ', and remove the child'}?", yes=yes)
        with output.progress("merge") as progress:
            merge_image(child, keep_child=keep_child, allowed_folders=parent_folder, progress=progress)
    document = {
        "child": plan.child,
        "parent": plan.parent,
        "data_bytes": plan.data_bytes,
        "relinked": plan.grandchildren,
        "child_kept": keep_child,
        "dry_run": dry_run,
    }
    output.show(document, lambda: output.line(f"{'would merge' if dry_run else 'merged'} {text}"))


@click.command()
@click.argument("path", type=IMAGE)
@click.argument("size", type=SIZE)
@parent_folder_option
@dry_run_option
@yes_option
@output_options
def resize(output: Output, path: Path, size: int, parent_folder: tuple[Path, ...], dry_run: bool, yes: bool) -> None:
    """Change the virtual size of an image.

    SIZE is the new size: bytes, or a number with K, M, G or T. A VHDX, a fixed VHD or a raw image grows with zeros,
    and shrinks only where no data is cut off.
    """
    plan = plan_resize(path, size, allowed_folders=parent_folder)
    text = f"{path} from {both_sizes(plan.old_size)} to {both_sizes(plan.new_size)}"
    if not dry_run:
        output.confirm(f"Resize {text}?", yes=yes)
        resize_image(path, size, allowed_folders=parent_folder)
    document = {"path": path, "format": plan.format, "old_size": plan.old_size, "new_size": plan.new_size}
    output.show(
        {**document, "dry_run": dry_run}, lambda: output.line(f"{'would resize' if dry_run else 'resized'} {text}")
    )


@click.command()
@click.argument("path", type=IMAGE)
@yes_option
@output_options
def compact(output: Output, path: Path, yes: bool) -> None:
    """Give back the storage of what holds nothing.

    In a VHDX, blocks of zeros are freed and the others moved down; a raw image or fixed VHD gets holes. What a guest
    reads does not change.
    """
    output.confirm(f"Compact {path} in place?", yes=yes)
    with output.progress("compact") as progress:
        done = compact_image(path, progress=progress)
    output.show(done, lambda: _render_compacted(output, done))


def _render_compacted(output: Output, done: Compacted) -> None:
    output.line(
        f"compacted {done.path}: file {human_size(done.file_size_before)} to {human_size(done.file_size_after)}"
    )
    if done.storage_before is not None and done.storage_after is not None:
        output.line(f"on storage {human_size(done.storage_before)} to {human_size(done.storage_after)}")
