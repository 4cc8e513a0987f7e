"""Plans and their runs, told: as JSON documents, and as lines for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from replica.plans import graph
from replica.plans.graph import Step, StepKind
from replica.plans.journal import What
from replica.plans.model import Plan, RunKind
from replica.plans.running import Run
from replica.plans.survey import Survey, VmSurvey


def waves(steps: Sequence[Step]) -> dict[str, int]:
    """Return, of each step, in which turn it comes at the earliest, from 1."""
    found: dict[str, int] = {}
    for one in steps:
        found[one.id] = 1 + max((found[name] for name in (*one.needs, *one.follows)), default=0)
    return found


def plan_document(plan: Plan, kind: RunKind, survey: Survey | None) -> dict[str, Any]:
    """Return the JSON form of what a run of a plan would do."""
    steps = graph.steps(plan, kind)
    turns = waves(steps)
    return {
        "plan": plan.name,
        "description": plan.description,
        "kind": kind.value,
        "groups": [
            {
                "group": group.name,
                "at_once": group.at_once,
                "consistent_within_seconds": group.within_seconds,
                "vms": [one.name for one in graph.order(plan, group)],
            }
            for group in plan.groups
        ],
        "steps": [
            {
                "id": one.id,
                "kind": one.kind.value,
                "title": one.title,
                "group": one.group or None,
                "vm": one.vm or None,
                "turn": turns[one.id],
                "needs": one.needs,
                "on_failure": one.on_failure.value,
                "timeout_seconds": one.timeout_seconds,
            }
            for one in steps
        ],
        "vms": [] if survey is None else survey.vms,
        "spreads": []
        if survey is None
        else [{"group": one.group, "seconds": one.seconds} for one in survey.prepared.spreads],
        "questions": [] if survey is None else survey.prepared.questions,
        "problems": [] if survey is None else survey.problems,
    }


def tree(plan: Plan, kind: RunKind, survey: Survey | None) -> Iterator[str]:
    """Yield the lines that show what a run of a plan would do, group by group, each step with its turn."""
    steps = graph.steps(plan, kind)
    turns = waves(steps)
    surveyed = {} if survey is None else {one.vm: one for one in survey.vms}
    spreads = {} if survey is None else {one.group: one for one in survey.prepared.spreads}
    yield f"{plan.name}, {kind.value}{f': {plan.description}' if plan.description else ''}"
    parts = _parts(steps)
    for number, (name, held) in enumerate(parts):
        last = number == len(parts) - 1
        lead, below = ("└─ ", "   ") if last else ("├─ ", "│  ")
        group = next((one for one in plan.groups if one.name == name), None)
        spread = spreads.get(name)
        told = "" if spread is None else f", points {spread.seconds:.0f} s apart"
        within = "" if group is None or group.within_seconds is None else f", within {group.within_seconds:.0f} s{told}"
        yield f"{lead}{f'group {name}{within}' if group is not None else 'the plan'}"
        for at, one in enumerate(held):
            branch = "└─ " if at == len(held) - 1 else "├─ "
            more = f": {_says(surveyed.get(one.vm))}" if one.kind is StepKind.START and one.vm in surveyed else ""
            rule = "" if one.on_failure.value == "stop" else "  [may fail]"
            yield f"{below}{branch}{turns[one.id]:>2}  {one.title}{more}{rule}"


def _parts(steps: Sequence[Step]) -> list[tuple[str, list[Step]]]:
    """Return the steps in pieces of one group each, as they come."""
    parts: list[tuple[str, list[Step]]] = []
    for one in steps:
        name = one.group if not one.id.startswith("plan/") else ""
        if not parts or parts[-1][0] != name:
            parts.append((name, []))
        parts[-1][1].append(one)
    return parts


def _says(one: VmSurvey | None) -> str:
    if one is None or one.point is None or one.created_at is None:
        return "no point"
    where = "" if one.platform is None else f" on {one.platform}"
    generation = "" if one.generation is None else f", Generation {one.generation}"
    converted = "" if one.converted_disk is None else f", disk {one.converted_disk} converted"
    return f"point {one.point} of {one.created_at:%Y-%m-%d %H:%M:%S} UTC{where}{generation}{converted}"


# -- runs -------------------------------------------------------------------------------------------------------------


def status_of(found: Run, step: Step) -> str:
    """Return how a step stands, as a word."""
    known = found.state.steps.get(step.id)
    if known is None or (known.outcome is None and not known.attempts):
        return "waiting"
    if known.outcome is None:
        return "under way" if found.state.ending is None else "unknown"
    return known.outcome.result.value


def run_document(found: Run) -> dict[str, Any]:
    """Return the JSON form of a run."""
    state, header = found.state, found.header
    ended = state.ending
    return {
        "plan": header.plan,
        "run": header.run,
        "kind": header.kind.value,
        "begun_at": header.begun_at,
        "begun_by": header.host_name,
        "state": "open" if ended is None else ended.value,
        "over": found.is_over,
        "detail": state.detail if ended is not None else "",
        "holder": None if state.holder is None or ended is not None else state.holder.host_name,
        "heard_at": state.heard_at,
        "points": dict(header.points),
        "steps": [_step_document(found, one) for one in found.steps],
        "groups": [
            {"group": group.name, "seconds": seconds}
            for group in found.plan.groups
            for seconds in (found.seconds_of(group.name),)
        ],
        "next": next_commands(found),
    }


def _step_document(found: Run, step: Step) -> dict[str, Any]:
    known = found.state.steps.get(step.id)
    outcome = None if known is None else known.outcome
    return {
        "id": step.id,
        "title": step.title,
        "group": step.group or None,
        "vm": step.vm or None,
        "status": status_of(found, step),
        "detail": "" if outcome is None else outcome.detail,
        "seconds": None if outcome is None else outcome.seconds,
        "attempts": 0 if known is None else known.attempts,
        "machine": None if outcome is None else outcome.machine,
        "point": None if outcome is None else outcome.point,
    }


def rows(document: Mapping[str, Any]) -> Iterator[tuple[object, ...]]:
    """Yield the rows of a table of a run's steps, of its document."""
    for one in document["steps"]:
        took = "" if one["seconds"] is None else f"{one['seconds']:.1f} s"
        yield one["id"], one["status"], took, one["detail"][:160] or one["title"]


def headline(found: Run) -> str:
    """Return how a run stands, in a sentence."""
    state = found.state
    name = f"{found.header.plan}, run {found.header.run} ({found.header.kind.value})"
    if state.ending is What.ENDED:
        return f"{name} is done{f': {state.detail}' if state.detail else ''}"
    if state.ending is What.GIVEN_UP:
        return f"{name} was given up"
    if state.ending is What.STOPPED:
        return f"{name} stopped: {state.detail}"
    who = "nobody" if state.holder is None else state.holder.host_name
    heard = "" if state.heard_at is None else f", heard of last at {state.heard_at:%Y-%m-%d %H:%M:%S} UTC"
    return f"{name} is in the hands of {who}{heard}"


def next_commands(found: Run) -> list[str]:
    """Return what leads on."""
    name = found.header.plan
    if not found.is_over:
        return [f"godwit plan resume {name}"]
    return {
        RunKind.TEST: [f"godwit plan cleanup {name}"],
        RunKind.FAILBACK: [],
    }.get(found.header.kind, [f"godwit plan commit {name}", f"godwit plan cleanup {name}"])
