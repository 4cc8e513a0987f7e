"""godwit prune, gc, pin and unpin: which recovery points stay, and the room of those that went."""

from __future__ import annotations

from datetime import UTC, timedelta
from typing import Any

import click

from cli.output import Output, output_options
from cli.session import Duration, Session, duration_text, store_options
from cli.sizes import human_size
from replica import catalog, garbage, immutability, pins, retention, rewriting, usage
from replica import prune as pruning
from replica.errors import GodwitError
from replica.garbage import Collection, References
from replica.health import gathering
from replica.immutability import Prolongation
from replica.plans import sweeping
from replica.prune import Pruning
from replica.rewriting import Rewriting
from replica.stores.store import Store

dry_run_option = click.option("--dry-run", is_flag=True, help="Only say what would be done.")
yes_option = click.option("--yes", is_flag=True, help="Do not ask.")


@click.command()
@click.argument("name")
@click.option("--keep", metavar="RULE", help="The retention rule for this run.  [default: the VM's]")
@click.option(
    "--point",
    "numbers",
    type=click.IntRange(1),
    multiple=True,
    metavar="P",
    help="Remove this point alone, whatever the rule says; may be repeated.",
)
@dry_run_option
@yes_option
@store_options
@output_options
def prune(
    output: Output,
    name: str,
    keep: str | None,
    numbers: tuple[int, ...],
    dry_run: bool,
    yes: bool,
    *,
    session: Session,
) -> int | None:
    """Remove the recovery points of the VM NAME that its retention rule does not keep.

    The newest point and pinned points always stay. A rule such as all:2h,hourly:24,daily:7,weekly:4,monthly:12 keeps
    every point of the two hours before the newest, and the last point of each of 24 hours, 7 days, 4 weeks and 12
    months that have any; last:N and yearly:N are terms too. The room is freed by 'godwit gc'.

    With --point those points go and no other: one of which a map is lost for good, say, without which gc cannot know
    what is needed.
    """
    if keep is not None and numbers:
        raise click.UsageError("say --keep or --point, not both")
    rule = None if keep is None else retention.parse(keep)
    points = frozenset(numbers) or None
    store = session.store()
    found = session.vm(store, name)
    done = pruning.plan(store, session.host, found, rule=rule, points=points)
    if done.removed and not dry_run:
        output.confirm(f"Remove {_count(len(done.removed), 'recovery point')} of {name} for good?", yes=yes)
        done = pruning.prune(store, session.host, found, rule=rule, points=points)
    document = {"vm": name, "dry_run": dry_run, **_pruning_document(done)}
    output.show(document, lambda: _render_pruning(output, name, done, dry_run=dry_run))
    return 12 if done.unreadable else None


def _pruning_document(done: Pruning) -> dict[str, Any]:
    return {
        "rule": done.rule,
        "removed": done.removed,
        "kept": done.kept,
        "pinned": done.pinned,
        "locked": done.locked,
        "unreadable": done.unreadable,
    }


def _render_pruning(output: Output, name: str, done: Pruning, *, dry_run: bool) -> None:
    verb = "would remove" if dry_run else "removed"
    pinned = f", {len(done.pinned)} pinned" if done.pinned else ""
    output.line(
        f"{name}: {verb} {_count(len(done.removed), 'recovery point')}, {len(done.kept)} kept{pinned} ({done.rule})"
    )
    if done.locked:
        output.line(f"  {_count(len(done.locked), 'point')} stayed because of locks that have not ended yet")
    for one in done.removed if dry_run else ():
        output.line(f"  point {one.point} of {one.created_at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC")
    for wrong in done.unreadable:
        output.note(f"cannot be read, left as it is: {wrong.message}")
    if done.removed and not dry_run:
        output.note(f"next: godwit gc {name}")


@click.command()
@click.argument("name", required=False)
@click.option("--all", "everything", is_flag=True, help="Collect for every protected VM of the tenant.")
@click.option(
    "--grace",
    type=Duration(),
    help="How long what nothing refers to stays before it is deleted.  [default: 1h]",
)
@click.option(
    "--thin",
    type=click.IntRange(0, 90),
    metavar="PERCENT",
    default=usage.THIN_PERCENT,
    show_default=True,
    help="Rewrite segments of which the newest point needs less than this; 0 for none.",
)
@dry_run_option
@yes_option
@store_options
@output_options
def gc(
    output: Output,
    name: str | None,
    everything: bool,
    grace: int | None,
    thin: int,
    dry_run: bool,
    yes: bool,
    *,
    session: Session,
) -> int | None:
    """Delete what no recovery point of the VM NAME needs any more, and rewrite what is hardly needed.

    The first run notes what nothing refers to; one that comes at least the grace period later deletes what nothing
    refers to still. Safe while replication and other machines are at work. Where a manifest or a map cannot be read
    nothing is deleted, and it exits with 12.

    Where little of a segment is still needed, that is copied, at most 256 MiB in a run, by a new point of the newest
    one's content and time; the rest is freed once no older point needs it. That is done only where it frees 16 MiB,
    and four times the size of the point's maps.
    """
    if bool(name) == everything:
        raise click.UsageError("name one VM, or say --all")
    store = session.store()
    catalog.read_store(store)
    tenant = session.configuration.tenant
    names = [name] if name else list(catalog.names(store, tenant))
    if name:
        session.vm(store, name)  # says so where there is none, before much is read
    if not dry_run:
        output.confirm("Delete what no recovery point needs any more?", yes=yes)
    references = garbage.survey(store, tenant, workers=session.configuration.workers)
    if not dry_run:
        gathering.sweep(store, tenant, session.host.clock.now())
        sweeping.sweep(store, tenant, session.host.clock.now())
    span = timedelta(seconds=grace) if grace is not None else garbage.GRACE
    results: list[dict[str, Any]] = []
    code = None
    for one in names:
        try:
            done = _collect(store, session, references, one, span, dry_run=dry_run)
            rewritten = _rewrite(store, session, references, one, thin, dry_run=dry_run or bool(done.busy))
        except GodwitError as error:
            if name:
                raise
            code = 3
            results.append(
                {"vm": one, "error": {"type": type(error).__name__, "message": str(error), "hint": error.hint}}
            )
            output.note(f"{one}: {error}")
            continue
        results.append({"vm": one, "dry_run": dry_run, **_collection_document(done), **_rewriting_document(rewritten)})
        if done.busy:
            code = 11 if name else 3
            output.note(f"{one}: what is due is left to a later run: {done.busy}")
        if not output.json:
            _render_collection(output, one, done, dry_run=dry_run)
            _render_rewriting(output, one, rewritten, dry_run=dry_run)
    output.show(results[0] if name else {"collections": results}, lambda: None)
    return code


def _collect(
    store: Store, session: Session, references: References, name: str, grace: timedelta, *, dry_run: bool
) -> Collection:
    return garbage.collect(
        store,
        session.host,
        session.vm(store, name),
        references,
        grace=grace,
        dry_run=dry_run,
        workers=session.configuration.workers,
    )


def _rewrite(
    store: Store, session: Session, references: References, name: str, percent: int, *, dry_run: bool
) -> Rewriting:
    found = session.vm(store, name)
    terms = usage.Terms(percent=percent)
    thin = rewriting.plan(store, session.host, found, terms, is_lent=references.is_lent)
    if dry_run:
        return Rewriting(thin)
    return rewriting.rewrite(store, session.host, found, thin, workers=session.configuration.workers)


def _collection_document(done: Collection) -> dict[str, Any]:
    return {
        "condemned_objects": done.condemned.objects,
        "condemned_bytes": done.condemned.bytes,
        "deleted_objects": done.deleted.objects,
        "reclaimed_bytes": done.deleted.bytes,
        "waiting_objects": done.waiting.objects,
        "waiting_bytes": done.waiting.bytes,
        "locked_objects": done.locked.objects,
        "locked_bytes": done.locked.bytes,
        "busy": done.busy,
    }


def _render_collection(output: Output, name: str, done: Collection, *, dry_run: bool) -> None:
    verb = "would delete" if dry_run else "deleted"
    output.line(
        f"{name}: {verb} {_count(done.deleted.objects, 'object')}, {human_size(done.deleted.bytes)} reclaimed; "
        f"{_count(done.waiting.objects, 'object')}, {human_size(done.waiting.bytes)} waiting for the grace period"
        + (f" or the end of their locks ({_count(done.locked.objects, 'object')})" if done.locked.objects else "")
    )


def _rewriting_document(done: Rewriting) -> dict[str, Any]:
    return {
        "thin_segments": len(done.thin.segments),
        "thin_bytes": done.thin.total_bytes,
        "rewritten_bytes": done.copied_bytes,
        "rewritten_point": done.point or None,
        "rewriting_damaged": done.damaged,
        "rewriting_busy": done.busy,
    }


def _render_rewriting(output: Output, name: str, done: Rewriting, *, dry_run: bool) -> None:
    segments, room = _count(len(done.thin.segments), "thin segment"), human_size(done.thin.total_bytes)
    if done.point:
        output.line(
            f"{name}: rewrote {human_size(done.copied_bytes)} of {segments}, as point {done.point}; {room} will be "
            "freed once no older point needs them"
        )
    elif done.thin.segments and dry_run:
        output.line(f"{name}: would rewrite {human_size(done.thin.copied_bytes)} of {segments} that take {room}")
    elif done.busy:
        output.note(f"{name}: {segments} left to a later run: {done.busy}")
    for key in done.damaged:
        output.note(f"{name}: {key} is damaged and stays as it is: 'godwit verify {name}' tells what that costs")


@click.command()
@click.argument("name", required=False)
@click.option("--all", "everything", is_flag=True, help="For every protected VM of the tenant.")
@dry_run_option
@store_options
@output_options
def retain(output: Output, name: str | None, everything: bool, dry_run: bool, *, session: Session) -> int | None:
    """Prolong the locks of what the kept points of the VM NAME need, in a store that was made with --immutable-for.

    To be run every quarter of that period at least. It exits with 12 where something that a point needs is gone.
    """
    if bool(name) == everything:
        raise click.UsageError("name one VM, or say --all")
    store = session.store()
    catalog.read_store(store)
    names = [name] if name else list(catalog.names(store, session.configuration.tenant))
    results: list[dict[str, Any]] = []
    code = None
    for one in names:
        try:
            done = immutability.prolong(
                store,
                session.host,
                session.vm(store, one),
                dry_run=dry_run,
                workers=session.configuration.workers,
            )
        except GodwitError as error:
            if name:
                raise
            code = 3
            results.append(
                {"vm": one, "error": {"type": type(error).__name__, "message": str(error), "hint": error.hint}}
            )
            output.note(f"{one}: {error}")
            continue
        results.append({"vm": one, "dry_run": dry_run, **_prolongation_document(done)})
        code = code or (12 if done.missing else None)
        if not output.json:
            _render_prolongation(output, one, done, dry_run=dry_run)
    output.show(results[0] if name else {"prolongations": results}, lambda: None)
    return code


def _prolongation_document(done: Prolongation) -> dict[str, Any]:
    return {
        "immutable_seconds": int(done.terms.period.total_seconds()),
        "objects": done.objects,
        "prolonged": done.prolonged,
        "locked_until": done.locked_until,
        "missing": done.missing,
    }


def _render_prolongation(output: Output, name: str, done: Prolongation, *, dry_run: bool) -> None:
    verb = "would prolong" if dry_run else "prolonged"
    output.line(
        f"{name}: {verb} the locks of {_count(done.prolonged, 'object')} of {done.objects}; all that kept points need "
        f"is locked until {done.locked_until.astimezone(UTC):%Y-%m-%d %H:%M} UTC at least"
    )
    for key in done.missing:
        output.line(f"  missing: {key}")


@click.command()
@click.argument("name")
@click.argument("point", type=click.IntRange(1), required=False)
@click.option("--reason", metavar="TEXT", help="Why, for whoever finds the pin.")
@store_options
@output_options
def pin(output: Output, name: str, point: int | None, reason: str | None, *, session: Session) -> None:
    """Keep the recovery point POINT of the VM NAME whatever the retention rule says; without POINT, list the pins."""
    store = session.store()
    found = session.vm(store, name)
    if point is None:
        listed = pins.pins(store, found)
        output.show({"vm": name, "pins": listed}, lambda: _render_pins(output, name, listed, session))
        return
    made = pins.pin(store, session.host, found, point, reason)
    output.show({"vm": name, **_pin_document(made)}, lambda: output.line(f"{name}: point {point} is pinned"))


def _pin_document(made: pins.Pin) -> dict[str, Any]:
    return {"point": made.point, "created_at": made.created_at, "reason": made.reason}


def _render_pins(output: Output, name: str, listed: list[pins.Pin], session: Session) -> None:
    if not listed:
        output.note(f"no recovery point of {name} is pinned")
        return
    now = session.host.clock.now()
    output.table(
        ["point", "pinned since", "reason"],
        [
            (one.point, f"{duration_text((now - one.created_at).total_seconds())} ago", one.reason or "")
            for one in listed
        ],
        right=(0,),
    )


@click.command()
@click.argument("name")
@click.argument("point", type=click.IntRange(1))
@store_options
@output_options
def unpin(output: Output, name: str, point: int, *, session: Session) -> None:
    """Leave the recovery point POINT of the VM NAME to the retention rule again."""
    store = session.store()
    pins.unpin(store, session.vm(store, name), point)
    output.show({"vm": name, "point": point}, lambda: output.line(f"{name}: point {point} is no longer pinned"))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
