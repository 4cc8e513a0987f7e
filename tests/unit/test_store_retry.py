"""Retries: how often, how long, and what a lost answer leads to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest

from replica.errors import (
    ObjectChangedError,
    ObjectExistsError,
    ObjectMissingError,
    StoreFullError,
    StoreUnavailableError,
)
from replica.stores.memory import MemoryStore
from replica.stores.retry import Patience, ResilientStore
from replica.stores.store import ObjectData, ObjectInfo, Store
from tests.support.store_doubles import Fault, FaultKind, FaultyStore, RecordingStore, Request

CONTENT = bytes(range(256)) * 20


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds

    def read(self) -> float:
        return self.now


def resilient(
    store: Store, clock: Clock | None = None, patience: Patience | None = None, chance: float = 0.0
) -> ResilientStore:
    clock = clock or Clock()
    return ResilientStore(store, patience, sleep=clock.sleep, clock=clock.read, chance=lambda: chance)


def kinds(requests: Sequence[Request]) -> list[str]:
    return [request.kind for request in requests]


@pytest.mark.parametrize(
    "ask",
    [
        lambda store: store.get("key"),
        lambda store: store.get_tagged("key"),
        lambda store: store.head("key"),
        lambda store: list(store.list("")),
        lambda store: store.delete("key"),
        lambda store: store.create("new", CONTENT),
        lambda store: store.replace("key", b"new", tag=store.inner.inner.head("key").tag),
    ],
)
@pytest.mark.parametrize("fault", [FaultKind.ERROR, FaultKind.SLOW_DOWN, FaultKind.APPLIED_ERROR, FaultKind.TIMEOUT])
def test_every_call_outlasts_a_passing_fault(ask: Callable[[ResilientStore], object], fault: FaultKind) -> None:
    inner = MemoryStore()
    inner.create("key", CONTENT)
    faulty = FaultyStore(inner, [Fault(fault, limit=3)])
    result = ask(resilient(faulty))
    assert faulty.fired == 3
    plain = MemoryStore()
    plain.create("key", CONTENT)
    expected = ask(ResilientStore(FaultyStore(plain, [])))
    assert result == expected
    assert list(inner.list("")) == list(plain.list(""))


def test_attempts_are_bounded_and_pauses_grow() -> None:
    clock = Clock()
    faulty = FaultyStore(MemoryStore(), [Fault(FaultKind.ERROR)])
    patience = Patience(attempts=7, first_pause_seconds=1, longest_pause_seconds=10, limit_seconds=1000)
    with pytest.raises(StoreUnavailableError, match="simulated"):
        resilient(faulty, clock, patience).head("key")
    assert faulty.fired == 7
    assert clock.pauses == [0.5, 1, 2, 4, 5, 5]


def test_chance_spreads_the_pauses_between_half_and_whole() -> None:
    patience = Patience(first_pause_seconds=2)
    assert patience.pause_seconds(1, 0.0) == 1.0
    assert patience.pause_seconds(1, 0.5) == 1.5
    assert patience.pause_seconds(10_000, 0.999) < patience.longest_pause_seconds


def test_the_time_is_bounded_too() -> None:
    clock = Clock()
    faulty = FaultyStore(MemoryStore(), [Fault(FaultKind.ERROR)])
    patience = Patience(attempts=1000, first_pause_seconds=1, longest_pause_seconds=8, limit_seconds=30)
    with pytest.raises(StoreUnavailableError):
        resilient(faulty, clock, patience).get("key")
    assert 20 < clock.now <= 30


def test_a_pause_is_as_long_as_the_store_asks() -> None:
    clock = Clock()
    faulty = FaultyStore(MemoryStore(), [Fault(FaultKind.SLOW_DOWN, limit=1)], retry_after_seconds=17)
    resilient(faulty, clock).create("key", b"x")
    assert clock.pauses == [17]


def test_a_store_that_asks_for_too_long_is_given_up_at_once() -> None:
    clock = Clock()
    faulty = FaultyStore(MemoryStore(), [Fault(FaultKind.SLOW_DOWN)], retry_after_seconds=3600)
    with pytest.raises(StoreUnavailableError):
        resilient(faulty, clock).create("key", b"x")
    assert clock.pauses == []


@pytest.mark.parametrize(
    ("error", "ask"),
    [
        (StoreFullError, lambda store: store.create("full/key", b"x")),
        (ObjectMissingError, lambda store: store.get("missing")),
        (ObjectExistsError, lambda store: store.create("there", b"x")),
        (ObjectChangedError, lambda store: store.replace("there", b"x", tag="old")),
    ],
)
def test_lasting_errors_are_not_repeated(error: type[Exception], ask: Callable[[Store], object]) -> None:
    inner = MemoryStore()
    inner.create("there", b"y")
    recording = RecordingStore(FaultyStore(inner, [Fault(FaultKind.FULL, pattern="full/*")]))
    with pytest.raises(error):
        ask(resilient(recording))
    assert len(recording.requests) == 1


def test_a_create_whose_answer_was_lost_is_found_and_not_sent_again() -> None:
    recording = RecordingStore(FaultyStore(MemoryStore(), [Fault(FaultKind.APPLIED_ERROR, kinds=["create"], limit=1)]))
    tag = resilient(recording).create("key", memoryview(CONTENT))
    assert kinds(recording.requests) == ["create", "get_tagged"]
    assert recording.inner.get_tagged("key") == (CONTENT, tag)


def test_a_create_that_failed_is_looked_for_and_sent_again() -> None:
    recording = RecordingStore(FaultyStore(MemoryStore(), [Fault(FaultKind.ERROR, kinds=["create"], limit=1)]))
    resilient(recording).create("key", CONTENT)
    assert kinds(recording.requests) == ["create", "get_tagged", "create"]


def test_a_create_that_lost_its_answer_and_then_the_race_is_refused() -> None:
    inner = MemoryStore()

    class Overtaken(FaultyStore):
        def create(self, key: str, data: ObjectData) -> str:
            inner.create(key, b"another's")
            raise StoreUnavailableError("lost", key=key)

    with pytest.raises(ObjectExistsError):
        resilient(Overtaken(inner, [])).create("key", CONTENT)
    assert inner.get("key") == b"another's"


@pytest.mark.parametrize(("late", "succeeds"), [(CONTENT, True), (b"another's", False)])
def test_a_create_that_is_applied_late_is_recognised_by_its_bytes(late: bytes, succeeds: bool) -> None:
    inner = MemoryStore()

    class Late(FaultyStore):
        """The first create is applied only when the second one arrives."""

        calls = 0

        def create(self, key: str, data: ObjectData) -> str:
            self.calls += 1
            if self.calls == 1:
                raise StoreUnavailableError("lost", key=key)
            inner.create(key, late)
            return inner.create(key, data)

    store = resilient(Late(inner, []))
    if succeeds:
        assert store.create("key", CONTENT) == inner.head("key").tag
    else:
        with pytest.raises(ObjectExistsError):
            store.create("key", CONTENT)
    assert inner.get("key") == late


def test_an_object_of_equal_bytes_that_was_there_before_is_still_refused() -> None:
    inner = MemoryStore()
    inner.create("key", CONTENT)
    with pytest.raises(ObjectExistsError):
        resilient(inner).create("key", CONTENT)


def test_a_replace_whose_answer_was_lost_is_found_and_not_sent_again() -> None:
    inner = MemoryStore()
    tag = inner.create("lease", b"free")
    recording = RecordingStore(FaultyStore(inner, [Fault(FaultKind.APPLIED_ERROR, kinds=["replace"], limit=1)]))
    new_tag = resilient(recording).replace("lease", b"mine", tag=tag)
    assert kinds(recording.requests) == ["replace", "get_tagged"]
    assert inner.get_tagged("lease") == (b"mine", new_tag)


def test_a_replace_that_lost_its_answer_and_then_the_race_is_refused() -> None:
    inner = MemoryStore()
    tag = inner.create("lease", b"free")

    class Overtaken(FaultyStore):
        def replace(self, key: str, data: ObjectData, *, tag: str) -> str:
            inner.replace(key, b"another's", tag=tag)
            raise StoreUnavailableError("lost", key=key)

    with pytest.raises(ObjectChangedError):
        resilient(Overtaken(inner, [])).replace("lease", b"mine", tag=tag)
    assert inner.get("lease") == b"another's"


def test_a_replace_of_what_was_deleted_meanwhile_is_refused() -> None:
    inner = MemoryStore()
    tag = inner.create("lease", b"free")

    class Deleted(FaultyStore):
        def replace(self, key: str, data: ObjectData, *, tag: str) -> str:
            inner.delete(key)
            raise StoreUnavailableError("lost", key=key)

    with pytest.raises(ObjectMissingError):
        resilient(Deleted(inner, [])).replace("lease", b"mine", tag=tag)


@pytest.mark.parametrize(("start", "length"), [(0, 100), (10, 100), (-50, None), (-50, 20), (0, len(CONTENT))])
def test_a_short_range_is_asked_for_again(start: int, length: int | None) -> None:
    inner = MemoryStore()
    inner.create("key", CONTENT)
    faulty = FaultyStore(inner, [Fault(FaultKind.SHORT_BODY, kinds=["get"], limit=2)])
    assert resilient(faulty).get("key", start=start, length=length) == inner.get("key", start=start, length=length)
    assert faulty.fired == 2


def test_a_range_past_the_end_is_short_for_good() -> None:
    recording = RecordingStore(MemoryStore())
    recording.create("key", CONTENT)
    assert resilient(recording).get("key", start=len(CONTENT) - 3, length=100) == CONTENT[-3:]
    assert resilient(recording).get("key", start=-2 * len(CONTENT)) == CONTENT
    assert recording.counts == {"create": 1, "get": 2, "head": 2}


def test_a_broken_listing_goes_on_where_it_was() -> None:
    inner = MemoryStore()
    for number in range(2500):
        inner.create(f"point/{number:05}", b"x")

    class Breaking(FaultyStore):
        """Every listing breaks after 1200 objects."""

        listings = 0

        def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
            self.listings += 1
            for number, info in enumerate(inner.list(prefix, start_after=start_after)):
                if number == 1200:
                    raise StoreUnavailableError("broken")
                yield info

    breaking = Breaking(inner, [])
    assert [i.key for i in resilient(breaking).list("point/")] == [i.key for i in inner.list("point/")]
    assert breaking.listings == 3


def test_a_listing_that_stays_broken_raises() -> None:
    faulty = FaultyStore(MemoryStore(), [Fault(FaultKind.ERROR, kinds=["list"])])
    with pytest.raises(StoreUnavailableError):
        list(resilient(faulty).list(""))
    assert faulty.fired == Patience().attempts
