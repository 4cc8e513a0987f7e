"""What a Hyper-V host that is none answers to the scripts of the change source that are not executed themselves."""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable
from typing import Any

from replica.hyperv import scripts
from replica.hyperv.session import SessionError
from tests.support.fake_hyperv import GRAIN, FakeHost, FakeVm, HostFaultError


def _drives(vm: FakeVm, owner: str, files: list[str]) -> list[dict[str, Any]]:
    return [
        {
            "controller": disk.controller,
            "number": disk.number,
            "location": disk.location,
            "id": disk.identifier(owner, "D"),
            "path": path,
            "shared": disk.shared,
            "physical": disk.physical,
        }
        for disk, path in zip(vm.disks, files, strict=True)
    ]


def _take(host: FakeHost, *, vm_id: str, ledger: str, label: str, consistency: str) -> dict[str, Any]:
    vm = host.vm(vm_id)
    vm.asked_levels.append(int(consistency))
    host.line(ledger, "taking", label)
    made = vm.create_snapshot()
    if host.dies_in == "take":
        host.dies_in = ""
        raise SessionError("the host is gone")
    host.line(ledger, "snapshot", label, made.id)
    return {"snapshot": made.id, "off": vm.off, "drives": _drives(vm, made.guid, made.frozen)}


def _changes(host: FakeHost, *, path: str, limit: str, offset: str, length: str) -> dict[str, Any]:
    vm, disk = next((vm, disk) for vm in host.vms for disk in vm.disks if path in disk.files)
    if limit not in disk.tracked:
        raise HostFaultError("Refused", 0xC03A002C - (1 << 32))
    start, wanted = int(offset), int(length)
    assert wanted < disk.size, "documented: it must be less than the disk's size"
    end = min(start + wanted, start + host.most_processed)
    until = next((one.at for one in vm.snapshots if path in one.frozen), 1 << 62)
    starts, lengths = [], []
    for at, first, last in disk.log:
        if disk.tracked[limit] <= at < until:
            low, high = max(first // GRAIN * GRAIN, start), min(-(-last // GRAIN) * GRAIN, end)
            if low < high:
                starts.append(low)
                lengths.append(high - low)
    return {"processed": str(end - start), "starts": _packed(starts), "lengths": _packed(lengths)}


def _packed(numbers: list[int]) -> str:
    return base64.b64encode(struct.pack(f"<{len(numbers)}Q", *numbers)).decode()


def _convert(host: FakeHost, *, vm_id: str, ledger: str, label: str, snapshot: str) -> dict[str, Any]:
    vm = host.vm(vm_id)
    found = [one for one in vm.snapshots if one.id == snapshot]
    if not found:
        raise HostFaultError("NotFound")
    host.line(ledger, "converting", label, snapshot)
    made = vm.convert(found[0])
    if host.dies_in == "convert":
        host.dies_in = ""
        raise SessionError("the host is gone")
    host.line(ledger, "reference", label, made.id)
    return {"reference": made.id}


def _discard(host: FakeHost, *, vm_id: str, ledger: str, snapshot: str) -> dict[str, Any]:
    vm = host.vm(vm_id)
    found = [one for one in vm.snapshots if one.id == snapshot]
    for one in found:
        vm.destroy_snapshot(one)
    host.line(ledger, "gone", snapshot)
    return {"removed": bool(found)}


def _forget(host: FakeHost, *, vm_id: str, ledger: str, reference: str) -> dict[str, Any]:
    vm = host.vm(vm_id)
    found = [one for one in vm.references if one.id == reference]
    for one in found:
        vm.destroy_reference(one)
    host.line(ledger, "gone", reference)
    return {"removed": bool(found)}


HANDLERS: dict[str, Callable[..., dict[str, Any]]] = {
    scripts.TAKE.name: _take,
    scripts.CHANGES.name: _changes,
    scripts.CONVERT.name: _convert,
    scripts.DISCARD.name: _discard,
    scripts.FORGET.name: _forget,
}
