"""Files as the operating system gives them: both implementations, locks, names, and errors that say what to do."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vhdx import osfile
from vhdx.errors import DiskBusyError, OsError, OutOfRangeError, ReadOnlyError
from vhdx.osfile import File, PortableFile, link_exclusive, open_file, remove_file, replace_file
from vhdx.temporary import temporary_path

FILES: list[Callable[..., File]] = [PortableFile]
if hasattr(osfile, "PosixFile"):
    FILES.append(osfile.PosixFile)


@pytest.fixture(params=FILES, ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest) -> Callable[..., File]:
    chosen: Callable[..., File] = request.param
    return chosen


def test_what_is_written_is_read_back_and_the_file_grows(tmp_path: Path, kind: Callable[..., File]) -> None:
    file = kind(tmp_path / "a", writable=True, create=True)
    file.pwrite(10, b"hello")
    file.pwrite(0, bytearray(b"0123"))
    file.pwrite(4, memoryview(b"xyzw")[1:3])
    assert file.size() == 15
    assert file.pread(0, 100) == b"0123yz\0\0\0\0hello"
    assert file.pread(10, 3) == b"hel"
    assert file.pread(15, 5) == b""
    assert file.pread(99, 5) == b""
    file.fsync()
    file.close()
    file.close()


def test_reading_into_a_buffer_says_how_much_the_file_had(tmp_path: Path, kind: Callable[..., File]) -> None:
    (tmp_path / "a").write_bytes(b"abcdef")
    file = kind(tmp_path / "a")
    buffer = bytearray(b"........")
    assert file.pread_into(2, memoryview(buffer)[1:4]) == 3
    assert buffer == b".cde...."
    assert file.pread_into(4, memoryview(buffer)) == 2
    assert buffer == b"efde...."
    file.close()


def test_a_call_is_split_where_systems_cap_it(
    tmp_path: Path, kind: Callable[..., File], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(osfile, "LARGEST_CALL_BYTES", 7)
    data = random.Random(1).randbytes(100)
    file = kind(tmp_path / "a", writable=True, create=True)
    file.pwrite(3, data)
    assert file.pread(3, 100) == data
    assert file.pread(3, 1000) == data
    buffer = bytearray(100)
    assert file.pread_into(3, memoryview(buffer)) == 100
    assert buffer == data
    file.close()


def test_truncating_cuts_and_extends_with_zeros(tmp_path: Path, kind: Callable[..., File]) -> None:
    file = kind(tmp_path / "a", writable=True, create=True)
    file.pwrite(0, b"abcdef")
    file.truncate(2)
    file.truncate(5)
    assert file.pread(0, 9) == b"ab\0\0\0"
    file.close()


def test_a_punched_range_reads_as_zeros_and_the_size_stays(tmp_path: Path, kind: Callable[..., File]) -> None:
    file = kind(tmp_path / "a", writable=True, create=True)
    file.pwrite(0, b"x" * 3_000_000)
    file.punch_hole(100, 2_500_000)
    assert file.pread(0, 3_000_000) == b"x" * 100 + bytes(2_500_000) + b"x" * 499_900
    file.punch_hole(2_900_000, 10_000_000)
    assert file.size() == 3_000_000
    assert file.pread(2_900_000, 100_000) == bytes(100_000)
    file.close()


def test_data_extents_miss_nothing_that_is_not_zero(tmp_path: Path, kind: Callable[..., File]) -> None:
    file = kind(tmp_path / "a", writable=True, create=True)
    file.truncate(10 << 20)
    places = (0, 3 << 20, (5 << 20) + 77)
    for place in places:
        file.pwrite(place, b"data")
    for start, end in ((0, 10 << 20), (1, 1 << 40), (3 << 20, 6 << 20), (9 << 20, 10 << 20), (50 << 20, 60 << 20)):
        extents = list(file.data_extents(start, end))
        assert all(start <= low < high <= min(end, 10 << 20) for low, high in extents)
        assert extents == sorted(extents)
        for place in places:
            if start <= place < end:
                assert any(low <= place < high for low, high in extents)
    file.close()


def test_several_threads_read_their_own_places(tmp_path: Path, kind: Callable[..., File]) -> None:
    data = random.Random(2).randbytes(1 << 20)
    (tmp_path / "a").write_bytes(data)
    file = kind(tmp_path / "a")
    wrong: list[int] = []

    def read(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(300):
            offset = chance.randrange(len(data) - 5000)
            if file.pread(offset, 5000) != data[offset : offset + 5000]:
                wrong.append(offset)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    file.close()


def test_a_file_opened_for_reading_refuses_writes(tmp_path: Path, kind: Callable[..., File]) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    file = kind(tmp_path / "a")
    for write in (lambda: file.pwrite(0, b"x"), lambda: file.truncate(0), lambda: file.punch_hole(0, 1)):
        with pytest.raises(ReadOnlyError):
            write()
    file.close()
    assert (tmp_path / "a").read_bytes() == b"abc"


def test_ranges_that_no_file_has_are_refused(tmp_path: Path, kind: Callable[..., File]) -> None:
    file = kind(tmp_path / "a", writable=True, create=True)
    with pytest.raises(OutOfRangeError):
        file.pread(-1, 5)
    with pytest.raises(OutOfRangeError):
        file.pwrite(1 << 63, b"x")
    file.close()


def test_a_closed_file_raises_our_error(tmp_path: Path, kind: Callable[..., File]) -> None:
    file = kind(tmp_path / "a", writable=True, create=True)
    file.close()
    for call in (file.size, file.fsync, lambda: file.pread(0, 1), lambda: file.pwrite(0, b"x")):
        with pytest.raises(OsError):
            call()


def test_a_missing_file_is_named_with_a_hint(tmp_path: Path, kind: Callable[..., File]) -> None:
    with pytest.raises(OsError) as caught:
        kind(tmp_path / "none")
    assert caught.value.path == str(tmp_path / "none")
    assert caught.value.hint
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_creating_refuses_a_file_that_exists(tmp_path: Path, kind: Callable[..., File]) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    with pytest.raises(OsError) as caught:
        kind(tmp_path / "a", writable=True, create=True)
    assert isinstance(caught.value.__cause__, FileExistsError)
    assert (tmp_path / "a").read_bytes() == b"abc"


def test_a_folder_is_no_file(tmp_path: Path, kind: Callable[..., File]) -> None:
    with pytest.raises(OsError):
        kind(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_an_os_error_with_a_hint(kind: Callable[..., File]) -> None:
    file = kind(Path("/dev/full"), writable=True)
    with pytest.raises(OsError) as caught:
        file.pwrite(0, b"x")
    cause = caught.value.__cause__
    assert isinstance(cause, OSError)
    assert cause.errno == errno.ENOSPC
    assert caught.value.hint
    assert "space" in caught.value.hint
    file.close()


def test_only_one_writer_at_a_time_and_readers_beside_it(tmp_path: Path) -> None:
    first = open_file(tmp_path / "a", create=True)
    with pytest.raises(DiskBusyError) as caught:
        open_file(tmp_path / "a", writable=True)
    assert caught.value.retryable
    reader = open_file(tmp_path / "a")
    reader.close()
    first.pwrite(0, b"still locked")
    with pytest.raises(DiskBusyError):
        open_file(tmp_path / "a", writable=True)
    open_file(tmp_path / "a", writable=True, lock=False).close()
    first.close()
    open_file(tmp_path / "a", writable=True).close()


@pytest.fixture
def qemu_io() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Open images in QEMU, which has them until the test is over."""
    program = shutil.which("qemu-io")
    if program is None or sys.platform != "linux":
        pytest.skip("qemu-io is not installed")
    with contextlib.ExitStack() as stack:

        def start(*arguments: str | Path) -> subprocess.Popen[bytes]:
            pipe = subprocess.PIPE
            command = [program, "-f", "raw", *arguments]
            process = subprocess.Popen(command, bufsize=0, stdin=pipe, stdout=pipe, stderr=pipe)
            stack.enter_context(process)
            stack.callback(process.kill)
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(BrokenPipeError):  # it has given up already
                process.stdin.write(b"read 0 512\n")
            process.stdout.read(8)  # it has answered, so it has opened the image, or has given up
            return process

        yield start


def test_a_disk_that_qemu_has_open_is_not_written_to(
    tmp_path: Path, qemu_io: Callable[..., subprocess.Popen[bytes]]
) -> None:
    (tmp_path / "a").write_bytes(bytes(65536))
    machine = qemu_io(tmp_path / "a")
    with pytest.raises(DiskBusyError, match="QEMU") as caught:
        open_file(tmp_path / "a", writable=True)
    assert caught.value.hint
    assert "machine" in caught.value.hint
    open_file(tmp_path / "a").close()
    machine.kill()
    machine.wait()
    open_file(tmp_path / "a", writable=True).close()


def test_a_disk_that_is_being_written_to_is_not_opened_by_qemu(
    tmp_path: Path, qemu_io: Callable[..., subprocess.Popen[bytes]]
) -> None:
    (tmp_path / "a").write_bytes(bytes(65536))
    file = open_file(tmp_path / "a", writable=True)
    (tmp_path / "other").touch()
    open_file(tmp_path / "other", writable=True).close()  # POSIX record locks would not outlive such a close
    open_file(tmp_path / "a").close()
    machine = qemu_io(tmp_path / "a")
    assert machine.stderr is not None
    assert b"lock" in machine.stderr.read()
    assert machine.wait()
    file.close()
    machine = qemu_io(tmp_path / "a")
    assert machine.poll() is None


def test_replacing_takes_the_place_of_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "new").write_bytes(b"new")
    (tmp_path / "old").write_bytes(b"old")
    replace_file(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old").read_bytes() == b"new"
    assert not (tmp_path / "new").exists()
    with pytest.raises(OsError):
        replace_file(tmp_path / "new", tmp_path / "old")


def test_an_exclusive_name_is_given_once(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"1")
    (tmp_path / "two").write_bytes(b"2")
    assert link_exclusive(tmp_path / "one", tmp_path / "name")
    assert not link_exclusive(tmp_path / "two", tmp_path / "name")
    assert (tmp_path / "name").read_bytes() == b"1"
    assert (tmp_path / "two").read_bytes() == b"2"
    assert not (tmp_path / "one").exists()


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP])
def test_an_exclusive_name_without_hard_links_is_given_by_renaming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def no_links(source: object, target: object) -> None:
        raise OSError(number, "no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    (tmp_path / "one").write_bytes(b"1")
    (tmp_path / "two").write_bytes(b"2")
    if osfile._RENAMEAT2 is None:
        pytest.skip("this system cannot rename without replacing")
    assert link_exclusive(tmp_path / "one", tmp_path / "name")
    assert not link_exclusive(tmp_path / "two", tmp_path / "name")
    assert (tmp_path / "name").read_bytes() == b"1"


def test_an_exclusive_name_that_cannot_be_promised_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(source: object, target: object) -> None:
        raise PermissionError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(osfile, "_RENAMEAT2", None)
    (tmp_path / "one").write_bytes(b"1")
    with pytest.raises(OsError):
        link_exclusive(tmp_path / "one", tmp_path / "name")
    assert not (tmp_path / "name").exists()


def test_racing_for_a_name_has_one_winner(tmp_path: Path) -> None:
    for turn in range(20):
        won: list[int] = []
        barrier = threading.Barrier(4)

        def race(number: int, turn: int = turn, won: list[int] = won, barrier: threading.Barrier = barrier) -> None:
            temporary = temporary_path(tmp_path / "name")
            temporary.write_bytes(str(number).encode())
            barrier.wait()
            if link_exclusive(temporary, tmp_path / f"name{turn}"):
                won.append(number)

        threads = [threading.Thread(target=race, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert (tmp_path / f"name{turn}").read_bytes() == str(won[0]).encode()


def test_removing_what_is_not_there_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    remove_file(tmp_path / "a")
    remove_file(tmp_path / "a")
    assert not (tmp_path / "a").exists()
