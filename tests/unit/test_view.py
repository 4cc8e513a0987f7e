"""A recovery point's disk as it is read from the store: right at every offset, checked, in bounded memory."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import numpy as np
import pytest

from replica import catalog
from replica.blockcache import BlockCache
from replica.errors import IntegrityError
from replica.stores.memory import MemoryStore
from replica.view import PointView
from tests.support.engine import BLOCK, WORKERS, Lab, make_lab, random_blocks
from tests.support.store_doubles import RecordingStore
from vhdx.convert import convert_disk
from vhdx.errors import OutOfRangeError, ReadOnlyError

SIZE = 40 * BLOCK - 1024  # the last block is short


def _content() -> bytes:
    data = random_blocks(1, 12) + bytes(9 * BLOCK) + random_blocks(2, 12) + bytes(5 * BLOCK) + random_blocks(3, 2)
    return data[:SIZE]


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    made = make_lab(tmp_path, [_content()], store=MemoryStore("lab"))
    made.replicate()
    made.patch(5 * BLOCK + 100, b"changed" * 1000)
    made.patch(20 * BLOCK, bytes(BLOCK))
    made.replicate()
    return made


def _view(
    lab: Lab, point: int | None = None, *, store: RecordingStore | None = None, memory: int = 1 << 20
) -> PointView:
    chosen = catalog.newest_point(lab.store, lab.found)
    if point is not None:
        from replica import history  # noqa: PLC0415

        chosen = history.point(lab.store, lab.found.keys, point)
    cache = BlockCache(memory_bytes=memory)
    return PointView(store or lab.store, lab.host, lab.found, chosen, chosen.disks[0], cache=cache, workers=WORKERS)


@pytest.mark.parametrize("memory", [BLOCK, 4 * BLOCK, 1 << 30])
def test_every_range_reads_as_the_disk_was(lab: Lab, memory: int) -> None:
    held = lab.contents()[0]
    drawn = random.Random(4)
    with _view(lab, memory=memory) as view:
        assert view.size == SIZE
        assert view.read_at(0, SIZE) == held
        for _ in range(200):
            start = drawn.randrange(SIZE)
            length = min(SIZE - start, drawn.choice([0, 1, 512, 4096, BLOCK, 3 * BLOCK + 7]))
            assert view.read_at(start, length) == held[start : start + length]


def test_an_older_point_reads_as_it_was(lab: Lab) -> None:
    with _view(lab, 1) as view:
        assert view.read_at(0, SIZE) == lab.published[1][0]


def test_threads_that_read_at_once_all_read_right(lab: Lab) -> None:
    held = lab.contents()[0]
    wrong: list[int] = []
    with _view(lab, memory=6 * BLOCK) as view:

        def read(seed: int) -> None:
            drawn = random.Random(seed)
            for _ in range(60):
                start = drawn.randrange(SIZE - 9000)
                if view.read_at(start, 9000) != held[start : start + 9000]:
                    wrong.append(start)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_what_was_read_is_not_fetched_again(lab: Lab) -> None:
    store = RecordingStore(lab.store)
    with _view(lab, store=store, memory=1 << 30) as view:
        view.read_at(0, SIZE)
        before = len(store.requests)
        view.read_at(0, SIZE)
        assert len(store.requests) == before


def test_allocated_tells_what_holds_data(lab: Lab) -> None:
    held = np.zeros(40, bool)
    with _view(lab) as view:
        for extents in view.allocated():
            for start, end in extents.tolist():
                held[start // BLOCK : -(-end // BLOCK)] = True
        clipped = np.concatenate(list(view.allocated(BLOCK + 10, 2 * BLOCK + 5)))
    expected = [any(lab.contents()[0][n * BLOCK : (n + 1) * BLOCK]) for n in range(40)]
    assert held.tolist() == expected
    assert clipped.tolist() == [[BLOCK + 10, 2 * BLOCK + 5]]


def test_a_view_converts_to_a_file_as_any_disk_does(lab: Lab, tmp_path: Path) -> None:
    with _view(lab) as view:
        convert_disk(view, tmp_path / "out.raw", format="raw", verify=True)
    assert (tmp_path / "out.raw").read_bytes() == lab.contents()[0]


def test_damage_is_never_handed_out(lab: Lab) -> None:
    key = next(info.key for info in lab.store.list("") if "/segments/" in info.key)
    data = bytearray(lab.store.get(key))
    data[200] ^= 1
    lab.store.delete(key)
    lab.store.create(key, bytes(data))
    with _view(lab, 1) as view, pytest.raises(IntegrityError, match="damaged"):
        view.read_at(0, SIZE)


def test_it_takes_no_writes_and_has_an_end(lab: Lab) -> None:
    with _view(lab) as view:
        with pytest.raises(ReadOnlyError):
            view.write_at(0, b"x")
        with pytest.raises(ReadOnlyError):
            view.trim(0, 512)
        for offset, length in ((-1, 1), (SIZE, 1), (0, SIZE + 1), (0, -1)):
            with pytest.raises(OutOfRangeError):
                view.read_at(offset, length)


def _block(number: int) -> bytes:
    return number.to_bytes(4, "big") * (BLOCK // 4)


def test_the_cache_forgets_the_oldest_first() -> None:
    cache = BlockCache(memory_bytes=3 * BLOCK)
    for number in range(3):
        cache.put(number, _block(number))
    assert cache.get(0) == _block(0)
    cache.put(3, _block(3))
    assert [number for number in range(4) if cache.get(number) is not None] == [0, 2, 3]


def test_what_leaves_memory_comes_back_from_the_file(tmp_path: Path) -> None:
    cache = BlockCache(memory_bytes=2 * BLOCK, disk_bytes=4 * BLOCK, folder=tmp_path)
    for number in range(10):
        cache.put(number, _block(number))
    found = [number for number in range(10) if cache.get(number) == _block(number)]
    assert found == [4, 5, 6, 7, 8, 9]
    assert list(tmp_path.iterdir()) == []
    cache.close()


def test_a_block_that_went_bad_in_the_file_is_forgotten(tmp_path: Path) -> None:
    cache = BlockCache(memory_bytes=BLOCK, disk_bytes=4 * BLOCK, folder=tmp_path)
    cache.put(1, _block(1))
    cache.put(2, _block(2))
    assert cache._file is not None
    cache._file.seek(100)
    cache._file.write(b"\xff")
    assert cache.get(1) is None
    assert cache.get(2) == _block(2)
    cache.close()
