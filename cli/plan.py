"""The godwit plan commands, each loaded when it is run."""

from __future__ import annotations

import click

from cli.lazy import LazyCommand, LazyGroup

PLAN_COMMANDS: dict[str, LazyCommand] = {
    "show": LazyCommand("cli.plan_look:show", "Show what a run of a plan would do, in which order."),
    "validate": LazyCommand("cli.plan_look:validate", "Name all that is wrong with a plan."),
    "run": LazyCommand("cli.plan_runs:run", "Run a plan: start its VMs elsewhere, or bring them home."),
    "resume": LazyCommand("cli.plan_runs:resume", "Go on with a run from where it stands, on any machine."),
    "status": LazyCommand("cli.plan_look:status", "Show how the last run of a plan stands."),
    "commit": LazyCommand("cli.plan_settle:commit", "Settle for the points that a run started from."),
    "reprotect": LazyCommand("cli.plan_settle:reprotect", "Replicate a plan's VMs from their recovery machines."),
    "cleanup": LazyCommand("cli.plan_settle:cleanup", "Remove what a run made."),
}


@click.group(cls=LazyGroup, table=PLAN_COMMANDS)
def plan() -> None:
    """Recovery plans: many VMs, started elsewhere, tried, or brought home, in an order that is written down.

    A plan is a YAML file; docs/plans.md describes it. A run is written down in the store step by step, so that another
    machine can go on with it.
    """
