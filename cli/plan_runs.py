"""godwit plan run and resume: a plan's VMs started elsewhere, tried, or brought home."""

from __future__ import annotations

from pathlib import Path

import click

from cli.failure import DEGRADED, FAILED, INTERRUPTED
from cli.output import Output, output_options
from cli.plan_look import kind_options, plan_name, remembered, show_plan, show_run, surveyed
from cli.plan_progress import PlanReport, report
from cli.session import Session, store_options
from replica.failover.homecoming import Destination, bring
from replica.plans import reading, running
from replica.plans.model import RunKind
from replica.plans.running import Operator, Run
from replica.stores.store import Store

_SAID = {
    RunKind.PLANNED: "Shut {} VMs down at their sources, and start them elsewhere?",
    RunKind.UNPLANNED: "Start {} VMs elsewhere? What their sources have written since is not taken along.",
    RunKind.FAILBACK: "Shut the recovery machines of {} VMs down, and bring them home?",
}


def operator_of(session: Session, store: Store, watch: PlanReport, *, overwrite: bool) -> Operator:
    """Return who runs plans here."""
    destination = Destination(may_overwrite=lambda _: overwrite)
    return Operator(
        store,
        session.host,
        session.configuration.tenant,
        remembered(session, store),
        watch.ask,
        lambda _: lambda means, state, newest, progress: bring(means, state, newest, destination, progress),
        watch,
    )


def _code(found: Run) -> int | None:
    ran = found.ran
    if ran is None or ran.went_well:
        return None
    if ran.interrupted:
        return INTERRUPTED
    return FAILED if ran.stopped is not None else DEGRADED


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@kind_options
@click.option("--yes", is_flag=True, help="Do not ask before it begins. Questions of the plan are asked all the same.")
@click.option("--confirm-all", is_flag=True, help="Answer every question of the plan with yes.")
@click.option("--overwrite", is_flag=True, help="With --failback: overwrite what home disks were written meanwhile.")
@click.option("--anew", is_flag=True, help="Give up a run of this plan that was not brought to its end.")
@click.option("--dry-run", is_flag=True, help="Show what would be done, and do nothing.")
@store_options
@output_options
def run(
    output: Output,
    file: Path,
    kind: str | None,
    yes: bool,
    confirm_all: bool,
    overwrite: bool,
    anew: bool,
    dry_run: bool,
    *,
    session: Session,
) -> int | None:
    """Run the plan FILE: --test, --planned, --unplanned or --failback.

    Each step is noted in the store before it is done, and again once it is. A step that fails stops the run, or not, as
    the plan says; 'godwit plan resume' goes on from there, on this machine or another. Ctrl-C lets what is under way
    end and begins nothing more. Exits with 1 where the run stopped, with 3 where it was done but for steps
    that may fail.
    """
    if kind is None:
        raise click.UsageError("say what for: --test, --planned, --unplanned or --failback")
    plan = reading.load(file)
    chosen = RunKind(kind)
    if dry_run:
        found = surveyed(session, plan, chosen, offline=False, thoroughly=True)
        show_plan(output, plan, chosen, found)
        return FAILED if found is not None and found.problems else None
    store = session.store()
    if chosen in _SAID:
        output.confirm(_SAID[chosen].format(len(list(plan.vms))), yes=yes)
    with report(output, plan.name, confirm_all=confirm_all) as watch:
        done = running.run(operator_of(session, store, watch, overwrite=overwrite), plan, chosen, anew=anew)
    show_run(output, done)
    return _code(done)


@click.command()
@click.argument("plan")
@click.option("--redo", multiple=True, metavar="STEP", help="This step may be done although it may have been done.")
@click.option("--skip", multiple=True, metavar="STEP", help="This step counts as done.")
@click.option("--confirm-all", is_flag=True, help="Answer every question of the plan with yes.")
@click.option("--overwrite", is_flag=True, help="Overwrite what home disks were written meanwhile.")
@store_options
@output_options
def resume(
    output: Output,
    plan: str,
    redo: tuple[str, ...],
    skip: tuple[str, ...],
    confirm_all: bool,
    overwrite: bool,
    *,
    session: Session,
) -> int | None:
    """Go on with the last run of the plan PLAN (its name, or its file) from where it stands, as it was begun.

    What the run was begun with is in the store: the file may be gone, and changes of it do not count. A step that was
    cut off is done again if that does no harm. Of a program that is not repeatable nobody knows: look, and say --redo
    or --skip.
    """
    store = session.store()
    name = plan_name(plan)
    with report(output, name, confirm_all=confirm_all) as watch:
        operator = operator_of(session, store, watch, overwrite=overwrite)
        done = running.resume(operator, name, redo=redo, skip=skip)
    show_run(output, done)
    return _code(done)
