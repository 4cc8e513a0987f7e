"""A wall clock that jumps an hour, at any request of a cycle: nothing is lost, at worst one agent is told to wait."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from replica import history
from replica.errors import LeaseHeldError, LeaseLostError
from replica.host import Host
from replica.lease import TERM
from replica.model import Point
from replica.stores.store import Store
from tests.support.engine import BLOCK, FakeClock, Lab, make_host, make_lab, random_blocks
from tests.support.store_doubles import RecordingStore

HOUR = 3600
JUMPS = [HOUR, -HOUR]
LARGEST_STEP = 200


class _AtRequest(RecordingStore):
    """Has something happen before the request of ordinal ``at``."""

    def __init__(self, inner: Store, at: int, event: Callable[[], object]) -> None:
        super().__init__(inner)
        self._at = at
        self._event = event
        self.happened = False

    def _call(self, kind, key, sent, work):  # type: ignore[no-untyped-def]
        self._at -= 1
        if self._at < 0 and not self.happened:
            self.happened = True
            self._event()
        return super()._call(kind, key, sent, work)


def _lab(folder: Path) -> Lab:
    lab = make_lab(folder, [random_blocks(1, 6)], host=make_host(folder / "state"))
    lab.replicate()
    lab.patch(2 * BLOCK, random_blocks(2, 2))
    return lab


def _clock(host: Host) -> FakeClock:
    assert isinstance(host.clock, FakeClock)
    return host.clock


def _assert_points(lab: Lab, *states: tuple[bytes, ...]) -> None:
    points = [one for one in history.points(lab.store, lab.found.keys) if isinstance(one, Point)]
    assert [lab.restore(point, host=make_host(name="elsewhere")) for point in points] == [state[0] for state in states]


@pytest.mark.parametrize("jump", JUMPS)
def test_a_jump_between_cycles_costs_nothing(tmp_path: Path, jump: float) -> None:
    lab = _lab(tmp_path)
    _clock(lab.host).jump(jump)
    lab.replicate()
    _clock(lab.host).jump(-jump)
    lab.replicate()
    lab.assert_restores(1, 2, 3)
    assert [one.point for one in history.points(lab.store, lab.found.keys) if isinstance(one, Point)] == [1, 2, 3]


@pytest.mark.parametrize("jump", JUMPS)
def test_a_jump_at_any_request_of_a_cycle_costs_nothing(tmp_path: Path, jump: float) -> None:
    for at in range(LARGEST_STEP):
        lab = _lab(tmp_path / str(at))
        store = _AtRequest(lab.store, at, lambda lab=lab: _clock(lab.host).jump(jump))  # type: ignore[misc]
        lab.replicate(store=store)
        if not store.happened:
            break
        lab.replicate()
        lab.assert_restores(1, 2, 3)
    assert 6 < at < LARGEST_STEP - 1


@pytest.mark.parametrize("jump", JUMPS)
def test_a_second_agent_whose_clock_is_an_hour_off_costs_one_of_the_two_its_cycle_at_most(
    tmp_path: Path, jump: float
) -> None:
    """At every request of a cycle another agent comes, whose clock is ahead, so that it takes over, or behind."""
    refused = lost = 0
    for at in range(LARGEST_STEP):
        lab = _lab(tmp_path / str(at))
        before, now = lab.published[1], lab.contents()
        other = make_host(tmp_path / str(at) / "other", name="host-b")
        _clock(other).jump(jump)
        outcomes: list[str] = []

        def attempt(host: Host, store: Store, lab: Lab = lab, outcomes: list[str] = outcomes) -> None:
            try:
                lab.replicate(store=store, host=host)
                outcomes.append("done")
            except LeaseHeldError as error:
                outcomes.append("held")
                assert error.exit_code == 11
            except LeaseLostError as error:
                outcomes.append("lost")
                assert error.exit_code == 11

        store = _AtRequest(lab.store, at, lambda: attempt(other, lab.store))  # noqa: B023
        attempt(lab.host, store)
        if not store.happened:
            break
        assert outcomes.count("done") >= 1
        refused += outcomes.count("held")
        lost += outcomes.count("lost")
        _assert_points(lab, before, *[now] * _published(lab, outcomes))
    assert 6 < at < LARGEST_STEP - 1
    assert refused + lost > 3
    assert (lost > 0) == (jump > 0), "only a clock that is ahead takes a lease over"


def _published(lab: Lab, outcomes: list[str]) -> int:
    """Return how many points there are beside the first: one more than reported where a lease was lost afterwards."""
    points = [one for one in history.points(lab.store, lab.found.keys) if isinstance(one, Point)]
    assert len(points) - 1 - outcomes.count("done") in range(outcomes.count("lost") + 1)
    return len(points) - 1


@pytest.mark.parametrize("jump", JUMPS)
def test_a_lease_left_by_a_dead_machine_with_a_wrong_clock_runs_out(tmp_path: Path, jump: float) -> None:
    lab = _lab(tmp_path)
    states = [lab.published[1]]
    _clock(lab.host).jump(jump)

    class Died(BaseException):
        pass

    def die() -> None:
        raise Died

    with pytest.raises(Died):
        lab.replicate(store=_AtRequest(lab.store, 4, die))
    other = make_host(tmp_path / "other", name="host-b")
    if jump > 0:
        with pytest.raises(LeaseHeldError):
            lab.replicate(host=other)
        _clock(other).advance(jump + TERM.total_seconds() + 1)
    lab.replicate(host=other)
    _assert_points(lab, *states, lab.contents())
