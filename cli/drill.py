"""godwit drill and evidence verify: a test failover with checks, and whether what is told of one was altered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import click

from cli.failover import means_of
from cli.output import Output, output_options
from cli.session import Duration, Session, duration_text, store_options
from replica.catalog import ProtectedVm
from replica.drills import checks as checking
from replica.drills import evidence, recording
from replica.drills.checks import Terms
from replica.drills.recording import Recorded
from replica.failover.failover import Order
from replica.failover.means import Means
from replica.failover.offer import OFFERS
from replica.host import Host
from replica.platforms.registry import NAMES
from replica.stores.store import Store

STARTING = [name for name in NAMES if OFFERS[name].starts]
FAILED = 1
DEGRADED = 3


@click.command()
@click.argument("name", required=False)
@click.option(
    "--plan",
    "plan_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="In place of NAME: all VMs of this recovery plan, in its order.",
)
@click.option(
    "--point", "number", type=click.IntRange(1), metavar="P", help="The point.  [default: the newest that verifies]"
)
@click.option(
    "--checks",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The checks, as TOML or JSON.  [default: [drill] of godwit.toml, or else whether the guest answers]",
)
@click.option("--platform", metavar=f"[{'|'.join(STARTING)}]", help="Where it is started.  [default: qemu]")
@click.option(
    "--generation", type=click.Choice(["1", "2", "auto"]), help="What it starts as; auto: as it is, if that can be."
)
@click.option("--timeout", "timeout_seconds", type=Duration(), help="How long checks may go on.  [default: 15m]")
@click.option(
    "--evidence",
    "folder",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Where the evidence is written.  [default: below the state folder]",
)
@store_options
@output_options
def drill(
    output: Output,
    name: str | None,
    plan_file: Path | None,
    number: int | None,
    checks: Path | None,
    platform: str | None,
    generation: str | None,
    timeout_seconds: int | None,
    folder: Path | None,
    *,
    session: Session,
) -> int | None:
    """Start the VM NAME beside its source, in a network of its own, check it, and remove it again.

    It has passed if every check that is required did, and the cleanup too; else the exit code is 1. What was seen is
    written as evidence, signed with this host's key, and recorded in the store. Replication goes on meanwhile.

    With --plan all VMs of a recovery plan are started in its order, each checked as the plan says, and removed at the
    end. It has passed if each of them did, and every action that belongs to a test was done; one evidence tells it all.
    """
    if (name is None) == (plan_file is None):
        raise click.UsageError("say which VM by its NAME, or which plan with --plan FILE")
    if plan_file is not None and number is not None:
        raise click.UsageError("--point is of one VM: a plan says itself which points its VMs start from")
    terms = session.configuration.drill or Terms()
    if checks is not None:
        terms = checking.load(checks)
    if timeout_seconds is not None:
        terms = replace(terms, timeout_seconds=float(timeout_seconds))
    if generation == "auto":
        terms = replace(terms, generation=None)
    if name is None:
        assert plan_file is not None
        from cli.drill_plan import drill_plan  # noqa: PLC0415 - YAML and all that is needed by plans alone

        given = replace(terms, platform=platform or terms.platform, generation=_wanted(generation) or terms.generation)
        return drill_plan(output, session, plan_file, given, folder)
    store = session.store()
    means = means_of(session, store, name)
    done = recording.drill(means, Order(None, number, platform, _wanted(generation)), terms, folder)
    output.show(_document(name, done), lambda: _render(output, name, done))
    if not done.drill.passed:
        return FAILED
    return DEGRADED if done.record is None else None


def _wanted(generation: str | None) -> Literal[1, 2] | None:
    return 1 if generation == "1" else 2 if generation == "2" else None


def _document(name: str, done: Recorded) -> dict[str, Any]:
    drill, written = done.drill, done.written
    return {
        "vm": name,
        "verdict": "passed" if drill.passed else "failed",
        "reasons": drill.reasons,
        "point": None if drill.point is None else drill.point.point,
        "machine": None if drill.machine is None else drill.machine.name,
        "platform": drill.platform,
        "generation": None if drill.machine is None else drill.machine.generation,
        "begun_at": drill.begun_at,
        "ended_at": drill.ended_at,
        "rto_seconds": drill.rto_seconds,
        "phases": drill.timings,
        "checks": drill.outcomes,
        "passed_over": drill.passed_over,
        "cleaned": drill.cleaned,
        "notes": drill.notes,
        "evidence": written.document,
        "page": written.page,
        "picture": written.picture,
        "evidence_sha256": written.sha256,
        "fingerprint": written.fingerprint,
        "record": done.record,
        "unrecorded": done.unrecorded,
    }


def _render(output: Output, name: str, done: Recorded) -> None:
    made = done.drill
    answered = "did not answer" if made.rto_seconds is None else f"answered after {made.rto_seconds:.1f} s"
    from_point = "" if made.point is None else f" of point {made.point.point}"
    output.line(f"{name}: the drill{from_point} {'passed' if made.passed else 'failed'}; the guest {answered}")
    for reason in made.reasons:
        output.line(f"  {reason}")
    if made.outcomes:
        output.table(
            ["check", "result", "took", "observed"],
            [
                [
                    one.name,
                    _result(one.passed, required=one.required, skipped=one.skipped),
                    f"{one.seconds:.1f} s",
                    one.observed[:120],
                ]
                for one in made.outcomes
            ],
            right=(2,),
        )
    output.fields([(one.phase.value, f"{one.seconds:.1f} s") for one in made.timings])
    for note in made.notes:
        output.note(note)
    if not made.cleaned and made.machine is not None:
        output.note(f"still there: 'godwit cleanup {name} --test {made.machine.name}' removes it, or the next drill")
    output.note(f"evidence: {done.written.document}")
    if done.unrecorded is not None:
        output.note(f"the store knows nothing of this drill: {done.unrecorded}")


def _result(passed: bool, *, required: bool, skipped: bool) -> str:
    if skipped:
        return "not made"
    return "passed" if passed else "FAILED" if required else "failed, not required"


def scheduled(session: Session) -> Callable[[Store, Host, ProtectedVm], dict[str, object]]:
    """Return what an agent runs for its drills."""

    def means(store: Store, _: Host, found: ProtectedVm) -> Means:
        return means_of(session, store, found.vm.name)

    return recording.scheduled(means, session.configuration.drill or Terms())


@click.command("verify")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--key", metavar="FINGERPRINT", help="The fingerprint that the signer's key is to have.")
@output_options
def verify(output: Output, file: Path, key: str | None) -> None:
    """Verify the evidence FILE of a drill, of a VM or a plan: its signature, and the page and pictures beside it.

    Exits with 12 where anything was altered. Without --key it tells which key signed: compare that with the drill's
    record in the store, or with what the host's owner says.
    """
    found = evidence.verify(file, key)
    body = found.body
    point = body.get("point")
    shown = {
        "file": file,
        "verified": True,
        "fingerprint": found.fingerprint,
        "key_was_given": key is not None,
        "files": found.files,
        "missing": found.missing,
        "evidence": body,
    }

    plan = body.get("plan")
    vms = [f"{one['vm']['name']}: {one['verdict']}" for one in body.get("vms", ())] if plan else None

    def render() -> None:
        rto = body.get("rto_seconds")
        output.fields(
            [
                ("evidence", "unaltered"),
                ("signed by", f"{found.fingerprint}{'' if key is None else ', as expected'}"),
                ("plan", plan["name"]) if plan else ("VM", body["vm"]["name"]),
                ("VMs", vms),
                ("verdict", body["verdict"]),
                ("reasons", list(body["reasons"]) or None),
                ("begun at", body["begun_at"]),
                ("point", None if point is None else f"{point['number']}, of {point['created_at']}"),
                ("RTO", None if rto is None else duration_text(rto)),
                ("verified too", list(found.files) or None),
            ]
        )
        for one in found.missing:
            output.note(f"not beside it, so not verified: {one}")
        if key is None:
            output.note("whose key that is, is not known here: compare it with the VM's record of the drill")

    output.show(shown, render)
