"""Disks becoming page blobs: what is sent, what an interruption leaves, and who may go on with it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replica.errors import GodwitError, PlatformError
from replica.platforms.azure import upload as uploading
from replica.platforms.azure.target import BlobHeldError, BlobLostError
from replica.platforms.azure.upload import GRANULE, PIECE_BYTES, Order, Pace, Piece, blob_size, pieces, sampled, upload
from tests.support.page_blobs import MemoryBlob, WatchedBlob
from tests.support.store_doubles import CrashMode, SimulatedCrash
from vhdx.disk import Extents
from vhdx.raw import RawDisk
from vhdx.vhd import open_vhd

MIB = 1 << 20
HERE = "00000000-0000-0000-0000-00000000000a"
ELSEWHERE = "00000000-0000-0000-0000-00000000000b"
ORDER = Order("content-1", HERE, datetime(2026, 3, 1, tzinfo=UTC), uploads=1)
QUICK = Pace(note_bytes=GRANULE, wait_seconds=0)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[RawDisk]:
    """A disk of 20 MiB and one sector: runs within a piece and over its edges, zeros that are written, and a tail."""
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(20 * MIB + 512)
        for start, content in CONTENT.items():
            file.seek(start)
            file.write(content)
    with RawDisk.open(path) as opened:
        yield opened


CONTENT = {
    0: b"boot" * 128,
    3 * MIB: b"\xa5" * (2 * MIB),  # over the edge of a piece
    9 * MIB + 100 * 1024: b"middle",
    12 * MIB: bytes(MIB),  # zeros that take room in the file
    13 * MIB + 512: b"\x01" * 512,
    20 * MIB: b"t" * 512,
}


def _whole() -> bytes:
    data = bytearray(21 * MIB)
    for start, content in CONTENT.items():
        data[start : start + len(content)] = content
    return bytes(data)


WHOLE = _whole()


def assert_is_the_disk(blob: MemoryBlob) -> None:
    assert memoryview(blob.data)[: 21 * MIB] == WHOLE
    footer = bytes(memoryview(blob.data)[21 * MIB :])
    assert len(footer) == 512 and footer.startswith(b"conectix")


def test_the_blob_is_a_fixed_vhd_of_which_only_what_is_not_zero_was_sent(disk: RawDisk, tmp_path: Path) -> None:
    blob = MemoryBlob()
    done = upload(disk, blob, ORDER, pace=QUICK)
    assert_is_the_disk(blob)
    path = tmp_path / "copy.vhd"
    path.write_bytes(blob.data)
    with open_vhd(path) as copy:
        assert copy.size == 21 * MIB and copy.read_at(0, copy.size) == WHOLE
        assert copy.footer.created == ORDER.created
    assert blob.lease is None
    written = list(blob.ranges())
    assert written == [
        (0, GRANULE),
        (3 * MIB, 5 * MIB),
        (9 * MIB + GRANULE, 9 * MIB + 2 * GRANULE),
        (13 * MIB, 13 * MIB + GRANULE),
        (20 * MIB, 20 * MIB + 512),
        (21 * MIB, 21 * MIB + 512),
    ]
    assert done.sent_bytes == sum(end - start for start, end in written) - 512
    watched = WatchedBlob(blob)
    again = upload(disk, watched, ORDER, pace=QUICK)
    assert again.already_whole and watched.calls == ["look"]


def test_the_footer_comes_after_everything_else_and_the_note_after_the_footer(disk: RawDisk) -> None:
    watched = WatchedBlob(MemoryBlob())
    upload(disk, watched, replace(ORDER, uploads=4), pace=QUICK)
    puts = [call for call in watched.calls if call.startswith("put")]
    assert puts[-1] == f"put {21 * MIB}"
    assert watched.calls[-3:] == [f"put {21 * MIB}", "note", "release"]
    assert watched.calls[:3] == ["look", "create", "acquire"]


def _cuts(disk: RawDisk) -> int:
    watched = WatchedBlob(MemoryBlob())
    upload(disk, watched, ORDER, pace=QUICK)
    return len(watched.calls)


@pytest.mark.parametrize("mode", [CrashMode.BEFORE, CrashMode.AFTER, CrashMode.APPLIED_ERROR])
def test_an_upload_that_is_cut_off_at_any_request_goes_on(disk: RawDisk, mode: CrashMode) -> None:
    resumed = []
    cuts = _cuts(disk)
    assert cuts > 20
    for at in range(cuts):
        blob = MemoryBlob()
        failed = False
        try:
            upload(disk, WatchedBlob(blob, at, mode), ORDER, pace=QUICK)
        except (SimulatedCrash, GodwitError):
            failed = True
        assert failed or at >= cuts - 1, "nothing but giving the lease back may fail unheard"
        if any(memoryview(blob.data)[21 * MIB :]):  # it is a disk then, and must be all of it
            assert_is_the_disk(blob)
        done = upload(disk, blob, ORDER, pace=QUICK)
        resumed.append(done.resumed_bytes)
        assert_is_the_disk(blob)
        assert uploading.is_whole(blob.look(), ORDER.content, disk.size)
    assert 0 in resumed and any(0 < one < disk.size for one in resumed) and disk.size in resumed


def test_another_host_goes_on_once_the_lease_of_the_dead_one_has_run_out(disk: RawDisk) -> None:
    blob = MemoryBlob()
    with pytest.raises(SimulatedCrash):
        upload(disk, WatchedBlob(blob, at=7), ORDER, pace=QUICK)
    assert blob.lease == HERE
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            blob.lease = None

    upload(disk, blob, replace(ORDER, lease=ELSEWHERE), pace=replace(QUICK, wait_seconds=60, sleep=sleep))
    assert len(slept) == 3
    assert_is_the_disk(blob)


def test_of_two_operators_the_second_is_refused(disk: RawDisk) -> None:
    blob = MemoryBlob()
    assert blob.create(blob_size(disk.size), {"godwit_content": ORDER.content})
    blob.acquire(HERE, 60)
    with pytest.raises(BlobHeldError):
        upload(disk, blob, replace(ORDER, lease=ELSEWHERE), pace=QUICK)
    assert list(blob.ranges()) == []
    upload(disk, blob, ORDER, pace=QUICK)
    assert_is_the_disk(blob)


def test_whoever_was_taken_over_writes_nothing_more(disk: RawDisk) -> None:
    class Taken(MemoryBlob):
        def put(self, lease: str, offset: int, data: bytes) -> None:
            if offset:
                self.lease = ELSEWHERE
            super().put(lease, offset, data)

    blob = Taken()
    with pytest.raises(BlobLostError):
        upload(disk, blob, ORDER, pace=QUICK)
    assert list(blob.ranges()) == [(0, GRANULE)]
    assert blob.lease == ELSEWHERE


def test_a_lease_that_is_lost_ends_the_upload_even_where_nothing_is_written(disk: RawDisk) -> None:
    blob = MemoryBlob()
    lost = threading.Event()

    class Losing(WatchedBlob):
        def renew(self, lease: str) -> None:
            lost.set()
            raise BlobLostError("simulated: lost")

        def put(self, lease: str, offset: int, data: bytes) -> None:
            assert lost.wait(60)  # there is one to be kept by now

    with pytest.raises(BlobLostError):
        upload(disk, Losing(blob), ORDER, pace=replace(QUICK, lease_seconds=0))


def test_a_blob_of_somebody_else_is_left_alone(disk: RawDisk) -> None:
    blob = MemoryBlob()
    blob.create(1024, {"owner": "me"})
    with pytest.raises(PlatformError, match="has not made"):
        upload(disk, blob, ORDER, pace=QUICK)
    state = blob.look()
    assert state is not None and state.metadata == {"owner": "me"}


@pytest.mark.parametrize("size", [512, 21 * MIB + 512])
def test_what_another_content_left_of_the_name_goes(disk: RawDisk, size: int) -> None:
    blob = MemoryBlob()
    blob.create(size, {"godwit_content": "content-0", "godwit_state": "whole", "godwit_done": str(size)})
    upload(disk, blob, ORDER, pace=QUICK)
    assert_is_the_disk(blob)


def test_what_another_content_left_is_not_removed_while_somebody_is_at_it(disk: RawDisk) -> None:
    blob = MemoryBlob()
    blob.create(512, {"godwit_content": "content-0"})
    blob.acquire(ELSEWHERE, 60)
    with pytest.raises(BlobHeldError):
        upload(disk, blob, ORDER, pace=QUICK)
    assert blob.look() is not None


@pytest.mark.parametrize("verify", ["sampled", "full"])
@pytest.mark.parametrize("fault", ["flipped", "dropped", "elsewhere"])
def test_a_blob_that_does_not_hold_what_was_sent_is_removed(disk: RawDisk, fault: str, verify: Any) -> None:
    class Faulty(MemoryBlob):
        def put(self, lease: str, offset: int, data: bytes) -> None:
            if offset == 3 * MIB and fault == "flipped":
                data = b"\0" + data[1:]
            if offset == 13 * MIB and fault == "dropped":
                return
            super().put(lease, offset, data)
            if offset == 13 * MIB and fault == "elsewhere":
                super().put(lease, 16 * MIB, data)  # where the disk has nothing

    blob = Faulty()
    with pytest.raises(PlatformError, match="is not what was uploaded"):
        upload(disk, blob, replace(ORDER, verify=verify), pace=QUICK)
    assert blob.look() is None


def test_a_mark_that_makes_no_sense_begins_anew(disk: RawDisk) -> None:
    for mark in ("", "-1", "x", "9" * 30, "²"):
        blob = MemoryBlob()
        noted = {"godwit_content": ORDER.content, "godwit_done": mark, "godwit_sent": mark}
        blob.create(blob_size(disk.size), noted)
        upload(disk, blob, ORDER, pace=QUICK)
        assert_is_the_disk(blob)


def test_an_empty_disk_costs_a_handful_of_requests(tmp_path: Path) -> None:
    path = tmp_path / "empty.raw"
    with path.open("wb") as file:
        file.truncate(8 * MIB)
    watched = WatchedBlob(MemoryBlob())
    with RawDisk.open(path) as disk:
        upload(disk, watched, ORDER, pace=QUICK)
    assert watched.calls == ["look", "create", "acquire", "look", "note", "ranges", f"put {8 * MIB}", "note", "release"]


class _Extents:
    """A disk of which nothing but its extents is known."""

    def __init__(self, size: int, extents: list[tuple[int, int]]) -> None:
        self.size = size
        self._extents = extents

    def allocated(self, start: int = 0, end: int | None = None) -> Iterator[Extents]:
        end = self.size if end is None else end
        for first, last in self._extents:
            if max(first, start) < min(last, end):
                yield np.array([[max(first, start), min(last, end)]], np.int64)


@st.composite
def extents(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]], int]:
    size = 512 * draw(st.integers(1, 6 * PIECE_BYTES // 512))
    cuts = sorted(draw(st.sets(st.integers(0, size // 512), max_size=12)))
    pairs = [(512 * first, 512 * last) for first, last in zip(cuts[::2], cuts[1::2], strict=False)]
    start = min(size, GRANULE * draw(st.integers(0, size // GRANULE)))
    return size, pairs, start


@settings(max_examples=200, deadline=None)
@given(extents())
def test_pieces_hold_what_the_disk_holds_each_once_and_within_a_window(
    case: tuple[int, list[tuple[int, int]], int],
) -> None:
    size, held, start = case
    found: list[Piece] = list(pieces(_Extents(size, held), start))  # type: ignore[arg-type]
    for first, last in found:
        assert start <= first < last <= size
        assert first % GRANULE == 0 and (last % GRANULE == 0 or last == size)
        assert first // PIECE_BYTES == (last - 1) // PIECE_BYTES
    assert all(before[1] <= after[0] for before, after in pairwise(found))
    for first, last in held:
        if last > start:
            assert sum(min(last, b) - max(first, a, start) for a, b in found if a < last and b > max(first, start)) == (
                last - max(first, start)
            )


def test_the_sample_is_of_the_whole_with_its_ends_and_the_same_for_the_same_seed() -> None:
    every = [(at, at + 1) for at in range(1000)]
    chosen = sampled(iter(every), 32, seed="a")
    assert chosen[0] == every[0] and chosen[-1] == every[-1] and 32 <= len(chosen) <= 34
    assert chosen == sampled(iter(every), 32, seed="a") != sampled(iter(every), 32, seed="b")
    assert max(one[0] for one in chosen[:-1]) > 800
    assert sampled(iter(every[:5]), 32, seed="a") == every[:5] and sampled(iter([]), 32, seed="a") == []
