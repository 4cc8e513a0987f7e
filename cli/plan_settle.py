"""godwit plan commit, reprotect and cleanup: what the last run of a plan made, settled for, followed, or removed."""

from __future__ import annotations

from collections.abc import Callable

import click

from cli.failure import FAILED
from cli.output import Output, output_options
from cli.plan_look import plan_name, remembered
from cli.session import Session, store_options
from replica.failover import description as machines
from replica.plans import running, settling
from replica.plans.points import MeansOf
from replica.plans.running import Run
from replica.plans.settling import Settled


def _found(session: Session, plan: str) -> tuple[Run, MeansOf]:
    store = session.store()
    found = running.status(store, running.keys_of(session.configuration.tenant, plan_name(plan)))
    running.refuse_busy(found, session.host.clock.now())
    return found, remembered(session, store)


def _show(output: Output, found: Run, settled: tuple[Settled, ...]) -> int | None:
    document = {"plan": found.header.plan, "run": found.header.run, "vms": settled}

    def render() -> None:
        for one in settled:
            standing = "" if one.standing is None else one.standing.value
            removed = f"; removed {', '.join(one.machines)}" if one.machines else ""
            output.line(f"{one.vm}: {one.error or standing}{removed}")
        if not settled:
            output.line("there was nothing to do")

    output.show(document, render)
    return FAILED if any(one.error is not None for one in settled) else None


def _for_all(
    output: Output, session: Session, plan: str, work: Callable[[Run, MeansOf], tuple[Settled, ...]]
) -> int | None:
    found, means_of = _found(session, plan)
    return _show(output, found, work(found, means_of))


@click.command()
@click.argument("plan")
@store_options
@output_options
def commit(output: Output, plan: str, *, session: Session) -> int | None:
    """Settle for the points that the VMs of the plan PLAN were failed over to. There is no way back but failback."""
    return _for_all(output, session, plan, settling.commit)


@click.command()
@click.argument("plan")
@store_options
@output_options
def reprotect(output: Output, plan: str, *, session: Session) -> int | None:
    """Replicate the VMs of the plan PLAN from their recovery machines from now on."""
    return _for_all(output, session, plan, settling.reprotect)


@click.command()
@click.argument("plan")
@click.option("--forget", is_flag=True, help="Strike machines of hosts that are gone for good.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and remove nothing.")
@store_options
@output_options
def cleanup(output: Output, plan: str, forget: bool, yes: bool, dry_run: bool, *, session: Session) -> int | None:
    """Remove what the last run of the plan PLAN made: its tests, or machines that nobody has settled for.

    The VM that was started last goes first. Without its recovery machine a VM's source counts again.
    """
    found, means_of = _found(session, plan)
    doomed = settling.doomed(found, means_of)
    if dry_run:
        document = {
            "plan": found.header.plan,
            "dry_run": True,
            "doomed": {vm: [machines.machine_document(one) for one in listed] for vm, listed in doomed.items()},
        }
        listed = [f"{vm}: {one.name}" for vm, held in doomed.items() for one in held]
        output.show(document, lambda: output.fields([("would be removed", listed or "nothing")]))
        return None
    if doomed:
        output.confirm(f"Remove {sum(map(len, doomed.values()))} machines of {', '.join(doomed)}?", yes=yes)
    done = settling.clean_up_after(
        session.store(), session.host, session.configuration.tenant, found, means_of, forget=forget
    )
    return _show(output, found, done)
