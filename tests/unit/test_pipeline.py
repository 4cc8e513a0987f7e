"""Bounded parallel work: order, bounds, errors that surface, and nothing left running."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from replica import pipeline
from replica.pipeline import Uploads, ordered


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as made:
        yield made


class Gauge:
    """Counts how many calls are under way, and how many there were at most."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.now = self.most = self.done = 0

    def __enter__(self) -> None:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.now -= 1
            self.done += 1


def test_results_come_in_the_order_of_the_items_whatever_finishes_first(pool: ThreadPoolExecutor) -> None:
    gates = [threading.Event() for _ in range(4)]

    def work(number: int) -> int:
        if number < 3:
            assert gates[number + 1].wait(30)  # each waits for the one after it
        if number < 4:
            gates[number].set()
        return number * 10

    assert list(ordered(pool, work, range(20), limit=8)) == [n * 10 for n in range(20)]


def test_items_are_taken_only_as_results_are(pool: ThreadPoolExecutor) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(50):
            taken.append(number)
            yield number

    results = ordered(pool, lambda n: n, items(), limit=5)
    with closing(results):
        for number in results:
            assert len(taken) <= number + 5
    assert len(taken) == 50


def test_the_first_error_ends_it_and_nothing_stays_behind(pool: ThreadPoolExecutor) -> None:
    gauge = Gauge()

    def work(number: int) -> int:
        with gauge:
            if number == 3:
                raise ValueError("three")
            return number

    seen = []
    with pytest.raises(ValueError, match="three"):
        for number in ordered(pool, work, range(1000), limit=6):
            seen.append(number)  # noqa: PERF402 - what came before the error is wanted
    assert seen == [0, 1, 2]
    assert gauge.now == 0
    assert gauge.done < 20


def test_an_error_of_the_items_themselves_surfaces_after_what_is_under_way_ended(pool: ThreadPoolExecutor) -> None:
    gauge = Gauge()

    def items() -> Iterator[int]:
        yield from range(3)
        raise LookupError("no more")

    def work(number: int) -> int:
        with gauge:
            return number

    with pytest.raises(LookupError, match="no more"):
        list(ordered(pool, work, items(), limit=10))
    assert gauge.now == 0


def test_a_caller_that_stops_early_leaves_nothing_running(pool: ThreadPoolExecutor) -> None:
    gauge = Gauge()
    release = threading.Event()

    def work(number: int) -> int:
        with gauge:
            if number:
                release.wait(30)
            return number

    results = ordered(pool, work, range(100), limit=10)
    assert next(results) == 0
    release.set()
    results.close()
    assert gauge.now == 0
    assert gauge.done <= 11


def test_ticks_go_on_while_a_result_is_waited_for(pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "TICK_SECONDS", 0.001)
    enough = threading.Event()
    ticks = []

    def tick() -> None:
        ticks.append(1)
        if len(ticks) == 5:
            enough.set()

    assert list(ordered(pool, lambda _: enough.wait(30), [0], limit=1, tick=tick)) == [True]
    assert len(ticks) >= 5


def test_an_error_of_a_tick_surfaces(pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "TICK_SECONDS", 0.001)
    release = threading.Event()

    def tick() -> None:
        release.set()
        raise ValueError("lost")

    with pytest.raises(ValueError, match="lost"):
        list(ordered(pool, lambda _: release.wait(30), [0, 1], limit=2, tick=tick))


def test_uploads_never_exceed_their_limit_and_all_are_done_when_drained(pool: ThreadPoolExecutor) -> None:
    gauge = Gauge()
    both = threading.Barrier(2)

    def upload() -> None:
        with gauge:
            both.wait(30)  # two at a time do run

    uploads = Uploads(pool, limit=2)
    for _ in range(10):
        uploads.submit(upload)
    uploads.drain()
    assert (gauge.done, gauge.now, gauge.most) == (10, 0, 2)


def test_an_upload_that_failed_surfaces_at_a_later_call(pool: ThreadPoolExecutor) -> None:
    def fail() -> None:
        raise OSError("no room")

    uploads = Uploads(pool, limit=1)
    uploads.submit(fail)
    with pytest.raises(OSError, match="no room"):
        uploads.submit(lambda: None)
    uploads = Uploads(pool, limit=5)
    uploads.submit(fail)
    with pytest.raises(OSError, match="no room"):
        uploads.drain()


def test_abandoning_waits_for_what_runs_and_cancels_the_rest() -> None:
    gauge = Gauge()
    started, release = threading.Event(), threading.Event()

    def slow() -> None:
        with gauge:
            started.set()
            release.wait(30)

    with ThreadPoolExecutor(1) as single:
        uploads = Uploads(single, limit=5)
        for _ in range(5):
            uploads.submit(slow)
        assert started.wait(30)
        threading.Timer(0.05, release.set).start()
        uploads.abandon()
        assert (gauge.now, gauge.done) == (0, 1)


def test_abandoning_swallows_errors(pool: ThreadPoolExecutor) -> None:
    def fail() -> None:
        raise OSError("no room")

    uploads = Uploads(pool, limit=3)
    uploads.submit(fail)
    uploads.abandon()
