"""Bandwidth: windows by the clocks on the wall, and the bucket's accuracy on a clock that tests move."""

from __future__ import annotations

from datetime import UTC, datetime, time, timedelta
from zoneinfo import ZoneInfo

import pytest

from replica.daemon.bandwidth import Bucket, Limits, Window
from replica.daemon.limited import LimitedStore
from replica.stores.memory import MemoryStore
from tests.support.engine import FakeClock

MIB = 1 << 20
BERLIN = ZoneInfo("Europe/Berlin")


def local(text: str, fold: int = 0) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=BERLIN, fold=fold).astimezone(UTC)


def test_a_window_is_half_open_and_goes_over_midnight_with_the_day_it_begins_on() -> None:
    night = Window(1, time(22), time(6), frozenset({4}), BERLIN)  # Friday
    inside = ["2026-07-03T22:00", "2026-07-03T23:59:59", "2026-07-04T00:00", "2026-07-04T05:59:59"]
    outside = ["2026-07-03T21:59:59", "2026-07-04T06:00", "2026-07-04T22:00", "2026-07-03T05:00", "2026-07-05T03:00"]
    assert [night.covers(local(one)) for one in inside] == [True] * 4
    assert [night.covers(local(one)) for one in outside] == [False] * 5
    day = Window(1, time(8), time(18), zone=BERLIN)
    assert day.covers(datetime(2026, 7, 1, 6, 0, tzinfo=UTC))  # 08:00 in summer
    assert not day.covers(datetime(2026, 1, 1, 6, 59, tzinfo=UTC))  # 07:59 in winter
    assert not day.covers(local("2026-07-01T18:00"))


def test_clocks_that_are_put_forward_and_back() -> None:
    window = Window(1, time(2, 30), time(3, 30), zone=BERLIN)
    spring = datetime(2026, 3, 29, tzinfo=UTC)  # 02:00 became 03:00 at 01:00 UTC
    covered = [minute for minute in range(240) if window.covers(spring + timedelta(minutes=minute))]
    assert covered == list(range(60, 90))  # from 03:00, when 02:30 is past, until 03:30
    autumn = datetime(2026, 10, 25, tzinfo=UTC)  # 03:00 became 02:00 at 01:00 UTC
    covered = [minute for minute in range(240) if window.covers(autumn + timedelta(minutes=minute))]
    assert covered == [*range(30, 60), *range(90, 150)]  # 02:30 to 03:00 comes twice


def test_the_first_window_that_covers_has_the_say() -> None:
    limits = Limits((Window(None, time(12), time(13)), Window(10, time(8), time(18)), Window(50)))
    hours = [limits.at(datetime(2026, 1, 1, hour, 30, tzinfo=UTC)) for hour in (7, 8, 12, 17, 18)]
    assert hours == [50, 10, None, 10, 50]
    assert Limits().at(datetime(2026, 1, 1, tzinfo=UTC)) is None


def seconds_for(bucket: Bucket, clock: FakeClock, pieces: list[int]) -> float:
    begun = clock.monotonic()
    for piece in pieces:
        bucket.take(piece, clock.advance)
    return clock.monotonic() - begun


@pytest.mark.parametrize("piece", [4096, MIB, 16 * MIB])
def test_the_rate_is_kept_whatever_the_size_of_the_pieces(piece: int) -> None:
    clock = FakeClock()
    bucket = Bucket(Limits((Window(10 * MIB),)), clock)
    count = 640 * MIB // piece if piece > 4096 else 8192
    total = count * piece
    # A second's worth was there at the beginning.
    assert seconds_for(bucket, clock, [piece] * count) == pytest.approx(total / (10 * MIB) - 1, rel=0.002)


def test_a_pause_earns_one_second_and_no_more() -> None:
    clock = FakeClock()
    bucket = Bucket(Limits((Window(MIB),)), clock)
    seconds_for(bucket, clock, [10 * MIB])
    clock.advance(86400)
    assert seconds_for(bucket, clock, [MIB]) == 0
    assert seconds_for(bucket, clock, [MIB] * 5) == pytest.approx(5, abs=0.01)


def test_windows_change_while_somebody_waits_across_midnight_and_the_change_of_clocks() -> None:
    # Saturday to Sunday when clocks go forward: 10 MiB/s in the night from 22:00 to 06:00, which has but 7 hours.
    clock = FakeClock(local("2026-03-28T21:00"))
    bucket = Bucket(Limits((Window(10 * MIB, time(22), time(6), zone=BERLIN), Window(MIB, zone=BERLIN))), clock)
    expected = MIB * 3600 + 10 * MIB * 7 * 3600 + MIB * 3600 + MIB
    assert seconds_for(bucket, clock, [16 * MIB] * (expected // (16 * MIB))) == pytest.approx(9 * 3600, rel=0.001)
    assert clock.now() == pytest.approx(local("2026-03-29T07:00"), abs=timedelta(seconds=40))


def test_without_a_limit_nothing_waits_and_a_limit_that_comes_owes_nothing_for_it() -> None:
    clock = FakeClock()
    bucket = Bucket(Limits(), clock)
    assert seconds_for(bucket, clock, [1 << 40]) == 0
    clock.advance(1)
    bucket.limits = Limits((Window(MIB),))
    assert seconds_for(bucket, clock, [MIB]) <= 1.01


def test_a_clock_that_is_set_back_or_forward_stops_nobody() -> None:
    clock = FakeClock()
    bucket = Bucket(Limits((Window(MIB),)), clock)
    seconds_for(bucket, clock, [MIB])
    clock.jump(-7 * 86400)
    assert seconds_for(bucket, clock, [MIB] * 3) == pytest.approx(3, abs=0.1)
    clock.jump(7 * 86400)
    assert seconds_for(bucket, clock, [MIB] * 3) == pytest.approx(3, abs=0.1)


def test_data_waits_and_leases_do_not() -> None:
    clock = FakeClock()
    bucket = Bucket(Limits((Window(MIB),)), clock)
    store = LimitedStore(MemoryStore("limited"), bucket, clock.advance)
    begun = clock.monotonic()
    tag = store.create("lease", b"x")
    store.create("data", bytes(11 * MIB))
    assert clock.monotonic() - begun == pytest.approx(10, abs=0.01)
    store.replace("lease", bytes(4 * MIB), tag=tag)
    assert clock.monotonic() - begun == pytest.approx(10, abs=0.01)
    store.get("data", start=0, length=MIB)  # waits for the lease's bytes too: they went over the same line
    assert clock.monotonic() - begun == pytest.approx(15, abs=0.01)
    assert [info.key for info in store.list("")] == ["data", "lease"]
    store.delete("data")
    assert store.head("lease").size == 4 * MIB
    assert clock.monotonic() - begun == pytest.approx(15, abs=0.01)


def test_a_machine_that_slept_for_a_year_does_not_go_through_every_minute_of_it() -> None:
    asked: list[datetime] = []

    class Counting(Limits):
        def at(self, moment: datetime) -> int | None:
            asked.append(moment)
            return MIB

    clock = FakeClock()
    bucket = Bucket(Counting(), clock)
    clock.advance(366 * 86400)
    bucket.take(1, clock.advance)
    assert len(asked) <= 24 * 60 + 10
