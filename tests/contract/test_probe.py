"""The probe passes the stores that keep their promises, and says which one a store breaks."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from replica.errors import ObjectMissingError, StoreRefusedError, StoreUnavailableError
from replica.stores.address import open_store
from replica.stores.file import FileStore
from replica.stores.memory import MemoryStore
from replica.stores.probe import probe_store
from replica.stores.store import ObjectData, ObjectInfo, Store
from tests.support.servers import S3Server
from tests.support.store_doubles import Fault, FaultKind, FaultyStore, RecordingStore


def _leftovers(store: Store) -> list[str]:
    return [info.key for info in store.list("")]


def test_the_memory_store_passes_and_is_left_clean() -> None:
    store = RecordingStore(MemoryStore())
    report = probe_store(store)
    assert _leftovers(store) == []
    assert {time.call for time in report.times} >= {
        "create",
        "get",
        "get of a range",
        "head",
        "replace",
        "list",
        "delete",
    }
    assert all(0 <= time.median_seconds <= time.longest_seconds and time.count > 0 for time in report.times)
    assert "create of one object by 8 threads at once" in report.checks
    assert "replace of one object by 8 threads at once" in report.checks
    assert store.counts["create"] < 100


def test_the_file_store_passes_and_is_left_clean(tmp_path: Path) -> None:
    store = FileStore(tmp_path, create=True)
    probe_store(store)
    assert _leftovers(store) == []


@pytest.mark.server
@pytest.mark.xdist_group("seaweedfs")
def test_seaweedfs_passes_and_is_left_clean(seaweedfs: S3Server) -> None:
    store = open_store(seaweedfs.url("probe"))
    probe_store(store, rounds=1)
    assert _leftovers(store) == []


@pytest.mark.server
@pytest.mark.xdist_group("rclone")
def test_rclone_is_refused_because_it_ignores_conditions(rclone_s3: S3Server) -> None:
    store = open_store(rclone_s3.url("probe"))
    with pytest.raises(StoreRefusedError) as caught:
        probe_store(store)
    assert "create of an object that exists: it was not refused" in str(caught.value)
    assert rclone_s3.endpoint in str(caught.value)
    assert "recovery point" in str(caught.value.hint)
    assert "SeaweedFS" in str(caught.value.hint)
    assert _leftovers(store) == []


class CarelessStore(MemoryStore):
    """A store that breaks the promise named by ``flaw``."""

    def __init__(self, flaw: str) -> None:
        super().__init__(flaw)
        self.flaw = flaw

    def create(self, key: str, data: ObjectData) -> str:
        if self.flaw == "create overwrites":
            self.delete(key)
        if self.flaw == "create looks, then writes" and not self._is_there(key):
            time.sleep(0.002)
            self.delete(key)
        return super().create(key, data)

    def replace(self, key: str, data: ObjectData, *, tag: str) -> str:
        if self.flaw == "replace ignores the tag":
            tag = self.head(key).tag
        if self.flaw == "replace creates" and not self._is_there(key):
            return self.create(key, data)
        if self.flaw == "replace looks, then writes" and self.head(key).tag == tag:
            time.sleep(0.002)
            tag = self.head(key).tag
        return super().replace(key, data, tag=tag)

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        if self.flaw == "no ranges":
            start, length = 0, None
        if self.flaw == "negative starts from the first byte":
            start = abs(start)
        return super().get(key, start=start, length=length)

    def get_tagged(self, key: str) -> tuple[bytes, str]:
        data, tag = super().get_tagged(key)
        return data, "constant" if self.flaw == "tags say nothing" else tag

    def delete(self, key: str) -> None:
        if self.flaw != "delete does nothing":
            super().delete(key)

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        found = tuple(super().list(prefix, start_after=start_after))
        if self.flaw == "list is in another order":
            found = tuple(sorted(found, key=lambda info: info.key.split("/")))
        if self.flaw == "list begins too early":
            found = tuple(super().list(prefix))
        if self.flaw == "list is empty":
            found = ()
        return iter(found)

    def _is_there(self, key: str) -> bool:
        try:
            self.head(key)
        except ObjectMissingError:
            return False
        return True


@pytest.mark.parametrize(
    ("flaw", "call"),
    [
        ("create overwrites", "create of an object that exists"),
        ("create looks, then writes", "create of one object by 8 threads at once"),
        ("replace ignores the tag", "replace with an old tag"),
        ("replace creates", "replace of an object that does not exist"),
        ("replace looks, then writes", "replace of one object by 8 threads at once"),
        ("no ranges", "get of the range 0, 16"),
        ("negative starts from the first byte", "get of the range -5"),
        ("tags say nothing", "head"),
        ("delete does nothing", "get after delete"),
        ("list is in another order", "list"),
        ("list begins too early", "list"),
        ("list is empty", "list"),
    ],
)
def test_a_broken_promise_is_named(flaw: str, call: str) -> None:
    with pytest.raises(StoreRefusedError) as caught:
        probe_store(CarelessStore(flaw))
    assert f": {call}" in str(caught.value)
    assert ("were told that they succeeded" in str(caught.value)) == ("at once" in call)
    assert caught.value.hint


def test_a_store_that_does_not_answer_is_not_called_unfit() -> None:
    store = FaultyStore(MemoryStore(), [Fault(FaultKind.ERROR, kinds=("replace",))])
    with pytest.raises(StoreUnavailableError):
        probe_store(store)
    assert _leftovers(store) == []


def test_two_probes_at_once_do_not_disturb_each_other() -> None:
    store = MemoryStore()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            probe_store(store, rounds=1)
        except StoreRefusedError as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
