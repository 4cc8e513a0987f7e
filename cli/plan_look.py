"""godwit plan show, validate and status: what a plan says, what is wrong with it, and how its run stands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from cli.failover import means_of
from cli.failure import CONFIGURATION, FAILED
from cli.output import Output, output_options
from cli.session import Session, store_options
from replica.failover.means import Means
from replica.plans import description, graph, reading, running
from replica.plans.document import Mistake
from replica.plans.model import Plan, RunKind
from replica.plans.points import MeansOf
from replica.plans.survey import Survey, survey
from replica.stores.store import Store

KINDS = [one.value for one in RunKind]


def kind_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command --test, --planned, --unplanned and --failback as its argument ``kind``."""
    for name, told in (
        ("failback", "Bring all home, in the reverse order."),
        ("unplanned", "The sources are lost: from what the store has."),
        ("planned", "Shut the sources down, take the last changes along."),
        ("test", "Beside the sources, each in a network of its own."),
    ):
        function = click.option(f"--{name}", "kind", flag_value=name, help=told)(function)
    return function


def remembered(session: Session, store: Store) -> MeansOf:
    """Return what gives the means for a VM, each found once."""
    known: dict[str, Means] = {}

    def means(name: str) -> Means:
        if name not in known:
            known[name] = means_of(session, store, name)
        return known[name]

    return means


def plan_name(text: str) -> str:
    """Return a plan's name, given as such or as its file. Raises ConfigurationError, UsageError."""
    path = Path(text)
    if path.suffix.lower() in (".yaml", ".yml") or len(path.parts) > 1:
        return reading.load(path).name
    return text


def surveyed(session: Session, plan: Plan, kind: RunKind, *, offline: bool, thoroughly: bool) -> Survey | None:
    """Return the plan beside the store, None where there is none to look into."""
    if offline or session.configuration.store is None:
        return None
    store = session.store()
    return survey(plan, kind, remembered(session, store), session.host.clock.now(), thoroughly=thoroughly)


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@kind_options
@click.option("--offline", is_flag=True, help="Look at the file alone, and not into the store.")
@store_options
@output_options
def show(output: Output, file: Path, kind: str | None, offline: bool, *, session: Session) -> None:
    """Show what a run of the plan FILE would do: which steps in which order, from which points.

    The number before a step is the turn in which it comes at the earliest. Without --test, --planned or --failback it
    is an unplanned run that is shown.
    """
    plan = reading.load(file)
    chosen = RunKind(kind or RunKind.UNPLANNED)
    found = surveyed(session, plan, chosen, offline=offline, thoroughly=False)
    show_plan(output, plan, chosen, found)


def show_plan(output: Output, plan: Plan, kind: RunKind, found: Survey | None) -> None:
    """Show what a run would do."""

    def render() -> None:
        for line in description.tree(plan, kind, found):
            output.line(line)
        for one in () if found is None else found.prepared.questions:
            output.note(f"will be asked: {one}")
        for one in () if found is None else found.problems:
            output.note(f"problem: {one}")

    output.show(description.plan_document(plan, kind, found), render)


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@kind_options
@click.option("--offline", is_flag=True, help="Look at the file alone, and not into the store.")
@store_options
@output_options
def validate(output: Output, file: Path, kind: str | None, offline: bool, *, session: Session) -> int | None:
    """Name all that is wrong with the plan FILE: in the file itself, and beside the store.

    Beside the store that is: VMs that are not there, or cannot be run for that purpose as they stand; points that are
    missing, too old or damaged; disks that do not convert; platforms that are not configured. Exits with 13 where the
    file is wrong, with 1 where what it says cannot be done.
    """
    plan, mistakes = reading.read(reading.text_of(file))
    mistakes = mistakes or graph.mistakes(plan)
    if mistakes:
        _show_mistakes(output, file, mistakes)
        return CONFIGURATION
    chosen = RunKind(kind or RunKind.UNPLANNED)
    found = surveyed(session, plan, chosen, offline=offline, thoroughly=True)
    problems = () if found is None else found.problems
    document = {
        "file": file,
        "valid": not problems,
        "mistakes": [],
        **description.plan_document(plan, chosen, found),
    }

    def render() -> None:
        for one in problems:
            output.line(one)
        for vm in () if found is None else found.vms:
            for note in vm.notes:
                output.note(f"{vm.vm}: {note}")
        for one in () if found is None else found.prepared.questions:
            output.note(f"will be asked: {one}")
        if not problems:
            beside = "the store was not looked into" if found is None else f"as {chosen.value} run, beside the store"
            output.line(f"{plan.name}: nothing is wrong ({beside})")

    output.show(document, render)
    return FAILED if problems else None


def _show_mistakes(output: Output, file: Path, mistakes: list[Mistake]) -> None:
    listed = [{"line": one.place.line, "column": one.place.column, "text": one.text} for one in mistakes]
    document = {"file": file, "valid": False, "mistakes": listed, "problems": []}

    def render() -> None:
        for one in mistakes:
            output.line(f"{file}:{one.place.line}:{one.place.column}: {one.text}")

    output.show(document, render)


@click.command()
@click.argument("plan")
@click.option("--run", "number", type=click.IntRange(1), metavar="N", help="The run.  [default: the last]")
@store_options
@output_options
def status(output: Output, plan: str, number: int | None, *, session: Session) -> None:
    """Show how a run of the plan PLAN (its name, or its file) stands, step by step."""
    keys = running.keys_of(session.configuration.tenant, plan_name(plan))
    show_run(output, running.status(session.store(), keys, number))


def show_run(output: Output, found: running.Run) -> None:
    """Show how a run stands."""
    document = description.run_document(found)

    def render() -> None:
        output.line(description.headline(found))
        output.table(["step", "state", "took", "what"], description.rows(document), right=(2,))
        for group in document["groups"]:
            if group["seconds"] is not None:
                output.note(f"the group {group['group']} was done {group['seconds']:.1f} s after the run was begun")
        if document["next"]:
            output.note(f"next: {' or '.join(document['next'])}")

    output.show(document, render)
