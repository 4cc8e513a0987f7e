"""Every write to the store and every change of a machine in a failover, crashed at: another host goes on from there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from replica import history
from replica.errors import GodwitError, LeaseHeldError, StandingError, UsageError
from replica.failover.failover import Order
from replica.failover.means import Means
from replica.host import Host
from replica.model import FailoverKind, Standing
from tests.support.failover import PLANNED, TEST, UNPLANNED, Site, make_site
from tests.support.fake_platform import FakePlatform
from tests.support.store_doubles import CrashingStore, CrashMode, RecordingStore, SimulatedCrash

Work = Callable[[Site, Means], object]
Prepare = Callable[[Site], None]


def _failed_over(site: Site) -> None:
    site.reach(Standing.FAILED_OVER)


def _tested_and_failed_over(site: Site) -> None:
    site.failover(TEST)
    site.reach(Standing.FAILED_OVER)


def _tested(site: Site) -> None:
    site.failover(TEST)
    site.failover(TEST)


def _nothing(site: Site) -> None:
    return None


# What is done, from where, and where it ends.
CASES: dict[str, tuple[Prepare, Work, Standing]] = {
    "planned": (_nothing, lambda site, means: site.failover(PLANNED, means), Standing.FAILED_OVER),
    "unplanned": (_nothing, lambda site, means: site.failover(UNPLANNED, means), Standing.FAILED_OVER),
    "another point": (
        _failed_over,
        lambda site, means: site.failover(Order(FailoverKind.UNPLANNED, point=1), means),
        Standing.FAILED_OVER,
    ),
    "commit": (_failed_over, lambda site, means: site.commit(means), Standing.COMMITTED),
    "cleanup": (_tested_and_failed_over, lambda site, means: site.cleanup(means=means), Standing.PROTECTED),
    "cleanup of tests": (
        _tested,
        lambda site, means: site.cleanup(means=means, everything=True),
        Standing.PROTECTED,
    ),
    "reprotect": (
        lambda site: site.reach(Standing.COMMITTED),
        lambda site, means: site.reprotect(means),
        Standing.REPROTECTED,
    ),
    "failback": (
        lambda site: site.reach(Standing.REPROTECTED),
        lambda site, means: site.failback(means),
        Standing.PROTECTED,
    ),
}


def _site(folder: Path, prepare: Prepare) -> Site:
    site = make_site(folder)
    prepare(site)
    return site


def _cuts(folder: Path, prepare: Prepare, work: Work) -> Iterator[tuple[str, Callable[[Site], Means]]]:
    """Yield every place where a run can be cut off: at each write, in each way, and at each call that changes."""
    site = _site(folder, prepare)
    before = len(site.hypervisor.calls)
    recording = RecordingStore(site.lab.store)
    work(site, site.means(store=recording))
    for at, write in enumerate(recording.writes):
        for mode in (CrashMode.BEFORE, CrashMode.AFTER, CrashMode.APPLIED_ERROR):
            if mode is CrashMode.APPLIED_ERROR and "/fleet/changes/" in write.key:
                continue  # a mark for reports: that it cannot be written is no reason to fail
            yield (
                f"write {at} {mode.value}",
                lambda site, at=at, mode=mode: site.means(store=CrashingStore(site.lab.store, at=at, mode=mode)),  # type: ignore[misc]
            )
    for at in range(len(site.hypervisor.calls) - before):
        for mode in (CrashMode.BEFORE, CrashMode.AFTER):
            yield (
                f"call {at} {mode.value}",
                lambda site, at=at, mode=mode: site.means(  # type: ignore[misc]
                    platform=FakePlatform(site.hypervisor, crash_at=at, crash_mode=mode)
                ),
            )


def _assert_nothing_is_forgotten(site: Site) -> None:
    """Check that the settings name every machine that there is."""
    state = site.state
    known = {one.name for one in state.beside} | ({state.machine.name} if state.machine else set())
    assert set(site.hypervisor.machines) <= known


def _repeat(site: Site, work: Work, host: Host, ends: Standing) -> None:
    try:
        work(site, site.means(host=host))
    except (StandingError, UsageError):  # all was done when it was cut off, and there is no doing it twice
        assert site.standing is ends


@pytest.mark.parametrize("case", list(CASES))
def test_whatever_is_cut_off_another_host_ends_in_the_same_place(tmp_path: Path, case: str) -> None:
    prepare, work, ends = CASES[case]
    whole = _site(tmp_path / "whole", prepare)
    work(whole, whole.means())
    assert whole.standing is ends
    cuts = 0
    for name, means in _cuts(tmp_path / "count", prepare, work):
        site = _site(tmp_path / name.replace(" ", "-"), prepare)
        with pytest.raises((SimulatedCrash, GodwitError)):
            work(site, means(site))
        _assert_nothing_is_forgotten(site)
        _assert_the_source_is_replicated_only_where_it_counts(site)

        host = site.other_host()
        _repeat(site, work, host, ends)
        assert site.standing is ends, name
        _assert_nothing_is_forgotten(site)
        assert len(site.hypervisor.machines) == len(whole.hypervisor.machines), name
        assert len(site.hypervisor.running) == len(whole.hypervisor.running), name
        _assert_same_points(site, whole, name)
        cuts += 1
    assert cuts >= 9, case


def _assert_the_source_is_replicated_only_where_it_counts(site: Site) -> None:
    host = site.other_host()
    before = _points(site)
    if site.standing in (Standing.PROTECTED, Standing.REPROTECTED):
        return
    with pytest.raises(StandingError):
        site.lab.replicate(host=host)
    assert _points(site) == before


def _points(site: Site) -> list[int]:
    return [getattr(one, "point", 0) for one in history.points(site.lab.store, site.lab.found.keys)]


def _assert_same_points(site: Site, whole: Site, name: str) -> None:
    """Check that the VM stands at a point with the content that it has where nothing was cut off."""
    ours, theirs = site.state, whole.state
    assert (ours.machine is None) == (theirs.machine is None), name
    if ours.machine is not None and theirs.machine is not None:
        for number in range(2):
            assert site.lab.restore(ours.machine.point, number) == whole.lab.restore(theirs.machine.point, number), name
    assert site.lab.contents() == whole.lab.contents(), name


def test_a_test_failover_that_is_cut_off_leaves_nothing_that_cleanup_does_not_find(tmp_path: Path) -> None:
    def work(site: Site, means: Means) -> object:
        return site.failover(TEST, means)

    for name, means in _cuts(tmp_path / "count", _nothing, work):
        site = _site(tmp_path / name.replace(" ", "-"), _nothing)
        with pytest.raises((SimulatedCrash, GodwitError)):
            work(site, means(site))
        _assert_nothing_is_forgotten(site)
        host = site.other_host()
        site.cleanup(means=site.means(host=host), everything=True)
        assert site.hypervisor.machines == {}, name
        assert not site.state.beside, name
        assert site.standing is Standing.PROTECTED
        site.lab.replicate(host=host)


def test_nobody_settles_for_a_machine_that_is_half_removed(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    site.failover(UNPLANNED)
    with pytest.raises(SimulatedCrash):
        site.cleanup(means=site.means(platform=FakePlatform(site.hypervisor, crash_at=0, crash_mode=CrashMode.AFTER)))
    host = site.other_host()
    with pytest.raises(StandingError, match="failing-over"):
        site.commit(site.means(host=host))
    done = site.failover(Order(), site.means(host=host))  # it may also be made again
    assert site.hypervisor.running == [done.machine.name]


def test_an_operator_who_is_cut_off_keeps_others_out_until_his_term_has_run_out(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    with pytest.raises(SimulatedCrash):
        site.failover(UNPLANNED, site.means(platform=FakePlatform(site.hypervisor, crash_at=1)))
    assert site.standing is Standing.FAILING_OVER
    key = site.lab.found.keys.lease
    state = site.lab.store.get(key)
    if b'"state":"held"' in state:
        with pytest.raises(LeaseHeldError):
            site.failover(UNPLANNED, site.means(host=_neighbour(site)))
    site.failover(UNPLANNED, site.means(host=site.other_host()))


def _neighbour(site: Site) -> Host:
    from tests.support.engine import make_host  # noqa: PLC0415

    return make_host(site.lab.folder / "neighbour", name="host-c", clock=site.lab.host.clock)  # type: ignore[arg-type]
