"""Drills on a platform in memory: one that passes, those that must not, what they leave, and what is recorded."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from replica import lease
from replica.drills import evidence
from replica.drills.checks import Check, Kind, Terms
from replica.drills.recording import Recorded, scheduled
from replica.errors import ConfigurationError, GodwitError, LeaseHeldError, PlatformError, UsageError
from replica.failover.offer import OFFERS
from replica.health import journal
from replica.health.observation import Event, EventKind
from replica.model import FailoverKind, Standing
from tests.support.drills import PICTURE, GuestPlatform, Range, check, make_range
from tests.support.engine import make_host
from tests.support.failover import TEST, make_site
from tests.support.store_doubles import CrashMode, Fault, FaultKind, FaultyStore, SimulatedCrash

MOTD = hashlib.sha256(b"welcome\n").hexdigest()
EVERYTHING = (
    check(Kind.AGENT, timeout_seconds=60.0),
    check(Kind.CONSOLE, match="^GODWIT-READY firmware=(bios|uefi)$"),
    check(Kind.SERVICE, service="nginx"),
    check(Kind.COMMAND, command=("hostname",), match="^web-1$"),
    check(Kind.FILE, path="/etc/motd", sha256=MOTD),
    check(Kind.SCREENSHOT),
    check(Kind.POINT),
    check(Kind.TCP, port=443),
)


@pytest.fixture
def place(tmp_path: Path) -> Range:
    return make_range(make_site(tmp_path), tmp_path / "evidence")


def last_event(place: Range) -> Event:
    lab = place.site.lab
    told = [one for one in journal.event_keys(lab.store, lab.found.keys) if one.kind is EventKind.DRILL]
    return journal.read_event(lab.store, told[-1])


def assert_failed(place: Range, done: Recorded, reason: str, *, cleaned: bool = True) -> None:
    """It failed for that reason, left nothing, and evidence and store say the same."""
    assert not done.drill.passed
    assert any(reason in one for one in done.drill.reasons), done.drill.reasons
    assert done.drill.cleaned is cleaned
    assert bool(place.site.state.beside) is not cleaned
    assert bool(place.site.hypervisor.machines) is not cleaned
    verified = evidence.verify(done.written.document, done.written.fingerprint)
    assert verified.body["verdict"] == "failed"
    assert list(verified.body["reasons"]) == list(done.drill.reasons)
    assert verified.missing == ()
    event = last_event(place)
    assert event.result == "failed"
    assert reason in event.detail


def test_a_drill_that_passes_leaves_evidence_and_a_record_and_no_machine(place: Range) -> None:
    done = place.drill(*EVERYTHING)
    made = done.drill
    assert made.passed, made.reasons
    assert [one.kind for one in made.outcomes] == [
        *("newest", "agent", "console", "service", "command", "file", "screenshot", "point", "tcp")
    ]
    assert [one.skipped for one in made.outcomes] == [False] * 8 + [True]
    assert [one.phase.value for one in made.timings] == [
        *("choose", "define", "start", "first answer", "checks", "cleanup")
    ]
    assert made.rto_seconds == 20.0  # the guest's, on a clock that stands still while nothing is waited for
    assert place.site.hypervisor.machines == {} and place.site.state.beside == ()
    assert place.site.standing is Standing.PROTECTED
    assert [what for what, _ in place.site.hypervisor.calls][:3] == ["define", "start", "delete"]

    verified = evidence.verify(done.written.document, done.written.fingerprint)
    body = verified.body
    assert body["verdict"] == "passed" and body["cleaned"] is True
    assert body["point"]["number"] == 2
    manifest = place.site.lab.store.get(place.site.lab.found.keys.manifest(2))
    assert body["point"]["manifest_sha256"] == hashlib.sha256(manifest).hexdigest()
    assert sorted(verified.files) == sorted([done.written.page.name, f"{done.written.document.stem}.png"])
    assert done.written.picture is not None and done.written.picture.read_bytes() == PICTURE

    event = last_event(place)
    assert (event.result, event.points, event.seconds) == ("passed", (2,), 20.0)
    assert done.written.fingerprint in event.detail and done.written.sha256 in event.detail


def test_a_drill_replicates_on_and_may_take_an_older_point(place: Range) -> None:
    done = place.drill(point=1)
    assert done.drill.passed, done.drill.reasons
    assert done.drill.point is not None and done.drill.point.point == 1
    assert place.site.lab.replicate().point == 3


def test_the_first_answer_is_what_counts(place: Range) -> None:
    done = place.drill(check(Kind.CONSOLE, match="^SeaBIOS"), check(Kind.AGENT))
    assert done.drill.passed and done.drill.rto_seconds == 0.0


@pytest.mark.parametrize("picture", [b"GIF89a", PICTURE + bytes(16 << 20)], ids=["no picture", "too large"])
def test_what_is_no_picture_is_not_kept(place: Range, picture: bytes) -> None:
    platform = replace(place.platform(), picture=picture)
    done = place.drill(check(Kind.AGENT), check(Kind.SCREENSHOT, required=True), platform=platform)
    assert_failed(place, done, "as a picture is none, or too large")
    assert done.drill.picture is None


def test_phases_follow_one_another(place: Range) -> None:
    place.guest.execution_seconds = 3.0
    made = place.drill(check(Kind.AGENT), check(Kind.COMMAND, command=("hostname",))).drill
    told = {one.phase.value: one.seconds for one in made.timings}
    assert (told["first answer"], told["checks"], told["cleanup"]) == (20.0, 3.0, 0.0)


def test_a_drill_that_cleaned_up_leaves_no_note_of_its_machine(place: Range) -> None:
    assert place.drill().drill.passed
    state = place.site.lab.host.state_folder
    assert state is not None
    assert [path for path in (state / "drills").rglob("*") if path.is_file()] == []


def test_it_is_recorded_with_one_request(place: Range) -> None:
    lab = place.site.lab
    before = {one.key for one in lab.store.list("")}
    place.drill()
    added = {one.key for one in lab.store.list("")} - before
    assert len([key for key in added if "/events/" in key]) == 1


# --- those that must fail


def test_a_guest_that_never_answers_fails_and_is_pictured(place: Range) -> None:
    place.guest.answers_after_seconds = None
    done = place.drill(check(Kind.AGENT, timeout_seconds=30.0), check(Kind.SERVICE, service="nginx"))
    assert_failed(place, done, "did not answer within 30 s")
    assert done.drill.rto_seconds is None
    assert done.drill.outcomes[-1].observed == "not made: the guest does not answer"
    assert done.drill.picture == PICTURE  # though nobody asked for it


def test_a_guest_that_turns_its_machine_off_is_not_waited_for(place: Range) -> None:
    place.guest.answers_after_seconds = None
    platform = replace(place.platform(), ends_by_itself=True)
    done = place.drill(check(Kind.CONSOLE, match="READY", timeout_seconds=3600.0), platform=platform)
    assert_failed(place, done, "the machine is off")
    assert done.drill.outcomes[-1].seconds < 10
    assert "SeaBIOS" in done.drill.outcomes[-1].observed


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (check(Kind.SERVICE, service="postgresql", timeout_seconds=5.0), "service: not found"),
        (check(Kind.COMMAND, command=("hostname",), match="^db"), "command: status 0: web-1"),
        (check(Kind.COMMAND, command=("hostname",), status=3), "command: status 0"),
        (check(Kind.FILE, path="/etc/motd", sha256="0" * 64), f"file: SHA-256 {MOTD}"),
        (check(Kind.FILE, path="/etc/shadow", sha256=MOTD), "no such file"),
        (check(Kind.CONSOLE, match="^login:", timeout_seconds=5.0), "no such line came within"),
    ],
)
def test_what_is_not_as_it_should_be_fails(place: Range, wrong: Check, reason: str) -> None:
    assert_failed(place, place.drill(check(Kind.AGENT), wrong), reason)
    assert place.drill(check(Kind.AGENT), replace(wrong, required=False)).drill.passed


def test_a_service_that_comes_up_late_is_waited_for(place: Range) -> None:
    states = iter([(3, b"activating\n", b"")] * 3)
    nginx = ("systemctl", "is-active", "--", "nginx")

    class Late(dict[tuple[str, ...], tuple[int, bytes, bytes]]):
        def get(self, key: object, default: object = None) -> tuple[int, bytes, bytes]:
            return next(states, (0, b"active\n", b"")) if key == nginx else self[key]  # type: ignore[index]

    place.guest.programs = Late()
    done = place.drill(check(Kind.AGENT), check(Kind.SERVICE, service="nginx"))
    assert done.drill.passed, done.drill.reasons


def test_what_was_seen_of_a_service_is_told_though_the_time_is_up_before_it_is_asked_again(place: Range) -> None:
    place.guest.execution_seconds = 4.0  # so it is asked twice, and the third answer would come too late
    done = place.drill(check(Kind.AGENT), check(Kind.SERVICE, service="postgresql", timeout_seconds=10.0))
    assert_failed(place, done, "service: not found")


def damage_the_point(place: Range, number: int) -> None:
    """Cut a segment that only that point needs."""
    lab = place.site.lab
    lab.store.delete(
        max(one.key for one in lab.store.list("") if "/segments/" in one.key and f"/{number:020}" in one.key)
    )


def test_a_damaged_point_fails(place: Range) -> None:
    damage_the_point(place, 2)
    done = place.drill(point=2)
    assert_failed(place, done, "point 2 does not restore")
    assert done.drill.machine is None
    assert last_event(place).points == (2,)


def test_a_newest_point_that_had_to_be_passed_over_fails_though_an_older_one_starts(place: Range) -> None:
    damage_the_point(place, 2)
    done = place.drill()
    assert done.drill.point is not None and done.drill.point.point == 1
    assert done.drill.rto_seconds is not None
    assert_failed(place, done, "point 1 was started in its place")


def test_bytes_that_changed_in_the_store_are_found_where_every_byte_is_read(place: Range) -> None:
    lab = place.site.lab
    key = max(one.key for one in lab.store.list("") if "/segments/" in one.key)
    held = bytearray(lab.store.get(key))
    held[len(held) // 2] ^= 1
    lab.store.delete(key)
    lab.store.create(key, bytes(held))
    assert_failed(place, place.drill(check(Kind.AGENT), check(Kind.POINT)), "point 2 is damaged")


@pytest.mark.parametrize("broken", [{"stays": True}, {"refuses": frozenset({"delete"})}])
def test_a_cleanup_that_fails_fails_the_drill_and_the_next_one_removes_what_is_left(
    place: Range, broken: dict[str, object]
) -> None:
    done = place.drill(*EVERYTHING, platform=replace(place.platform(), **broken))  # type: ignore[arg-type]
    assert not any(one.stands_against for one in done.drill.outcomes)
    assert_failed(place, done, "cleanup: ", cleaned=False)
    left = place.site.state.beside[0].name
    again = place.drill(*EVERYTHING)
    assert again.drill.passed
    assert again.drill.notes == (f"{left}, of a drill that was cut off, was removed",)
    assert place.site.hypervisor.machines == {} and place.site.state.beside == ()


def test_time_that_is_up_fails(place: Range) -> None:
    place.guest.execution_seconds = 50.0
    slow = check(Kind.COMMAND, command=("hostname",), timeout_seconds=600.0)
    done = place.drill(check(Kind.AGENT), slow, replace(slow, name="last"), timeout_seconds=60)
    assert_failed(place, done, "did not end in the guest within 40 s")
    assert_failed(place, done, "last: not made: the time of the drill was up")


def test_a_machine_that_does_not_start_fails_and_is_removed(place: Range) -> None:
    done = place.drill(platform=replace(place.platform(), refuses=frozenset({"start"})))
    assert_failed(place, done, "start: simulated")
    assert done.drill.outcomes == ()


def test_a_platform_without_a_way_in_fails_the_checks_that_need_one(place: Range) -> None:
    platform = replace(place.platform(), guest=None)
    assert_failed(place, place.drill(check(Kind.AGENT), platform=platform), "no way into a guest")


# --- what is refused, killed, unrecorded


def test_what_cannot_be_begun_is_refused_and_not_recorded(place: Range) -> None:
    with pytest.raises(UsageError, match="99"):
        place.drill(point=99)
    with pytest.raises(UsageError, match="starts no machines"):
        place.drill(adapt=lambda terms: replace(terms, platform="files"), means=replace(place.means(), offers=OFFERS))
    lab = place.site.lab
    assert journal.event_keys(lab.store, lab.found.keys) == []
    assert not list(place.folder.glob("*"))


@pytest.mark.parametrize("mode", [CrashMode.BEFORE, CrashMode.AFTER])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_drill_that_is_killed_leaves_a_machine_that_the_next_removes(place: Range, at: int, mode: CrashMode) -> None:
    with pytest.raises(SimulatedCrash):
        place.drill(platform=replace(place.platform(), crash_at=at, crash_mode=mode))
    (left,) = place.site.state.beside  # so status and cleanup tell of it
    assert left.kind is FailoverKind.TEST
    again = place.drill()
    assert again.drill.passed, again.drill.reasons
    assert left.name in again.drill.notes[0]
    assert place.site.hypervisor.machines == {} and place.site.state.beside == ()


def test_the_tests_of_people_are_left_alone(place: Range) -> None:
    theirs = place.site.failover(TEST).machine
    assert place.drill().drill.passed
    assert [one.name for one in place.site.state.beside] == [theirs.name]
    assert list(place.site.hypervisor.machines) == [theirs.name]


def test_cleanup_removes_what_a_killed_drill_left_and_the_next_says_nothing(place: Range) -> None:
    with pytest.raises(SimulatedCrash):
        place.drill(platform=replace(place.platform(), crash_at=1))
    place.site.cleanup(everything=True)
    assert place.drill().drill.notes == ()


def test_an_interruption_cleans_up(place: Range) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        place.drill(means=replace(place.means(), sleep=interrupted))
    assert place.site.hypervisor.machines == {} and place.site.state.beside == ()


def test_one_drill_of_a_vm_at_a_time_on_a_host(place: Range) -> None:
    host, vm_id = place.site.lab.host, place.site.lab.found.vm.vm_id
    with host.exclusive(f"drill-{vm_id}"), pytest.raises(LeaseHeldError):
        place.drill()
    assert place.drill().drill.passed


def test_a_drill_that_cannot_be_recorded_says_so(place: Range) -> None:
    store = FaultyStore(place.site.lab.store, [Fault(FaultKind.ERROR, ["create"], "*/events/*")])
    done = place.drill(means=replace(place.means(), store=store))
    assert done.drill.passed
    assert done.record is None and done.unrecorded


def test_one_without_evidence_counts_as_failed(place: Range, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise PlatformError("no space left on device")

    monkeypatch.setattr(evidence, "write", full)
    with pytest.raises(PlatformError, match="no space"):
        place.drill()
    assert last_event(place).result == "failed"
    assert place.site.hypervisor.machines == {}


def test_an_agent_is_told_where_its_drill_was_not_recorded(place: Range) -> None:
    lab = place.site.lab
    store = FaultyStore(lab.store, [Fault(FaultKind.ERROR, ["create"], "*/events/*")])
    terms = Terms((check(Kind.AGENT, timeout_seconds=30.0),), evidence=place.folder)
    work = scheduled(lambda _, host, found: replace(place.means(), store=store), terms)
    with pytest.raises(GodwitError, match="passed, and was not recorded"):
        work(store, lab.host, lab.found)


def test_without_a_place_for_evidence_nothing_is_started(place: Range, tmp_path: Path) -> None:
    (tmp_path / "evidence").write_text("a file")
    with pytest.raises(GodwitError, match="evidence"):
        place.drill()
    assert place.site.hypervisor.calls == []


def test_a_host_without_state_has_no_key_and_makes_no_drill(place: Range) -> None:
    means = replace(place.means(), host=replace(place.site.lab.host, state_folder=None))
    with pytest.raises(ConfigurationError, match="signing key"):
        place.drill(means=means)
    assert place.site.hypervisor.calls == []


def test_every_machine_is_isolated(place: Range) -> None:
    seen = []

    class Looking(GuestPlatform):
        def define(self, spec: object) -> None:
            seen.append(spec.isolated)  # type: ignore[attr-defined]
            GuestPlatform.define(self, spec)  # type: ignore[arg-type]

    assert place.drill(platform=Looking(place.site.hypervisor, guest=place.guest)).drill.passed
    assert seen == [True]


def test_a_vm_that_is_failed_over_can_be_drilled(place: Range) -> None:
    place.site.reach(Standing.COMMITTED)
    done = place.drill(point=1)  # a test is beside whatever counts
    assert done.drill.passed
    assert place.site.standing is Standing.COMMITTED
    assert place.site.state.machine is not None
    assert list(place.site.hypervisor.machines) == [place.site.state.machine.name]


def test_what_an_agent_runs_tells_or_raises(place: Range) -> None:
    lab = place.site.lab
    terms = Terms((check(Kind.AGENT, timeout_seconds=30.0),), evidence=place.folder)
    work = scheduled(lambda store, host, found: place.means(), terms)
    told = work(lab.store, lab.host, lab.found)
    assert (told["point"], told["rto_seconds"]) == (2, 20.0)
    assert evidence.verify(Path(str(told["evidence"]))).body["verdict"] == "passed"
    place.guest.answers_after_seconds = None
    with pytest.raises(GodwitError, match="the drill failed: the guest did not answer"):
        work(lab.store, lab.host, lab.found)


def test_a_cycle_that_is_at_work_is_waited_for_by_the_cleanup(place: Range) -> None:
    lab = place.site.lab
    gone_before: list[bool] = []
    with ExitStack() as stack:

        def begin_a_cycle(seconds: float) -> None:
            """The guest is waited for, and meanwhile a cycle begins; the next to wait is the cleanup."""
            if place.guest.is_up:
                gone_before.append(place.site.hypervisor.machines == {})
                stack.close()
                return
            place.guest.clock.advance(60)
            other = make_host(lab.folder / "other", name="host-b", clock=place.guest.clock)
            stack.enter_context(lease.holding(lab.store, lab.found.keys, other))

        done = place.drill(means=replace(place.means(), sleep=begin_a_cycle))
    assert done.drill.passed, done.drill.reasons
    assert gone_before == [True]  # the machine does not run while the lease is waited for
    assert place.site.state.beside == ()
