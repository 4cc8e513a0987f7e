"""The WMI of a Hyper-V host that is none: checkpoints, reference points, changes, settings, pictures, and jobs.

Methods answer with a job, as they do when they take long, whose state is asked for until it has ended.
"""

from __future__ import annotations

import json
import struct
import uuid
from collections.abc import Callable
from typing import Any

from replica.hyperv.session import SessionError
from tests.support.fake_hyperv import GRAIN, FakeHost, FakeVm, HostFaultError, ReferencePoint, Snapshot
from tests.support.powershell import Cmdlet
from tests.support.powershell_values import PsObject, Table

RECOVERY_SNAPSHOT = 32768
RECOVERY = "Microsoft:Hyper-V:Snapshot:Recovery"


class Job:
    """A job, at work when it is first looked at."""

    def __init__(self, made: list[Any] | None = None, fault: HostFaultError | None = None) -> None:
        self.made = made or []
        self.jobstate = 4
        self.errorcode = 0 if fault is None else fault.code
        self.errordescription = "" if fault is None else fault.message
        self._end = 7 if fault is None else 10

    def looked_at(self) -> Job:
        self.jobstate, self._end = self._end, self._end
        return self


class Wmi:
    """What the CIM cmdlets do."""

    def __init__(self, host: FakeHost) -> None:
        self.host = host

    def table(self) -> dict[str, Cmdlet]:
        return {
            "Get-CimInstance": Cmdlet(self.instances, ("Namespace", "ClassName", "InputObject")),
            "Get-CimClass": Cmdlet(self.class_of, ("Namespace", "ClassName")),
            "New-CimInstance": Cmdlet(
                lambda run, cim_class, property, client_only: PsObject(values=property),  # noqa: A006
                ("CimClass", "Property"),
                ("ClientOnly",),
            ),
            "Get-CimAssociatedInstance": Cmdlet(self.associated, ("InputObject", "ResultClassName", "Association")),
            "Invoke-CimMethod": Cmdlet(self.call, ("InputObject", "MethodName", "Arguments")),
        }

    @staticmethod
    def types() -> dict[str, Any]:
        name = "microsoft.management.infrastructure.serialization"
        serializer = PsObject(Serialize=lambda one, how: json.dumps(one.values).encode("utf-16-le"))
        return {
            f"{name}.cimserializer": PsObject(Create=lambda: serializer),
            f"{name}.instanceserializationoptions": PsObject(None_=None),
            "text.encoding": PsObject(Unicode=PsObject(GetString=lambda data: data.decode("utf-16-le"))),
            "buffer": PsObject(BlockCopy=_block_copy),
        }

    def instances(self, run: Any, namespace: str = "", class_name: str = "", input_object: Any = None) -> list[Any]:
        if isinstance(input_object, Job):
            return [input_object.looked_at()]
        if class_name == "Msvm_ComputerSystem":
            return [PsObject(Name=one.guid.upper(), vm=one) for one in self.host.vms]
        return [PsObject(CreationClassName=class_name)]

    def class_of(self, run: Any, namespace: str, class_name: str) -> PsObject:
        assert class_name == "Msvm_VirtualSystemSnapshotSettingData"
        known = ["ConsistencyLevel", "IgnoreNonSnapshottableDisks"]
        if not self.host.is_2016:
            known.append("GuestBackupType")
        return PsObject(CimClassProperties=Table.fromkeys(known, PsObject()))

    def associated(self, run: Any, input_object: Any, result_class_name: str, association: str = "") -> list[PsObject]:
        if isinstance(input_object, Job):
            return [] if "silent jobs" in self.host.quirks else list(input_object.made)
        vm = input_object.vm
        if association == "Msvm_SnapshotOfVirtualSystem":
            return [_snapshot(vm, one) for one in vm.snapshots]
        if association == "Msvm_ReferencePointOfVirtualSystem":
            return [_reference(vm, one) for one in vm.references]
        assert (result_class_name, association) == ("Msvm_VirtualSystemSettingData", "Msvm_SettingsDefineState")
        return [PsObject(vm=vm, BIOSGUID="{" + vm.settings.get("bios", str(uuid.uuid4()).upper()) + "}")]

    def call(self, run: Any, input_object: PsObject, method_name: str, arguments: Table) -> PsObject:
        work: dict[str, Callable[..., PsObject]] = {
            "CreateSnapshot": self._create,
            "ConvertToReferencePoint": self._convert,
            "DestroySnapshot": self._destroy_snapshot,
            "DestroyReferencePoint": self._destroy_reference,
            "GetVirtualDiskChanges": self._changes,
            "GetVirtualSystemThumbnailImage": self._picture,
        }
        try:
            return work[method_name](**{name.lower(): value for name, value in arguments.items()})
        except HostFaultError as fault:
            return PsObject(ReturnValue=4096, Job=Job(fault=fault))

    def _create(self, affectedsystem: PsObject, snapshotsettings: str, snapshottype: int) -> PsObject:
        vm, wanted = affectedsystem.vm, json.loads(snapshotsettings)  # type: ignore[attr-defined]
        assert snapshottype == RECOVERY_SNAPSHOT and wanted["IgnoreNonSnapshottableDisks"] is True
        assert ("GuestBackupType" in wanted) is not self.host.is_2016
        vm.asked_levels.append(wanted["ConsistencyLevel"])
        made = vm.create_snapshot()
        self._dies("take")
        return PsObject(ReturnValue=4096, Job=Job([_snapshot(vm, made)]))

    def _convert(self, affectedsnapshot: PsObject) -> PsObject:
        vm, one = affectedsnapshot.vm, affectedsnapshot.one  # type: ignore[attr-defined]
        made = vm.convert(one)
        self._dies("convert")
        return PsObject(ReturnValue=4096, Job=Job([_reference(vm, made)]))

    def _destroy_snapshot(self, affectedsnapshot: PsObject) -> PsObject:
        affectedsnapshot.vm.destroy_snapshot(affectedsnapshot.one)  # type: ignore[attr-defined]
        return PsObject(ReturnValue=4096, Job=Job())

    def _destroy_reference(self, affectedreferencepoint: PsObject) -> PsObject:
        affectedreferencepoint.vm.destroy_reference(affectedreferencepoint.one)  # type: ignore[attr-defined]
        return PsObject(ReturnValue=0, Job=None)

    def _dies(self, where: str) -> None:
        if self.host.dies_in == where:
            self.host.dies_in = ""
            raise SessionError("the host is gone")

    def _changes(self, path: str, limitid: str, byteoffset: int, bytelength: int) -> PsObject:
        vm, disk = next((vm, disk) for vm in self.host.vms for disk in vm.disks if path in disk.files)
        if limitid not in disk.tracked:
            raise HostFaultError("Refused", 0xC03A002C - (1 << 32))
        assert bytelength < disk.size, "documented: it must be less than the disk's size"
        end = min(byteoffset + bytelength, byteoffset + self.host.most_processed)
        until = next((one.at for one in vm.snapshots if path in one.frozen), 1 << 62)
        starts, lengths = [], []
        for at, first, last in disk.log:
            if disk.tracked[limitid] <= at < until:
                low, high = max(first // GRAIN * GRAIN, byteoffset), min(-(-last // GRAIN) * GRAIN, end)
                if low < high:
                    starts.append(low)
                    lengths.append(high - low)
        return PsObject(
            ReturnValue=0,
            Job=None,
            ProcessedByteLength=end - byteoffset,
            ChangedByteOffsets=starts or None,
            ChangedByteLengths=lengths or None,
        )

    def _picture(self, targetsystem: PsObject, widthpixels: int, heightpixels: int) -> PsObject:
        if targetsystem.vm.state != "Running":  # type: ignore[attr-defined]
            return PsObject(ReturnValue=32775, ImageData=None)
        pixels = widthpixels * heightpixels
        return PsObject(ReturnValue=0, ImageData=list(b"\x00\xf8" + b"\xe0\x07" * (pixels - 1)))  # red, then green


def _snapshot(vm: FakeVm, one: Snapshot) -> PsObject:
    kind = RECOVERY if one.type == "Recovery" else "Microsoft:Hyper-V:Snapshot:Realized"
    return PsObject(vm=vm, one=one, InstanceID=one.id, VirtualSystemType=kind)


def _reference(vm: FakeVm, one: ReferencePoint) -> PsObject:
    return PsObject(
        vm=vm,
        one=one,
        InstanceID=one.id,
        ReferencePointType=one.type,
        VirtualDiskIdentifiers=list(one.disks),
        ResilientChangeTrackingIdentifiers=list(one.changes),
    )


def _block_copy(source: list[int], start: int, target: bytearray, at: int, length: int) -> None:
    packed = struct.pack(f"<{len(source)}Q", *source)
    target[at : at + length] = packed[start : start + length]
