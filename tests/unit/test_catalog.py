"""What a store holds: names, records and settings, created once, found again, refused when damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from replica import catalog, keys, lease, record
from replica.errors import (
    GodwitError,
    IntegrityError,
    LeaseHeldError,
    NoStoreError,
    StoreUnavailableError,
    UsageError,
)
from replica.host import Host, this_host
from replica.keys import VmKeys
from replica.model import Machine, Nic, Settings, SourceDisk
from replica.stores.memory import MemoryStore
from tests.support.engine import START, Lab, make_host, make_lab, random_blocks
from tests.support.store_doubles import CrashingStore, CrashMode, RecordingStore, SimulatedCrash

MACHINE = Machine(2, 4, 1 << 30, (Nic("00:15:5d:00:00:01", None),), True)
SOURCES = (SourceDisk(0, "os", "/vm/os.vhdx"), SourceDisk(3, "data", "/vm/data.vhdx", "ide"))


@pytest.fixture
def host() -> Host:
    return make_host()


@pytest.fixture
def store(host: Host) -> MemoryStore:
    made = MemoryStore("catalog")
    catalog.init_store(made, host)
    return made


def protect(store: Any, host: Host, name: str = "web", tenant: str = "default") -> catalog.ProtectedVm:
    return catalog.protect(
        store,
        host,
        tenant=tenant,
        name=name,
        machine=MACHINE,
        sources=SOURCES,
        interval_seconds=60,
        compression_level=3,
    )


def overwrite(store: MemoryStore, key: str, data: bytes) -> None:
    store.delete(key)
    store.create(key, data)


def body_of(store: MemoryStore, key: str) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(store.get(key))["body"]
    return body


def test_making_a_store_twice_keeps_the_first(host: Host) -> None:
    store = MemoryStore()
    made, is_new = catalog.init_store(store, host)
    again, is_new_again = catalog.init_store(store, make_host(name="other"))
    assert (is_new, is_new_again) == (True, False)
    assert made == again
    assert made.created_at == START


def test_an_address_without_a_store_says_how_to_make_one() -> None:
    with pytest.raises(NoStoreError) as caught:
        catalog.read_store(MemoryStore("nothing"))
    assert caught.value.exit_code == 10
    assert "godwit init memory:nothing" in (caught.value.hint or "")


def test_a_protected_vm_is_found_by_its_name_with_its_settings(store: MemoryStore, host: Host) -> None:
    made = protect(store, host, "größe/1 ..")
    found = catalog.find(store, "default", "größe/1 ..")
    assert found == made
    assert found.vm.created_at == START
    expected = Settings(1, MACHINE, SOURCES, 4, 60, 3)
    assert catalog.settings_in_force(store, found) == expected
    assert list(catalog.names(store, "default")) == ["größe/1 .."]


def test_a_name_is_given_once_in_a_tenant(store: MemoryStore, host: Host) -> None:
    made = protect(store, host)
    before = {info.key: info.tag for info in store.list("")}
    with pytest.raises(UsageError, match="protected already"):
        protect(store, host)
    assert {info.key: info.tag for info in store.list("")} == before
    other = protect(store, host, tenant="acme")
    assert other.vm.vm_id != made.vm.vm_id
    assert catalog.find(store, "default", "web") == made
    with pytest.raises(UsageError, match="no VM named"):
        catalog.find(store, "third", "web")


def test_losing_the_race_for_a_name_leaves_nothing_behind(store: MemoryStore, host: Host) -> None:
    class Racing(MemoryStore):
        def head(self, key: str) -> Any:
            try:
                return store.head(key)
            finally:
                if "/names/" in key:
                    protect(store, make_host(name="faster"))

        def create(self, key: str, data: Any) -> str:
            return store.create(key, data)

        def delete(self, key: str) -> None:
            store.delete(key)

    with pytest.raises(UsageError, match="protected already"):
        protect(Racing(), host)
    winner = catalog.find(store, "default", "web")
    assert all(winner.vm.vm_id in info.key for info in store.list("tenants/default/vms/"))


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("mode", [CrashMode.BEFORE, CrashMode.AFTER])
def test_a_vm_that_was_half_protected_does_not_exist_and_can_be_protected(
    store: MemoryStore, host: Host, at: int, mode: CrashMode
) -> None:
    with pytest.raises(SimulatedCrash):
        protect(CrashingStore(store, at=at, mode=mode), host)
    exists = at == 3 and mode is CrashMode.AFTER
    assert list(catalog.names(store, "default")) == (["web"] if exists else [])
    if not exists:
        protect(store, host)
    assert catalog.settings_in_force(store, catalog.find(store, "default", "web")).interval_seconds == 60


def test_new_settings_are_a_new_version_and_the_old_one_stays(store: MemoryStore, host: Host) -> None:
    found = protect(store, host)
    sources = (SOURCES[0], SourceDisk(9, "new", "/vm/new.vhdx"))
    after = catalog.update_settings(store, host, found, sources=sources, interval_seconds=120)
    assert (after.version, after.sources, after.interval_seconds) == (2, sources, 120)
    assert (after.next_disk_number, after.compression_level, after.machine) == (10, 3, MACHINE)
    assert catalog.settings_in_force(store, found) == after
    assert catalog.read_settings(store, found.keys, 1).interval_seconds == 60
    fewer = catalog.update_settings(store, host, found, sources=SOURCES[:1], compression_level=0)
    assert (fewer.next_disk_number, fewer.compression_level) == (10, 0)


def test_a_version_left_by_a_crash_is_stepped_over(store: MemoryStore, host: Host) -> None:
    found = protect(store, host)
    recording = RecordingStore(store)
    with pytest.raises(SimulatedCrash):
        catalog.update_settings(CrashingStore(recording, at=1, mode=CrashMode.AFTER), host, found, interval_seconds=90)
    assert recording.writes[-1].key == found.keys.settings(2)
    assert catalog.settings_in_force(store, found).interval_seconds == 60
    clocked = make_host(name=host.host_name)
    clocked.clock.advance(lease.TERM.total_seconds())  # type: ignore[attr-defined]
    after = catalog.update_settings(store, clocked, found, interval_seconds=30)
    assert after.version == 3
    assert catalog.settings_in_force(store, found) == after


def test_settings_cannot_change_under_a_running_cycle(store: MemoryStore, host: Host) -> None:
    found = protect(store, host)
    with lease.holding(store, found.keys, host), pytest.raises(LeaseHeldError):
        catalog.update_settings(store, make_host(name="b"), found, interval_seconds=90)
    assert catalog.settings_in_force(store, found).version == 1


def test_new_settings_forget_no_leftovers(tmp_path: Path) -> None:
    lab: Lab = make_lab(tmp_path, [random_blocks(1, 8)], host=make_host())
    dying = CrashingStore(lab.store, at=2, mode=CrashMode.APPLIED_ERROR)
    with pytest.raises(StoreUnavailableError):
        lab.replicate(dying)
    assert any("/segments/" in info.key for info in lab.store.list(""))
    catalog.update_settings(lab.store, lab.host, lab.found, interval_seconds=90)
    assert lab.replicate().cycle.reused_blocks == 8


def test_what_is_missing_is_named(store: MemoryStore, host: Host) -> None:
    found = protect(store, host)
    for key in (found.keys.vm, found.keys.settings(1), found.keys.lease):
        data = store.get(key)
        store.delete(key)
        with pytest.raises(IntegrityError, match="missing") as caught:
            catalog.settings_in_force(store, catalog.find(store, "default", "web"))
        assert caught.value.key == key
        store.create(key, data)


HOSTILE: tuple[Any, ...] = (
    *(None, True, -1, 2**16, 2**64, 10**400, 1.5, "", "x", "²", "9" * 5000, "../..", [], {}, [{}]),
    *({"a": 1}, "9999-12-31T23:59:59-23:59"),
)


def test_hostile_values_in_every_record_give_our_errors(store: MemoryStore, host: Host) -> None:
    found = protect(store, host)
    places = {"store": keys.STORE, "name": keys.name("default", "web"), "vm": found.keys.vm}
    places["settings"] = found.keys.settings(1)
    for kind, key in places.items():
        good = body_of(store, key)
        for field in good:
            refused = 0
            for value in HOSTILE:
                overwrite(store, key, record.encode(kind, {**good, field: value}))
                try:
                    catalog.read_store(store)
                    catalog.settings_in_force(store, catalog.find(store, "default", "web"))
                except GodwitError as error:
                    refused += 1
                    assert isinstance(error, (IntegrityError, UsageError)), (kind, field, value)
                    assert len(str(error)) < 400
            assert refused or field in ("wrapped_key",), (kind, field)
        overwrite(store, key, record.encode(kind, good))


@pytest.mark.parametrize(
    "field, value",
    [("number", -1), ("number", 2**16), ("number", 0), ("number", "0"), ("name", 5), ("path", None), ("bus", [])],
)
def test_hostile_sources_are_refused(store: MemoryStore, host: Host, field: str, value: object) -> None:
    found = protect(store, host)
    key = found.keys.settings(1)
    body = body_of(store, key)
    body["sources"][1][field] = value
    overwrite(store, key, record.encode("settings", body))
    with pytest.raises(IntegrityError) as caught:
        catalog.settings_in_force(store, found)
    assert caught.value.key == key


def test_settings_of_another_version_than_their_key_says_are_refused(store: MemoryStore, host: Host) -> None:
    found = protect(store, host)
    store.create(found.keys.settings(2), store.get(found.keys.settings(1)))
    with pytest.raises(IntegrityError, match="mixed up"):
        catalog.read_settings(store, found.keys, 2)


def test_a_name_that_leads_to_another_vm_is_refused(store: MemoryStore, host: Host) -> None:
    found, other = protect(store, host), protect(store, host, "db")
    overwrite(store, found.keys.vm, store.get(other.keys.vm))
    with pytest.raises(IntegrityError, match="another VM"):
        catalog.find(store, "default", "web")
    with pytest.raises(IntegrityError):
        VmKeys("default", "../../other")


def test_this_machine_keeps_its_identity_and_survives_a_damaged_one(tmp_path: Path) -> None:
    first = this_host(tmp_path / "state")
    assert this_host(tmp_path / "state").host_id == first.host_id
    for damage in (b"", b"short", b"\xff\xfe\x00", b"\n" * 100):
        (tmp_path / "state" / "host-id").write_bytes(damage)
        again = this_host(tmp_path / "state")
        assert len(again.host_id) == 32
        assert this_host(tmp_path / "state").host_id == again.host_id
    (tmp_path / "file").write_text("")
    assert this_host(tmp_path / "file" / "below").state_folder is None
