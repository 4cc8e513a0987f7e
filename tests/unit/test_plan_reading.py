"""Plans as they are written: what is understood, and every mistake with its line; bombs, tags and nonsense refused."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replica.errors import ConfigurationError, UsageError
from replica.plans import graph, reading
from replica.plans.model import ActionKind, OnFailure, Policy, RunKind
from tests.support.plans import plan_of

EXAMPLE = Path(__file__).parents[2] / "contrib" / "plans" / "webshop.yaml"
DOCUMENT = Path(__file__).parents[2] / "docs" / "plans.md"

BASE = """\
plan: shop
groups:
  - group: one
    vms:
      - db
      - vm: web
"""


def mistakes(text: str) -> list[str]:
    plan, found = reading.read(text)
    return [str(one) for one in (found or graph.mistakes(plan))]


def test_the_examples_are_plans_without_mistakes() -> None:
    plan = reading.load(EXAMPLE)
    assert [len(group.vms) for group in plan.groups] == [2, 2, 1]
    shown = DOCUMENT.read_text(encoding="utf-8").partition("```yaml\n")[2].partition("```")[0]
    assert shown == EXAMPLE.read_text(encoding="utf-8")
    for kind in RunKind:
        assert graph.steps(plan, kind)


def test_values_are_what_they_say() -> None:
    plan = plan_of(
        """
        plan: a-1
        defaults: {platform: qemu, generation: auto, point: application-consistent, timeout: 2h, on_failure: continue}
        groups:
          - group: g
            consistent_within: 90s
            at_once: 7
            on_failure: stop
            vms:
              - no
              - {vm: b, point: 17, generation: 2, networks: {lan: dr, "*": q}, max_point_age: 1d, on_old_point: ask}
              - {vm: c, point: {at_or_before: "2026-05-01T10:00:00+02:00"}, on_failure: continue}
          - group: h
            vms:
              - vm: d
                after:
                  - {guest: [a, "b c"], runs: test, repeatable: true}
                  - wait: {tcp: "[::1]:443"}
                  - confirm: Yes?
        """
    )
    no, b, c, d = plan.vms
    assert no.name == "no"  # a name is a name, whatever YAML takes it for
    assert (no.point.policy, no.timeout_seconds, no.on_failure) == (Policy.APPLICATION, 7200.0, OnFailure.STOP)
    assert (b.point.number, b.generation, b.networks) == (17, 2, (("lan", "dr"), ("*", "q")))
    assert (b.max_point_age_seconds, b.on_old_point) == (86400.0, "ask")
    assert c.point.at == datetime(2026, 5, 1, 8, tzinfo=UTC)
    assert (c.on_failure, d.on_failure) == (OnFailure.CONTINUE, OnFailure.CONTINUE)
    guest, tcp, confirm = d.after
    assert guest.command == ("a", "b c") and guest.repeatable and guest.runs == {RunKind.TEST}
    assert (tcp.kind, tcp.address, tcp.port, tcp.repeatable) == (ActionKind.TCP, "::1", 443, True)
    assert confirm.text == "Yes?" and confirm.runs == {RunKind.PLANNED, RunKind.UNPLANNED}
    assert plan.groups[0].within_seconds == 90.0 and plan.groups[0].at_once == 7


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "line 1, column 1: the file is empty"),
        ("- a", "line 1, column 1: a plan is a table"),
        ("plan: Shop", "line 1, column 7: plan 'Shop' cannot be a plan's name"),
        ("plan:\ngroups: []", "line 1, column 1: plan has no value"),
        ("plan: a\nplan: b", "line 2, column 1: plan is there twice"),
        ("plan: a: b", "line 1, column 8: this is no YAML: mapping values are not allowed here"),
        ("plan: *x", "line 1, column 7: nothing is named &x before this"),
        ("plan: &a [*a]", "nothing is named &a"),
        ("plan: !!python/name:os.system a", "line 1, column 7: tags have no meaning"),
        ("? [a]\n: b", "line 1, column 3: a key is one word"),
        ("a: 1\n---\nb: 2", "line 2, column 1: a file holds one plan"),
        ("[" * 40, "nested deeper than 16"),
        ("a: \x01", "this is no YAML"),
        (
            BASE.replace("- vm: web", "- vm: web\n        dependsOn: [db]"),
            "line 7, column 9: 'dependsOn' is nothing that",
        ),
        (BASE.replace("- vm: web", "- vm: web\n        dependsOn: [db]"), "did you mean 'depends_on'?"),
        (BASE.replace("- vm: web", "- vm: web\n        tiemout: 3m"), "did you mean 'timeout'?"),
        (BASE.replace("- vm: web", "- vm: web\n        timeout: 3 m"), "line 7, column 18: timeout should be a time"),
        (BASE.replace("- vm: web", "- vm: web\n        generation: 3"), "generation should be 1, 2 or auto"),
        (BASE.replace("- vm: web", "- vm: web\n        platform: abacus"), "platform should be one of qemu"),
        (BASE.replace("- vm: web", "- vm: web\n        point: best"), "point should be newest"),
        (BASE.replace("- vm: web", "- vm: web\n        point: {at_or_before: noon}"), "should be a time with its zone"),
        (BASE.replace("- vm: web", "- vm: db"), "line 6, column 9: the VM 'db' is in the plan already, line 5"),
        (
            BASE.replace("- vm: web", "- vm: web\n        depends_on: [bd]"),
            "column 22: web depends on 'bd', which is not",
        ),
        (BASE.replace("- vm: web", "- vm: web\n        depends_on: web"), "these depend on one another: web → web"),
        (BASE.replace("- vm: web", "- vm: web\n        checks: [{kind: magic}]"), "line 7, column 18: kind"),
        (BASE + "    before: [{guest: [a]}]", "whose guest is meant: vm"),
        (BASE + "    before: [{guest: [a], vm: web}]", "the machine of web does not run at that time"),
        (BASE + "    after: [{guest: [a], vm: web, runs: failback}]", "does not run in a run for failback"),
        (BASE + "    after: [{guest: [a], vm: wbe}]", "is about 'wbe', which is not in the plan"),
        (BASE + "    after: [{host: a b}]", "host should be a program and its arguments as a list"),
        (BASE + "    after: [{host: [a], guest: [b]}]", "needs one of host, guest, wait, confirm, and no more"),
        (BASE + "    after: [{wait: {console: '('}}]", "console is no regular expression"),
        (BASE + "    after: [{wait: agent, vm: db, repeatable: true}]", "repeatable is of programs"),
        (BASE + "    after: [{host: [a], runs: [sometimes]}]", "runs should be test or planned"),
        (BASE + "    at_once: 0", "at_once should be a whole number from 1 to 64"),
        (
            BASE.replace("- db", "- vm: db\n        before: [{guest: [a]}]"),
            "the machine of db does not run at that time",
        ),
        (
            BASE + "  - group: one\n    vms: [x]\n",
            "line 7, column 5: there is a group 'one' already, line 3",
        ),
        (
            BASE.replace("- db", "- {vm: db, depends_on: x}") + "  - group: two\n    vms: [x]\n",
            "db depends on x, which is only started later, with the group two",
        ),
    ],
)
def test_every_mistake_is_named_with_its_place(text: str, told: str) -> None:
    found = mistakes(text)
    assert any(told in one for one in found), found


def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    text = "plan: Shop\ngruops: []\ndefaults: {timeout: long}\ngroups:\n  - vms: [{vm: a, generation: 9}, {}]\n"
    found = mistakes(text)
    assert len(found) == 6, found
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        reading.load(path)
    assert all(one in str(caught.value) for one in found)
    with pytest.raises(UsageError, match="cannot read"):
        reading.load(tmp_path / "none.yaml")


def test_a_bomb_of_aliases_is_refused_before_it_goes_off() -> None:
    text = "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    for before, name in zip("abcdefghij", "bcdefghijk", strict=True):
        text += f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n"
    assert "at most 20000 values" in mistakes(text)[-1]
    assert "at most 256 KiB" in mistakes("x" * (300 << 10))[0]


def test_aliases_save_writing() -> None:
    plan = plan_of(BASE.replace("- db", "- vm: db\n        after: &a [{wait: agent}]") + "        after: *a\n")
    assert [len(one.after) for one in plan.vms] == [1, 1]


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=":-[]{}&*!|>'\"#%@`?,. \n\tabgrouplnvmsif0129", max_size=200), st.integers(0, len(BASE)))
def test_whatever_is_written_there_nothing_but_mistakes_comes_of_it(noise: str, at: int) -> None:
    for text in (noise, BASE[:at] + noise + BASE[at:]):
        plan, found = reading.read(text)
        assert all(one.place.line >= 1 and one.place.column >= 1 for one in found)
        if not found and not graph.mistakes(plan):
            graph.steps(plan, RunKind.PLANNED)
