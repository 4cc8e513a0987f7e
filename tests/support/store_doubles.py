"""Stores around a store: one records every request, one crashes at a chosen write, one misbehaves by rule."""

from __future__ import annotations

import enum
import itertools
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TypeVar

from replica.errors import StoreFullError, StoreUnavailableError
from replica.stores.busy import StoreBusyError
from replica.stores.store import ObjectData, ObjectInfo, Store

READS = ("get", "get_tagged", "head", "list")
WRITES = ("create", "replace", "delete")

T = TypeVar("T")


class SimulatedCrash(BaseException):
    """The process died here. Not an Exception, so that no ``except Exception`` of the code under test survives it."""


@dataclass(frozen=True, slots=True)
class Request:
    """One call on a store, as it was made."""

    ordinal: int  # among all requests, from 0
    write_ordinal: int | None  # among creates, replaces and deletes, from 0; None for reads
    kind: str
    key: str
    size: int  # bytes sent or received; objects yielded, for a list
    error: str | None  # the error's class name


class _Around:
    """A store that sends each call through ``_call``, which tests' doubles override."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner

    @property
    def url(self) -> str:
        return self.inner.url

    def _call(self, kind: str, key: str, sent: int, work: Callable[[], T]) -> T:
        raise NotImplementedError

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        return self._call("get", key, 0, lambda: self.inner.get(key, start=start, length=length))

    def get_tagged(self, key: str) -> tuple[bytes, str]:
        return self._call("get_tagged", key, 0, lambda: self.inner.get_tagged(key))

    def head(self, key: str) -> ObjectInfo:
        return self._call("head", key, 0, lambda: self.inner.head(key))

    def create(self, key: str, data: ObjectData) -> str:
        return self._call("create", key, memoryview(data).nbytes, lambda: self.inner.create(key, data))

    def replace(self, key: str, data: ObjectData, *, tag: str) -> str:
        return self._call("replace", key, memoryview(data).nbytes, lambda: self.inner.replace(key, data, tag=tag))

    def delete(self, key: str) -> None:
        self._call("delete", key, 0, lambda: self.inner.delete(key))

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        return iter(self._call("list", prefix, 0, lambda: tuple(self.inner.list(prefix, start_after=start_after))))

    def close(self) -> None:
        self.inner.close()


class RecordingStore(_Around):
    """Keeps a record of every request: order, kind, key, bytes, error."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self._lock = threading.Lock()
        self._requests: dict[int, Request] = {}
        self._ordinals = itertools.count()
        self._write_ordinals = itertools.count()

    @property
    def requests(self) -> tuple[Request, ...]:
        """All requests in the order they were begun."""
        with self._lock:
            return tuple(self._requests[ordinal] for ordinal in sorted(self._requests))

    @property
    def writes(self) -> tuple[Request, ...]:
        """The creates, replaces and deletes, in the order they were begun; what a crash plan enumerates."""
        return tuple(request for request in self.requests if request.write_ordinal is not None)

    @property
    def counts(self) -> Counter[str]:
        """Requests by kind."""
        return Counter(request.kind for request in self.requests)

    @property
    def bytes_written(self) -> int:
        """Bytes of creates and replaces that succeeded."""
        return sum(r.size for r in self.requests if r.kind in ("create", "replace") and r.error is None)

    @property
    def bytes_read(self) -> int:
        """Bytes that gets returned."""
        return sum(r.size for r in self.requests if r.kind in ("get", "get_tagged"))

    def forget(self) -> None:
        """Begin a new record; ordinals start at 0 again."""
        with self._lock:
            self._requests.clear()
            self._ordinals = itertools.count()
            self._write_ordinals = itertools.count()

    def _call(self, kind: str, key: str, sent: int, work: Callable[[], T]) -> T:
        with self._lock:
            ordinal = next(self._ordinals)
            write_ordinal = next(self._write_ordinals) if kind in WRITES else None
        size, error = sent, None
        try:
            result = work()
            if kind in ("get", "list"):
                size = len(result)  # type: ignore[arg-type]
            elif kind == "get_tagged":
                size = len(result[0])  # type: ignore[index]
        except BaseException as raised:
            error = type(raised).__name__
            raise
        finally:
            with self._lock:
                self._requests[ordinal] = Request(ordinal, write_ordinal, kind, key, size, error)
        return result


class CrashMode(enum.Enum):
    """What happens at the chosen write."""

    BEFORE = "before"  # the process dies, the write was not applied
    AFTER = "after"  # the write was applied, the process dies without hearing of it
    APPLIED_ERROR = "applied-error"  # the write was applied, the process lives and hears an error
    TORN = "torn"  # power fails while it is written: stores write whole objects, so nothing is applied


class CrashingStore(_Around):
    """Crashes at the write (create, replace or delete) of ordinal ``at``, counted from 0.

    From a crash on, every call of every thread raises SimulatedCrash: a dead process does nothing more. Open what it
    left through the inner store. ``crashed`` tells whether the chosen write was reached.
    """

    def __init__(self, inner: Store, *, at: int, mode: CrashMode) -> None:
        super().__init__(inner)
        self.at = at
        self.mode = mode
        self.crashed = False
        self._dead = False
        self._lock = threading.Lock()
        self._write_ordinals = itertools.count()

    def _call(self, kind: str, key: str, sent: int, work: Callable[[], T]) -> T:
        with self._lock:
            self._check_alive()
            if kind not in WRITES or next(self._write_ordinals) != self.at:
                chosen = False
            else:
                chosen = self.crashed = True
                self._dead = self.mode is not CrashMode.APPLIED_ERROR
        if not chosen:
            result = work()
            with self._lock:
                self._check_alive()
            return result
        if self.mode in (CrashMode.AFTER, CrashMode.APPLIED_ERROR):
            work()
        if self.mode is CrashMode.APPLIED_ERROR:
            raise StoreUnavailableError("simulated: applied, but the answer was lost", key=key)
        raise SimulatedCrash(f"{self.mode.value} {kind} {key}")

    def _check_alive(self) -> None:
        if self._dead:
            raise SimulatedCrash("called after the crash")


def crash_points(write_count: int) -> Iterator[tuple[int, CrashMode]]:
    """Yield every (ordinal, mode) of a run that made ``write_count`` writes."""
    yield from itertools.product(range(write_count), CrashMode)


class FaultKind(enum.Enum):
    """How a request is made to fail."""

    ERROR = "error"  # not applied; StoreUnavailableError
    TIMEOUT = "timeout"  # writes: applied or not by the toss of a coin; StoreUnavailableError
    APPLIED_ERROR = "applied-error"  # applied; StoreUnavailableError
    SLOW_DOWN = "slow-down"  # not applied; StoreBusyError with retry_after_seconds
    FULL = "full"  # not applied; StoreFullError
    SHORT_BODY = "short-body"  # get and get_tagged return only the first half
    STALE_LIST = "stale-list"  # a list lacks the newest object and still has the one deleted last


@dataclass(frozen=True, slots=True)
class Fault:
    """A rule: requests of ``kinds`` whose keys match ``pattern`` fail as ``fault`` says."""

    fault: FaultKind
    kinds: Sequence[str] = (*READS, *WRITES)
    pattern: str = "*"  # as of fnmatch
    probability: float = 1.0
    limit: int | None = None  # how many times at most; None for no bound
    skip: int = 0  # how many matching requests pass unharmed first


@dataclass(slots=True)
class _Rule:
    fault: Fault
    met: int = 0
    fired: int = field(default=0)


class FaultyStore(_Around):
    """Misbehaves by rules, the first that matches deciding; the same seed gives the same faults to the same calls."""

    def __init__(self, inner: Store, faults: Sequence[Fault], *, seed: int = 0, retry_after_seconds: float = 2) -> None:
        super().__init__(inner)
        self.retry_after_seconds = retry_after_seconds
        self._rules = [_Rule(fault) for fault in faults]
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._last_created = ""
        self._last_deleted: ObjectInfo | None = None

    @property
    def fired(self) -> int:
        """How many faults were dealt out."""
        with self._lock:
            return sum(rule.fired for rule in self._rules)

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        """Yield the inner listing, stale where a rule says so."""
        fault = self._choose("list", prefix)
        if fault is not None and fault is not FaultKind.STALE_LIST:
            raise self._error(fault, prefix)
        found = {info.key: info for info in self.inner.list(prefix, start_after=start_after)}
        if fault is FaultKind.STALE_LIST:
            found.pop(self._last_created, None)
            ghost = self._last_deleted
            if ghost is not None and ghost.key.startswith(prefix) and ghost.key > start_after:
                found[ghost.key] = ghost
        return iter([found[key] for key in sorted(found)])

    def _call(self, kind: str, key: str, sent: int, work: Callable[[], T]) -> T:
        fault = self._choose(kind, key)
        if fault is None or fault is FaultKind.STALE_LIST:
            return self._apply(kind, key, work)
        if fault is FaultKind.SHORT_BODY:
            return _shortened(self._apply(kind, key, work))
        with self._lock:
            heads = self._random.random() < 0.5
        if fault is FaultKind.APPLIED_ERROR or (fault is FaultKind.TIMEOUT and heads):
            self._apply(kind, key, work)
        raise self._error(fault, key)

    def _choose(self, kind: str, key: str) -> FaultKind | None:
        with self._lock:
            for rule in self._rules:
                fault = rule.fault
                if kind not in fault.kinds or not fnmatchcase(key, fault.pattern):
                    continue
                rule.met += 1
                if rule.met <= fault.skip or (fault.limit is not None and rule.fired >= fault.limit):
                    continue
                if self._random.random() < fault.probability:
                    rule.fired += 1
                    return fault.fault
        return None

    def _apply(self, kind: str, key: str, work: Callable[[], T]) -> T:
        ghost = next((info for info in self.inner.list(key) if info.key == key), None) if kind == "delete" else None
        result = work()
        with self._lock:
            if kind == "create":
                self._last_created = key
            if ghost is not None:
                self._last_deleted = ghost
        return result

    def _error(self, fault: FaultKind, key: str) -> Exception:
        if fault is FaultKind.FULL:
            return StoreFullError("simulated: no room left", key=key)
        if fault is FaultKind.SLOW_DOWN:
            return StoreBusyError("simulated: slow down", key=key, retry_after_seconds=self.retry_after_seconds)
        return StoreUnavailableError(f"simulated: {fault.value}", key=key)


def _shortened(result: T) -> T:
    if isinstance(result, bytes):
        return result[: len(result) // 2]  # type: ignore[return-value]
    if isinstance(result, tuple):
        return (result[0][: len(result[0]) // 2], result[1])  # type: ignore[return-value]
    return result
