"""The evidence of a drill as one HTML page: it needs no network and no script, and runs nothing.

Whatever comes from a user, a guest or the store is escaped: all of it goes through ``_text``.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any, Final

from replica.health.style import POLICY, SHEET
from replica.health.units import bytes_text, duration_text

LONGEST_TEXT: Final = 4000

# Marks that reorder or hide text, and controls: shown as what they are, or a name could pass for another.
_MARKS: Final = {
    code: f"\\u{code:04x}"
    for code in (
        *(one for one in range(0x20) if one != 0x0A),
        *range(0x7F, 0xA0),
        *range(0x200B, 0x2010),
        *range(0x2028, 0x202F),
        *range(0x2066, 0x206A),
        *range(0xD800, 0xE000),
        0xFEFF,
    )
}


def page(body: Mapping[str, Any], picture: bytes | None, fingerprint: str, document: str) -> str:
    """Return the page of what the document named ``document`` says; ``picture`` is a PNG."""
    title = f"Drill of {body['vm']['name']}: {body['verdict']}"
    policy = f"{POLICY}; img-src data:"
    parts = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(title)}</title><style>{SHEET}</style></head><body>",
        _head(body, body["vm"]["name"]),
        _reasons(body["reasons"]),
        _summary(body),
        _point(body["point"], body["passed_over"]),
        _table("Phases", ("Phase", "Took"), ((one["name"], _seconds(one["seconds"])) for one in body["phases"])),
        _checks(body["checks"]),
        _notes(body["notes"]),
        _picture(picture),
        _proof(body, fingerprint, document),
        "</main></body></html>\n",
    ]
    return "".join(parts)


def plan_page(body: Mapping[str, Any], pictures: Mapping[str, bytes], fingerprint: str, document: str) -> str:
    """Return the page of the drill of a plan; ``pictures`` are PNG, by the VM."""
    name = f"the plan {body['plan']['name']}"
    title = f"Drill of {name}: {body['verdict']}"
    rto = "not all answered" if body["rto_seconds"] is None else _seconds(body["rto_seconds"])
    groups = (
        (
            one["name"],
            "not all answered" if one["rto_seconds"] is None else _seconds(one["rto_seconds"]),
            "left open" if one["spread_seconds"] is None else _seconds(one["spread_seconds"]),
        )
        for one in body["groups"]
    )
    steps = ((one["id"], one["result"], _seconds(one["seconds"]), one["detail"]) for one in body["steps"])
    parts = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{escape(f"{POLICY}; img-src data:")}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(title)}</title><style>{SHEET}</style></head><body>",
        _head(body, name),
        _reasons(body["reasons"], "all machines were"),
        _facts("What was seen", (("RTO, from the command to the last first answer", rto), ("VMs", len(body["vms"])))),
        _table("Groups", ("Group", "All answered after", "Points lie apart"), groups),
        _table("Steps", ("Step", "Result", "Took", "What"), steps),
        *(_vm_part(one, pictures.get(one["vm"]["name"])) for one in body["vms"]),
        _facts(
            "Proof",
            (
                ("Signed document", document),
                ("Signed by the key", fingerprint),
                ("SHA-256 of the plan", body["plan"]["sha256"]),
                ("Host", body["host"]["id"]),
                ("Store", body["store"]),
                ("Made by", body["made_by"]),
            ),
        ),
        f"{_PROVEN}</main></body></html>\n",
    ]
    return "".join(parts)


def _vm_part(body: Mapping[str, Any], picture: bytes | None) -> str:
    tone = "good" if body["verdict"] == "passed" else "bad"
    verdict = f'<span class="tag {tone}">{_text(body["verdict"])}</span>'
    inner = "".join(
        (
            _reasons(body["reasons"]),
            _summary(body),
            _point(body["point"], body["passed_over"]),
            _table("Phases", ("Phase", "Took"), ((one["name"], _seconds(one["seconds"])) for one in body["phases"])),
            _checks(body["checks"]),
            _notes(body["notes"]),
            _picture(picture),
        )
    )
    lower = inner.replace("<h2>", "<h3>").replace("</h2>", "</h3>")
    return f"<h2>{_text(body['vm']['name'])} {verdict}</h2>{lower}"


_PROVEN: Final = (
    "<p>This page says what the document beside it says, which is signed and names this page by its "
    "hash: 'godwit evidence verify' tells whether either was altered. The VM's record of the drill in the store "
    "names the key.</p>"
)


def _head(body: Mapping[str, Any], name: str) -> str:
    tone = "good" if body["verdict"] == "passed" else "bad"
    verdict = f'<span class="tag {tone}">{_text(body["verdict"])}</span>'
    return (
        f"<header><h1>Drill of {_text(name)} {verdict}</h1>"
        f'<p class="soft">Begun {_time(body["begun_at"])}, ended {_time(body["ended_at"])} on the host '
        f"{_text(body['host']['name'])}. All times are UTC.</p></header><main>"
    )


def _reasons(reasons: list[str], machines: str = "the machine was") -> str:
    if not reasons:
        return f"<p>Every check that is required passed, and {machines} removed.</p>"
    told = "".join(f'<li class="bad">{_text(one)}</li>' for one in reasons)
    return f'<h2>Why it failed</h2><ul class="reasons">{told}</ul>'


def _summary(body: Mapping[str, Any]) -> str:
    machine, point = body["machine"], body["point"]
    rto = "it did not answer" if body["rto_seconds"] is None else _seconds(body["rto_seconds"])
    made = ", converted" if machine["converted"] else ""
    return _facts(
        "What was seen",
        (
            ("RTO, from the command to the first answer", rto),
            ("Point", "none" if point is None else f"{point['number']}, {_seconds(point['age_seconds'])} old"),
            ("Platform", machine["platform"]),
            ("Generation", "unknown" if machine["generation"] is None else f"{machine['generation']}{made}"),
            ("Machine", machine["name"] or "none was made"),
            ("Network", "its own, with no way out" if machine["isolated"] else "not isolated"),
            ("Removed afterwards", "yes" if body["cleaned"] else "no"),
        ),
    )


def _point(point: Mapping[str, Any] | None, passed_over: list[Mapping[str, Any]]) -> str:
    parts = []
    if point is not None:
        parts.append(
            _facts(
                "The point",
                (
                    ("Number", point["number"]),
                    ("Holds the instant", _time(point["created_at"])),
                    ("Could be restored since", _time(point["published_at"])),
                    ("Consistency", point["consistency"]),
                    ("Manifest", point["manifest"]),
                    ("SHA-256 of the manifest", point["manifest_sha256"] or "it could not be read"),
                ),
            )
        )
        disks = ((one["number"], one["name"], bytes_text(one["bytes"]), one["digest"]) for one in point["disks"])
        parts.append(_table("Its disks", ("Disk", "Name", "Size", "Digest over every block"), disks))
    if passed_over:
        rows = ((one["point"], one["because"]) for one in passed_over)
        parts.append(_table("Points that were passed over", ("Point", "Because"), rows))
    return "".join(parts)


def _checks(checks: list[Mapping[str, Any]]) -> str:
    if not checks:
        return "<h2>Checks</h2><p>None was made.</p>"
    rows = "".join(
        f'<tr><th scope="row">{_text(one["name"])}</th><td>{_text(one["kind"])}</td>'
        f"<td>{'required' if one['required'] else 'not required'}</td><td>{_verdict(one)}</td>"
        f'<td class="w">{_text(one["observed"])}</td><td class="n">{_seconds(one["seconds"])}</td></tr>'
        for one in checks
    )
    heads = "".join(f'<th scope="col">{one}</th>' for one in ("Check", "Kind", "Weight", "Result", "Observed", "Took"))
    return f"<h2>Checks</h2>{_wide('Checks', f'<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody>')}"


def _verdict(one: Mapping[str, Any]) -> str:
    if one["skipped"]:
        return '<span class="tag warn">not made</span>'
    return '<span class="tag good">passed</span>' if one["passed"] else '<span class="tag bad">failed</span>'


def _notes(notes: list[str]) -> str:
    return "".join(f"<p>{_text(one)}</p>" for one in notes)


def _picture(picture: bytes | None) -> str:
    if picture is None:
        return "<h2>The console</h2><p>No picture was taken.</p>"
    data = base64.b64encode(picture).decode()
    return (
        '<h2>The console</h2><div class="wide" role="region" aria-label="Picture of the console" tabindex="0">'
        f'<img alt="What the machine showed on its screen" src="data:image/png;base64,{data}"></div>'
    )


def _proof(body: Mapping[str, Any], fingerprint: str, document: str) -> str:
    facts = _facts(
        "Proof",
        (
            ("Signed document", document),
            ("Signed by the key", fingerprint),
            ("VM", body["vm"]["id"]),
            ("Host", body["host"]["id"]),
            ("Store", body["store"]),
            ("Made by", body["made_by"]),
        ),
    )
    return f"{facts}{_PROVEN}"


def _facts(title: str, facts: Iterable[tuple[str, object]]) -> str:
    told = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in facts)
    return f'<h2>{_text(title)}</h2><dl class="facts">{told}</dl>'


def _table(title: str, columns: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    heads = "".join(f'<th scope="col">{_text(one)}</th>' for one in columns)
    told = "".join(
        f'<tr><th scope="row">{_text(row[0])}</th>{"".join(f"<td>{_text(one)}</td>" for one in row[1:])}</tr>'
        for row in rows
    )
    return f"<h2>{_text(title)}</h2>{_wide(title, f'<thead><tr>{heads}</tr></thead><tbody>{told}</tbody>')}"


def _wide(title: str, table: str) -> str:
    return f'<div class="wide" role="region" aria-label="{_text(title)}" tabindex="0"><table>{table}</table></div>'


def _seconds(value: float) -> str:
    return duration_text(value)


def _time(text: str) -> str:
    """Return a time of the document as it is read: without its fraction."""
    return _text(text.partition(".")[0].removesuffix("Z").replace("T", " "))


def _text(value: object) -> str:
    shown = str(value)
    shown = shown if len(shown) <= LONGEST_TEXT else f"{shown[:LONGEST_TEXT]}…"
    return escape(shown.translate(_MARKS))
