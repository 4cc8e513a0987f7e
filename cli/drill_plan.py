"""godwit drill --plan: a test run of a plan, each VM checked, told in one evidence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cli.failure import DEGRADED, FAILED
from cli.output import Output
from cli.plan_progress import report
from cli.plan_runs import operator_of
from cli.session import Session
from replica.drills.checks import Terms
from replica.plans import drill as plan_drill
from replica.plans import reading
from replica.plans.drill import Recorded


def drill_plan(output: Output, session: Session, file: Path, terms: Terms, folder: Path | None) -> int | None:
    """Make a drill of a plan; return the exit code."""
    plan = reading.load(file)
    store = session.store()
    with report(output, plan.name) as watch:
        operator = operator_of(session, store, watch, overwrite=False)
        done = plan_drill.drill(operator, plan, terms, folder)
    output.show(_document(plan.name, done), lambda: _render(output, plan.name, done))
    if not done.drill.passed:
        return FAILED
    return DEGRADED if done.unrecorded else None


def _document(name: str, done: Recorded) -> dict[str, Any]:
    made = done.drill
    return {
        "plan": name,
        "verdict": "passed" if made.passed else "failed",
        "reasons": made.reasons,
        "begun_at": made.begun_at,
        "ended_at": made.ended_at,
        "rto_seconds": made.rto_seconds,
        "groups": made.groups,
        "vms": [
            {
                "vm": vm,
                "verdict": "passed" if one.passed else "failed",
                "reasons": one.reasons,
                "point": None if one.point is None else one.point.point,
                "machine": None if one.machine is None else one.machine.name,
                "rto_seconds": one.rto_seconds,
                "checks": one.outcomes,
                "cleaned": one.cleaned,
            }
            for vm, one in made.drills.items()
        ],
        "evidence": done.written.document,
        "page": done.written.page,
        "evidence_sha256": done.written.sha256,
        "fingerprint": done.written.fingerprint,
        "unrecorded": done.unrecorded,
    }


def _render(output: Output, name: str, done: Recorded) -> None:
    made = done.drill
    answered = "not all answered" if made.rto_seconds is None else f"all answered after {made.rto_seconds:.1f} s"
    output.line(f"{name}: the drill of {len(made.drills)} VMs {'passed' if made.passed else 'failed'}; {answered}")
    for reason in made.reasons:
        output.line(f"  {reason}")
    output.table(
        ["VM", "result", "point", "answered", "checks"],
        [
            [
                vm,
                "passed" if one.passed else "FAILED",
                "" if one.point is None else one.point.point,
                "" if one.rto_seconds is None else f"{one.rto_seconds:.1f} s",
                f"{sum(check.passed for check in one.outcomes)} of {len(one.outcomes)}",
            ]
            for vm, one in made.drills.items()
        ],
        right=(2, 3),
    )
    for group in made.groups:
        if group.rto_seconds is not None:
            output.note(f"the group {group.name} had answered {group.rto_seconds:.1f} s after the command")
    for vm, one in made.drills.items():
        for note in one.notes:
            output.note(f"{vm}: {note}")
        if not one.cleaned and one.machine is not None:
            output.note(f"still there: 'godwit cleanup {vm} --test {one.machine.name}' removes it, or the next drill")
    output.note(f"evidence: {done.written.document}")
    for vm, why in done.unrecorded.items():
        output.note(f"the store knows nothing of this drill of {vm}: {why}")
