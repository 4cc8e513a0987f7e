"""Page blobs that a test watches, cuts off, and keeps in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from replica.platforms.azure.target import BlobHeldError, BlobLostError, BlobState, BlobUnreachableError, PageBlob
from tests.support.store_doubles import CrashMode, SimulatedCrash
from vhdx.extents import runs_of

Result = TypeVar("Result")
PAGE = 512


@dataclass(slots=True)
class MemoryBlob:
    """A ``PageBlob`` as the service keeps one: pages, what is noted, and a lease that runs out when told to."""

    url: str = "https://account.example/machines/web/disk-0.vhd"
    state: BlobState | None = None
    data: bytearray = field(default_factory=bytearray)
    lease: str | None = None
    _written: bytearray = field(default_factory=bytearray)  # a byte a page
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def look(self) -> BlobState | None:
        return self.state

    def create(self, size: int, metadata: Mapping[str, str]) -> bool:
        with self._lock:
            if self.state is not None:
                return False
            self.state = BlobState("disk-0.vhd", size, dict(metadata))
            self.data = bytearray(size)
            self._written = bytearray(size // PAGE)
            return True

    def acquire(self, lease: str, seconds: int) -> None:
        with self._lock:
            self._there()
            if self.lease not in (None, lease):
                raise BlobHeldError("simulated: held", path=self.url)
            self.lease = lease

    def renew(self, lease: str) -> None:
        self._check(lease)

    def release(self, lease: str) -> None:
        self._check(lease)
        self.lease = None

    def put(self, lease: str, offset: int, data: bytes) -> None:
        with self._lock:
            self._check(lease)
            assert offset % PAGE == 0 and len(data) % PAGE == 0 and 0 < len(data) <= 4 << 20
            assert offset + len(data) <= len(self.data)
            self.data[offset : offset + len(data)] = data
            self._written[offset // PAGE : (offset + len(data)) // PAGE] = b"\1" * (len(data) // PAGE)

    def note(self, lease: str, metadata: Mapping[str, str]) -> None:
        with self._lock:
            self._check(lease)
            before = self._there()
            self.state = BlobState(before.name, before.size, dict(metadata))

    def ranges(self) -> Iterator[tuple[int, int]]:
        self._there()
        flags = np.frombuffer(self._written, np.bool_)
        yield from ((start, end) for start, end in (runs_of(flags) * PAGE).tolist())

    def read(self, offset: int, length: int) -> bytes:
        self._there()
        return bytes(self.data[offset : offset + length])

    def delete(self) -> None:
        with self._lock:
            self.state = self.lease = None

    def _there(self) -> BlobState:
        if self.state is None:
            raise BlobLostError("simulated: the blob is gone", path=self.url)
        return self.state

    def _check(self, lease: str) -> None:
        self._there()
        if self.lease != lease:
            raise BlobLostError("simulated: somebody else has it", path=self.url)


@dataclass(slots=True)
class WatchedBlob:
    """A blob whose requests are written down, and of which the one with the ordinal ``at`` goes wrong by ``mode``.

    From then on nothing gets through where that was a crash; an error is an error once.
    """

    blob: PageBlob
    at: int | None = None
    mode: CrashMode = CrashMode.BEFORE
    calls: list[str] = field(default_factory=list)
    crashed: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return self.blob.url

    def look(self) -> BlobState | None:
        return self._call("look", self.blob.look)

    def create(self, size: int, metadata: Mapping[str, str]) -> bool:
        return self._call("create", lambda: self.blob.create(size, metadata))

    def acquire(self, lease: str, seconds: int) -> None:
        self._call("acquire", lambda: self.blob.acquire(lease, seconds))

    def renew(self, lease: str) -> None:
        self.blob.renew(lease)  # when that comes is a matter of time: it is not counted

    def release(self, lease: str) -> None:
        self._call("release", lambda: self.blob.release(lease))

    def put(self, lease: str, offset: int, data: bytes) -> None:
        self._call(f"put {offset}", lambda: self.blob.put(lease, offset, data))

    def note(self, lease: str, metadata: Mapping[str, str]) -> None:
        self._call("note", lambda: self.blob.note(lease, metadata))

    def ranges(self) -> Iterator[tuple[int, int]]:
        yield from self._call("ranges", lambda: list(self.blob.ranges()))

    def read(self, offset: int, length: int) -> bytes:
        return self._call("read", lambda: self.blob.read(offset, length))

    def delete(self) -> None:
        self._call("delete", self.blob.delete)

    def _call(self, what: str, work: Callable[[], Result]) -> Result:
        with self._lock:
            if self.crashed:
                raise SimulatedCrash(f"{what} after the crash")
            chosen = len(self.calls) == self.at
            self.calls.append(what)
            if chosen and self.mode is CrashMode.BEFORE:
                self.crashed = True
                raise SimulatedCrash(f"before {what}")
        result = work()
        if chosen:
            if self.mode is CrashMode.APPLIED_ERROR:
                raise BlobUnreachableError(f"simulated: {what} was done, and no answer came")
            self.crashed = True
            raise SimulatedCrash(f"after {what}")
        return result
