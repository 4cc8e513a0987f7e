"""The stores that tests put around a store do what they say."""

from __future__ import annotations

import contextlib

import pytest

from replica.errors import ObjectExistsError, StoreFullError, StoreUnavailableError
from replica.stores.busy import StoreBusyError
from replica.stores.memory import MemoryStore
from tests.support.store_doubles import (
    CrashingStore,
    CrashMode,
    Fault,
    FaultKind,
    FaultyStore,
    RecordingStore,
    SimulatedCrash,
    crash_points,
)


def test_a_recording_counts_requests_bytes_and_errors() -> None:
    store = RecordingStore(MemoryStore())
    tag = store.create("a", b"12345")
    with pytest.raises(ObjectExistsError):
        store.create("a", b"678")
    store.replace("a", b"1234567", tag=tag)
    store.get("a", length=3)
    store.get_tagged("a")
    assert [info.key for info in store.list("")] == ["a"]
    store.delete("a")
    assert [(r.ordinal, r.write_ordinal, r.kind, r.size, r.error) for r in store.requests] == [
        (0, 0, "create", 5, None),
        (1, 1, "create", 3, "ObjectExistsError"),
        (2, 2, "replace", 7, None),
        (3, None, "get", 3, None),
        (4, None, "get_tagged", 7, None),
        (5, None, "list", 1, None),
        (6, 3, "delete", 0, None),
    ]
    assert (store.bytes_written, store.bytes_read) == (12, 10)
    assert store.counts["create"] == 2
    assert [request.kind for request in store.writes] == ["create", "create", "replace", "delete"]
    store.forget()
    assert store.requests == ()


def _run(store: RecordingStore | CrashingStore) -> None:
    with contextlib.suppress(StoreUnavailableError):
        store.create("first", b"1")
    with contextlib.suppress(Exception):
        store.create("second", b"2")
    store.delete("first")


def test_every_crash_point_leaves_what_its_mode_says() -> None:
    recording = RecordingStore(MemoryStore())
    _run(recording)
    states: dict[tuple[int, CrashMode], list[str]] = {}
    for at, mode in crash_points(len(recording.writes)):
        inner = MemoryStore()
        store = CrashingStore(inner, at=at, mode=mode)
        try:
            _run(store)
        except SimulatedCrash:
            with pytest.raises(SimulatedCrash):
                store.head("first")
        except StoreUnavailableError:
            assert mode is CrashMode.APPLIED_ERROR
        else:
            assert mode is CrashMode.APPLIED_ERROR
        assert store.crashed
        states[at, mode] = [info.key for info in inner.list("")]
    for mode in (CrashMode.BEFORE, CrashMode.TORN):
        assert [states[at, mode] for at in range(3)] == [[], ["first"], ["first", "second"]]
    assert [states[at, CrashMode.AFTER] for at in range(3)] == [["first"], ["first", "second"], ["second"]]
    assert [states[at, CrashMode.APPLIED_ERROR] for at in range(3)] == [["second"]] * 3


def test_a_faulty_store_follows_its_rules() -> None:
    inner = MemoryStore()
    inner.create("object", b"whole")
    store = FaultyStore(
        inner,
        [
            Fault(FaultKind.SHORT_BODY, kinds=["get"], limit=1),
            Fault(FaultKind.FULL, kinds=["create"], pattern="full/*"),
            Fault(FaultKind.SLOW_DOWN, kinds=["create"], pattern="slow/*"),
            Fault(FaultKind.ERROR, kinds=["create"], pattern="error/*", skip=1),
            Fault(FaultKind.APPLIED_ERROR, kinds=["create"], pattern="applied/*"),
        ],
    )
    assert store.get("object") == b"wh"
    assert store.get("object") == b"whole"
    with pytest.raises(StoreFullError):
        store.create("full/x", b"x")
    with pytest.raises(StoreBusyError):
        store.create("slow/x", b"x")
    store.create("error/1", b"x")
    with pytest.raises(StoreUnavailableError):
        store.create("error/2", b"x")
    with pytest.raises(StoreUnavailableError):
        store.create("applied/x", b"x")
    assert [info.key for info in inner.list("")] == ["applied/x", "error/1", "object"]
    assert store.fired == 5


def test_a_stale_listing_lacks_the_newest_and_keeps_the_deleted() -> None:
    store = FaultyStore(MemoryStore(), [Fault(FaultKind.STALE_LIST)])
    for key in ("a", "b", "c"):
        store.create(key, b"x")
    store.delete("a")
    assert [info.key for info in store.list("")] == ["a", "b"]


def test_the_same_seed_gives_the_same_faults() -> None:
    def run(seed: int) -> list[bool]:
        store = FaultyStore(MemoryStore(), [Fault(FaultKind.TIMEOUT, probability=0.3)], seed=seed)
        outcomes = []
        for number in range(50):
            try:
                store.create(str(number), b"x")
                outcomes.append(True)
            except StoreUnavailableError:
                outcomes.append(False)
        return [*outcomes, *(info.key == "7" for info in store.inner.list(""))]

    assert run(1) == run(1) != run(2)
