"""godwit verify and repair: finding what is damaged in the store, and putting it right."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, TypeAlias

import click

from cli.output import Output, output_options
from cli.replication import point_document
from cli.session import Session, store_options
from cli.sizes import human_size, parse_size
from replica import history
from replica import repair as repairing
from replica import verify as verification
from replica.damage import DamagedObject, DiskDamage, Report, Sample
from replica.model import Point
from replica.repair import Plan, Repair
from replica.sampling import Budget

if TYPE_CHECKING:
    BudgetParameter: TypeAlias = click.ParamType[Budget]
else:  # generic for type checkers alone
    BudgetParameter = click.ParamType

_SHARE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*%")
RANGES_SHOWN = 4


class _Budget(BudgetParameter):
    """What may be read in a day: a size such as 10G, or a share such as 5%."""

    name = "budget"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Budget:
        """Return the budget that was typed."""
        if isinstance(value, Budget):
            return value
        share = _SHARE.fullmatch(str(value).strip())
        if share:
            percent = float(share[1])
            if not 0 < percent <= 100:
                self.fail(f"{value!r}: a share is more than 0% and at most 100%.", param, ctx)
            return Budget(share=percent / 100)
        try:
            size_bytes = parse_size(str(value))
        except ValueError:
            self.fail(f"{value!r} is neither a size such as 10G nor a share such as 5%.", param, ctx)
        if not size_bytes:
            self.fail("nothing can be read with a budget of 0.", param, ctx)
        return Budget(size_bytes=size_bytes)


@click.command()
@click.argument("name")
@click.option("--point", "number", type=click.IntRange(1), metavar="P", help="One recovery point.  [default: all]")
@click.option("--full", is_flag=True, help="Read and hash every block, instead of looking whether everything is there.")
@click.option(
    "--sampled",
    "budget",
    type=_Budget(),
    metavar="BUDGET",
    help="Read and hash a part, another one each day: at most so much, such as 10G or 5%, until all had its turn.",
)
@store_options
@output_options
def verify(
    output: Output, name: str, number: int | None, full: bool, budget: Budget | None, *, session: Session
) -> int | None:
    """Verify recovery points of the VM NAME, without changing anything.

    Exits with 12 if anything is damaged, and names what is, which points and ranges of their disks that costs, and
    which points still restore. 'godwit repair' puts right what can be.
    """
    if full and budget is not None:
        raise click.UsageError("--full reads everything, --sampled a part: say one of the two")
    store = session.store()
    found = session.vm(store, name)
    points = None if number is None else [history.point(store, found.keys, number)]
    with output.progress(name) as progress:
        report = verification.verify(
            store,
            session.host,
            found,
            points=points,
            full=full,
            sample=budget,
            workers=session.configuration.workers,
            progress=progress,
        )
    output.show(_report_document(name, report), lambda: _render_report(output, name, report))
    return 12 if report.damaged else None


def _mode(report: Report) -> str:
    if report.sample is not None:
        return "sampled"
    return "full" if report.full else "quick"


def _report_document(name: str, report: Report) -> dict[str, Any]:
    return {
        "vm": name,
        "mode": _mode(report),
        "damaged": report.damaged,
        "newest_whole_point": report.newest_whole,
        "sample": None if report.sample is None else _sample_document(report.sample),
        "points": [
            {
                "point": verdict.point,
                "restores": verdict.restores,
                "objects": verdict.objects,
                "read_bytes": verdict.read_bytes,
                "damage": verdict.damage,
                "whole_disks": verdict.whole_disks,
            }
            for verdict in report.verdicts
        ],
        "unreadable": report.unreadable,
        "segments": report.segments,
        "objects": report.objects,
    }


def _sample_document(sample: Sample) -> dict[str, Any]:
    return {
        "day": sample.day + 1,
        "days": sample.days,
        "segments": sample.segments,
        "read_bytes": sample.read_bytes,
        "total_segments": sample.total_segments,
        "total_bytes": sample.total_bytes,
        "percent": round(sample.percent, 3),
    }


def _render_report(output: Output, name: str, report: Report) -> None:
    if not report.verdicts and not report.unreadable:
        output.note(f"{name} has no recovery point yet: godwit replicate {name}")
    for verdict in report.verdicts:
        what = f"{verdict.objects} objects, {human_size(verdict.read_bytes)} checked"
        output.line(f"point {verdict.point}: {'good' if verdict.restores else 'DAMAGED'} ({what})")
    if report.sample is not None:
        output.line(_sample_text(report.sample))
    _render_damage(output, report)
    if report.damaged:
        output.line(f"points that {'restore' if report.full else 'passed'}: {_good(report)}")
        output.note(f"next: godwit repair {name} --dry-run")
    elif report.verdicts and not report.full:
        output.note(
            "everything is there in its size"
            + ("" if report.sample else "; --full reads and hashes every block, --sampled a part each day")
        )


def _sample_text(sample: Sample) -> str:
    all_of_it = f"{human_size(sample.total_bytes)} in {sample.total_segments} segments"
    return (
        f"read {human_size(sample.read_bytes)} in {sample.segments} segments, {sample.percent:.1f} % of {all_of_it}: "
        f"day {sample.day + 1} of {sample.days} until all had its turn"
    )


def _good(report: Report) -> str:
    return _numbers([verdict.point for verdict in report.verdicts if verdict.restores])


def _numbers(points: list[int] | tuple[int, ...]) -> str:
    """Return ascending numbers with runs of more than two as from-to."""
    runs: list[list[int]] = []
    for number in points:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return ", ".join(texts) or "none"


def _render_damage(output: Output, report: Report) -> None:
    for damage in report.unreadable:
        output.line(f"unreadable: {damage.message}")
    for one in report.objects:
        output.line(f"damaged: {_with_key(one)}")
        if not one.points:
            output.line("  no recovery point is harmed by it")
            continue
        output.line(f"  needed by point{'s' if len(one.points) > 1 else ''} {_numbers(one.points)}")
        for disk in one.disks:
            output.line(f"  {_disk_text(disk)}")
    for verdict in report.verdicts:
        for damage in verdict.damage:
            if damage.key is None:
                output.line(f"point {verdict.point}: {damage.message}")


def _with_key(one: DamagedObject) -> str:
    return one.message if one.key is None or one.key in one.message else f"{one.key}: {one.message}"


def _disk_text(disk: DiskDamage) -> str:
    shown = ", ".join(f"{start}-{end}" for start, end in disk.ranges_bytes[:RANGES_SHOWN])
    more = disk.ranges - min(RANGES_SHOWN, len(disk.ranges_bytes))
    rest = f" and {more} more ranges" if more else ""
    return f"disk {disk.number} ({disk.name}): {human_size(disk.damaged_bytes)} lost, bytes {shown}{rest}"


@click.command()
@click.argument("name")
@click.option(
    "--quick", is_flag=True, help="Only look whether everything is there, instead of reading the newest point."
)
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@store_options
@output_options
def repair(output: Output, name: str, quick: bool, dry_run: bool, yes: bool, *, session: Session) -> int | None:
    """Make the newest recovery point of the VM NAME whole again, and older ones where that is possible.

    Reads the newest point from the store. Where that does not restore, all that the disks hold is compared with it,
    and a new recovery point is made for which damaged blocks are stored again. Damaged objects whose content is known
    in full are put back, so that every point that needs them restores. A manifest that cannot be read, which no point
    can be restored from and which keeps 'godwit gc' from its work, is replaced by a mark that its number is taken.

    Exits with 12 if damage was found that could not be put right: older points that stay damaged, or with --dry-run
    any at all.
    """
    store = session.store()
    found = session.vm(store, name)
    workers = session.configuration.workers
    with output.progress(name) as progress:
        planned = repairing.plan(store, session.host, found, quick=quick, workers=workers, progress=progress)
    if dry_run or not planned.is_needed:
        output.show(_plan_document(name, planned), lambda: _render_plan(output, name, planned))
        return 12 if planned.report.damaged else None
    if not yes and not output.json:
        _render_plan(output, name, planned)
    output.confirm(_question(name, planned), yes=yes)
    with output.progress(name) as progress:
        done = repairing.repair(store, session.host, found, planned, workers=workers, progress=progress)
    output.show(_repair_document(name, done), lambda: _render_repair(output, name, done))
    return 12 if done.report.damaged or not done.is_whole else None


def _question(name: str, planned: Plan) -> str:
    replaced = f", replacing {len(planned.manifests)} unreadable manifest(s) for good" if planned.manifests else ""
    return f"Repair {name}{replaced}?"


def _plan_document(name: str, planned: Plan) -> dict[str, Any]:
    return {
        "vm": name,
        "dry_run": True,
        "damaged": planned.is_needed,
        "resends": planned.resends,
        "basis": planned.basis.point if planned.basis else None,
        "manifests": planned.manifests,
        "unreadable": planned.report.unreadable,
        "objects": planned.report.objects,
        "newest_whole_point": planned.report.newest_whole,
    }


def _render_plan(output: Output, name: str, planned: Plan) -> None:
    if planned.newest is None and not planned.is_needed:
        output.note(f"{name} has no recovery point yet: godwit replicate {name}")
        return
    if not planned.is_needed:
        _render_damage(output, planned.report)
        how = "is there in its size" if planned.quick else "is there, and every block of the newest point is good"
        output.line(f"{name}: nothing to repair: everything {how}")
        return
    _render_damage(output, planned.report)
    if planned.resends:
        upon = f"compared with point {planned.basis.point}" if planned.basis else "sent as if for the first time"
        output.line(f"the newest point does not restore: a new one would be made, the disks {upon}")
    for number in planned.manifests:
        output.line(f"the manifest of point {number} would give way to a mark that its number is taken")
    output.line(f"points that passed: {_good(planned.report)}")


def _repair_document(name: str, done: Repair) -> dict[str, Any]:
    return {
        "vm": name,
        "dry_run": False,
        "whole": done.is_whole,
        "damaged": done.report.damaged,
        "point": None if done.point is None else point_document(done.point),
        "replaced_manifests": done.replaced_manifests,
        "healed": done.healed,
        "unhealed": done.unhealed,
        "damaged_points": _damaged_points(done),
        "unreadable": done.report.unreadable,
        "objects": done.report.objects,
        "newest_whole_point": done.report.newest_whole,
    }


def _damaged_points(done: Repair) -> list[int]:
    return [verdict.point for verdict in done.report.verdicts if not verdict.restores]


def _render_repair(output: Output, name: str, done: Repair) -> None:
    for number in done.replaced_manifests:
        output.line(f"{name}: the manifest of point {number} could not be read; its number is marked as taken")
    if done.point is not None:
        _render_new_point(output, name, done.point)
    for key in done.healed:
        output.line(f"put back: {key}")
    for one in done.unhealed:
        output.line(f"not put back: {one.key}: {one.why}")
    lost = _damaged_points(done)
    if lost:
        output.line(f"points that stay damaged: {_numbers(lost)}")
    output.line(f"points that passed: {_good(done.report)}")
    if not done.is_whole:
        output.line("the newest point does not restore: run 'godwit repair' again")


def _render_new_point(output: Output, name: str, point: Point) -> None:
    output.line(
        f"{name}: point {point.point}, {point.cycle.changed_blocks} blocks sent, "
        f"{human_size(point.cycle.stored_bytes)} stored in {point.cycle.seconds:.1f} s"
    )
