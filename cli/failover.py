"""godwit failover, commit and cleanup: a VM started elsewhere, settled for, or taken back."""

from __future__ import annotations

from typing import Any, Literal

import click

from cli.output import Output, output_options
from cli.session import Session, store_options
from replica import catalog
from replica.failover import description, settling, transitions
from replica.failover import failover as failing_over
from replica.failover.failover import Failover, Order
from replica.failover.means import Means
from replica.failover.offer import configured
from replica.failover.providing import ServantProvider
from replica.failover.transitions import Command
from replica.model import FailoverKind, RecoveryMachine, Standing
from replica.platforms.registry import NAMES
from replica.stores.store import Store

WAIT_SECONDS = 60.0  # for a cycle that is at work


def means_of(session: Session, store: Store, name: str) -> Means:
    """Return what a failover of the VM works with on this machine."""
    loaded = session.configuration
    provider = ServantProvider(store.url, loaded.tenant, name, session.host.state_folder, loaded.file)
    return Means(
        store,
        session.host,
        session.vm(store, name),
        session.platform,
        provider,
        configured(loaded.platforms),
        workers=loaded.workers,
        wait_seconds=WAIT_SECONDS,
    )


@click.command()
@click.argument("name")
@click.option("--test", "kind", flag_value="test", help="Beside the source, in a network of its own.")
@click.option("--planned", "kind", flag_value="planned", help="Shut the source down, take the last changes along.")
@click.option("--unplanned", "kind", flag_value="unplanned", help="The source is lost: from what the store has.")
@click.option(
    "--point", "number", type=click.IntRange(1), metavar="P", help="The point.  [default: the newest that verifies]"
)
@click.option(
    "--platform", metavar=f"[{'|'.join(NAMES)}]", help="Where it is started; files: disks only.  [default: qemu]"
)
@click.option(
    "--generation",
    type=click.Choice(["1", "2", "auto"]),
    default="auto",
    help="What it starts as; auto: as it is, if the platform can.",
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Say what would be started from which point, and start nothing.")
@store_options
@output_options
def failover(
    output: Output,
    name: str,
    kind: str | None,
    number: int | None,
    platform: str | None,
    generation: str,
    yes: bool,
    dry_run: bool,
    *,
    session: Session,
) -> None:
    """Start the VM NAME elsewhere, from a recovery point, before anything is restored.

    A test runs beside the source and changes nothing; 'godwit cleanup' removes it. After a planned or unplanned
    failover the source is not replicated any more: 'godwit commit' settles for it, 'godwit cleanup' takes it back.
    A failover that was cut off goes on when it is asked for again, from this machine or another.
    """
    store = session.store()
    means = means_of(session, store, name)
    wanted: Literal[1, 2] | None = None if generation == "auto" else 1 if generation == "1" else 2
    order = Order(None if kind is None else FailoverKind(kind), number, platform, wanted)
    if dry_run:
        _show_plan(output, name, order, failing_over.plan(means, order))
        return
    _confirm_failover(output, means, order, yes=yes)
    with output.progress(name) as progress:
        done = failing_over.failover(means, order, progress)
    settings = catalog.settings_in_force(store, means.found)
    output.show(
        {"vm": name, **_failover_document(done), "status": description.document(name, settings, means.offers)},
        lambda: _render_failover(output, means, done),
    )


def _confirm_failover(output: Output, means: Means, order: Order, *, yes: bool) -> None:
    if order.kind is FailoverKind.TEST:
        return
    state = catalog.settings_in_force(means.store, means.found).state
    transitions.require(means.name, state, Command.FAILOVER)
    if state.standing is Standing.PROTECTED and order.kind is FailoverKind.PLANNED:
        output.confirm(f"Shut {means.name} down at its source, and start it elsewhere?", yes=yes)
    elif state.standing is Standing.PROTECTED and order.kind is FailoverKind.UNPLANNED:
        question = f"Start {means.name} elsewhere? What its source has written since the point is not taken along,"
        output.confirm(f"{question} and the source is replicated no more.", yes=yes)
    elif state.standing is Standing.FAILED_OVER and order != Order(order.kind):
        output.confirm(f"Delete the recovery machine of {means.name} for another?", yes=yes)


def _show_plan(output: Output, name: str, order: Order, plan: failing_over.Plan) -> None:
    document = {
        "vm": name,
        "dry_run": True,
        "kind": None if order.kind is None else order.kind.value,
        "point": plan.point.point,
        "created_at": plan.point.created_at,
        "platform": plan.platform,
        "generation": plan.generation,
        "converted_disk": plan.converted_disk,
        "passed_over": plan.passed_over,
    }

    def render() -> None:
        output.line(f"{name} would start on {plan.platform} as Generation {plan.generation}")
        output.line(f"  from point {plan.point.point}, of {plan.point.created_at:%Y-%m-%d %H:%M:%S} UTC")
        if plan.converted_disk is not None:
            output.line(f"  disk {plan.converted_disk} would be converted, in an overlay")
        for one in plan.passed_over:
            output.note(f"point {one.point} is passed over: {one.because}")
        output.line("Nothing was started: this was a dry run.")

    output.show(document, render)


def _failover_document(done: Failover) -> dict[str, Any]:
    return {
        "standing": done.standing.value,
        "machine": description.machine_document(done.machine),
        "point": done.machine.point,
        "passed_over": done.passed_over,
        "resumed": done.resumed,
        "final_point": None if done.final is None else done.final.point,
        "left": [description.machine_document(one) for one in done.left],
        "notes": done.notes,
    }


def _render_failover(output: Output, means: Means, done: Failover) -> None:
    name, machine = means.name, done.machine
    for one in done.passed_over:
        output.note(f"point {one.point} was passed over: {one.because}")
    starts = means.offer(machine.platform).starts
    verb = "runs" if starts else "lies ready"
    output.line(
        f"{name} {verb} from point {machine.point} on {machine.platform}, Generation {machine.generation}, "
        f"as {machine.name}"
    )
    if done.final is not None:
        output.line(
            f"  nothing was lost: point {done.final.point} holds all that its disks did, compared after it was off"
        )
    for disk in machine.disks:
        output.line(f"  disk {disk.number}: {disk.address}")
    warn_of_left(output, done.left)
    for note in done.notes:
        output.note(note)
    if machine.kind is FailoverKind.TEST:
        output.note(f"next: godwit cleanup {name} --test {machine.name}")
    else:
        output.note(f"next: godwit commit {name}, or godwit cleanup {name}")


def warn_of_left(output: Output, left: tuple[RecoveryMachine, ...]) -> None:
    """Name the machines that only another host can remove."""
    for one in left:
        output.note(f"{one.name} is on the host {one.host_name} still: run godwit cleanup there, or with --forget")


@click.command()
@click.argument("name")
@store_options
@output_options
def commit(output: Output, name: str, *, session: Session) -> None:
    """Settle for the point that the VM NAME was failed over to. There is no way back to its source but failback."""
    store = session.store()
    means = means_of(session, store, name)
    settling.commit(means)
    show_standing(output, store, means)


def show_standing(output: Output, store: Store, means: Means, more: dict[str, Any] | None = None) -> None:
    """Show where a VM stands now, and what leads on."""
    settings = catalog.settings_in_force(store, means.found)
    told = description.document(means.name, settings, means.offers)
    document = {"vm": means.name, **told, **(more or {})}

    def render() -> None:
        output.line(f"{means.name} is {told['standing']}: {told['says']}")
        output.note(f"next: {' or '.join(transitions.next_commands(means.name, settings.state))}")

    output.show(document, render)


@click.command()
@click.argument("name")
@click.option("--test", "tests", multiple=True, metavar="MACHINE", help="A test machine by its name. May be repeated.")
@click.option("--all", "everything", is_flag=True, help="All machines but the one that counts.")
@click.option("--forget", is_flag=True, help="Strike machines of hosts that are gone for good.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and remove nothing.")
@store_options
@output_options
def cleanup(
    output: Output,
    name: str,
    tests: tuple[str, ...],
    everything: bool,
    forget: bool,
    yes: bool,
    dry_run: bool,
    *,
    session: Session,
) -> None:
    """Remove what a failover of the VM NAME made: its tests, or before 'godwit commit' the recovery machine.

    Without the recovery machine the source counts again, and is replicated from there.
    """
    store = session.store()
    means = means_of(session, store, name)
    state = catalog.settings_in_force(store, means.found).state
    transitions.require(name, state, Command.CLEANUP)
    doomed = settling.doomed(name, state, tests, everything=everything)
    if dry_run:
        document = {"vm": name, "dry_run": True, "doomed": [description.machine_document(one) for one in doomed]}
        output.show(document, lambda: output.fields([("would be removed", [one.name for one in doomed])]))
        return
    if doomed:
        lost = "; what was written there is lost" if state.machine in doomed else ""
        output.confirm(f"Remove {', '.join(one.name for one in doomed)}{lost}?", yes=yes)
    done = settling.cleanup(means, tests, everything=everything, forget=forget)
    for one in done.removed:
        output.note(f"removed: {one.name}")
    for one in done.forgotten:
        output.note(f"forgotten: {one.name} on {one.host_name}")
    removed = {
        "removed": [one.name for one in done.removed],
        "forgotten": [one.name for one in done.forgotten],
    }
    show_standing(output, store, means, removed)
