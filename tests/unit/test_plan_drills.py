"""Drills of plans on a platform in memory: one that passes, those that must not, what they leave, and the evidence."""

from __future__ import annotations

import html.parser
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from replica.drills import evidence, page
from replica.drills.checks import Terms
from replica.errors import FormatVersionError, IntegrityError, UsageError
from replica.failover.offer import OFFERS
from replica.health import journal
from replica.plans import drill as plan_drill
from replica.plans.drill import Recorded
from replica.signing import host_key
from tests.support.drills import FakeGuest, GuestPlatform
from tests.support.plans import Estate, make_estate, plan_of

HOSTILE = "</style><script>alert(1)</script><img src=x onerror=alert(2)> \x1b[2J \u202e \ud800 \" ' &"

PLAN = """
plan: shop
groups:
  - group: data
    consistent_within: 60s
    vms:
      - vm: db
        checks: [{kind: agent}, {kind: command, command: [hostname], match: "^web-1$"}]
        after: [{guest: [hostname]}]
  - group: front
    vms: [{vm: web, depends_on: [db]}]
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Estate:
    return make_estate(tmp_path_factory.mktemp("estate"), ("db", "web"))


@pytest.fixture
def estate(whole: Estate) -> Estate:
    made = whole.copy()
    made.guest = FakeGuest(made.clock, 20.0, programs={("hostname",): (0, b"web-1\n", b"")})
    return made


def drilled(estate: Estate, folder: Path, text: str = PLAN, platform: GuestPlatform | None = None) -> Recorded:
    # Its agent is waited for, since an action in the guest is made as soon as the machine runs.
    text = text.replace("after: [{guest", "after: [{wait: agent}, {guest")
    return plan_drill.drill(estate.operator(platform=platform), plan_of(text), Terms(), folder)


def events(estate: Estate, name: str) -> list[str]:
    return [one.result for one in journal.event_keys(estate.store, estate.found(name).keys)]


def test_a_drill_that_passes_leaves_one_evidence_a_record_of_each_vm_and_no_machine(
    estate: Estate, tmp_path: Path
) -> None:
    done = drilled(estate, tmp_path)
    made = done.drill
    assert made.passed, made.reasons
    assert estate.hypervisor.machines == {} and estate.state("db").beside == ()
    assert events(estate, "db") == events(estate, "web") == ["passed"]
    assert [one.name for one in made.groups] == ["data", "front"]
    first, second = (one.rto_seconds for one in made.groups)
    assert first is not None and second is not None and 20 <= first < second == made.rto_seconds
    assert made.groups[0].spread_seconds == 0.0 and made.groups[1].spread_seconds is None

    verified = evidence.verify(done.written.document, done.written.fingerprint)
    assert verified.missing == () and len(verified.files) == 3  # a page, and a picture of each
    body = verified.body
    assert [one["vm"]["name"] for one in body["vms"]] == body["plan"]["vms"] == ["db", "web"]
    assert body["plan"]["document"].strip().startswith("plan: shop")
    assert {one["result"] for one in body["steps"]} == {"done"}
    assert evidence.verify(done.written.page).fingerprint == verified.fingerprint
    picture = done.written.document.with_name(verified.files[0])
    assert evidence.verify(picture).fingerprint == verified.fingerprint
    detail = journal.read_event(estate.store, journal.event_keys(estate.store, estate.found("web").keys)[0]).detail
    assert done.written.document.name in detail and done.written.sha256 in detail


def assert_failed(estate: Estate, done: Recorded, reason: str, *, cleaned: bool = True) -> None:
    assert not done.drill.passed
    assert any(reason in one for one in done.drill.reasons), done.drill.reasons
    assert (estate.hypervisor.machines == {}) is cleaned
    body = evidence.verify(done.written.document).body
    assert body["verdict"] == "failed" and list(body["reasons"]) == list(done.drill.reasons)


def test_a_check_that_fails_fails_it_and_the_others_are_tried_all_the_same(estate: Estate, tmp_path: Path) -> None:
    done = drilled(estate, tmp_path, PLAN.replace("^web-1$", "^db-1$"))
    assert_failed(estate, done, "db: command hostname: status 0: web-1")
    assert done.drill.drills["web"].passed
    assert events(estate, "db") == ["failed"] and events(estate, "web") == ["passed"]


def test_a_guest_that_never_answers(estate: Estate, tmp_path: Path) -> None:
    assert estate.guest is not None
    estate.guest.answers_after_seconds = None
    done = drilled(estate, tmp_path)
    assert_failed(estate, done, "vm/db/after/1")
    assert done.drill.drills["db"].reasons == ("its checks were not made",)
    assert events(estate, "db") == ["failed"] and events(estate, "web") == []
    assert done.drill.rto_seconds is None
    assert "web: it was not tried" in done.drill.reasons  # the plan stops where an action fails


def test_an_action_that_fails_though_it_may(estate: Estate, tmp_path: Path) -> None:
    text = PLAN.replace("{guest: [hostname]}", "{guest: [no-such-program], on_failure: continue}")
    done = drilled(estate, tmp_path, text)
    assert_failed(estate, done, "vm/db/after/2: status 127")
    assert all(one.passed for one in done.drill.drills.values())


def test_a_machine_that_does_not_start(estate: Estate, tmp_path: Path) -> None:
    platform = GuestPlatform(estate.hypervisor, guest=estate.guest, refuses=frozenset({"start"}))
    done = drilled(estate, tmp_path, platform=platform)
    assert_failed(estate, done, "db: start: simulated")
    assert "web: it was not tried" in done.drill.reasons


def test_a_machine_that_stays_fails_it_and_the_next_drill_removes_it(estate: Estate, tmp_path: Path) -> None:
    platform = GuestPlatform(estate.hypervisor, guest=estate.guest, stays=True)
    host = estate.host()
    operator = estate.operator(platform=platform, host=host)
    done = plan_drill.drill(operator, plan_of(PLAN.replace("guest: [hostname]", "wait: agent")), Terms(), tmp_path)
    assert_failed(estate, done, "db: cleanup: ", cleaned=False)
    again = plan_drill.drill(
        estate.operator(host=host), plan_of(PLAN.replace("guest: [hostname]", "wait: agent")), Terms(), tmp_path
    )
    assert again.drill.passed, again.drill.reasons
    assert "of a drill that was cut off, was removed" in again.drill.drills["db"].notes[0]
    assert estate.hypervisor.machines == {}


def test_what_cannot_be_begun_is_refused(estate: Estate, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no recovery point 9"):
        drilled(estate, tmp_path, PLAN.replace("vm: web,", "vm: web, point: 9,"))
    estate.offers = OFFERS
    with pytest.raises(UsageError, match="starts no machines"):
        drilled(estate, tmp_path, "plan: a\ngroups: [{group: g, vms: [{vm: db, platform: files}]}]")
    assert estate.hypervisor.machines == {} and events(estate, "db") == []
    assert not list(tmp_path.glob("*.json"))


def test_every_change_of_the_evidence_is_found(estate: Estate, tmp_path: Path) -> None:
    done = drilled(estate, tmp_path)
    held = done.written.document.read_bytes()
    evidence.opened(held, "it")
    drawn = random.Random(1)
    for at in drawn.sample(range(len(held)), 400):
        altered = bytearray(held)
        altered[at] ^= 1 << drawn.randrange(8)
        with pytest.raises((IntegrityError, FormatVersionError)):
            evidence.opened(bytes(altered), "it")


def test_a_verdict_that_does_not_follow_is_refused_though_it_is_signed(estate: Estate, tmp_path: Path) -> None:
    key = host_key(tmp_path)
    done = drilled(estate, tmp_path)
    body = json.loads(done.written.document.read_bytes())["body"]

    def signed(change: object) -> bytes:
        altered = json.loads(json.dumps(body))
        change(altered)  # type: ignore[operator]
        return evidence.signed(altered, key, version=evidence.PLAN_VERSION)

    evidence.opened(signed(lambda one: None), "it")
    wrong = [
        lambda one: one.update(verdict="failed"),
        lambda one: one["vms"].pop(),  # a VM of the plan that was not tried
        lambda one: one["vms"][0].update(verdict="failed"),
        lambda one: one["vms"][0]["checks"][0].update(passed=False),
        lambda one: one["vms"][1].update(cleaned=False),
        lambda one: one.update(reasons=["something"]),
        lambda one: one.update(vms=None),
        lambda one: one.update(plan={"name": 1}),
    ]
    for change in wrong:
        with pytest.raises(IntegrityError):
            evidence.opened(signed(change), "it")
    with pytest.raises(IntegrityError):  # no drill of one VM, either
        evidence.opened(evidence.signed(body, key), "it")


class Elements(html.parser.HTMLParser):
    """Notes which elements and attributes there are."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen |= {tag, *(name for name, _ in attrs)}


def poisoned(value: object) -> object:
    if isinstance(value, str):
        return value + HOSTILE
    if isinstance(value, dict):
        return {name: poisoned(one) for name, one in value.items()}
    return [poisoned(one) for one in value] if isinstance(value, list) else value


def test_hostile_texts_are_shown_and_run_nothing(estate: Estate, tmp_path: Path) -> None:
    assert estate.guest is not None
    estate.guest.programs = {("hostname",): (0, HOSTILE.encode("utf-8", "surrogatepass"), b"")}
    done = drilled(estate, tmp_path)
    body = json.loads(done.written.document.read_bytes())["body"]
    spoiled = poisoned(body)
    assert isinstance(spoiled, dict)
    for shown in (done.written.page.read_text(encoding="utf-8"), page.plan_page(spoiled, {}, HOSTILE, HOSTILE)):
        elements = Elements()
        elements.feed(shown)
        assert "script" not in elements.seen and not [one for one in elements.seen if one.startswith("on")]
        assert shown.count("<style>") == 1 and "\u202e" not in shown and "\x1b" not in shown
        assert "&lt;script&gt;" in shown
        shown.encode()


def test_vms_may_have_terms_of_their_own(estate: Estate, tmp_path: Path) -> None:
    text = PLAN.replace("vms: [{vm: web,", "vms: [{vm: web, checks: [{kind: tcp, port: 1}],")
    done = drilled(estate, tmp_path, text)
    assert [one.kind for one in done.drill.drills["web"].outcomes] == ["newest", "agent", "tcp"]
    assert replace(done.drill, reasons=("x",)).passed is False
