"""A disk becomes a page blob: the content of a fixed VHD, of which only what is not zero is sent, its footer last.

Order: the blob is made, all zeros; a lease keeps everybody else from changing it; what is not zero is written in
ascending order, several pages at once; how far everything has been acknowledged is noted with the blob now and then,
and an upload that was cut off goes on from there; the blob is looked at; then the footer is written, without which
nothing takes the blob for a disk; then it is noted as whole. What a blob is made of is noted with it too, so that an
upload never goes on with the blob of another.

Memory: for each upload at once, ``PIECE_BYTES`` twice.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal, TypeAlias, TypeVar
from uuid import UUID, uuid5

from replica.errors import GodwitError, PlatformError
from replica.platforms.azure.target import BlobHeldError, BlobLostError, BlobState, PageBlob
from vhdx.convert import nonzero_runs
from vhdx.disk import Disk
from vhdx.progress import Progress, silent
from vhdx.vhd_create import aligned_size
from vhdx.vhd_structures import FOOTER_SIZE, DiskType, Footer, geometry_for
from vhdx.windows import length_of

PIECE_BYTES: Final = 4 << 20  # the most that one request writes
PAGE_BYTES: Final = 512
GRANULE: Final = 64 << 10  # bytes; what is looked at for being zero, and left out if it is
NOTE_BYTES: Final = 128 << 20  # sent between two notes of how far it is
SAMPLES: Final = 32  # pieces that are read back
LEASE_SECONDS: Final = 60
WAIT_SECONDS: Final = 90.0  # for the lease of somebody who has gone
POLL_SECONDS: Final = 5.0
NAMES: Final = UUID("7d3f4d02-6f53-4f0c-9a55-0a4c5f0d6b0e")  # of footers and leases, by what they are of

_CONTENT, _STATE, _DONE, _SENT = "godwit_content", "godwit_state", "godwit_done", "godwit_sent"
_UPLOADING, _WHOLE = "uploading", "whole"

Piece: TypeAlias = tuple[int, int]
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be made: ``content`` names it, the same for the same bytes, whichever host makes it.

    ``lease`` is the id of the lease, the same for whoever may go on at once with what was cut off: this host.
    """

    content: str
    lease: str
    created: datetime
    uploads: int = 8
    verify: Literal["sampled", "full"] = "sampled"


@dataclass(frozen=True, slots=True)
class Uploaded:
    """What an upload did. ``sent_bytes`` by this attempt; ``resumed_bytes``: the place on the disk it went on from."""

    sent_bytes: int
    resumed_bytes: int
    already_whole: bool = False


@dataclass(frozen=True, slots=True)
class Pace:
    """The times and sizes of an upload, for tests to change."""

    note_bytes: int = NOTE_BYTES
    lease_seconds: int = LEASE_SECONDS
    wait_seconds: float = WAIT_SECONDS
    poll_seconds: float = POLL_SECONDS
    sleep: Callable[[float], object] = time.sleep
    clock: Callable[[], float] = time.monotonic


def blob_size(size: int) -> int:
    """Return how large the blob of a disk of ``size`` bytes is: whole MiB, and the footer."""
    return aligned_size(size) + FOOTER_SIZE


def is_whole(state: BlobState | None, content: str, size: int) -> bool:
    """Whether the blob is the finished one of a disk of ``size`` bytes."""
    if state is None or state.size != blob_size(size):
        return False
    return state.metadata.get(_CONTENT) == content and state.metadata.get(_STATE) == _WHOLE


def says_whole(state: BlobState) -> bool:
    """Whether the blob is noted as a finished one, of whatever disk."""
    return state.metadata.get(_STATE) == _WHOLE


def remaining_bytes(state: BlobState | None, content: str, size: int) -> int:
    """Return how much of the disk has not been gone through yet."""
    if is_whole(state, content, size):
        return 0
    return size if state is None or state.metadata.get(_CONTENT) != content else max(0, size - _noted(state, _DONE))


def upload(
    disk: Disk, blob: PageBlob, order: Order, *, progress: Progress = silent, pace: Pace | None = None
) -> Uploaded:
    """Make the blob that holds the disk as a fixed VHD; safe to repeat, and what was begun goes on.

    Raises BlobHeldError while somebody else makes it, BlobLostError where it was taken over, PlatformError, and what
    the disk raises.
    """
    return _Upload(disk, blob, order, progress, pace or Pace()).run()


class _Upload:
    """One attempt."""

    def __init__(self, disk: Disk, blob: PageBlob, order: Order, progress: Progress, pace: Pace) -> None:
        self._disk = disk
        self._blob = blob
        self._order = order
        self._progress = progress
        self._pace = pace
        self._size = blob_size(disk.size)
        self._sent = 0  # by all attempts, up to what is noted, and by this one

    def run(self) -> Uploaded:
        if is_whole(self._blob.look(), self._order.content, self._disk.size):
            return Uploaded(0, self._disk.size, already_whole=True)
        self._make()
        self._acquire()
        with _Kept(self._blob, self._order.lease, self._pace) as kept:
            state = self._blob.look()
            if is_whole(state, self._order.content, self._disk.size):
                return Uploaded(0, self._disk.size, already_whole=True)
            if state is None or not self._is_ours(state):
                raise BlobLostError("the blob was replaced by somebody else", path=self._blob.url)
            done = min(_noted(state, _DONE), self._disk.size)
            before = self._sent = _noted(state, _SENT)
            self._send(done, kept)
            kept.check()
            self._note(_UPLOADING, self._disk.size)
            self._verify()
            kept.check()
            self._blob.put(self._order.lease, aligned_size(self._disk.size), self._footer())
            self._note(_WHOLE, self._disk.size)
        return Uploaded(self._sent - before, done)

    def _make(self) -> None:
        """See to it that there is a blob of this content; what an other content left of that name goes."""
        for _ in range(3):
            if self._blob.create(self._size, self._metadata(_UPLOADING, 0, 0)):
                return
            state = self._blob.look()
            if state is None:
                continue
            if self._is_ours(state):
                return
            if _CONTENT not in state.metadata:
                raise PlatformError(
                    "there is a blob of that name which Godwit has not made, and it is left alone",
                    path=self._blob.url,
                    hint="remove it, or name another container",
                )
            self._acquire()  # not while somebody is at it
            self._blob.delete()
        raise BlobHeldError("somebody else makes and removes this blob", path=self._blob.url, hint="try again later")

    def _is_ours(self, state: BlobState) -> bool:
        ours = state.metadata.get(_CONTENT) == self._order.content
        return ours and state.size == self._size and state.is_page_blob

    def _acquire(self) -> None:
        pace = self._pace
        deadline = pace.clock() + pace.wait_seconds
        while True:
            try:
                return self._blob.acquire(self._order.lease, pace.lease_seconds)
            except BlobHeldError:
                if pace.clock() >= deadline:
                    raise
            pace.sleep(pace.poll_seconds)

    def _send(self, done: int, kept: _Kept) -> None:
        """Write what is not zero from ``done`` on, and note now and then how far it is."""
        total_bytes = length_of(self._disk.allocated())
        passed = length_of(self._disk.allocated(0, done)) if done else 0
        noted = self._sent
        work = _in_order(pieces(self._disk, done), self._copy, self._order.uploads)
        with contextlib.closing(work):
            for (start, end), sent in work:
                kept.check()
                self._sent += sent
                passed = min(total_bytes, passed + end - start)
                self._progress(passed, total_bytes, "uploading")
                if self._sent - noted >= self._pace.note_bytes:
                    self._note(_UPLOADING, end)
                    noted = self._sent

    def _copy(self, piece: Piece) -> int:
        """Send what is not zero of a piece; return its bytes."""
        start, end = piece
        buffer = bytearray(-(-(end - start) // PAGE_BYTES) * PAGE_BYTES)
        view = memoryview(buffer)
        self._disk.read_into(start, view[: end - start])
        sent = 0
        for first, last in nonzero_runs(view).tolist():
            self._blob.put(self._order.lease, start + first, bytes(view[first:last]))
            sent += last - first
        return sent

    def _verify(self) -> None:
        """Compare what the blob says it holds with what was sent, and read pieces back. Raises PlatformError."""
        end = aligned_size(self._disk.size)
        held = sum(min(last, end) - first for first, last in self._blob.ranges() if first < end)
        if held != self._sent:
            self._throw_away(f"{self._sent} bytes were sent, and it holds {held}")
        chosen: Iterable[Piece] = pieces(self._disk, 0)
        if self._order.verify == "sampled":
            chosen = sampled(chosen, SAMPLES, seed=self._order.content)
        work = _in_order(chosen, self._is_there, self._order.uploads)
        with contextlib.closing(work):
            for (start, last), there in work:
                if not there:
                    self._throw_away(f"bytes {start} to {last} read back are not those that were sent")

    def _is_there(self, piece: Piece) -> bool:
        start, end = piece
        return self._blob.read(start, end - start) == self._disk.read_at(start, end - start)

    def _throw_away(self, reason: str) -> None:
        self._blob.delete()
        raise PlatformError(
            f"the blob is not what was uploaded: {reason}; it was removed", path=self._blob.url, hint="try again"
        )

    def _footer(self) -> bytes:
        size = aligned_size(self._disk.size)
        return Footer(
            kind=DiskType.FIXED,
            original_size=size,
            current_size=size,
            identifier=uuid5(NAMES, self._order.content),
            created=self._order.created,
            geometry=geometry_for(size),
        ).encode()

    def _note(self, state: str, done: int) -> None:
        self._blob.note(self._order.lease, self._metadata(state, done, self._sent))

    def _metadata(self, state: str, done: int, sent: int) -> dict[str, str]:
        return {_CONTENT: self._order.content, _STATE: state, _DONE: str(done), _SENT: str(sent)}


class _Kept:
    """Holds the blob's lease while the context lasts."""

    def __init__(self, blob: PageBlob, lease: str, pace: Pace) -> None:
        self._blob = blob
        self._lease = lease
        self._pace = pace
        self._ended = threading.Event()
        self._lost: GodwitError | None = None
        self._thread = threading.Thread(target=self._renew, name="blob lease", daemon=True)

    def check(self) -> None:
        """Raise BlobLostError where the lease is somebody else's by now."""
        if self._lost is not None:
            raise BlobLostError(f"the blob was taken over: {self._lost.message}", path=self._blob.url)

    def _renew(self) -> None:
        while not self._ended.wait(self._pace.lease_seconds / 4):
            try:
                self._blob.renew(self._lease)
            except BlobLostError as error:
                self._lost = error
                return
            except GodwitError:
                continue  # once it has run out, writing is refused

    def __enter__(self) -> _Kept:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(GodwitError):  # it runs out by itself
            self._blob.release(self._lease)


def pieces(disk: Disk, start: int) -> Iterator[Piece]:
    """Yield what is to be read from ``start`` on: in each window of ``PIECE_BYTES`` from the first to the last byte
    that the disk holds, cut at 64 KiB.
    """
    first = last = None
    for extents in disk.allocated(start, None):
        for begin, end in extents.tolist():
            at = max(begin // GRANULE * GRANULE, start)
            while at < end:
                stop = min(end, (at // PIECE_BYTES + 1) * PIECE_BYTES)
                if first is not None and last is not None and first // PIECE_BYTES != at // PIECE_BYTES:
                    yield first, last
                    first = None
                if first is None:
                    first = at
                last = min(disk.size, -(-stop // GRANULE) * GRANULE)
                at = stop
    if first is not None and last is not None:
        yield first, last


def sampled(all_pieces: Iterable[Piece], count: int, *, seed: str) -> list[Piece]:
    """Return about ``count`` of the pieces, each as likely as any other, the first and the last among them."""
    chance = random.Random(seed)
    kept: list[Piece] = []
    first = last = None
    for number, piece in enumerate(all_pieces):
        first, last = first or piece, piece
        if len(kept) < count:
            kept.append(piece)
        elif (place := chance.randrange(number + 1)) < count:
            kept[place] = piece
    return sorted({*kept, *(one for one in (first, last) if one is not None)})


def _in_order(
    all_pieces: Iterable[Piece], work: Callable[[Piece], Result], at_once: int
) -> Generator[tuple[Piece, Result], None, None]:
    """Yield each piece and what ``work`` makes of it, in order; ``at_once`` are at work.

    Raises what ``work`` raises, at the place of its piece; those that have not begun by then are not begun.
    """
    with ThreadPoolExecutor(at_once, thread_name_prefix="azure") as pool:
        running: deque[tuple[Piece, Future[Result]]] = deque()
        try:
            for piece in all_pieces:
                if len(running) == 2 * at_once:
                    head, future = running.popleft()
                    yield head, future.result()
                running.append((piece, pool.submit(work, piece)))
            while running:
                head, future = running.popleft()
                yield head, future.result()
        finally:
            for _, future in running:
                future.cancel()


def _noted(state: BlobState, name: str) -> int:
    text = state.metadata.get(name, "0")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0
