"""The SYSTEM hive: what a conversion changes in it, key by key over real ones, and what the way back takes back."""

from __future__ import annotations

import json
import struct
import uuid

import pytest

from conversion.errors import DamagedError
from conversion.identity import DiskIdentity, PartitionIdentity
from conversion.windows.hive import REG_BINARY, REG_DWORD, Hive
from conversion.windows.hiveedit import HiveEditor
from conversion.windows.hivelog import recover
from conversion.windows.system import (
    BOOT_DRIVERS,
    HiveConversion,
    HiveEdit,
    control_sets,
    convert_system_to_bios,
    convert_system_to_uefi,
    driver_states,
)
from tests.support import windows_disk
from tests.support.hive_builder import build_hive, tree
from tests.unit.test_hive import everything
from tests.unit.test_hive_edit import check_cells

needs_samples = pytest.mark.skipif(not windows_disk.SAMPLES.is_dir(), reason=windows_disk.NO_SAMPLES)


def partition(guid: uuid.UUID, offset_bytes: int) -> PartitionIdentity:
    return PartitionIdentity(1, guid, 1, offset_bytes, 2048)


SIGNATURE = 0x60D17002
WINDOWS, ESP, DATA, GONE = (uuid.UUID(int=number << 100) for number in (1, 2, 3, 4))
IDENTITY = DiskIdentity(
    uuid.UUID(int=9),
    SIGNATURE,
    (partition(ESP, 1 << 20), partition(WINDOWS, 117 << 20), partition(DATA, 3 << 40)),
)


def gpt(guid: uuid.UUID) -> tuple[int, bytes]:
    return REG_BINARY, b"DMIO:ID:" + guid.bytes_le


def mbr(offset: int, signature: int = SIGNATURE) -> tuple[int, bytes]:
    return REG_BINARY, struct.pack("<IQ", signature, offset)


def number(value: int) -> tuple[int, bytes]:
    return REG_DWORD, struct.pack("<I", value)


def system_hive() -> bytes:
    paths: dict[str, dict[str, tuple[int, bytes] | str | int]] = {
        "Select": {"Current": 1, "Default": 1, "Failed": 3, "LastKnownGood": 2},
        "MountedDevices": {
            r"\DosDevices\C:": gpt(WINDOWS),
            r"\DosDevices\D:": gpt(DATA),
            r"\DosDevices\E:": gpt(GONE),
            r"\DosDevices\F:": (3, "USBSTOR#Disk".encode("utf-16-le")),
            r"\DosDevices\G:": mbr(1 << 20, 0x12345678),
        },
    }
    for control_set in ("ControlSet001", "ControlSet002", "ControlSet003"):
        for name in BOOT_DRIVERS:
            image = "vmstorfl" if name == "storflt" else name
            paths[rf"{control_set}\Services\{name}"] = {"Start": 3, "ImagePath": rf"System32\drivers\{image}.sys"}
        paths[rf"{control_set}\Services\storvsc"]["Start"] = 0
        paths[rf"{control_set}\Services\storvsc\StartOverride"] = {"0": 3}
        paths[rf"{control_set}\Services\vmbus\StartOverride"] = {"1": 3}
        paths[rf"{control_set}\Services\disk"] = {"Start": 0}
    return build_hive(tree(paths), spare_bytes=4096)


def reloaded(done: HiveConversion) -> tuple[HiveEdit, ...]:
    return tuple(HiveEdit.from_document(json.loads(json.dumps(edit.document()))) for edit in done.edits)


def test_drivers_and_records_are_edited_and_nothing_else() -> None:
    before = system_hive()
    done = convert_system_to_bios(before, IDENTITY, letterless=[ESP])
    wanted = everything(Hive(before))
    for control_set in ("ControlSet001", "ControlSet002"):  # the one that failed is left as it failed
        for name in BOOT_DRIVERS:
            wanted[rf"{control_set}\Services\{name}"]["Start"] = number(0)
        wanted[rf"{control_set}\Services\storvsc\StartOverride"]["0"] = number(0)
    mounted = wanted["MountedDevices"]
    mounted[r"\DosDevices\C:"], mounted[r"\DosDevices\D:"] = mbr(117 << 20), mbr(3 << 40)
    mounted[f"#{{{ESP}}}"] = mbr(1 << 20)
    assert everything(Hive(done.content)) == wanted
    assert len(done.content) == len(before)
    assert done.findings == ()
    check_cells(done.content)
    assert all(state.starts_at_boot for state in driver_states(Hive(done.content)))
    assert convert_system_to_bios(before, IDENTITY, letterless=[ESP]) == done


def test_every_edit_tells_what_stood_there_and_survives_json() -> None:
    done = convert_system_to_bios(system_hive(), IDENTITY, letterless=[ESP])
    assert reloaded(done) == done.edits
    named = {(edit.key, edit.name): edit for edit in done.edits}
    assert len(named) == len(done.edits) == 2 * (len(BOOT_DRIVERS) - 1 + 1) + 3
    override = named[r"ControlSet001\Services\storvsc\StartOverride", "0"]
    assert override.before is not None
    assert override.after is not None
    assert (override.before.data, override.after.data) == (b"\3\0\0\0", bytes(4))
    assert named["MountedDevices", f"#{{{ESP}}}"].before is None


def test_the_way_back_restores_every_value() -> None:
    before = system_hive()
    there = convert_system_to_bios(before, IDENTITY, letterless=[ESP])
    back = convert_system_to_uefi(there.content, IDENTITY, reloaded(there))
    assert everything(Hive(back.content)) == everything(Hive(before))
    check_cells(back.content)


def test_what_the_guest_changed_meanwhile_stays_and_its_new_records_are_mapped() -> None:
    there = convert_system_to_bios(system_hive(), IDENTITY, letterless=[ESP])
    editor = HiveEditor(there.content)

    def set_value(path: str, name: str, value: tuple[int, bytes]) -> None:
        key = editor.hive.key(path)
        assert key is not None
        editor.set_value(key, name, *value)

    set_value(r"ControlSet001\Services\atapi", "Start", number(4))  # switched off by the guest
    set_value("MountedDevices", rf"\??\Volume{{{uuid.UUID(int=77)}}}", mbr(117 << 20))
    set_value("MountedDevices", r"\DosDevices\S:", mbr(1 << 20))
    set_value("MountedDevices", r"\DosDevices\X:", mbr(5 << 20))  # no partition begins there
    set_value("MountedDevices", r"\DosDevices\D:", mbr(1 << 20, 0x12345678))  # another disk has the letter now
    back = everything(Hive(convert_system_to_uefi(editor.finish(), IDENTITY, reloaded(there)).content))
    assert back[r"ControlSet001\Services\atapi"]["Start"] == number(4)
    assert back[r"ControlSet002\Services\atapi"]["Start"] == number(3)
    mounted = back["MountedDevices"]
    assert mounted[rf"\??\Volume{{{uuid.UUID(int=77)}}}"] == gpt(WINDOWS)
    assert mounted[r"\DosDevices\S:"] == gpt(ESP)
    assert mounted[r"\DosDevices\X:"] == mbr(5 << 20)
    assert mounted[r"\DosDevices\D:"] == mbr(1 << 20, 0x12345678)
    assert f"#{{{ESP}}}" not in mounted


def test_a_letter_given_by_a_person_is_kept() -> None:
    hive = build_hive(
        tree({"Select": {"Current": 1}, "ControlSet001": {}, "MountedDevices": {r"\DosDevices\S:": gpt(ESP)}})
    )
    done = convert_system_to_bios(hive, IDENTITY, letterless=[ESP])
    assert everything(Hive(done.content))["MountedDevices"] == {r"\DosDevices\S:": mbr(1 << 20)}


def test_a_driver_without_its_file_is_not_started() -> None:
    files = {f"{name}.sys" for name in BOOT_DRIVERS}  # storflt's is named vmstorfl.sys
    done = convert_system_to_bios(system_hive(), IDENTITY, letterless=[ESP], driver_files=files)
    states = {state.name: state.start for state in driver_states(Hive(done.content))}
    assert states == {**dict.fromkeys(BOOT_DRIVERS, 0), "storflt": 3}
    assert [(finding.rule, "vmstorfl.sys" in finding.evidence) for finding in done.findings] == [
        ("driver-missing", True)
    ]


def test_a_driver_that_is_not_installed_is_told() -> None:
    hive = build_hive(tree({"Select": {"Current": 1}, r"ControlSet001\Services\intelide": {"Start": 0}}))
    done = convert_system_to_bios(hive, IDENTITY, letterless=[ESP])
    assert [finding.rule for finding in done.findings] == ["driver-missing"]
    assert done.content == hive


@pytest.mark.parametrize("paths", [{}, {"Select": {}}, {"Select": {"Current": 1}}, {"ControlSet001": {}}])
def test_a_hive_that_is_no_system_hive_is_refused(paths: dict[str, dict[str, int]]) -> None:
    hive = build_hive(tree({"Key": {}, **paths}))
    with pytest.raises(DamagedError, match="no SYSTEM hive"):
        convert_system_to_bios(hive, IDENTITY, letterless=[ESP])


@pytest.mark.parametrize(
    "document", [{}, {"key": 1, "name": "x", "before": None, "after": None, "why": ""}, {"key": "x"}]
)
def test_a_damaged_list_of_edits_is_refused(document: dict[str, object]) -> None:
    with pytest.raises(DamagedError, match="list of registry edits"):
        HiveEdit.from_document(document)


@needs_samples
def test_the_sample_of_a_gpt_machine_is_changed_in_nine_values_and_back() -> None:
    recovered = recover(
        windows_disk.sample("SYSTEM_B"), [windows_disk.sample("SYSTEM_B.LOG1"), windows_disk.sample("SYSTEM_B.LOG2")]
    )
    identity = DiskIdentity(
        windows_disk.DISK_GUID,
        SIGNATURE,
        (partition(windows_disk.ESP_GUID, 1 << 20), partition(windows_disk.WINDOWS_GUID, 117 << 20)),
    )
    before = everything(Hive(recovered.content))
    done = convert_system_to_bios(
        recovered.content, identity, letterless=[windows_disk.ESP_GUID], above_sequence=recovered.highest_sequence
    )
    wanted = {path: dict(values) for path, values in before.items()}
    for name in BOOT_DRIVERS:
        wanted[rf"ControlSet001\Services\{name}\StartOverride"]["0"] = number(0)
    wanted["MountedDevices"][r"\DosDevices\C:"] = mbr(117 << 20)
    wanted["MountedDevices"][f"#{{{windows_disk.ESP_GUID}}}"] = mbr(1 << 20)
    assert everything(Hive(done.content)) == wanted
    assert Hive(done.content).base_block.primary_sequence == 2131
    assert len(done.content) == len(recovered.content)
    changed = [
        at for at in range(4096, len(done.content), 64) if done.content[at : at + 64] != recovered.content[at : at + 64]
    ]
    assert len(changed) < 40
    back = convert_system_to_uefi(done.content, identity, reloaded(done))
    assert everything(Hive(back.content)) == before


@needs_samples
def test_the_sample_of_an_mbr_machine_maps_to_gpt_and_back() -> None:
    content = bytearray(windows_disk.sample("SYSTEM_WIN_10_1709"))
    content[8:12] = content[4:8]  # its logs are not here: read as if its last write had ended
    editor = HiveEditor(bytes(content[:508]) + struct.pack("<I", _xor(content)) + bytes(content[512:]))
    hive = editor.finish()
    assert control_sets(Hive(hive)) == ("ControlSet001",)
    places = {0x1F500000: WINDOWS, 0x18E1858000: DATA, 0x100000: ESP}
    identity = DiskIdentity(uuid.UUID(int=9), 0xDF4546AE, tuple(partition(guid, at) for at, guid in places.items()))
    before = everything(Hive(hive))
    there = convert_system_to_uefi(hive, identity, ())
    mounted = everything(Hive(there.content))["MountedDevices"]
    assert mounted[r"\DosDevices\C:"] == gpt(WINDOWS)
    assert mounted["#{5aae7822-77cb-11e9-bcf1-784f439fa657}"] == gpt(DATA)
    assert mounted[r"\DosDevices\E:"] == gpt(ESP)
    assert mounted[r"\DosDevices\F:"] == before["MountedDevices"][r"\DosDevices\F:"]  # another disk
    assert len(there.edits) == 3
    back = convert_system_to_bios(there.content, identity)
    after = everything(Hive(back.content))
    assert after["MountedDevices"] == before["MountedDevices"]
    differing = {path for path in before if before[path] != after[path]}
    assert differing == {
        rf"ControlSet001\Services\{name}\StartOverride" for name in ("pciide", "storvsc", "vmbus", "storflt")
    }


def _xor(content: bytearray) -> int:
    value = 0
    for (word,) in struct.iter_unpack("<I", content[:508]):
        value ^= word
    return value
