"""godwit convert and inspect: a disk image from one generation to the other, as an overlay, a copy, or in place."""

from __future__ import annotations

from pathlib import Path

import click

from cli.output import Output, output_options
from cli.sizes import human_size
from conversion.finding import Finding, Severity
from conversion.layout_planner import LARGEST_FIXED_VHD_SECTORS
from conversion.plan import Plan
from replica.generation.convert import GenerationChange, convert_generation
from replica.generation.inspect import inspect_image
from vhdx.convert import CONVERT_FORMATS

REFUSED = 14
_MARKS = {Severity.REFUSAL: "refused", Severity.WARNING: "warning", Severity.NOTE: "note"}


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--to", "to", type=click.Choice(["gen1", "gen2"]), required=True, help="The generation to start as.")
@click.option(
    "--output", "-o", "target", type=click.Path(path_type=Path), metavar="PATH",
    help="The disk to make: .vhdx (a differencing disk) or .qcow2, over PATH.  [default: beside PATH]",
)  # fmt: skip
@click.option("--format", "format_", type=click.Choice(CONVERT_FORMATS), help="Make a whole copy, of this format.")
@click.option("--in-place", is_flag=True, help="Write into PATH itself. What stood there is saved beside it.")
@click.option(
    "--manifest", type=click.Path(path_type=Path), metavar="FILE", help="To go back: what the disk was converted by."
)
@click.option(
    "--parent-folder", "folders", multiple=True, type=click.Path(path_type=Path, file_okay=False), metavar="FOLDER",
    help="A folder in which parents of PATH may lie, besides its own.",
)  # fmt: skip
@click.option("--for-azure", is_flag=True, help="Refuse what does not fit on a fixed VHD.")
@click.option("--discard-hibernation", is_flag=True, help="Convert a hibernated Windows; its sleeping state is lost.")
@click.option("--dry-run", is_flag=True, help="Show what would be written and why, and write nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@output_options
def convert(
    output: Output,
    path: Path,
    to: str,
    target: Path | None,
    format_: str | None,
    in_place: bool,
    manifest: Path | None,
    folders: tuple[Path, ...],
    for_azure: bool,
    discard_hibernation: bool,
    dry_run: bool,
    yes: bool,
) -> int | None:
    """Convert the OS disk at PATH between Generation 2 (GPT, UEFI) and Generation 1 (MBR, BIOS).

    The disk itself is left as it is: the result is a small overlay over it, verified before it has its name. Exits
    with 14 where the disk cannot be converted, with every reason.
    """
    if in_place and (target is not None or format_ is not None):
        raise click.UsageError("--in-place makes no other disk: leave out --output and --format")
    if format_ is not None and target is None:
        raise click.UsageError("say with --output where the copy goes")
    if in_place and not dry_run:
        output.confirm(f"Write into {path} itself?", yes=yes)
    with output.progress(path.name) as progress:
        done = convert_generation(
            path,
            1 if to == "gen1" else 2,
            output=target,
            format=format_,  # type: ignore[arg-type]
            in_place=in_place,
            dry_run=dry_run,
            manifest=manifest,
            folders=folders,
            discard_hibernation=discard_hibernation,
            largest_sectors=LARGEST_FIXED_VHD_SECTORS if for_azure else None,
            progress=progress,
        )
    output.show(done.document(), lambda: _render(output, done))
    return REFUSED if done.plan.overlay is None else None


def _render(output: Output, done: GenerationChange) -> None:
    plan = done.plan
    output.line(f"{done.source}: {plan.inspection.system_name}, to Generation {plan.generation}")
    render_findings(output, plan.findings)
    for sentence in plan.sentences:
        output.line(f"  {sentence}")
    if plan.overlay is None:
        output.line("It cannot be converted; nothing was written.")
        return
    _render_changes(output, plan)
    if done.target is None:
        output.line("Nothing was written: this was a dry run.")
        return
    kept = f"; {done.source} is as it was" if done.target != done.source else ""
    output.line(f"{done.target} starts as Generation {plan.generation}, verified{kept}")
    if done.manifest is not None:
        output.line(f"Keep {done.manifest}: the way back needs it.")


def _render_changes(output: Output, plan: Plan) -> None:
    rows = [
        (change.what, human_size(sum(length for _, length in change.extents)), change.why) for change in plan.changes
    ]
    output.table(("CHANGE", "BYTES", "WHY"), rows, right=(1,))


def render_findings(output: Output, findings: tuple[Finding, ...]) -> None:
    """Show findings, the grave ones first."""
    order = [Severity.REFUSAL, Severity.WARNING, Severity.NOTE]
    for one in sorted(findings, key=lambda finding: order.index(finding.severity)):
        output.line(f"  {_MARKS[one.severity]}: {one.message} [{one.rule}: {one.subject}; {one.evidence}]")
        if one.remedy:
            output.line(f"    {one.remedy}")


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--parent-folder", "folders", multiple=True, type=click.Path(path_type=Path, file_okay=False), metavar="FOLDER",
    help="A folder in which parents of PATH may lie, besides its own.",
)  # fmt: skip
@output_options
def inspect(output: Output, path: Path, folders: tuple[Path, ...]) -> int | None:
    """Look at the OS disk at PATH: its partitions, the system on it, and whether it can be converted.

    Exits with 14 where it cannot be.
    """
    found = inspect_image(path, folders=folders)

    def render() -> None:
        output.line(f"{path}: {found.system_name}, Generation {found.generation or 'unknown'}")
        rows = [
            (one.number, human_size(one.device.start), human_size(one.device.size), one.name or one.type_name)
            for one in found.partitions
        ]
        output.table(("PARTITION", "AT", "SIZE", "NAME"), rows, right=(0, 1, 2))
        render_findings(output, found.findings)
        output.line("It can be converted." if found.is_convertible else "It cannot be converted.")

    output.show({"path": str(path), **found.document()}, render)
    return None if found.is_convertible else REFUSED
