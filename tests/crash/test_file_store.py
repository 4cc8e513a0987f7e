"""A crash at any instant leaves each object of a file store whole, as it was before or as it is after, or absent."""

from __future__ import annotations

import contextlib
import hashlib
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from replica.errors import ObjectExistsError, ObjectMissingError, StoreError
from replica.stores.file import DIGEST_LIMIT_BYTES, FileStore
from tests.support.crash_files import CrashPoint, RecordingFiles, SparseBytes, crash_points, scratch_folder

OLD = random.Random(1).randbytes(3000)
SMALL = random.Random(2).randbytes(5000)
LARGE = random.Random(3).randbytes(DIGEST_LIMIT_BYTES + 5000)
CONTENTS = pytest.mark.parametrize("content", [b"", SMALL, LARGE], ids=["empty", "small", "large"])


@pytest.fixture
def folder() -> Iterator[Path]:
    with scratch_folder() as scratch:
        yield scratch


def _prepared(root: Path) -> None:
    FileStore(root, create=True).create("vms/old", OLD)


def _recording(root: Path, *, fail_at: int = -1, applied: bool = False) -> RecordingFiles:
    """Return a recorder that knows every file below ``root``."""
    files = RecordingFiles(root, fail_at=fail_at, applied=applied)
    for number, path in enumerate(sorted(path for path in root.rglob("*") if path.is_file()), start=1_000_000):
        files.inodes[path] = files.base_names[path] = number
        files.base[number] = SparseBytes.of(path)
    return files


def _rebuilt(point: CrashPoint, recorded: Path, target: Path) -> FileStore:
    """Return a store on what the crash left, with every folder that any of its files was in."""
    shutil.rmtree(target, ignore_errors=True)
    (target / ".godwit" / "tmp").mkdir(parents=True)
    for path, content in point.files.items():
        place = target / path.relative_to(recorded)
        place.parent.mkdir(parents=True, exist_ok=True)
        content.write_to(place)
    return FileStore(target)


def _content(store: FileStore, key: str) -> bytes | None:
    try:
        return store.get(key)
    except ObjectMissingError:
        return None


@CONTENTS
def test_a_crash_during_create_leaves_the_object_whole_or_absent(folder: Path, content: bytes) -> None:
    root = folder / "store"
    _prepared(root)
    files = _recording(root)
    FileStore(root, files=files).create("vms/new/object", content)
    files.mark("created")
    outcomes = set()
    for point in crash_points(files):
        store = _rebuilt(point, root, folder / "after")
        found = _content(store, "vms/new/object")
        assert found in (None, content), point
        if point.marks:
            assert found == content, point
        assert store.get("vms/old") == OLD
        listed = [info.key for info in store.list("")]
        assert listed == (["vms/new/object"] if found is not None else []) + ["vms/old"], point
        with contextlib.nullcontext() if found is None else pytest.raises(ObjectExistsError):
            store.create("vms/new/object", content)
        assert store.get("vms/new/object") == content
        outcomes.add(found is None)
    assert outcomes == {True, False}


@CONTENTS
def test_a_crash_during_replace_leaves_the_old_or_the_new_object(folder: Path, content: bytes) -> None:
    root = folder / "store"
    _prepared(root)
    files = _recording(root)
    recorded = FileStore(root, files=files)
    recorded.replace("vms/old", content, tag=recorded.head("vms/old").tag)
    files.mark("replaced")
    outcomes = set()
    for point in crash_points(files):
        store = _rebuilt(point, root, folder / "after")
        found, tag = store.get_tagged("vms/old")
        assert found in (OLD, content), point
        if point.marks:
            assert found == content, point
        store.replace("vms/old", b"after the crash", tag=tag)
        assert store.get("vms/old") == b"after the crash"
        outcomes.add(found)
    assert outcomes == {OLD, content}


def test_a_crash_during_delete_leaves_the_object_or_nothing(folder: Path) -> None:
    root = folder / "store"
    _prepared(root)
    files = _recording(root)
    FileStore(root, files=files).delete("vms/old")
    files.mark("deleted")
    for point in crash_points(files):
        found = _content(_rebuilt(point, root, folder / "after"), "vms/old")
        assert found is None or (found == OLD and not point.marks), point


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize(
    "act",
    [
        lambda store: store.create("vms/new", LARGE),
        lambda store: store.replace("vms/old", LARGE, tag=store.head("vms/old").tag),
        lambda store: store.delete("vms/old"),
    ],
    ids=["create", "replace", "delete"],
)
def test_a_failing_call_leaves_each_object_whole(
    folder: Path, act: Callable[[FileStore], object], applied: bool
) -> None:
    for fail_at in range(20):
        root = folder / str(fail_at)
        _prepared(root)
        files = _recording(root, fail_at=fail_at, applied=applied)
        store = FileStore(root, files=files)
        try:
            act(store)
        except StoreError:
            pass
        else:
            assert fail_at > 0
            return  # past the last effect
        again = FileStore(root)
        assert _content(again, "vms/old") in (None, OLD, LARGE)
        assert _content(again, "vms/new") in (None, LARGE)
        assert list((root / ".godwit" / "tmp").iterdir()) == []
        again.delete("vms/new")
        again.create("vms/new", SMALL)
        assert again.get("vms/new") == SMALL
    pytest.fail("no call went through")


WRITER = """
import hashlib, itertools, os, sys
from replica.stores.file import FileStore
store = FileStore(sys.argv[1])
tag = store.head("lease").tag
print("ready", flush=True)
for number in itertools.count():
    body = os.urandom(number * 7919 % 300_000)
    content = hashlib.sha256(body).digest() + body
    key = f"run/{sys.argv[2]}/{number:06}"
    store.create(key, content)
    tag = store.replace("lease", content[:40], tag=tag)
    print(key, flush=True)
"""


def test_a_killed_writer_leaves_only_whole_objects(tmp_path: Path) -> None:
    store = FileStore(tmp_path, create=True)
    store.create("lease", b"free")
    chance = random.Random(7)
    reported = []
    for run in range(5):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(run)], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
            for _ in range(chance.randrange(1, 30)):
                reported.append(writer.stdout.readline().strip())  # noqa: PERF401 - read as it is written
            writer.kill()
    there = {info.key for info in store.list("")}
    assert set(reported) <= there
    for key in there - {"lease"}:
        content = store.get(key)
        assert hashlib.sha256(content[32:]).digest() == content[:32], key
    store.replace("lease", b"taken", tag=store.head("lease").tag)  # no lock outlives its process
