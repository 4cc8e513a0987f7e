"""The file store's own promises: its folder, its tags, its locks, and what the system's errors become."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from replica.errors import (
    NoStoreError,
    ObjectChangedError,
    ObjectExistsError,
    StoreError,
    StoreFullError,
    StoreRefusedError,
    StoreUnavailableError,
)
from replica.stores import file as file_module
from replica.stores.file import DIGEST_LIMIT_BYTES, FileStore
from replica.stores.store import ObjectInfo

LARGE = bytes(range(256)) * (DIGEST_LIMIT_BYTES // 256 + 1)


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store", create=True)


def _files_below(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def _states_below(root: Path) -> dict[Path, tuple[int, int, int, int]]:
    """Return what a change would change; not the time of the last access, which looking changes."""
    found = {path: path.stat() for path in root.rglob("*")}
    return {path: (one.st_ino, one.st_mode, one.st_size, one.st_mtime_ns) for path, one in found.items()}


def test_making_a_store_again_changes_nothing(tmp_path: Path, store: FileStore) -> None:
    store.create("key", b"x")
    before = _states_below(tmp_path)
    FileStore(tmp_path / "store", create=True)
    assert _states_below(tmp_path) == before


def test_objects_are_plain_files_under_their_keys(tmp_path: Path, store: FileStore) -> None:
    store.create("vms/a/segment", LARGE)
    assert (tmp_path / "store" / "vms" / "a" / "segment").read_bytes() == LARGE


def test_files_put_there_by_others_are_objects(tmp_path: Path, store: FileStore) -> None:
    place = tmp_path / "store" / "copied"
    place.mkdir()
    (place / "small").write_bytes(b"x")
    (place / "large").write_bytes(LARGE)
    for key, content in (("copied/small", b"x"), ("copied/large", LARGE)):
        data, tag = store.get_tagged(key)
        assert data == content
        store.replace(key, b"new", tag=tag)
        assert store.get(key) == b"new"


def test_a_copy_without_empty_files_and_folders_works(tmp_path: Path, store: FileStore) -> None:
    tag = store.create("key", b"x")
    for path in sorted((tmp_path / "store" / ".godwit").iterdir()):
        if path.is_dir():
            path.rmdir()
        elif path.stat().st_size == 0:
            path.unlink()
    copy = FileStore(tmp_path / "store")
    copy.create("new", b"y")
    copy.replace("key", b"z", tag=tag)
    copy.delete("new")
    assert [info.key for info in copy.list("")] == ["key"]


def test_what_can_be_no_object_is_not_listed(tmp_path: Path, store: FileStore) -> None:
    root = tmp_path / "store"
    store.create("real", b"x")
    (root / "empty folder").mkdir()
    (root / "not ascii ü").write_bytes(b"x")
    (root / "back\\slash").write_bytes(b"x")
    (root / "link").symlink_to(root / "real")
    (root / "loop").symlink_to(root)
    (root / ".godwit" / "tmp" / "left behind").write_bytes(b"x")
    assert [info.key for info in store.list("")] == ["real"]
    assert list(store.list(".godwit")) == []


def test_an_object_and_a_folder_cannot_share_a_name(store: FileStore) -> None:
    store.create("a/b", b"x")
    with pytest.raises(StoreError, match="a folder of that name") as caught:
        store.create("a", b"x")
    assert not isinstance(caught.value, ObjectExistsError)
    with pytest.raises(StoreError):
        store.create("a/b/c", b"x")
    with pytest.raises(StoreError):
        store.create("a/b/c/d", b"x")
    assert [info.key for info in store.list("")] == ["a/b"]


def test_tags_of_large_objects_differ_though_the_clock_stands_or_goes_back(tmp_path: Path) -> None:
    for now_ns in (1_700_000_000_000_000_000, 0):
        store = FileStore(tmp_path, create=True, clock_ns=lambda now_ns=now_ns: now_ns)  # type: ignore[misc]
        key = f"large/{now_ns}"
        tags = [store.create(key, LARGE)]
        for number in range(5):
            tags.append(store.replace(key, LARGE[number:] + LARGE[:number], tag=tags[-1]))
            assert store.head(key) == ObjectInfo(key, len(LARGE), tags[-1])
        assert len(set(tags)) == len(tags)


def test_an_emptied_folder_may_vanish_between_two_creates(tmp_path: Path, store: FileStore) -> None:
    store.create("vms/a/one", b"1")
    store.delete("vms/a/one")
    shutil.rmtree(tmp_path / "store" / "vms")
    store.create("vms/a/two", b"2")
    assert store.get("vms/a/two") == b"2"


def test_a_create_flushes_the_file_once_and_its_folder_once(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.create("vms/a/first", b"x")
    flushed: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(Path(f"/proc/self/fd/{fd}").readlink().name))
    store.create("vms/a/second", LARGE)
    assert len(flushed) == 2
    assert flushed[1] == "a"


def test_new_folders_are_flushed_into_their_parents(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(Path(f"/proc/self/fd/{fd}").readlink().name))
    store.create("vms/a/points/1", b"x")
    assert {"store", "vms", "a", "points"} <= set(flushed)
    flushed.clear()
    # Another process that finds the folders made cannot know whether they were flushed.
    FileStore(Path(store.url.removeprefix("file://"))).create("vms/a/points/2", b"x")
    assert {"store", "vms", "a", "points"} <= set(flushed)


def test_temporaries_left_by_a_crash_are_removed_after_a_day(tmp_path: Path, store: FileStore) -> None:
    temporaries = tmp_path / "store" / ".godwit" / "tmp"
    (temporaries / "old").write_bytes(b"x")
    (temporaries / "new").write_bytes(b"x")
    long_ago = time.time() - 2 * 24 * 3600
    os.utime(temporaries / "old", (long_ago, long_ago))
    FileStore(tmp_path / "store").create("key", b"x")
    assert [path.name for path in temporaries.iterdir()] == ["new"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_store_is_told_and_shows_nothing_half_written(
    tmp_path: Path, store: FileStore, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    tag = store.create("lease", b"old")
    before = _files_below(tmp_path)
    real = os.pwrite

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        if offset >= 1000:
            raise OSError(number, os.strerror(number))
        return real(descriptor, data[:1000], offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(StoreFullError) as caught:
        store.create("vms/new", LARGE)
    assert caught.value.hint
    assert caught.value.key == "vms/new"
    with pytest.raises(StoreFullError):
        store.replace("lease", LARGE, tag=tag)
    monkeypatch.undo()
    assert _files_below(tmp_path) == before
    assert store.get_tagged("lease") == (b"old", tag)
    store.create("vms/new", LARGE)


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.EACCES, StoreRefusedError),
        (errno.EROFS, StoreRefusedError),
        (errno.ESTALE, StoreUnavailableError),
        (errno.EIO, StoreError),
    ],
)
def test_errors_of_the_system_become_the_stores(
    store: FileStore, monkeypatch: pytest.MonkeyPatch, number: int, expected: type[StoreError]
) -> None:
    store.create("key", b"x")
    real = os.open

    def failing(path: str, *args: int, **kwargs: int) -> int:
        if "key" in str(path) or "tmp" in str(path):
            raise OSError(number, os.strerror(number))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", failing)
    for ask in (lambda: store.get("key"), lambda: store.create("other", b"x")):
        with pytest.raises(StoreError) as caught:
            ask()
        assert type(caught.value) is expected
        assert os.strerror(number) in str(caught.value)
        assert caught.value.hint or number == errno.ESTALE


def test_a_store_that_vanished_is_not_an_empty_one(tmp_path: Path, store: FileStore) -> None:
    tag = store.create("vms/key", b"x")
    # An unmounted file system leaves its empty mount point behind.
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    (tmp_path / "store").mkdir()
    for ask in (
        lambda: store.get("vms/key"),
        lambda: store.get_tagged("vms/key"),
        lambda: store.head("vms/key"),
        lambda: list(store.list("")),
        lambda: list(store.list("vms/")),
        lambda: store.create("vms/new", b"x"),
        lambda: store.replace("vms/key", b"x", tag=tag),
        lambda: store.delete("vms/key"),
    ):
        with pytest.raises(StoreUnavailableError) as caught:
            ask()
        assert "mount" in str(caught.value.hint)
    assert list((tmp_path / "store").iterdir()) == []
    with pytest.raises(NoStoreError):
        FileStore(tmp_path / "store")
    (tmp_path / "store").rmdir()
    (tmp_path / "elsewhere").rename(tmp_path / "store")
    assert store.get_tagged("vms/key") == (b"x", tag)


def test_a_listing_tells_when_the_store_vanishes_under_it(tmp_path: Path, store: FileStore) -> None:
    for folder in "abc":
        store.create(f"{folder}/key", b"x")
    listing = store.list("")
    assert next(listing).key == "a/key"
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    with pytest.raises(StoreUnavailableError):
        list(listing)


HOLDER = """
import sys
from pathlib import Path
from replica.stores.file import FileStore
with FileStore(sys.argv[1])._locked("lease"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_replace_waits_for_another_process_for_a_bounded_time(
    tmp_path: Path, store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    tag = store.create("lease", b"free")
    monkeypatch.setattr(file_module, "LOCK_LIMIT_SECONDS", 0.05)
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "store")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StoreUnavailableError, match="was held by another process"):
            store.replace("lease", b"taken", tag=tag)
        holder.communicate()
    store.replace("lease", b"taken", tag=tag)


SWAPPER = """
import sys
from replica.errors import ObjectChangedError
from replica.stores.file import FileStore
store = FileStore(sys.argv[1])
done = 0
while done < 40:
    data, tag = store.get_tagged("counter")
    try:
        store.replace("counter", b"%d" % (int(data) + 1), tag=tag)
    except ObjectChangedError:
        continue
    done += 1
"""


def test_swaps_of_several_processes_lose_no_update(tmp_path: Path, store: FileStore) -> None:
    store.create("counter", b"0")
    command = [sys.executable, "-c", SWAPPER, str(tmp_path / "store")]
    swappers = [subprocess.Popen(command) for _ in range(3)]
    assert [swapper.wait() for swapper in swappers] == [0, 0, 0]
    assert store.get("counter") == b"120"


def test_creates_of_several_processes_have_one_winner(tmp_path: Path, store: FileStore) -> None:
    code = (
        "import sys; from replica.stores.file import FileStore; from replica.errors import ObjectExistsError\n"
        "store = FileStore(sys.argv[1]); won = 0\n"
        "for n in range(60):\n"
        "    try: store.create(f'race/{n}', sys.argv[2].encode()); won += 1\n"
        "    except ObjectExistsError: pass\n"
        "print(won)"
    )
    racers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "store"), name], stdout=subprocess.PIPE, text=True)
        for name in "abc"
    ]
    won = {name: int(racer.communicate()[0]) for name, racer in zip("abc", racers, strict=True)}
    assert sum(won.values()) == 60
    contents = [store.get(f"race/{n}").decode() for n in range(60)]
    assert {name: contents.count(name) for name in "abc"} == won


def test_a_stale_replace_writes_nothing(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.create("lease", b"x")
    monkeypatch.setattr(os, "pwrite", lambda *_: pytest.fail("it was written"))
    with pytest.raises(ObjectChangedError):
        store.replace("lease", b"y", tag="stale")
    with pytest.raises(ObjectExistsError):
        store.create("lease", b"y")
