"""godwit health: how well the protected VMs are protected, and whether a recovery would succeed."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import click

from cli.output import Output, output_options
from cli.session import Duration, Session, duration_text, store_options
from cli.sizes import human_size
from replica.health import report as reports
from replica.health.assessment import Assessment, Reason, check_window
from replica.health.file import write_whole
from replica.health.observing import BRIEF, CHARTS, CLOSE
from replica.health.page import measured, page
from replica.health.report import HealthReport
from replica.health.rules import RULES, Severity

MOST_TOLD = 20  # VMs whose reasons are told in full below a fleet's table


@click.command()
@click.argument("name", required=False)
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write the report as one HTML page, too.")
@click.option(
    "--metrics", type=click.Path(path_type=Path), metavar="FILE", help="Write metrics as Prometheus text, too."
)
@click.option("--window", type=Duration(), help="The time over which cycles are counted, 1h to 7d.  [default: 12h]")
@click.option("--fresh", is_flag=True, help="Look at every VM, also those that agents' digests tell of.")
@store_options
@output_options
def health(
    output: Output,
    name: str | None,
    html: Path | None,
    metrics: Path | None,
    window: int | None,
    fresh: bool,
    *,
    session: Session,
) -> int | None:
    """Show how well the VMs are protected, or the VM NAME with every reason. It reads only.

    Of most VMs it reads what their agents wrote down a moment ago; the VM NAME, and those of no agent, are looked at.
    Health tells whether replication goes well; readiness, beside it, whether a recovery would succeed. Exits with 3
    where the health of any VM is not normal.
    """
    counted = check_window(timedelta(seconds=window or 12 * 3600))
    depth = CHARTS if html else CLOSE if name else BRIEF
    made = reports.report(
        session.store(),
        session.host,
        session.configuration.tenant,
        [name] if name else None,
        depth=depth,
        window=counted,
        fresh=fresh,
    )
    if html is not None:
        write_whole(html, page(made.assessments, made.made_at))
    if metrics is not None:
        from replica.health.metrics import metrics as metrics_text  # noqa: PLC0415 - few ask for it

        write_whole(metrics, metrics_text(made.assessments, made.made_at.timestamp()))

    def render() -> None:
        if name:
            _render_one(output, made.assessments[0])
        else:
            _render_fleet(output, made)
        for file in (html, metrics):
            if file is not None:
                output.note(f"written: {file}")

    vms = [reports.document(one) for one in made.assessments]
    output.show(
        vms[0]
        if name
        else {
            "made_at": made.made_at,
            "health": made.health.value,
            "digests": made.digests,
            "looked_at": made.direct,
            "warnings": list(made.warnings),
            "vms": vms,
        },
        render,
    )
    return None if made.health is Severity.NORMAL else 3


def _render_fleet(output: Output, made: HealthReport) -> None:
    if not made.assessments:
        output.note("no VM is protected in this store yet: godwit protect NAME --disk PATH")
        return
    gravest_first = sorted(made.assessments, key=lambda one: -one.health.rank)
    output.table(
        ["VM", "health", "RPO", "wanted", "readiness", "why"],
        [_row(one) for one in gravest_first],
        right=(2, 3),
    )
    told = [one for one in gravest_first if one.reasons]
    for one in told[:MOST_TOLD]:
        output.line(f"{one.seen.name}:")
        _render_reasons(output, one.reasons, indent="  ")
    if len(told) > MOST_TOLD:
        output.note(f"and {len(told) - MOST_TOLD} more VMs with reasons: godwit health NAME tells them")
    age = made.oldest_word_seconds
    if age is not None:
        looked = f"; {made.direct} looked at" if made.direct else ""
        output.note(f"told as agents wrote down, at most {duration_text(age)} ago{looked}; --fresh looks at every VM")
    for warning in made.warnings:
        output.note(warning)


def _row(one: Assessment) -> list[str]:
    wanted = "" if one.seen.unread is not None else duration_text(one.seen.interval_seconds)
    why = ""
    if one.reasons:
        why = one.reasons[0].rule_id + (f" +{len(one.reasons) - 1}" if len(one.reasons) > 1 else "")
    return [one.seen.name, one.health.value, _rpo(one), wanted, one.readiness.value, why]


def _rpo(one: Assessment) -> str:
    if one.rpo_seconds is not None:
        return duration_text(one.rpo_seconds)
    return "none" if one.seen.unread is None and one.seen.newest_restorable is None else "unknown"


def _render_reasons(output: Output, reasons: Sequence[Reason], *, indent: str = "") -> None:
    for reason in reasons:
        told = "; ".join(part for part in (measured(reason), reason.evidence) if part)
        output.line(f"{indent}{reason.severity.value} {reason.rule_id}: {RULES[reason.rule_id].observes}")
        output.line(f"{indent}  {told}")
        output.line(f"{indent}  {reason.remedy}")


def _render_one(output: Output, one: Assessment) -> None:
    seen, counted = one.seen, one.statistics
    fields: list[tuple[str, object]] = [
        ("VM", seen.name),
        ("health", one.health.value),
        ("readiness", one.readiness.value),
    ]
    if seen.unread is None:
        newest = seen.newest
        forecast = one.resynchronisation_seconds
        space = seen.free_space
        fields += [
            ("state", one.state.value),
            ("RPO", f"{_rpo(one)}, wanted every {duration_text(seen.interval_seconds)}"),
            ("points", f"{seen.listed}{f', {len(seen.damaged)} damaged' if seen.damaged else ''}"),
            (
                "cycles",
                f"{counted.points} made, {counted.misses} missed in {duration_text(counted.window_seconds)}",
            ),
            ("lag", _lag(one)),
            ("stored", _stored(one)),
            ("data", f"{human_size(newest.data_bytes)} in {human_size(newest.size_bytes)}" if newest else None),
            (
                "chain",
                f"{newest.chain_files} file{'s' * (newest.chain_files > 1)}" if newest and newest.chain_files else None,
            ),
            (
                "last drill",
                f"{seen.last_drill.result} {seen.last_drill.at:%Y-%m-%d}" if seen.last_drill else "never",
            ),
            (
                "verified",
                f"{seen.last_verify.result} {seen.last_verify.at:%Y-%m-%d}" if seen.last_verify else "never",
            ),
            ("conversion", seen.convertibility),
            ("encrypted", "yes" if seen.encrypted else "no"),
            ("source host", seen.source_host or None),
            ("clock", _clock(seen.store_skew_seconds)),
            ("free space", f"{human_size(space.free_bytes)} at {space.path}" if space else None),
            ("resynchronising", None if forecast is None else f"would take {duration_text(forecast)}"),
        ]
    output.fields(fields)
    if one.reasons:
        output.line()
        output.line("why it is not healthy:")
        _render_reasons(output, one.reasons, indent="  ")
    if one.doubts:
        output.line()
        output.line("what stands against readiness:")
        _render_reasons(output, one.doubts, indent="  ")
    for warning in seen.warnings:
        output.note(warning)


def _lag(one: Assessment) -> str | None:
    average, largest = one.statistics.average_latency_seconds, one.statistics.largest_latency_seconds
    if average is None or largest is None:
        return None
    return f"{duration_text(average)} on average, {duration_text(largest)} at most"


def _stored(one: Assessment) -> str | None:
    average, largest = one.statistics.average_stored_bytes, one.statistics.largest_stored_bytes
    if average is None or largest is None:
        return None
    return f"{human_size(int(average))} a cycle on average, {human_size(largest)} at most"


def _clock(skew_seconds: float | None) -> str:
    """Return how far this machine's clock is from the store's, which tells its own to the second."""
    if skew_seconds is None:
        return "unknown: the store tells no time"
    if abs(skew_seconds) < 2:
        return "that of the store"
    return f"{duration_text(abs(skew_seconds))} {'ahead of' if skew_seconds > 0 else 'behind'} the store's"
