"""The report's page as a document, metrics, and what is shipped beside them; tests/browser ask a browser."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from replica.health import charts, style
from replica.health import page as pages
from replica.health.assessment import assess
from replica.health.metrics import FLEET, METRICS, metrics
from replica.health.observation import AgentNote, Observation
from replica.health.page import page
from replica.health.plot import Series, binned, plot, span_for
from replica.health.rules import RULES
from replica.health.units import bytes_text, duration_text, step_for
from tests.support.health import HOSTILE_NAMES, MINUTE, NOW, every, fleet, healthy

CHECKOUT = Path(__file__).parents[2]
CONTRIB = CHECKOUT / "contrib"
VOID = {"meta", "br"}
ALLOWED = {
    *("html", "head", "meta", "title", "style", "body", "a", "header", "main", "footer", "h1", "h2", "h3", "h4", "p"),
    *("ul", "li", "b", "div", "table", "caption", "thead", "tbody", "tr", "th", "td", "span", "details", "summary"),
    *("dl", "dt", "dd", "figure", "figcaption", "svg", "path", "text", "rect", "br"),
}


class Document(HTMLParser):
    """What a page is made of; fails where an element is not closed in its order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text.append(data)


@pytest.fixture(scope="module")
def document() -> Document:
    return Document(page([assess(one) for one in fleet(24)], NOW))


def test_it_is_made_of_harmless_elements_alone(document: Document) -> None:
    assert {tag for tag, _ in document.elements} <= ALLOWED
    for tag, attributes in document.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "src", "srcset")], tag
        assert (attributes.get("href") or "#").startswith("#")


def test_every_hostile_name_is_there_as_text(document: Document) -> None:
    shown = "".join(document.text)
    for name in HOSTILE_NAMES:
        if "\u202e" in name or "\u200b" in name:  # what reorders or hides is shown as what it is
            assert name not in shown
            name = name.encode("ascii", "backslashreplace").decode()
        assert name in shown


def test_names_that_are_no_unicode_are_written_escaped() -> None:
    text = page([assess(healthy(name="x\udcffy"))], NOW)
    assert "x\\udcffy" in text
    text.encode()


def test_the_policy_allows_the_one_style_sheet_and_nothing_else(document: Document) -> None:
    [policy] = [a["content"] for tag, a in document.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == style.POLICY
    assert policy.startswith("default-src 'none'; style-src 'sha256-") and "unsafe" not in policy
    assert "@import" not in style.SHEET and "url(" not in style.SHEET and "</" not in style.SHEET


def test_ids_are_unique_and_links_lead_somewhere(document: Document) -> None:
    ids = [a["id"] for _, a in document.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {(a["href"] or "").removeprefix("#") for tag, a in document.elements if tag == "a"} <= set(ids)


def test_headings_tables_and_plots_say_what_they_are(document: Document) -> None:
    levels = [int(tag[1]) for tag, _ in document.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later - one <= 1 for one, later in pairwise(levels))
    assert all(a.get("scope") in ("col", "row") for tag, a in document.elements if tag == "th")
    assert all(a.get("role") == "img" and a.get("aria-label") for tag, a in document.elements if tag == "svg")
    assert ("html", {"lang": "en"}) in document.elements


def test_every_reason_is_told_with_threshold_and_remedy() -> None:
    judged = assess(healthy(samples=healthy().samples[:-20], leftovers=True))
    shown = " ".join(Document(page([judged], NOW)).text)
    for reason in judged.reasons:
        assert reason.rule_id in shown and reason.remedy in shown and reason.evidence in shown
    assert "1 h 42 min, limit 1 h" in shown


def test_an_empty_fleet_and_a_vm_without_points_make_a_page() -> None:
    assert "No machine is protected" in page([], NOW)
    assert "There is no recovery point yet" in page([assess(healthy(samples=(), listed=0))], NOW)
    Document(page([assess(Observation("", "x", NOW, unread="damaged"))], NOW))


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        digits = colour if len(colour) == 6 else "".join(digit * 2 for digit in colour)
        parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_text_stands_out_from_its_ground_in_both_schemes() -> None:
    for block in re.findall(r":root\{([^}]*)\}", style.SHEET):
        colours = dict(re.findall(r"--([\w-]+):#([0-9a-f]{3,6})", block))
        for text in ("text", "soft", "link"):
            for ground in ("ground", "raised"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        for tone in ("good", "warn", "bad"):
            assert contrast(colours[tone], colours[f"{tone}-g"]) >= 4.5, tone
        for line in ("one", "two", "bad"):
            assert contrast(colours[line], colours["raised"]) >= 3, line


# --- plots


def test_a_plot_has_axes_with_units_and_tells_its_values() -> None:
    span = span_for([NOW - 60 * MINUTE], NOW, 12)
    values = binned(span, [(NOW - 60 * MINUTE, 3 << 20), (NOW - 59 * MINUTE, 5 << 20), (NOW, 1 << 20)], max)
    assert [value for value in values if value is not None] == [5 << 20, 1 << 20]
    drawn = plot("Churn", "bytes", span, [Series("changed", values, bars=True)])
    assert re.findall(r'class="v"[^>]*>([^<]*)<', drawn) == ["0 B", "2 MiB", "4 MiB", "6 MiB"]
    assert re.findall(r'class="t"[^>]*>([^<]*)<', drawn) == ["07:00", "08:00", "09:00", "10:00", "11:00"]
    assert "Churn. changed: last 1 MiB, at most 5 MiB." in drawn
    assert "<title>2026-03-31 11:00 UTC\nchanged: 5 MiB</title>" in drawn
    assert drawn.count("<title>") == 2 and plot("x", "bytes", span, [], titles=False).count("<title>") == 0


def test_a_limit_is_drawn_where_values_come_near_it() -> None:
    span = span_for([NOW - 60 * MINUTE], NOW, 4)
    far = plot("RPO", "seconds", span, [Series("x", (1.0, 2.0, None, None))], limit=1800)
    near = plot("RPO", "seconds", span, [Series("x", (900.0, 2.0, None, None))], limit=1800)
    assert "limit" not in far and "warning from 30 min" in near


def test_all_values_lie_within_the_frame() -> None:
    for one in fleet(12):
        if one.samples:
            drawn = charts.plots(assess(one), charts.detail_for(1))
            for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", drawn):
                assert 60 <= float(x) <= 560 and 0 <= float(y) <= 190


@pytest.mark.parametrize(
    "seconds, text", [(0.25, "0.2 s"), (59, "59 s"), (61, "1 min 1 s"), (7200, "2 h"), (90061, "1 d 1 h")]
)
def test_durations_are_told_in_two_units(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize("count, text", [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 40, "5 TiB")])
def test_sizes_are_told_in_powers_of_1024(count: float, text: str) -> None:
    assert bytes_text(count) == text


def test_axes_are_divided_by_round_steps() -> None:
    assert [step_for(top, "seconds") for top in (3, 100, 5000, 400_000)] == [1, 30, 1800, 172_800]
    assert [step_for(top, "bytes") for top in (3, 5000, 5 << 30)] == [1, 2048, 2 << 30]


# --- metrics, and what is shipped for Prometheus and Grafana

NAMES = {name for name, *_ in METRICS} | {name for name, _ in FLEET}


def test_metrics_are_read_by_prometheus_with_names_as_they_are() -> None:
    assessments = [assess(one) for one in fleet(24)]
    families = {family.name: family for family in text_string_to_metric_families(metrics(assessments, 1234.0))}
    assert set(families) == NAMES
    health = {sample.labels["vm"]: sample.value for sample in families["godwit_vm_health"].samples}
    assert set(health) == {one.seen.name for one in assessments}
    assert all(set(one.labels) <= {"vm", "health"} for family in families.values() for one in family.samples)
    assert families["godwit_report_timestamp_seconds"].samples[0].value == 1234.0
    assert sum(one.value for one in families["godwit_fleet_vms"].samples) == 24


def test_a_metric_that_is_not_known_has_no_sample() -> None:
    text = metrics([assess(healthy(drills=(), samples=(), listed=0))], 0.0)
    assert "\ngodwit_vm_last_drill_timestamp_seconds{" not in text and "\ngodwit_vm_rpo_seconds{" not in text


def test_units_are_in_the_names() -> None:
    for name, *_ in METRICS:
        assert name.endswith(
            (
                "_seconds",
                "_bytes",
                "_health",
                "_readiness",
                "_reasons",
                "_readable",
                "_points",
                "_cycles",
                "_passed",
                "_files",
            )
        ), name


@pytest.mark.parametrize("file", ["grafana/dashboard.json", "prometheus/alerts.yml"])
def test_dashboard_and_alerts_name_only_metrics_that_exist(file: str) -> None:
    text = (CONTRIB / file).read_text(encoding="utf-8")
    named = set(re.findall(r"\bgodwit_[a-z_]+", text))
    assert len(named) >= 5 and named <= NAMES


def test_the_dashboard_is_json_with_panels_that_do_not_overlap() -> None:
    board = json.loads((CONTRIB / "grafana/dashboard.json").read_text(encoding="utf-8"))
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24
        taken |= cells
        assert panel["targets"] and all(target["expr"] for target in panel["targets"])
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_every_rule_is_told_in_the_document() -> None:
    text = (CHECKOUT / "docs" / "health.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `([a-z-]+)` \| (\w+)", text, re.MULTILINE))
    assert told == {rule.rule_id: rule.severity.value for rule in RULES.values()}


def test_the_result_of_the_last_drill_is_in_the_metrics() -> None:
    failed = healthy(name="b", drills=tuple(replace(one, result="failed") for one in healthy().drills))
    text = metrics([assess(healthy(name="a")), assess(failed)], 0.0)
    assert 'godwit_vm_last_drill_passed{vm="a"} 1.0' in text
    assert 'godwit_vm_last_drill_passed{vm="b"} 0.0' in text


def test_points_that_are_not_known_any_more_make_no_rpo_of_their_own_gap() -> None:
    points = every(5 * MINUTE, 25)
    reached = [grown for _, grown in charts.exposures(healthy(samples=(points[0], points[-1])))]
    # 24 cycles in two hours, and the last was there after 20 seconds.
    assert reached == [pytest.approx((24 * 300 + 20) / 24), 120.0]


def test_very_many_machines_make_a_page_that_a_browser_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (pages.MOST_DETAILED, pages.MOST_IN_TABLE) == (1000, 500)
    monkeypatch.setattr(pages, "MOST_DETAILED", 100)
    monkeypatch.setattr(pages, "MOST_IN_TABLE", 50)
    worst = healthy(name="the worst", samples=(), drills=(), listed=0, leftovers=True, damaged=frozenset())
    note = AgentNote("host-a", NOW - MINUTE, "waiting")
    bare = healthy(samples=healthy().samples[-2:], drills=(), as_of=NOW - 3 * MINUTE, agent=note)
    count = 170
    fleet = [assess(replace(bare, name=f"app-{number:04}")) for number in range(count - 1)]
    text = page([*fleet, assess(worst)], NOW)
    document = Document(text)
    rows = [attrs for tag, attrs in document.elements if tag == "th" and attrs.get("scope") == "row"]
    assert len(rows) == count, "all have a row"
    ids = {attrs["id"] for _, attrs in document.elements if "id" in attrs}
    assert sum((one or "").startswith("vm-") for one in ids) == 100
    links = [(attrs["href"] or "").removeprefix("#") for tag, attrs in document.elements if tag == "a"]
    assert set(links) <= ids, "none leads to a section that is not there"
    assert text.index(">the worst<") < text.index(">app-0000<"), "the gravest first"
    assert document.elements.count(("table", {})) == 4, "none of more than fifty rows"
    assert "70 more machines have a row above" in text
    assert f"{count - 1} of them are told as their agents wrote down, at most 3 min before" in text


def test_a_machine_s_section_says_whose_word_it_is() -> None:
    note = AgentNote("host-a", NOW - MINUTE, "retrying", 2, "<b>no room</b>")
    text = page([assess(healthy(as_of=NOW - MINUTE, agent=note))], NOW)
    assert "the agent on host-a, 2026-03-31 11:59" in text
    assert "retrying, 2 failures in a row: &lt;b&gt;no room&lt;/b&gt;" in text
    assert "All are told as their agents wrote down, at most 1 min before this page was made." in text
    assert "Told by" not in page([assess(healthy())], NOW)
