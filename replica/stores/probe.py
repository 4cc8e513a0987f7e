"""Whether a store keeps the promises that safe replication rests on, tried out before it is used, also in races."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Final, NoReturn, TypeVar

from replica.errors import (
    ObjectChangedError,
    ObjectExistsError,
    ObjectMissingError,
    StoreError,
    StoreRefusedError,
)
from replica.stores.store import Store

T = TypeVar("T")

PROBE_FOLDER: Final = "godwit-probe"
RACERS: Final = 8
ROUNDS: Final = 3
CONTENT: Final = bytes(range(256)) * 16

WHY_CREATE: Final = "two writers could both publish the same recovery point, and one would overwrite the other's"
WHY_SWAP: Final = "two agents could both believe to hold a VM's lease, and damage each other's recovery points"
WHY_READ: Final = "what was written must be there for whoever reads next"
WHY_LIST: Final = "recovery points are found, and space is given back, by listings"
STORES_THAT_DO: Final = (
    "Conditional writes are known to work on file stores, AWS S3 and SeaweedFS 4.48 or later, and are documented for"
    " MinIO, Ceph, Cloudflare R2 and Garage"
)


@dataclass(frozen=True, slots=True)
class CallTime:
    """How long one kind of call took in the probe."""

    call: str
    count: int
    median_seconds: float
    longest_seconds: float


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """What the probe of a store found: every check passed (else it had raised), and the calls' times."""

    url: str
    checks: tuple[str, ...]
    times: tuple[CallTime, ...]


def probe_store(
    store: Store,
    *,
    racers: int = RACERS,
    rounds: int = ROUNDS,
    token: Callable[[], str] = lambda: secrets.token_hex(8),
    clock: Callable[[], float] = time.perf_counter,
) -> ProbeReport:
    """Check the store's promises on scratch objects, which are removed again; return what was checked and the times.

    In each race ``racers`` threads do the same at once, ``rounds`` times. Raises StoreRefusedError naming the call
    that failed and why it matters; other StoreErrors where the store does not answer.
    """
    probe = _Probe(store, token(), clock)
    try:
        probe.check_create()
        probe.check_reads()
        probe.check_replace()
        probe.check_listing()
        probe.check_delete()
        for number in range(rounds):
            probe.race_creates(number, racers)
            probe.race_swaps(number, racers)
    finally:
        probe.clean_up()
    return ProbeReport(store.url, tuple(probe.checks), probe.times())


class _Probe:
    """One probe's scratch keys, the checks that passed and the times taken."""

    def __init__(self, store: Store, token: str, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self._token = token
        self._key = self._scratch("object")
        self._tag = ""
        self._keys: set[str] = set()
        self._seconds: dict[str, list[float]] = {}
        self._lock = threading.Lock()
        self.checks: list[str] = []

    def check_create(self) -> None:
        """A new object is created; a second create of it is refused and harms nothing."""
        self._tag = self._create(self._key, CONTENT)
        self._expect_refusal(
            "create of an object that exists",
            lambda: self._create(self._key, b"overwritten"),
            ObjectExistsError,
            WHY_CREATE,
        )
        self._expect_content("create of an object that exists", self._key, CONTENT, WHY_CREATE)

    def check_reads(self) -> None:
        """What was written is read back, whole and in ranges, with its tag."""
        ranges: Sequence[tuple[int, int | None]] = ((0, 16), (100, 7), (4000, None), (-5, None), (-50, 10), (4090, 50))
        for start, length in ranges:
            begin = len(CONTENT) + start if start < 0 else start
            wanted = CONTENT[begin:] if length is None else CONTENT[begin : begin + length]
            found = self._timed("get of a range", partial(self._store.get, self._key, start=start, length=length))
            if found != wanted:
                self._refuse(f"get of the range {start}, {length}", "other bytes came back", WHY_READ)
        info = self._timed("head", lambda: self._store.head(self._key))
        if info.size != len(CONTENT) or info.tag != self._tag:
            self._refuse("head", "it shows another size or tag than the write returned", WHY_SWAP)
        self._expect_refusal(
            "get of an object that does not exist",
            lambda: self._store.get(self._scratch("missing")),
            ObjectMissingError,
            WHY_READ,
        )
        self._passed("get of ranges", "head")

    def check_replace(self) -> None:
        """A swap with the present tag is done; with an old one, or of nothing, it is refused."""
        old_tag = self._tag
        content = CONTENT[::-1]
        self._tag = self._replace(self._key, content, old_tag)
        self._expect_content("replace", self._key, content, WHY_READ)
        if self._tag == old_tag:
            self._refuse("replace", "the tag stayed the same though the content changed", WHY_SWAP)
        self._expect_refusal(
            "replace with an old tag", lambda: self._replace(self._key, b"stale", old_tag), ObjectChangedError, WHY_SWAP
        )
        self._expect_content("replace with an old tag", self._key, content, WHY_SWAP)
        missing = self._scratch("missing")
        self._expect_refusal(
            "replace of an object that does not exist",
            lambda: self._replace(missing, b"from nothing", old_tag),
            (ObjectMissingError, ObjectChangedError),
            WHY_SWAP,
        )

    def check_listing(self) -> None:
        """A listing shows what was written, in key order, from where it is told to begin."""
        beside = f"{PROBE_FOLDER}-{self._token}"  # '-' sorts before '/', which stores made of folders may get wrong
        self._create(beside, b"beside")
        self._create(self._scratch("later"), b"later")
        expected = [beside, self._scratch("later"), self._key]
        if self._listed("") != expected or self._listed(expected[0]) != expected[1:]:
            self._refuse(
                "list", f"the {len(expected)} objects just written were not shown once each in key order", WHY_LIST
            )
        self._passed("list")

    def check_delete(self) -> None:
        """A deleted object is gone from reads and listings; deleting it again is no error."""
        key = self._scratch("later")
        for _ in range(2):
            self._timed("delete", lambda: self._store.delete(key))
        self._expect_refusal("get after delete", lambda: self._store.get(key), ObjectMissingError, WHY_READ)
        if key in self._listed(""):
            self._refuse("list after delete", "the deleted object is still shown", WHY_LIST)
        self._create(key, b"created again")
        self._passed("delete")

    def race_creates(self, number: int, racers: int) -> None:
        """Several threads create one object at once: one succeeds, and its bytes are what is there."""
        key = self._scratch(f"race-create-{number}")
        call = f"create of one object by {racers} threads at once"
        won = self._race(racers, lambda content: self._create(key, content), ObjectExistsError)
        self._judge(call, key, won, WHY_CREATE)

    def race_swaps(self, number: int, racers: int) -> None:
        """Several threads swap one object from the same tag at once: one succeeds."""
        key = self._scratch(f"race-swap-{number}")
        call = f"replace of one object by {racers} threads at once"
        tag = self._create(key, b"before the race")
        won = self._race(racers, lambda content: self._replace(key, content, tag), ObjectChangedError)
        self._judge(call, key, won, WHY_SWAP)

    def clean_up(self) -> None:
        """Remove the scratch objects as far as the store lets us."""
        for key in sorted(self._keys):
            with contextlib.suppress(StoreError):
                self._store.delete(key)

    def times(self) -> tuple[CallTime, ...]:
        """Return the calls' times, by name."""
        return tuple(
            CallTime(call, len(seconds), median(seconds), max(seconds))
            for call, seconds in sorted(self._seconds.items())
        )

    def _scratch(self, name: str) -> str:
        return f"{PROBE_FOLDER}/{self._token}-{name}"

    def _race(self, racers: int, act: Callable[[bytes], str], refusal: type[StoreError]) -> list[bytes]:
        """Return what the threads wrote that were told of success."""
        barrier = threading.Barrier(racers)

        def run(number: int) -> bytes | None:
            content = b"racer %d of %s" % (number, self._token.encode())
            barrier.wait()
            try:
                act(content)
            except refusal:
                return None
            return content

        with ThreadPoolExecutor(racers) as pool:
            return [content for content in pool.map(run, range(racers)) if content is not None]

    def _judge(self, call: str, key: str, won: Sequence[bytes], why: str) -> None:
        if len(won) != 1:
            self._refuse(call, f"{len(won)} of them were told that they succeeded, where exactly one may", why)
        self._expect_content(call, key, won[0], why)
        if call not in self.checks:
            self._passed(call)

    def _create(self, key: str, content: bytes) -> str:
        with self._lock:
            self._keys.add(key)
        return self._timed("create", lambda: self._store.create(key, content))

    def _replace(self, key: str, content: bytes, tag: str) -> str:
        with self._lock:
            self._keys.add(key)
        return self._timed("replace", lambda: self._store.replace(key, content, tag=tag))

    def _listed(self, start_after: str) -> list[str]:
        keys = self._timed("list", lambda: [i.key for i in self._store.list(PROBE_FOLDER, start_after=start_after)])
        return [key for key in keys if self._token in key]

    def _expect_content(self, call: str, key: str, content: bytes, why: str) -> None:
        found, _ = self._timed("get", lambda: self._store.get_tagged(key))
        if found != content:
            self._refuse(call, "afterwards the object holds other bytes than it should", why)
        if call not in self.checks:
            self._passed(call)

    def _expect_refusal(
        self, call: str, act: Callable[[], object], refusal: type[StoreError] | tuple[type[StoreError], ...], why: str
    ) -> None:
        try:
            act()
        except refusal:
            if call not in self.checks:
                self._passed(call)
            return
        self._refuse(call, "it was not refused", why)

    def _timed(self, call: str, work: Callable[[], T]) -> T:
        begun = self._clock()
        try:
            return work()
        finally:
            seconds = self._clock() - begun
            with self._lock:
                self._seconds.setdefault(call, []).append(seconds)

    def _passed(self, *calls: str) -> None:
        self.checks.extend(calls)

    def _refuse(self, call: str, happened: str, why: str) -> NoReturn:
        raise StoreRefusedError(
            f"the store {self._store.url} cannot be used: {call}: {happened}",
            hint=f"Without this, {why}. {STORES_THAT_DO}."
            if why not in (WHY_READ, WHY_LIST)
            else f"{why.capitalize()}.",
        )
