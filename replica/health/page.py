"""The report as one HTML page: the fleet, then each VM. It needs no network and no script, and runs nothing.

Whatever comes from the store or from a user (names, reasons, host names) goes through ``escape`` or through ``_text``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from html import escape
from typing import Final

from replica.health import charts
from replica.health.assessment import Assessment, Observed, Readiness, Reason
from replica.health.observation import Event, Observation
from replica.health.rules import RULES, Severity
from replica.health.style import POLICY, SHEET
from replica.health.units import bytes_text, duration_text, time_text

OPEN_AT_ONCE: Final = 3  # a report of no more VMs shows them unfolded
MOST_DETAILED: Final = 1000  # machines with a section of their own; of the others a row is shown
MOST_IN_TABLE: Final = 500  # rows of a table, where there are more machines than have sections
LONGEST_TEXT: Final = 2000

_FOOTER: Final = (
    '</main><footer><p class="soft">RPO is the age of the newest point that restores. Every reason names its rule, '
    "its threshold, what was observed, and what to do.</p></footer>"
)
_UNPLOTTED: Final = (
    "<h4>Over time</h4><p>So large a report has plots of the machines that stand first alone. "
    "Ask for this machine by its name to see its own.</p>"
)
_TONE: Final = {Severity.NORMAL: "good", Severity.WARNING: "warn", Severity.CRITICAL: "bad"}
_READY_TONE: Final = {Readiness.READY: "good", Readiness.UNPROVEN: "warn", Readiness.NOT_READY: "bad"}
# Marks that reorder or hide text, and controls: shown as what they are, or a name could pass for another.
_MARKS: Final = {
    code: f"\\u{code:04x}"
    for code in (
        *range(0x20),
        *range(0x7F, 0xA0),
        *range(0x200B, 0x2010),
        *range(0x2028, 0x202F),
        *range(0x2066, 0x206A),
        0xFEFF,
    )
}


def page(assessments: Sequence[Assessment], now: datetime, *, title: str = "Replication health") -> str:
    """Return the whole page. The VMs are shown gravest first, then by name."""
    ordered = sorted(
        enumerate(assessments, start=1),
        key=lambda one: (-one[1].health.rank, _readiness_rank(one[1]), one[1].seen.name),
    )
    detail = charts.detail_for(len(assessments))
    body = [
        '<a class="skip" href="#fleet">To the fleet</a>',
        f"<header><h1>{_text(title)}</h1>",
        f'<p class="soft">Made {time_text(now)} UTC by Godwit. All times are UTC.</p></header><main>',
        _overview(assessments),
        _as_of(assessments, now),
        *_fleet_tables(ordered),
        '<h2 id="vms">Machines</h2>',
        *(
            _machine(number, one, detail if place < charts.MOST_PLOTTED else None, is_open=len(ordered) <= OPEN_AT_ONCE)
            for place, (number, one) in enumerate(ordered[:MOST_DETAILED])
        ),
        _undetailed(len(ordered) - MOST_DETAILED),
        _FOOTER,
    ]
    head = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">'
        f"<title>{_text(title)}</title><style>{SHEET}</style></head><body>"
    )
    return head + "\n".join(body) + "</body></html>\n"


def _text(value: object) -> str:
    shown = str(value)[:LONGEST_TEXT].translate(_MARKS)
    return escape(shown.encode("utf-8", "backslashreplace").decode())


def _tag(text: str, tone: str) -> str:
    return f'<span class="tag {tone}">{_text(text)}</span>'


def _readiness_rank(one: Assessment) -> int:
    return -list(Readiness).index(one.readiness)


def _overview(assessments: Sequence[Assessment]) -> str:
    count = {severity: sum(one.health is severity for one in assessments) for severity in Severity}
    ready = sum(one.readiness is Readiness.READY for one in assessments)
    worst = max((one.rpo_seconds for one in assessments if one.rpo_seconds is not None), default=None)
    data = sum(one.seen.newest.data_bytes for one in assessments if one.seen.newest is not None)
    tiles = (
        (len(assessments), "machines"),
        (count[Severity.NORMAL], "normal"),
        (count[Severity.WARNING], "with a warning"),
        (count[Severity.CRITICAL], "critical"),
        (ready, "proven ready by a drill"),
        ("none" if worst is None else duration_text(worst), "largest RPO"),
        (bytes_text(data), "data protected"),
    )
    shown = "".join(f"<li><b>{_text(value)}</b>{_text(label)}</li>" for value, label in tiles)
    return f'<h2 id="fleet">Fleet</h2><ul class="tiles">{shown}</ul>'


def _as_of(assessments: Sequence[Assessment], now: datetime) -> str:
    told = [one.seen.as_of for one in assessments if one.seen.as_of is not None]
    if not told:
        return ""
    oldest = (now - min(told)).total_seconds()
    whose = "All are told" if len(told) == len(assessments) else f"{len(told)} of them are told"
    others = "." if len(told) == len(assessments) else "; the others were looked at."
    ago = duration_text(max(0.0, oldest))
    return f'<p class="soft">{whose} as their agents wrote down, at most {ago} before this page was made{others}</p>'


def _undetailed(rest: int) -> str:
    if rest <= 0:
        return ""
    return (
        f"<p>{rest} more machines have a row above and no section here: those that stand first are the gravest. "
        "Ask for a machine by its name to see all about it.</p>"
    )


def _fleet_tables(ordered: Sequence[tuple[int, Assessment]]) -> Iterator[str]:
    """Yield one table; of very many machines one of the gravest, and the rest folded, so that a browser lays it out."""
    if not ordered:
        yield "<p>No machine is protected in this store yet.</p>"
    elif len(ordered) <= MOST_DETAILED:
        yield _fleet_table(ordered, "All machines, gravest first", ordered)
    else:
        detailed = ordered[:MOST_DETAILED]
        yield _fleet_table(ordered[:MOST_IN_TABLE], f"The {MOST_IN_TABLE} gravest of {len(ordered)} machines", detailed)
        for start in range(MOST_IN_TABLE, len(ordered), MOST_IN_TABLE):
            rows = ordered[start : start + MOST_IN_TABLE]
            label = f"Machines {start + 1} to {start + len(rows)} of {len(ordered)}"
            count = ", ".join(
                f"{number} {severity.value}"
                for severity in reversed(Severity)
                if (number := sum(one.health is severity for _, one in rows))
            )
            first, last = rows[0][1].seen.name, rows[-1][1].seen.name
            yield (
                f'<details class="vm"><summary><h3>{label}</h3><span class="soft">{count}; from {_text(first)} to '
                f"{_text(last)}</span></summary>{_fleet_table(rows, label, detailed)}</details>"
            )


def _fleet_table(rows: Sequence[tuple[int, Assessment]], label: str, detailed: Sequence[tuple[int, Assessment]]) -> str:
    with_section = {number for number, _ in detailed}
    shown = "".join(_fleet_row(number, one, is_detailed=number in with_section) for number, one in rows)
    return (
        f'<div class="wide" role="region" aria-label="{label}" tabindex="0"><table>'
        f"<caption>{label}</caption><thead><tr>"
        '<th scope="col">Machine</th><th scope="col">Health</th><th scope="col" class="n">RPO</th>'
        '<th scope="col" class="n">Wanted</th><th scope="col" class="n">Missed</th><th scope="col">Readiness</th>'
        f'<th scope="col">Last drill</th><th scope="col">Why</th></tr></thead><tbody>{shown}</tbody></table></div>'
    )


def _fleet_row(number: int, one: Assessment, *, is_detailed: bool) -> str:
    seen = one.seen
    name = f'<a href="#vm-{number}">{_text(seen.name)}</a>' if is_detailed else _text(seen.name)
    wanted, missed = duration_text(seen.interval_seconds), f"{one.statistics.missed_percent:.0f} %"
    drill = _drill_text(seen.last_drill)
    if seen.unread is not None:
        wanted = missed = drill = ""
    why = ", ".join(reason.rule_id for reason in one.reasons)
    return (
        f'<tr><th scope="row">{name}</th>'
        f"<td>{_tag(one.health.value, _TONE[one.health])}</td>"
        f'<td class="n">{_rpo_text(one)}</td><td class="n">{wanted}</td><td class="n">{missed}</td>'
        f"<td>{_tag(one.readiness.value, _READY_TONE[one.readiness])}</td>"
        f'<td class="d">{_text(drill)}</td><td class="w">{_text(why)}</td></tr>'
    )


def _rpo_text(one: Assessment) -> str:
    if one.rpo_seconds is not None:
        return duration_text(one.rpo_seconds)
    return "none" if one.seen.unread is None and one.seen.newest_restorable is None else "unknown"


def _drill_text(drill: Event | None) -> str:
    return "never" if drill is None else f"{drill.result} {time_text(drill.at)[:10]}"


def _machine(number: int, one: Assessment, detail: charts.Detail | None, *, is_open: bool) -> str:
    seen = one.seen
    parts = [
        f'<details class="vm"{" open" if is_open else ""}><summary><h3>{_text(seen.name)}</h3>',
        _tag(one.health.value, _TONE[one.health]),
        f'<span class="soft">RPO {_rpo_text(one)}, {_text(one.state.value)}</span></summary>',
        # The anchor lies inside: a browser that is led to it unfolds what it is in.
        f'<div class="in" id="vm-{number}">',
        _reasons("Why it is not healthy", one.reasons),
        _reasons("What stands against readiness", one.doubts),
    ]
    if seen.unread is None:
        plotted = _UNPLOTTED if detail is None else charts.plots(one, detail)
        parts += [_facts(one), plotted, _drills(seen), _changes(seen.changes)]
        parts += [f'<p class="soft">{_text(warning)}</p>' for warning in seen.warnings]
    parts.append('<p><a href="#fleet">Back to the fleet</a></p></div></details>')
    return "".join(parts)


def _reasons(heading: str, reasons: Sequence[Reason]) -> str:
    if not reasons:
        return ""
    shown = "".join(
        f'<li class="{_TONE[one.severity]}"><b>{_text(one.rule_id)}</b>: {_text(RULES[one.rule_id].observes)}<br>'
        f"{_text(measured(one))}{'; ' if measured(one) and one.evidence else ''}{_text(one.evidence)}<br>"
        f'<span class="soft">{_text(one.remedy)}</span></li>'
        for one in reasons
    )
    return f'<h4>{_text(heading)}</h4><ul class="reasons">{shown}</ul>'


def measured(reason: Reason) -> str:
    """Return what was observed and from where on that counts, as text; empty where a rule has no threshold."""
    if reason.threshold is None:
        return "" if isinstance(reason.observed, bool) else str(reason.observed)
    beyond = "least" if reason.rule_id == "free-space" else "limit"
    return f"{_measure(reason.observed, reason.unit)}, {beyond} {_measure(reason.threshold, reason.unit)}"


def _measure(value: Observed, unit: str) -> str:
    if isinstance(value, str):
        return value
    if unit == "seconds":
        return duration_text(value)
    return f"{value:.0f} %" if unit == "percent" else f"{value:.0f}{' files' if unit == 'files' else ''}"


def _facts(one: Assessment) -> str:
    seen, counted = one.seen, one.statistics
    newest = seen.newest
    facts = [
        ("Point wanted every", duration_text(seen.interval_seconds)),
        ("Recovery points", f"{seen.listed}{f', {len(seen.damaged)} damaged' if seen.damaged else ''}"),
        ("Cycles in the window", f"{counted.points} made, {counted.misses} missed"),
        ("Retention rule", seen.retention or "the default"),
        ("Encrypted", "yes" if seen.encrypted else "no"),
        ("Source host", seen.source_host or "none yet"),
        *_told_by(seen),
        (
            "Last verification",
            f"{seen.last_verify.result} {time_text(seen.last_verify.at)}" if seen.last_verify else "never",
        ),
        ("Conversion", seen.convertibility or "not known"),
    ]
    if newest is not None:
        facts += [
            ("Newest point", f"{newest.point}, {newest.consistency.value}, {time_text(newest.created_at)}"),
            ("Disks", f"{bytes_text(newest.data_bytes)} of data in {bytes_text(newest.size_bytes)}"),
            ("Files in the longest chain", str(newest.chain_files) if newest.chain_files else "not recorded"),
        ]
    if counted.average_latency_seconds is not None:
        facts.append(("Average lag", duration_text(counted.average_latency_seconds)))
    if one.resynchronisation_seconds is not None:
        facts.append(("A resynchronisation would take", duration_text(one.resynchronisation_seconds)))
    if seen.free_space is not None:
        facts.append(("Free space", f"{bytes_text(seen.free_space.free_bytes)} ({seen.free_space.percent:.0f} %)"))
    shown = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in facts)
    return f'<h4>Facts</h4><dl class="facts">{shown}</dl>'


def _told_by(seen: Observation) -> Iterator[tuple[str, str]]:
    note = seen.agent
    if note is None or seen.as_of is None:
        return
    yield "Told by", f"the agent on {note.host_name}, {time_text(seen.as_of)}"
    going = note.state if not note.failures else f"{note.state}, {note.failures} failures in a row"
    yield "Its cycles", f"{going}: {note.error}" if note.error else going


def _drills(seen: Observation) -> str:
    if not seen.drills:
        return "<h4>Drills</h4><p>None was ever made: that this machine would start elsewhere was not seen.</p>"
    rows = "".join(
        f'<tr><th scope="row">{time_text(one.at)}</th>'
        f"<td>{_tag(one.result, 'good' if one.result == 'passed' else 'bad')}</td>"
        f'<td class="n">{_text(", ".join(map(str, one.points)))}</td><td class="n">{duration_text(one.seconds)}</td>'
        f'<td>{_text(one.host_name)}</td><td class="w">{_text(one.detail)}</td></tr>'
        for one in reversed(seen.drills)
    )
    return (
        f'<h4>Drills</h4><div class="wide" role="region" aria-label="Drills of {_text(seen.name)}" tabindex="0">'
        "<table><thead><tr>"
        '<th scope="col">Time</th><th scope="col">Result</th><th scope="col" class="n">Point</th>'
        '<th scope="col" class="n">RTO</th><th scope="col">Host</th><th scope="col">What was seen</th>'
        f"</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _changes(changes: Sequence[tuple[datetime, str]]) -> str:
    if not changes:
        return ""
    shown = "".join(f"<li>{time_text(at)}: {_text(became)}</li>" for at, became in reversed(changes))
    return f"<h4>Changes of health</h4><ul>{shown}</ul>"
