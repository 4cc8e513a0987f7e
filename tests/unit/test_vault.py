"""Encrypted VMs through the whole engine: they restore, they reveal nothing, and nothing can be changed unnoticed."""

from __future__ import annotations

import base64
import contextlib
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from replica import (
    catalog,
    cycle,
    garbage,
    history,
    keys,
    lease,
    packer,
    pins,
    protection,
    prune,
    record,
    retention,
    verify,
)
from replica.catalog import ProtectedVm
from replica.errors import (
    ConfigurationError,
    FormatVersionError,
    GodwitError,
    IntegrityError,
    ObjectMissingError,
    StoreUnavailableError,
    TenantKeyError,
)
from replica.keys import VmKeys
from replica.model import Nic, Point
from replica.protection import MachineWishes
from replica.stores.memory import MemoryStore
from replica.stores.retry import Patience, ResilientStore
from replica.stores.store import ObjectInfo, Store
from replica.tenantkey import Secret
from replica.vault import Vault
from tests.support.encryption import OTHER_SECRET, SECRET, encrypted_lab, give_key, sealed, vault_for
from tests.support.engine import BLOCK, WORKERS, FakeClock, Lab, make_host, make_lab, random_blocks, restore_disk
from tests.support.store_doubles import RecordingStore

ELSEWHERE = make_host(name="elsewhere")
OTHER = make_host(name="other")


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packer, "SEGMENT_FRAMES", 6)
    monkeypatch.setattr("replica.scan.BATCH_BLOCKS", 2)


def written(folder: Path, inner: Store | None = None) -> tuple[Lab, Store]:
    """Return an encrypted VM of two disks with three points, and the store beneath the vault."""
    beneath = MemoryStore("beneath") if inner is None else inner
    lab = encrypted_lab(folder, [random_blocks(1, 14), random_blocks(2, 3) + b"tail" * 128], beneath)
    lab.replicate()
    lab.patch(3 * BLOCK, random_blocks(3, 2))
    lab.replicate()
    lab.patch(5 * BLOCK, bytes(BLOCK))
    lab.patch(0, random_blocks(4, 1), number=1)
    lab.replicate()
    return lab, beneath


def contents(store: Store) -> dict[str, bytes]:
    return {info.key: store.get(info.key) for info in store.list("")}


def copy_of(objects: dict[str, bytes]) -> MemoryStore:
    made = MemoryStore("copy")
    for key, data in objects.items():
        made.create(key, data)
    return made


def use_everything(store: Store) -> list[bytes]:
    """Do all that reads, as another machine; return the disks of every point. Raises GodwitError for any damage."""
    found = catalog.find(store, "default", "web 1")
    catalog.settings_in_force(store, found)
    catalog.newest_point(store, found)
    disks = []
    for point in history.points(store, found.keys):
        if not isinstance(point, Point):
            raise point
        disks += [restore_disk(store, ELSEWHERE, found, point, disk.number) for disk in point.disks]
    return disks


def expected(lab: Lab) -> list[bytes]:
    return [disk for number in sorted(lab.published) for disk in lab.published[number]]


def test_every_point_restores_here_and_elsewhere(tmp_path: Path) -> None:
    lab, beneath = written(tmp_path)
    lab.assert_restores()
    assert use_everything(sealed(beneath)) == expected(lab)
    report = verify.verify(sealed(beneath), ELSEWHERE, catalog.find(sealed(beneath), "default", "web 1"), full=True)
    assert not report.damaged
    assert len(report.verdicts) == 3


def test_the_store_sees_nothing_of_what_disks_hold(tmp_path: Path) -> None:
    marker = b"the minutes of the board, strictly between us; "
    folder = tmp_path / "payroll-folder"
    beneath = MemoryStore()
    give_key(beneath)
    vault = vault_for()
    store = vault.around(beneath)
    host = make_host(name="build-host-17")
    catalog.init_store(store, host)
    folder.mkdir()
    path = folder / "secret-disk.img"
    path.write_bytes((marker * 1500)[:BLOCK] + random.Random(1).randbytes(BLOCK))
    found, _ = protection.protect(
        store,
        host,
        tenant="default",
        name="web",
        disks=[path],
        wishes=MachineWishes(nics=(Nic("00:15:5d:0a:0b:0c", "LAN-of-the-board"),)),
        vault=vault,
    )
    point = cycle.replicate(store, host, found, workers=WORKERS)
    held = b"\n".join(data for key, data in contents(beneath).items())
    seen_above = b"\n".join(data for key, data in contents(store).items())
    part = point.maps[0].parts[0]
    index = store.get(found.keys.segment(part.part))
    searched = [
        marker[:16],
        path.read_bytes()[BLOCK : BLOCK + 16],
        b"payroll",
        b"secret-disk",
        b"00:15:5d",
        b"LAN-of",
        b"build-host",
        str(found.vm.hash_seed).encode(),
        found.vm.hash_seed.to_bytes(8, "little"),
        index[-64 - 16 : -64],  # the last block's hash, in the segment's index
        index[-64 - 2 * 40 + 24 : -64 - 40],
        str(point.disks[0].digest).encode(),
        b"GWSEGMNT",
        b"GWBLKMAP",
        b"hash_seed",
        b"zstd",
        b"expires_at",
    ]
    assert [one for one in searched if one in held] == []
    assert sum(one in seen_above for one in searched) >= 10  # what is searched for is there, above the vault
    for number in range(2):  # hashes without the secret seed tell nothing either
        block = path.read_bytes()[number * BLOCK : (number + 1) * BLOCK]
        assert xxhash.xxh3_128_digest(block) not in held
        assert xxhash.xxh3_128_digest(block, found.vm.hash_seed) not in held
        assert xxhash.xxh3_128_digest(block, found.vm.hash_seed) in seen_above


def test_everything_of_a_vm_is_sealed_but_its_record(tmp_path: Path) -> None:
    lab, beneath = written(tmp_path)
    objects = contents(beneath)
    mine = {key: data for key, data in objects.items() if key.startswith(lab.found.keys.prefix)}
    assert len(mine) > 10
    assert [key for key, data in mine.items() if not data.startswith(b"GWSEALED")] == [lab.found.keys.vm]
    body = json.loads(mine[lab.found.keys.vm])
    assert body["suite"] == 1
    assert set(body["body"]) == {"vm_id", "wrapped_key", "sealed"}


def test_sizes_and_ranges_are_those_of_what_objects_hold(tmp_path: Path) -> None:
    lab, beneath = written(tmp_path)
    for info in lab.store.list(lab.found.keys.prefix):
        whole = lab.store.get(info.key)
        if info.key != lab.found.keys.vm:
            assert info.size == lab.store.head(info.key).size == len(whole)
            assert beneath.head(info.key).size > len(whole)
        assert info.tag == beneath.head(info.key).tag
        assert lab.store.get_tagged(info.key) == (whole, info.tag)


# --- wrong keys


@pytest.mark.parametrize("secret", [None, OTHER_SECRET], ids=["no key", "another key"])
def test_without_the_key_nothing_is_read_or_written(tmp_path: Path, secret: None) -> None:
    lab, beneath = written(tmp_path)
    before = contents(beneath)
    recording = RecordingStore(beneath)
    store = sealed(recording, secret)
    attempts = [
        lambda: catalog.find(store, "default", "web 1"),
        lambda: cycle.replicate(store, lab.host, lab.found),
        lambda: catalog.settings_in_force(store, lab.found),
        lambda: list(history.points(store, lab.found.keys)),
        lambda: catalog.update_settings(store, lab.host, lab.found, interval_seconds=60),
        lambda: store.create(lab.found.keys.map_part(keys.PartId(9, 9, 9)), b"x"),
        lambda: list(store.list(lab.found.keys.prefix)),
        lambda: make_lab(tmp_path / "new", [bytes(BLOCK)], store=store, name="new", vault=store.vault),
    ]
    for attempt in attempts:
        with pytest.raises(TenantKeyError) as caught:
            attempt()
        assert caught.value.exit_code == 13
    assert recording.writes == () or {one.error for one in recording.writes} == {"ObjectExistsError"}  # godwit.json
    assert contents(beneath) == before


def test_a_vm_cannot_be_encrypted_before_its_tenant_has_a_key(tmp_path: Path) -> None:
    beneath = MemoryStore()
    store = sealed(beneath)
    with pytest.raises(TenantKeyError, match="no encryption key") as caught:
        make_lab(tmp_path, [bytes(BLOCK)], store=store, vault=store.vault)
    assert "godwit key init" in str(caught.value.hint)
    assert list(contents(beneath)) == ["godwit.json"]


def test_a_reader_that_knows_of_no_encryption_says_so(tmp_path: Path) -> None:
    _, beneath = written(tmp_path)
    with pytest.raises(FormatVersionError, match="encrypted by suite 1"):
        catalog.find(beneath, "default", "web 1")


# --- damage and malice


def flips(objects: dict[str, bytes], seed: int) -> Iterator[tuple[str, int]]:
    """Yield places to damage: every byte of small objects' beginnings and ends, a sample of the rest."""
    drawn = random.Random(seed)
    for key, data in objects.items():
        if "/vms/" not in key:
            continue
        places = {*range(0, len(data), max(1, len(data) // 12)), 0, 8, 10, 15, 16, 27, 28, len(data) - 1}
        places |= {drawn.randrange(len(data)) for _ in range(4)}
        yield from ((key, at) for at in sorted(places) if at < len(data))


def test_a_flipped_byte_anywhere_is_detected_or_harmless(tmp_path: Path) -> None:
    lab, beneath = written(tmp_path)
    objects, wanted = contents(beneath), expected(lab)
    tried = 0
    for key, at in flips(objects, 1):
        damaged = bytearray(objects[key])
        damaged[at] ^= 1 << at % 8
        if b"GWSEALED" in objects[key][:8] and at < 16 and ("/segments/" in key):
            continue  # ranges do not read the header; reading the whole object does, below
        tried += 1
        with pytest.raises(GodwitError) as caught:
            use_everything(sealed(copy_of({**objects, key: bytes(damaged)})))
        assert caught.value.exit_code in (12, 13), (key, at, caught.value)
        assert key in str(caught.value) or key == lab.found.keys.vm
    assert tried > 200
    assert use_everything(sealed(copy_of(objects))) == wanted


def test_a_damaged_header_is_found_when_the_whole_object_is_read(tmp_path: Path) -> None:
    _, beneath = written(tmp_path)
    objects = contents(beneath)
    key = next(key for key in objects if "/segments/" in key)
    for at in range(16):
        damaged = bytearray(objects[key])
        damaged[at] ^= 4
        with pytest.raises((IntegrityError, FormatVersionError), match=key):
            sealed(copy_of({**objects, key: bytes(damaged)})).get(key)


def test_objects_cannot_take_each_others_place(tmp_path: Path) -> None:
    """Also those of the same kind and size class: a segment, a map, a manifest of another point, another VM."""
    lab, beneath = written(tmp_path / "one")
    other = encrypted_lab(
        tmp_path / "two", [random_blocks(1, 14), random_blocks(2, 3)], beneath, name="web 2", host=OTHER
    )
    other.replicate()
    objects = contents(beneath)
    mine = [key for key in objects if key.startswith(lab.found.keys.prefix)]
    theirs = [key for key in objects if key.startswith(other.found.keys.prefix)]
    swaps = 0
    for target in mine:
        kind = target.split("/")[4]
        for source in [*mine, *theirs]:
            if source != target and source.split("/")[4] == kind:
                swaps += 1
                with pytest.raises(GodwitError) as caught:
                    use_everything(sealed(copy_of({**objects, target: objects[source]})))
                assert caught.value.exit_code == 12
    assert swaps > 30


def test_a_name_that_was_led_to_another_vm_is_noticed(tmp_path: Path) -> None:
    _, beneath = written(tmp_path / "one")
    other = encrypted_lab(tmp_path / "two", [random_blocks(9, 1)], beneath, name="web 2", host=OTHER)
    objects = contents(beneath)
    forged = record.encode("name", {"vm_id": other.found.keys.vm_id, "name": "web 1"})
    with pytest.raises(IntegrityError, match="leads to the VM 'web 2'"):
        catalog.find(sealed(copy_of({**objects, keys.name("default", "web 1"): forged})), "default", "web 1")


def test_a_chunk_from_elsewhere_does_not_open(tmp_path: Path) -> None:
    _, beneath = written(tmp_path)
    objects = contents(beneath)
    segment = max((key for key in objects if "/segments/" in key), key=lambda key: len(objects[key]))
    data = objects[segment]
    assert len(data) > 16 + 3 * 65564
    moved = data[:16] + data[16 + 65564 : 16 + 2 * 65564] + data[16 : 16 + 65564] + data[16 + 2 * 65564 :]
    with pytest.raises(IntegrityError, match="chunk"):
        use_everything(sealed(copy_of({**objects, segment: moved})))


def test_a_vm_exchanged_for_one_in_clear_is_noticed_where_encryption_is_required(tmp_path: Path) -> None:
    lab, beneath = written(tmp_path / "encrypted")
    objects = contents(beneath)
    plain = make_lab(tmp_path / "plain", [random_blocks(1, 2)], name="web 1")
    clear = {
        key.replace(plain.found.keys.vm_id, lab.found.keys.vm_id): data for key, data in contents(plain.store).items()
    }
    body = json.loads(plain.store.get(plain.found.keys.vm))["body"]
    clear[lab.found.keys.vm] = record.encode("vm", {**body, "vm_id": lab.found.keys.vm_id})
    forged = copy_of({**objects, **{key: data for key, data in clear.items() if "/vms/" in key}})

    vault = vault_for(require=True)
    with pytest.raises(ConfigurationError, match="not encrypted, and the configuration requires it"):
        catalog.find(vault.around(forged), "default", "web 1")
    with pytest.raises(IntegrityError):  # of objects that the forger forgot
        use_everything(sealed(forged))

    seen = vault_for()
    catalog.find(seen.around(beneath), "default", "web 1")  # within one process the first word holds
    with pytest.raises(IntegrityError, match="says that it is not encrypted; it was"):
        catalog.find(seen.around(forged), "default", "web 1")


def test_nothing_is_written_in_clear_on_the_word_of_a_record_that_is_missing_or_damaged(tmp_path: Path) -> None:
    lab, beneath = written(tmp_path)
    objects = contents(beneath)
    key = lab.found.keys.map_part(keys.PartId(9, 9, 9))
    without = copy_of({key: data for key, data in objects.items() if key != lab.found.keys.vm})
    for store in (without, copy_of({**objects, lab.found.keys.vm: b"{"})):
        with pytest.raises(IntegrityError):
            sealed(store).create(key, b"plain")
        assert key not in contents(store)
    with pytest.raises(ConfigurationError):
        plain = make_lab(tmp_path / "plain", [bytes(BLOCK)], store=without, name="plain", host=OTHER)
        vault_for(require=True).around(without).create(plain.found.keys.map_part(keys.PartId(9, 9, 9)), b"plain")


@pytest.mark.parametrize(
    "change",
    [
        {"wrapped_key": "00" * 60},
        {"wrapped_key": "0"},
        {"sealed": "!"},
        {"sealed": ""},
        {"vm_id": "0f" * 16},
        {"sealed": 3},
    ],
    ids=str,
)
def test_a_forged_record_is_damage(tmp_path: Path, change: dict[str, object]) -> None:
    lab, beneath = written(tmp_path)
    objects = contents(beneath)
    body = json.loads(objects[lab.found.keys.vm])["body"]
    forged = record.encode("vm", {**body, **change}, suite=1)
    with pytest.raises(IntegrityError):
        catalog.find(sealed(copy_of({**objects, lab.found.keys.vm: forged})), "default", "web 1")


def test_suites_to_come_are_named(tmp_path: Path) -> None:
    lab, beneath = written(tmp_path)
    objects = contents(beneath)
    later = record.encode("vm", json.loads(objects[lab.found.keys.vm])["body"], suite=2)
    with pytest.raises(FormatVersionError, match="suite 2"):
        catalog.find(sealed(copy_of({**objects, lab.found.keys.vm: later})), "default", "web 1")


# --- side by side, and cut off


def test_vms_with_and_without_encryption_live_in_one_store(tmp_path: Path) -> None:
    lab, beneath = written(tmp_path / "one")
    plain = make_lab(tmp_path / "two", [random_blocks(7, 4)], store=sealed(beneath), name="plain", host=OTHER)
    plain.replicate()
    plain.assert_restores()
    untouched = Lab(plain.folder, beneath, plain.host, plain.found, plain.paths, plain.published)
    untouched.assert_restores()  # without any vault
    without_key = sealed(beneath, None)
    assert catalog.find(without_key, "default", "plain") == plain.found
    lab.assert_restores()
    assert lab.store.vault.is_encrypted(lab.found.keys)  # type: ignore[attr-defined]
    assert not plain.store.vault.is_encrypted(plain.found.keys)  # type: ignore[attr-defined]


def test_no_request_is_added_to_a_cycle(tmp_path: Path) -> None:
    counts = []
    for encrypted in (True, False):
        recording = RecordingStore(MemoryStore())
        folder = tmp_path / str(encrypted)
        disks = [random_blocks(1, 14)]
        lab = encrypted_lab(folder, disks, recording) if encrypted else make_lab(folder, disks, store=recording)
        lab.replicate()
        lab.patch(BLOCK, random_blocks(5, 3))
        recording.forget()
        lab.replicate()
        lab.restore()
        counts.append(recording.counts)
    assert counts[0] == counts[1]


def test_what_a_cycle_left_over_is_used_although_it_is_sealed(tmp_path: Path) -> None:
    lab, beneath = written(tmp_path)

    class Full(RecordingStore):
        def create(self, key: str, data: bytes | bytearray | memoryview) -> str:
            if "/maps/" in key:
                raise StoreUnavailableError("no answer", key=key)
            return super().create(key, data)

    lab.patch(0, random_blocks(50, 8))
    with pytest.raises(StoreUnavailableError):
        lab.replicate(store=Full(lab.store))
    point = lab.replicate()
    assert point.cycle.reused_blocks == 8
    assert use_everything(sealed(beneath)) == expected(lab)


class _Cutting(RecordingStore):
    """Gives half of what is asked of segments, the first time."""

    cuts = 0

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        data = super().get(key, start=start, length=length)
        if "/segments/" in key and length is not None and not self.cuts:
            self.cuts += 1
            return data[: len(data) // 2]
        return data


def test_an_answer_that_was_cut_short_is_asked_for_again(tmp_path: Path) -> None:
    lab, beneath = written(tmp_path)
    cutting = _Cutting(beneath)
    with pytest.raises(StoreUnavailableError, match="cut short"):
        use_everything(sealed(cutting))
    cutting.cuts = 0
    patient = ResilientStore(sealed(cutting), Patience(attempts=3), sleep=lambda seconds: None)
    assert use_everything(patient) == expected(lab)
    assert cutting.cuts == 1


def test_a_vm_that_could_not_be_made_leaves_nothing(tmp_path: Path) -> None:
    _, beneath = written(tmp_path)
    before = contents(beneath)

    class Late(RecordingStore):
        def head(self, key: str) -> ObjectInfo:
            if "/names/" in key:
                raise ObjectMissingError("not yet", key=key)  # another agent is about to create it
            return super().head(key)

    with pytest.raises(GodwitError, match="protected already"):
        store = vault_for().around(Late(beneath))
        make_lab(tmp_path / "again", [bytes(BLOCK)], store=store, host=OTHER, vault=store.vault)
    assert contents(beneath) == before


def test_the_lease_cannot_be_forged_and_is_swapped_as_ever(tmp_path: Path) -> None:
    lab, beneath = written(tmp_path)
    state, tag = lease.read(lab.store, lab.found.keys)
    forged = lease.encode(replace(state, epoch=state.epoch + 7))
    beneath.replace(lab.found.keys.lease, forged, tag=tag)
    with pytest.raises(IntegrityError, match="not encrypted although"):
        lease.read(lab.store, lab.found.keys)


def test_the_vault_must_stand_before_the_store(tmp_path: Path) -> None:
    beneath = MemoryStore()
    give_key(beneath)
    with pytest.raises(AssertionError, match="vault"):
        make_lab(tmp_path, [random_blocks(1, 1)], store=beneath, vault=vault_for())


def test_pruning_pinning_and_garbage_collection_work_behind_a_vault(tmp_path: Path) -> None:
    lab, beneath = written(tmp_path)
    pins.pin(lab.store, lab.host, lab.found, 1, "the auditors' copy")
    done = prune.prune(lab.store, lab.host, lab.found, rule=retention.parse("last:1"))
    assert [one.point for one in done.removed] == [2]
    for grace in (timedelta(), timedelta(), timedelta()):
        references = garbage.survey(lab.store, "default")
        garbage.collect(lab.store, lab.host, lab.found, references, grace=grace)
        assert isinstance(lab.host.clock, FakeClock)
        lab.host.clock.advance(60)
    lab.assert_restores(1, 3)
    assert not verify.verify(sealed(beneath), ELSEWHERE, lab.found, full=True).damaged
    objects = contents(beneath)
    assert not any(b"auditors" in data for data in objects.values())
    assert len([key for key in objects if "/manifests/" in key]) == 2
    with pytest.raises(TenantKeyError):
        garbage.survey(sealed(beneath, None), "default")


# --- the store protocol through a vault


VM = VmKeys("t", "0f" * 16)


def _vm_with_objects(sizes: list[int]) -> tuple[Store, dict[str, bytes]]:
    beneath = MemoryStore()
    give_key(beneath, "t")
    vault = vault_for()
    store = vault.around(beneath)
    vault.admit(store, VM)
    store.create(VM.vm, b"{}")
    objects = {VM.segment(keys.PartId(1, 1, n)): random.Random(n).randbytes(size) for n, size in enumerate(sizes)}
    for key, data in objects.items():
        store.create(key, data)
    return store, objects


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_range_is_as_in_a_store_without_a_vault(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([0, 1, 100, 65535, 65536, 65537, 131072, 200000]))
    store, objects = _vm_with_objects([size])
    plain = copy_of(objects)
    (key,) = objects
    edges = st.sampled_from([0, 1, 65535, 65536, 65537, 131071, 131072, 199999, 200000, 300000])
    start = data.draw(edges | st.integers(-200010, 200010))
    length = data.draw(st.none() | edges | st.integers(0, 200010))
    assert store.get(key, start=start, length=length) == plain.get(key, start=start, length=length)


def test_listing_is_as_in_a_store_without_a_vault() -> None:
    store, objects = _vm_with_objects([0, 10, 65536, 70000])
    plain = copy_of(objects)
    for prefix, after in ((VM.segments, ""), (VM.prefix + "segments/", sorted(objects)[1])):
        listed = [(info.key, info.size) for info in store.list(prefix, start_after=after)]
        assert listed == [(info.key, info.size) for info in plain.list(prefix, start_after=after)]
    key = sorted(objects)[0]
    store.delete(key)
    with pytest.raises(ObjectMissingError):
        store.get(key)


def test_base64_in_the_record_is_checked_strictly(tmp_path: Path) -> None:
    lab, beneath = written(tmp_path)
    objects = contents(beneath)
    body = json.loads(objects[lab.found.keys.vm])["body"]
    assert base64.b64decode(body["sealed"]).startswith(b"GWSEALED")
    forged = record.encode("vm", {**body, "sealed": body["sealed"][:40] + "\n" + body["sealed"][40:]}, suite=1)
    with pytest.raises(IntegrityError, match="base64"):
        catalog.find(sealed(copy_of({**objects, lab.found.keys.vm: forged})), "default", "web 1")


def found_of(store: Store) -> ProtectedVm:
    return catalog.find(store, "default", "web 1")


def test_the_secret_is_asked_for_once(tmp_path: Path) -> None:
    _, beneath = written(tmp_path)
    for secret in (SECRET, OTHER_SECRET):
        asked: list[Secret] = []

        def ask(secret: Secret = secret, asked: list[Secret] = asked) -> Secret:
            asked.append(secret)
            return secret

        vault = Vault(ask)
        for _ in range(3):
            with contextlib.suppress(TenantKeyError):
                found_of(vault.around(beneath))
        assert asked == [secret]
