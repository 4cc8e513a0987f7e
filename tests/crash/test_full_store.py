"""A file store that fills up at any instant of a cycle: one clear error, nothing lost, and it goes on with room."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from replica import history, packer
from replica.errors import StoreError, StoreFullError
from replica.lease import TERM
from replica.model import Point
from replica.stores.address import open_store
from replica.stores.file import FileStore
from replica.stores.store import Store
from replica.verify import verify
from tests.support.engine import BLOCK, WORKERS, FakeClock, Lab, make_host, make_lab, random_blocks
from vhdx.disk import ReadableBuffer
from vhdx.osfile import OS_FILES, File, translated


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packer, "SEGMENT_FRAMES", 3)
    monkeypatch.setattr("replica.scan.BATCH_BLOCKS", 2)


class _FillingFiles:
    """Files on a disk without room from the effect of ordinal ``full_at`` on, for ``effects`` or for good."""

    def __init__(self, full_at: int, effects: int | None) -> None:
        self._full_at = full_at
        self._effects = effects
        self._count = 0
        self.was_full = False

    def take_room(self, path: Path, operation: str) -> None:
        at, self._count = self._count, self._count + 1
        if at >= self._full_at and (self._effects is None or at < self._full_at + self._effects):
            self.was_full = True
            with translated(path, operation):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open(self, path: Path, *, writable: bool = False, create: bool = False, lock: bool = True) -> File:
        if create:
            self.take_room(path, "create")
        file = OS_FILES.open(path, writable=writable, create=create, lock=lock)
        return _FillingFile(file, self) if create else file  # type: ignore[return-value]

    def link_exclusive(self, temporary: Path, target: Path) -> bool:
        self.take_room(target, "create")
        return OS_FILES.link_exclusive(temporary, target)

    def replace(self, source: Path, target: Path) -> None:
        self.take_room(target, "replace")
        OS_FILES.replace(source, target)

    def remove(self, path: Path) -> None:
        OS_FILES.remove(path)


class _FillingFile:
    """A file that is being written; its last bytes may find no room when they are flushed."""

    def __init__(self, file: File, files: _FillingFiles) -> None:
        self._file = file
        self._files = files

    def pwrite(self, offset: int, data: ReadableBuffer) -> None:
        half = memoryview(data).cast("B")[: memoryview(data).nbytes // 2]
        self._file.pwrite(offset, half)
        self._files.take_room(self._file.path, "write")
        self._file.pwrite(offset, data)

    def fsync(self) -> None:
        self._files.take_room(self._file.path, "flush")
        self._file.fsync()

    def close(self) -> None:
        self._file.close()


def _changed_lab(folder: Path, store: Store) -> Lab:
    """Return a VM with one point, changed since."""
    lab = make_lab(folder, [random_blocks(1, 12), random_blocks(2, 3)], store=store, host=make_host(folder / "state"))
    lab.replicate()
    for block in range(1, 9):
        lab.patch(block * BLOCK, random_blocks(100 + block, 1))
    return lab


def _assert_nothing_is_lost(lab: Lab, store: Store) -> None:
    """Check that every point restores: those reported, and at most one that was published without a word."""
    points = [one for one in history.points(store, lab.found.keys) if isinstance(one, Point)]
    assert {one.point for one in points} >= lab.published.keys()
    for point in points:
        for number, held in enumerate(lab.published.get(point.point, lab.contents())):
            assert lab.restore(point, number, host=make_host(name="elsewhere")) == held
    assert not verify(store, make_host(), lab.found, full=True, workers=WORKERS).damaged


@pytest.mark.parametrize("effects", [None, 1], ids=["for good", "once"])
def test_a_store_that_is_full_at_any_write_of_a_cycle(tmp_path: Path, effects: int | None) -> None:
    failed = 0
    for full_at in range(1000):
        folder = tmp_path / str(full_at)
        root = folder / "store"
        lab = _changed_lab(folder, FileStore(root, create=True))
        filling = _FillingFiles(full_at, effects)
        try:
            lab.replicate(store=FileStore(root, files=filling))
        except StoreFullError as error:
            failed += 1
            assert error.hint
            assert error.key
            assert "no space left" in str(error).lower() or "room" in str(error), error
        else:
            if not filling.was_full:
                break
        assert list((root / ".godwit" / "tmp").iterdir()) == []
        _assert_nothing_is_lost(lab, lab.store)
        point = lab.replicate()
        _assert_nothing_is_lost(lab, lab.store)
        assert point.cycle.changed_blocks in (0, 8)
        shutil.rmtree(folder)
    assert failed >= full_at - 2
    assert full_at > 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of its own, small; only an administrator can make one."""
    folder = tmp_path / "small"
    folder.mkdir()
    if shutil.which("mount") is None or _mount(folder, "size=8m,nr_inodes=400").returncode != 0:
        pytest.skip("mounting a tmpfs needs an administrator on Linux")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def _mount(folder: Path, options: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=False, capture_output=True)


def _used(folder: Path) -> tuple[int, int]:
    """Return the bytes and the inodes in use of a file system."""
    if sys.platform == "win32":  # where the fixture skips
        return 0, 0
    used = os.statvfs(folder)
    return (used.f_blocks - used.f_bfree) * used.f_frsize, used.f_files - used.f_ffree


@pytest.mark.parametrize("scarce", ["bytes", "inodes"])
def test_a_file_system_that_fills_up_in_the_middle_of_a_cycle(tmp_path: Path, small_disk: Path, scarce: str) -> None:
    lab = _changed_lab(tmp_path / "vm", open_store(str(small_disk / "store"), create=True))
    assert isinstance(lab.host.clock, FakeClock)
    failed = 0
    for room in range(0, 40):
        used_bytes, used_inodes = _used(small_disk)
        if scarce == "bytes":
            limits = f"remount,size={used_bytes + room * 8 * 4096},nr_inodes=400"
        else:
            limits = f"remount,size=8m,nr_inodes={used_inodes + room}"
        assert _mount(small_disk, limits).returncode == 0
        try:
            lab.replicate(store=open_store(str(small_disk / "store")))
        except StoreError as error:
            assert isinstance(error, StoreFullError), error
            failed += 1
        else:
            break
        assert _mount(small_disk, "remount,size=8m,nr_inodes=400").returncode == 0
        _assert_nothing_is_lost(lab, lab.store)
        lab.host.clock.advance(TERM.total_seconds())
    assert _mount(small_disk, "remount,size=8m,nr_inodes=400").returncode == 0
    assert failed >= 2
    lab.replicate()
    _assert_nothing_is_lost(lab, lab.store)
