"""What every store promises, asked of each of them, bare and with retries around it."""

from __future__ import annotations

import errno
import os
import random
import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from replica.errors import ObjectChangedError, ObjectExistsError, ObjectMissingError, StoreError, UsageError
from replica.stores.address import open_store
from replica.stores.file import FileStore
from replica.stores.memory import MemoryStore
from replica.stores.retry import ResilientStore
from replica.stores.s3 import S3Store
from replica.stores.store import Store
from tests.support.servers import S3Server
from vhdx import osfile

CONTENT = random.Random(1).randbytes(10_000)
LARGE = random.Random(2).randbytes((5 << 20) + 12345)  # above every store's own limits for small objects


def _no_hard_links(*_args: object, **_kwargs: object) -> None:
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


def _bare_store(kind: str, request: pytest.FixtureRequest) -> Store:
    if kind == "memory":
        return MemoryStore("test")
    if kind == "s3":
        server: S3Server = request.getfixturevalue("seaweedfs")
        return S3Store(server.bucket, f"contract/{secrets.token_hex(6)}", endpoint=server.endpoint)
    patch: pytest.MonkeyPatch = request.getfixturevalue("monkeypatch")
    if kind == "file-portable":
        patch.setattr(osfile, "_new_file", osfile.PortableFile)
    elif kind == "file-without-links":
        patch.setattr(os, "link", _no_hard_links)
    tmp_path: Path = request.getfixturevalue("tmp_path")
    return FileStore(tmp_path / "store", create=True)


KINDS = (
    "memory",
    "file",
    "file-portable",
    "file-without-links",
    pytest.param("s3", marks=[pytest.mark.server, pytest.mark.xdist_group("seaweedfs")]),
)


@pytest.fixture(params=KINDS)
def bare(request: pytest.FixtureRequest) -> Iterator[Store]:
    store = _bare_store(request.param, request)
    yield store
    store.close()


@pytest.fixture(params=("bare", "resilient"))
def store(bare: Store, request: pytest.FixtureRequest) -> Store:
    return bare if request.param == "bare" else ResilientStore(bare)


def keys(store: Store, prefix: str = "", start_after: str = "") -> list[str]:
    return [info.key for info in store.list(prefix, start_after=start_after)]


def test_a_created_object_reads_back_with_one_tag_everywhere(store: Store) -> None:
    tag = store.create("vms/a/object", CONTENT)
    assert store.get("vms/a/object") == CONTENT
    assert store.get_tagged("vms/a/object") == (CONTENT, tag)
    info = store.head("vms/a/object")
    assert (info.key, info.size, info.tag) == ("vms/a/object", len(CONTENT), tag)
    assert list(store.list("")) == [info]


def test_create_refuses_an_object_that_exists_and_keeps_it(store: Store) -> None:
    tag = store.create("key", CONTENT)
    for content in (b"other", CONTENT):
        with pytest.raises(ObjectExistsError) as caught:
            store.create("key", content)
        assert caught.value.key == "key"
    assert store.get_tagged("key") == (CONTENT, tag)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda data: memoryview(bytearray(data))[10:]])
def test_any_buffer_is_written(store: Store, kind: Callable[[bytes], bytes]) -> None:
    data = kind(CONTENT)
    tag = store.create("key", data)
    assert store.get("key") == bytes(data)
    store.replace("key", kind(CONTENT[::-1]), tag=tag)
    assert store.get("key") == bytes(kind(CONTENT[::-1]))


def test_an_empty_object_is_an_object(store: Store) -> None:
    tag = store.create("empty", b"")
    assert store.get_tagged("empty") == (b"", tag)
    assert [store.get("empty", start=s, length=n) for s, n in ((0, 10), (-4, None), (5, None), (0, 0))] == [b""] * 4
    assert store.head("empty").size == 0
    assert keys(store) == ["empty"]
    with pytest.raises(ObjectExistsError):
        store.create("empty", b"")


def test_a_range_is_the_slice_of_the_object(store: Store) -> None:
    store.create("key", CONTENT)
    for start in (0, 1, 5000, 9_999, 10_000, 20_000, -1, -300, -10_000, -20_000):
        begin = max(0, len(CONTENT) + start) if start < 0 else start
        for length in (None, 0, 1, 300, 9_999, 20_000):
            expected = CONTENT[begin:] if length is None else CONTENT[begin : begin + length]
            assert store.get("key", start=start, length=length) == expected, (start, length)


@pytest.mark.parametrize(
    "ask",
    [
        lambda s: s.get("no/such"),
        lambda s: s.get("no/such", start=5, length=0),
        lambda s: s.get("no/such", start=5, length=10),
        lambda s: s.get("no/such", start=-5),
        lambda s: s.get_tagged("no/such"),
        lambda s: s.head("no/such"),
        lambda s: s.replace("no/such", b"x", tag="tag"),
        lambda s: s.get("folder"),
        lambda s: s.head("folder"),
        lambda s: s.get("folder/object/below"),
        lambda s: s.head("folder/object/below"),
    ],
)
def test_a_missing_object_is_named(store: Store, ask: Callable[[Store], object]) -> None:
    store.create("folder/object", b"x")
    with pytest.raises(ObjectMissingError) as caught:
        ask(store)
    assert caught.value.key in ("no/such", "folder", "folder/object/below")
    assert keys(store) == ["folder/object"]


@pytest.mark.parametrize("content", [CONTENT, LARGE], ids=["small", "large"])
def test_replace_needs_the_present_tag(store: Store, content: bytes) -> None:
    first = store.create("lease", content)
    second = store.replace("lease", content[::-1], tag=first)
    assert first != second
    for stale in (first, "", "*", "no tag at all", f"{first},{second}"):
        with pytest.raises(ObjectChangedError):
            store.replace("lease", b"stale", tag=stale)
    assert store.get_tagged("lease") == (content[::-1], second)
    third = store.replace("lease", b"third", tag=second)
    assert store.get_tagged("lease") == (b"third", third)
    assert store.head("lease").tag == third


def test_replace_of_a_deleted_object_does_not_bring_it_back(store: Store) -> None:
    tag = store.create("lease", CONTENT)
    store.delete("lease")
    with pytest.raises(ObjectMissingError):
        store.replace("lease", b"again", tag=tag)
    assert keys(store) == []


def test_delete_may_be_repeated_and_the_key_used_again(store: Store) -> None:
    store.create("a/b", b"1")
    for _ in range(2):
        store.delete("a/b")
    store.delete("never/was")
    store.delete("a")
    with pytest.raises(ObjectMissingError):
        store.get("a/b")
    assert keys(store) == []
    store.create("a/b", b"2")
    assert store.get("a/b") == b"2"


def test_a_large_object_travels_whole(store: Store) -> None:
    tag = store.create("segments/1", memoryview(LARGE))
    assert store.get_tagged("segments/1") == (LARGE, tag)
    assert store.get("segments/1", start=-100) == LARGE[-100:]
    assert store.get("segments/1", start=4 << 20, length=100) == LARGE[4 << 20 : (4 << 20) + 100]
    assert next(store.list("segments/")).tag == tag == store.head("segments/1").tag


def test_listings_are_sorted_cut_by_prefix_and_begin_after(store: Store) -> None:
    # '-' and '.' sort before '/', '0' after it: what stores made of folders may get wrong.
    there = sorted(
        ["a-b", "a.b", "a/a", "a/b/c", "a/c-/d", "a/c/d", "a/c0", "a0", "ab", "b", "vms/web-1/p", "vms/web/p", "z/z/z"]
    )
    for key in random.Random(3).sample(there, len(there)):
        store.create(key, key.encode())
    prefixes = ["", "a", "a/", "a/c", "a/c/", "a-", "vms/web", "vms/web/", "z/z/z", "z/z/zz", "nothing", "nothing/at/"]
    afters = ["", "0", "a", "a-b", "a/", "a/a", "a/b", "a/b/c", "a/b/d", "a/c-/d", "a/zzz", "b", "vms/web/p", "zz"]
    for prefix in prefixes:
        for after in afters:
            expected = [key for key in there if key.startswith(prefix) and key > after]
            assert keys(store, prefix, after) == expected, (prefix, after)


def test_a_listing_survives_deletes_while_it_runs(store: Store) -> None:
    for number in range(20):
        store.create(f"point/{number:02}", b"x")
    listing = store.list("point/")
    first = next(listing)
    for number in range(5, 15):
        store.delete(f"point/{number:02}")
    rest = [info.key for info in listing]
    assert first.key == "point/00"
    assert rest == sorted(set(rest))
    assert {f"point/{n:02}" for n in (*range(1, 5), *range(15, 20))} <= set(rest)


@pytest.mark.parametrize(
    "key",
    [
        *("", "/", "/abs", "a//b", "a/", "..", "../up", "a/../b", "a/./b", "a./b", ".godwit/marker", "C:/x"),
        *("a\\b", "a\0b", "a\nb", "ключ", "x" * 300, "/".join(["x" * 200] * 6)),
    ],
)
def test_a_bad_key_reaches_no_object(store: Store, key: str) -> None:
    asks: list[Callable[[], object]] = [
        lambda: store.get(key),
        lambda: store.get_tagged(key),
        lambda: store.head(key),
        lambda: store.create(key, b"x"),
        lambda: store.replace(key, b"x", tag="t"),
        lambda: store.delete(key),
    ]
    for ask in asks:
        with pytest.raises(UsageError):
            ask()
    assert keys(store) == []


@pytest.mark.parametrize("prefix", ["/", "a//", "../", "a/../", "a\\", "\0"])
def test_a_bad_prefix_is_refused(store: Store, prefix: str) -> None:
    with pytest.raises(UsageError):
        list(store.list(prefix))


def _together(count: int, act: Callable[[int], object]) -> list[object]:
    """Do ``act`` in ``count`` threads at once; return each one's result or StoreError."""
    barrier = threading.Barrier(count)

    def run(number: int) -> object:
        barrier.wait()
        try:
            return act(number)
        except StoreError as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def _rounds(store: Store) -> int:
    # SeaweedFS has the losers of a race wait for seconds.
    bare = store.inner if isinstance(store, ResilientStore) else store
    return 1 if isinstance(bare, S3Store) else 5


@pytest.mark.parametrize("content", [b"", LARGE], ids=["small", "large"])
def test_of_many_creators_one_wins(store: Store, content: bytes) -> None:
    for attempt in range(_rounds(store)):
        key = f"race/{attempt}"
        results = _together(6, lambda n, key=key: store.create(key, b"%d" % n + content))  # type: ignore[misc]
        won = [n for n, result in enumerate(results) if not isinstance(result, StoreError)]
        assert len(won) == 1
        assert all(isinstance(result, ObjectExistsError) for n, result in enumerate(results) if n != won[0])
        assert store.get(key) == b"%d" % won[0] + content


@pytest.mark.parametrize("content", [b"", LARGE], ids=["small", "large"])
def test_of_many_swappers_one_wins(store: Store, content: bytes) -> None:
    tag = store.create("lease", b"before")
    for attempt in range(_rounds(store)):
        results = _together(
            6,
            lambda n, tag=tag, attempt=attempt: store.replace("lease", b"%d %d" % (attempt, n) + content, tag=tag),  # type: ignore[misc]
        )
        won = [n for n, result in enumerate(results) if not isinstance(result, StoreError)]
        assert len(won) == 1
        assert all(isinstance(result, ObjectChangedError) for n, result in enumerate(results) if n != won[0])
        data, tag = store.get_tagged("lease")
        assert data == b"%d %d" % (attempt, won[0]) + content
        assert tag == results[won[0]]


def test_a_swap_loop_of_many_threads_loses_no_update(store: Store) -> None:
    store.create("counter", b"0")

    def add(_number: int) -> None:
        done = 0
        while done < 5:
            data, tag = store.get_tagged("counter")
            try:
                store.replace("counter", b"%d" % (int(data) + 1), tag=tag)
                done += 1
            except ObjectChangedError:
                continue

    assert _together(4, add) == [None] * 4
    assert store.get("counter") == b"20"


def test_one_store_serves_many_threads(store: Store) -> None:
    def work(number: int) -> bool:
        data = CONTENT[number:]
        tag = store.create(f"thread/{number}/object", data)
        return (
            store.get_tagged(f"thread/{number}/object") == (data, tag)
            and store.get(f"thread/{number}/object", start=7, length=9) == (data[7:16])
        )

    assert _together(8, work) == [True] * 8
    assert len(keys(store, "thread/")) == 8


def test_the_url_opens_the_same_store(bare: Store) -> None:
    if isinstance(bare, MemoryStore):
        pytest.skip("a memory store has no address of its own")
    url = bare.url
    if isinstance(bare, S3Store):
        assert "secret" not in url
        url += f"?endpoint={bare._client.meta.endpoint_url}"
    bare.create("key", CONTENT)
    assert open_store(url).get("key") == CONTENT
